package datapath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// udpIdle is how long a client may be silent and still get its answers
	// from the same source port of ours.
	udpIdle = 90 * time.Second
	// maxDatagram is the largest UDP payload.
	maxDatagram = 65535
	// maxSessions bounds what senders with invented addresses can make one
	// published port cost.
	maxSessions = 1024
)

// udpProxy passes datagrams on, through one connected socket per client.
type udpProxy struct {
	*proxy
	ctx  context.Context
	sock *net.UDPConn
	raw  syscall.RawConn
	to   netip.AddrPort
	to4  netip.AddrPort

	mu       sync.Mutex
	sessions map[udpClient]*net.UDPConn
	open     int            // files; see files.take
	wg       sync.WaitGroup // of the sessions
}

// udpClient is who sent a datagram, and to which of our addresses: the answer
// must come from there, which a socket on all addresses does not do by itself.
type udpClient struct {
	addr  netip.AddrPort
	local netip.Addr
}

func newUDPProxy(ctx context.Context, p *proxy, sock *net.UDPConn, to, to4 netip.AddrPort) (*udpProxy, error) {
	raw, err := sock.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("proxy UDP: %w", err)
	}
	var opt error
	err = raw.Control(func(fd uintptr) {
		if sock.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Is4() {
			opt = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		} else {
			opt = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		}
	})
	if err := errors.Join(err, opt); err != nil {
		return nil, fmt.Errorf("proxy UDP: ask for destination addresses: %w", err)
	}
	return &udpProxy{proxy: p, ctx: ctx, sock: sock, raw: raw, to: to, to4: to4}, nil
}

// ready passes on a few of the datagrams that wait, so that other ports have
// their turn.
func (u *udpProxy) ready() {
	for range 32 {
		if !readable(u.raw) {
			return
		}
		u.one()
	}
}

// end ends all sessions.
func (u *udpProxy) end() {
	u.mu.Lock()
	for _, s := range u.sessions {
		_ = s.Close()
	}
	u.mu.Unlock()
	u.wg.Wait()
}

// one receives one datagram and passes it on.
func (u *udpProxy) one() {
	buf := u.buffers.Get().(*[maxDatagram]byte)
	defer u.buffers.Put(buf)
	var oob [64]byte
	n, oobn, _, from, err := u.sock.ReadMsgUDPAddrPort(buf[:], oob[:])
	if err != nil {
		return // closed
	}
	client := udpClient{from, localAddr(oob[:oobn])}
	if !client.local.IsValid() {
		return // for everybody: the kernel would not translate it either
	}
	server, err := u.session(client)
	if err != nil {
		u.seldom.warn(u.log.WithError(err).WithField("container", u.to.String()), "published UDP port: datagram dropped")
		return
	}
	_ = server.SetReadDeadline(time.Now().Add(u.idle))
	_, _ = server.Write(buf[:n]) // UDP promises nothing
}

// session finds or opens the socket for a client.
func (u *udpProxy) session(client udpClient) (*net.UDPConn, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if s := u.sessions[client]; s != nil {
		return s, nil
	}
	if len(u.sessions) >= maxSessions || !u.files.take(1, &u.open) {
		return nil, fmt.Errorf("%d clients at once", len(u.sessions))
	}
	to := u.to
	if client.local.Unmap().Is4() {
		to = u.to4
	}
	c, err := u.dial(u.ctx, "udp", to.String())
	server, ok := c.(*net.UDPConn)
	if err == nil && !ok {
		err = errors.Join(fmt.Errorf("dial %s: got a %T", u.to, c), c.Close())
	}
	if err != nil {
		u.files.give(1, &u.open)
		return nil, err
	}
	if u.sessions == nil {
		u.sessions = make(map[udpClient]*net.UDPConn)
	}
	u.sessions[client] = server
	u.wg.Go(func() { u.answers(client, server) })
	return server, nil
}

// answers passes the container's datagrams back until the session is idle.
func (u *udpProxy) answers(client udpClient, server *net.UDPConn) {
	defer func() {
		u.mu.Lock()
		delete(u.sessions, client)
		u.mu.Unlock()
		_ = server.Close()
		u.files.give(1, &u.open)
	}()
	raw, err := server.SyscallConn()
	if err != nil {
		return
	}
	oob := sourceAddr(client.local)
	for {
		_ = server.SetReadDeadline(time.Now().Add(u.idle))
		if err := waitReadable(raw); err != nil {
			return // idle or closed
		}
		buf := u.buffers.Get().(*[maxDatagram]byte)
		if n, err := server.Read(buf[:]); err == nil {
			_, _, _ = u.sock.WriteMsgUDPAddrPort(buf[:n], oob, client.addr)
		} // else the container's port is closed (ICMP); it may open again
		u.buffers.Put(buf)
	}
}

// waitReadable returns when a datagram or an error can be read, so that a
// buffer is needed only then: a thousand idle ports have none.
func waitReadable(c syscall.RawConn) error {
	return c.Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), nil, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	})
}

// readable reports whether there is a datagram. An error that the socket has, an
// ICMP one about an answer, is taken away by the question.
func readable(c syscall.RawConn) (yes bool) {
	_ = c.Control(func(fd uintptr) {
		for range 2 {
			_, _, err := unix.Recvfrom(int(fd), nil, unix.MSG_PEEK|unix.MSG_DONTWAIT)
			if yes = err == nil; yes {
				return
			}
		}
	})
	return yes
}

// localAddr reads from control messages which of our addresses was meant: none
// where the datagram is for everybody (broadcast, multicast).
func localAddr(oob []byte) netip.Addr {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.Addr{}
	}
	for _, m := range msgs {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			// ipi_spec_dst is an address of ours even where ipi_addr, which the
			// header has, is everybody's.
			if local := [4]byte(m.Data[4:8]); local == [4]byte(m.Data[8:12]) {
				return netip.AddrFrom4(local)
			}
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			if a := netip.AddrFrom16([16]byte(m.Data[0:16])); !a.IsMulticast() {
				return a
			}
		}
	}
	return netip.Addr{}
}

// sourceAddr is the control message that makes an answer come from a. The
// interface is left open: the way back need not be the way here.
func sourceAddr(a netip.Addr) []byte {
	switch {
	case a.Is4():
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: a.As4()})
	case a.Is6():
		return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: a.As16()})
	}
	return nil
}
