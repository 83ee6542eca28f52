package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

const (
	// dialTimeout bounds the connection to the container.
	dialTimeout = 10 * time.Second
	// acceptPause is the wait after an accept that failed although the
	// socket is open: we are out of file descriptors or memory.
	acceptPause = 100 * time.Millisecond
)

// proxy passes on what arrives at a held socket itself, because the kernel
// cannot translate it: from [::1] (replies to a translated connection from
// there are lost), and from IPv6 to a container that has only IPv4. Everything
// else is translated before it gets here and never seen.
type proxy struct {
	log     logrus.FieldLogger
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)
	idle    time.Duration // life of a UDP session without traffic
	buffers sync.Pool     // of *[maxDatagram]byte; filled only where something arrived
	files   *files
	watcher watcher
	seldom  seldom // what strangers can make us say
}

func newProxy(log logrus.FieldLogger, f *files) *proxy {
	return &proxy{
		log:     log,
		dial:    (&net.Dialer{Timeout: dialTimeout}).DialContext,
		idle:    udpIdle,
		buffers: sync.Pool{New: func() any { return new([maxDatagram]byte) }},
		files:   f,
	}
}

// service is a proxy at work for one socket.
type service struct {
	quiet func() // takes nothing new from now on; before the socket is closed
	end   func() // ends what is under way and waits for it; after
}

// start serves sock. It returns nil where there is nothing to serve. ctx is not a
// call's: the service outlives that. What comes by IPv4 to a socket for both
// families goes to to4.
func (p *proxy) start(ctx context.Context, sock io.Closer, to, to4 netip.AddrPort) (*service, error) {
	var raw syscall.RawConn
	var ready func() time.Duration
	s := &service{}
	var err error
	switch sock := sock.(type) {
	case *net.TCPListener:
		if raw, err = sock.SyscallConn(); err != nil {
			return nil, fmt.Errorf("proxy TCP: %w", err)
		}
		t := &tcpProxy{proxy: p, raw: raw, to: to, to4: to4}
		t.ctx, t.cancel = context.WithCancel(ctx)
		ready, s.end = t.ready, t.end
	case *net.UDPConn:
		u, err := newUDPProxy(ctx, p, sock, to, to4)
		if err != nil {
			return nil, err
		}
		raw, s.end = u.raw, u.end
		ready = func() time.Duration {
			u.ready()
			return 0
		}
	default:
		return nil, nil
	}
	if s.quiet, err = p.watcher.add(raw, ready); err != nil {
		s.end()
		return nil, err
	}
	return s, nil
}

// seldom says how often something happened, at most once a minute.
type seldom struct {
	mu   sync.Mutex
	last time.Time
	n    int // since last
}

func (s *seldom) warn(log logrus.FieldLogger, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	if now := time.Now(); now.Sub(s.last) >= time.Minute {
		log.WithField("times", s.n).Warn(text)
		s.last, s.n = now, 0
	}
}

// tcpProxy passes connections on.
type tcpProxy struct {
	*proxy
	raw    syscall.RawConn // of the listening socket
	to     netip.AddrPort
	to4    netip.AddrPort
	ctx    context.Context // of all connections
	cancel context.CancelFunc
	conns  sync.WaitGroup
	open   int // files; see files.take
}

func (t *tcpProxy) end() {
	t.cancel()
	t.conns.Wait()
}

// ready accepts a few of the connections that wait, so that other ports have
// their turn.
func (t *tcpProxy) ready() (pause time.Duration) {
	for range 16 {
		client, err := t.accept()
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			t.seldom.warn(t.log.WithError(err).WithField("container", t.to.String()), "accept for a published port")
			return acceptPause
		}
		if err != nil {
			return 0
		}
		if !t.files.take(tcpFiles, &t.open) {
			t.seldom.warn(t.log.WithField("container", t.to.String()), "published port: too many connections at once, refused")
			reset(client)
			continue
		}
		t.conns.Go(func() {
			defer t.files.give(tcpFiles, &t.open)
			to := t.to
			if client.LocalAddr().(*net.TCPAddr).IP.To4() != nil {
				to = t.to4
			}
			t.passTCP(t.ctx, client, to)
		})
	}
	return 0
}

func (t *tcpProxy) accept() (client *net.TCPConn, err error) {
	fd := -1
	cerr := t.raw.Control(func(l uintptr) {
		fd, _, err = unix.Accept4(int(l), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	})
	if cerr != nil || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.EINTR) {
		return nil, unix.EAGAIN
	}
	if err != nil {
		return nil, os.NewSyscallError("accept4", err)
	}
	f := os.NewFile(uintptr(fd), "tcp")
	defer func() { _ = f.Close() }() // c has a copy
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	client, ok := c.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("accepted a %T", c), c.Close())
	}
	return client, nil
}

// passTCP connects a client to the container and copies both ways until both
// directions have ended.
func (p *proxy) passTCP(ctx context.Context, client *net.TCPConn, to netip.AddrPort) {
	server, err := p.dialTCP(ctx, to)
	if err != nil {
		p.log.WithError(err).WithField("container", to.String()).Debug("published port: container does not answer")
		reset(client) // what a closed port would have said
		return
	}
	abort := func() {
		reset(client)
		reset(server)
	}
	stop := context.AfterFunc(ctx, abort)
	var wg sync.WaitGroup
	wg.Go(func() { copyHalf(server, client, abort) })
	copyHalf(client, server, abort)
	wg.Wait()
	stop()
	_ = client.Close()
	_ = server.Close()
}

func (p *proxy) dialTCP(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	c, err := p.dial(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	t, ok := c.(*net.TCPConn)
	if !ok {
		_ = c.Close()
		return nil, fmt.Errorf("dial %s: got a %T", to, c)
	}
	return t, nil
}

// copyHalf copies one direction. Its end is passed on as an end, so that
// protocols which close one half and read the answer work; an error is passed
// on as a reset of both sides, so that neither takes a torn stream for whole.
func copyHalf(dst, src *net.TCPConn, abort func()) {
	_, err := io.Copy(dst, src) // splice(2): the bytes do not come through here
	if err == nil {
		err = dst.CloseWrite()
	}
	if err != nil {
		abort()
	}
}

// reset closes a connection with RST. On one that is closed it does nothing.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}
