package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
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
}

func newProxy(log logrus.FieldLogger) *proxy {
	return &proxy{
		log:     log,
		dial:    (&net.Dialer{Timeout: dialTimeout}).DialContext,
		idle:    udpIdle,
		buffers: sync.Pool{New: func() any { return new([maxDatagram]byte) }},
	}
}

// start serves sock until the returned stop, which is called after sock was
// closed and returns when everything has ended. It is nil where there is
// nothing to serve.
func (p *proxy) start(ctx context.Context, sock io.Closer, to netip.AddrPort) (stop func(), err error) {
	// The proxy outlives the request that asked for it.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	switch sock := sock.(type) {
	case *net.TCPListener:
		wg.Go(func() { p.serveTCP(ctx, sock, to) })
	case *net.UDPConn:
		u, err := newUDPProxy(p, sock, to)
		if err != nil {
			cancel()
			return nil, err
		}
		wg.Go(func() { u.serve(ctx) })
	default:
		cancel()
		return nil, nil
	}
	return func() {
		cancel()
		wg.Wait()
	}, nil
}

// serveTCP accepts connections until the listener is closed.
func (p *proxy) serveTCP(ctx context.Context, l *net.TCPListener, to netip.AddrPort) {
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		client, err := l.AcceptTCP()
		if err == nil {
			conns.Go(func() { p.passTCP(ctx, client, to) })
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		p.log.WithError(err).WithField("listener", l.Addr().String()).Warn("accept for a published port")
		select {
		case <-ctx.Done():
			return
		case <-time.After(acceptPause):
		}
	}
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
