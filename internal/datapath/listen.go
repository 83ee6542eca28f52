package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// other is the same port on all addresses of the other family; ok is false unless
// this is one of all addresses.
func (p hostPort) other() (o hostPort, ok bool) {
	a := netip.IPv6Unspecified()
	if p.addr.Addr() == a {
		a = netip.IPv4Unspecified()
	}
	return hostPort{p.proto, netip.AddrPortFrom(a, p.addr.Port())}, p.addr.Addr().IsUnspecified()
}

// dualLocked holds a port on all addresses of both families with one socket, which
// halves the file descriptors of a range. nil means that it takes one for each.
// The other family's port is reserved with it.
func (s *sockets) dualLocked(ctx context.Context, p hostPort) *held {
	o, ok := p.other()
	if !ok || s.held[o] != nil {
		return nil
	}
	sock, err := listenDual(ctx, p.proto, p.addr.Port())
	if err != nil {
		return nil // one for each says what is wrong
	}
	v6, v4 := &held{sock: sock}, &held{}
	v6.twin, v4.twin = v4, v6
	s.files.hold(1)
	if p.addr.Addr().Is4() {
		s.held[p], s.held[o] = v4, v6
	} else {
		s.held[p], s.held[o] = v6, v4
	}
	return s.held[p]
}

// partLocked lets go of one family of a port that one socket holds for both. If
// the other is in use, it gets a socket of its own; if it was reserved with this
// one, it goes too. h is out of the table already, and counted as gone.
func (s *sockets) partLocked(ctx context.Context, p hostPort, h *held) error {
	o, _ := p.other()
	rest := h.twin
	rest.twin = nil
	if !rest.to.IsValid() {
		delete(s.held, o)
		return errors.Join(h.close(), rest.close())
	}
	s.files.hold(1) // rest's
	if rest.sock != nil {
		rest.dual = true // it goes on with the socket; see narrowLocked
		return nil
	}
	err := h.close()
	s.reopenLocked(ctx, o, rest)
	return err
}

// narrowLocked lets go of p, IPv4, where a socket for both families holds it that is
// in use for IPv6 alone, and reports whether it did. Nobody waits for that when the
// last of a range goes, family by family.
func (s *sockets) narrowLocked(ctx context.Context, p hostPort) bool {
	o := hostPort{p.proto, netip.AddrPortFrom(netip.IPv6Unspecified(), p.addr.Port())}
	h := s.held[o]
	if h == nil || !h.dual || !p.addr.Addr().Is4() {
		return false
	}
	if err := h.close(); err != nil {
		s.log.WithError(err).WithField("port", o.String()).Warn("a published port is held anew")
	}
	h.sock, h.service, h.dual = nil, nil, false
	s.reopenLocked(ctx, o, h)
	return true
}

// reopenLocked has h go on with a socket of its own.
func (s *sockets) reopenLocked(ctx context.Context, p hostPort, h *held) {
	ctx = context.WithoutCancel(ctx)
	sock, err := listen(ctx, p)
	if err == nil {
		h.sock = sock
		h.service, err = s.proxy.start(ctx, sock, h.to, h.to)
	}
	if err != nil {
		s.log.WithError(err).WithField("port", p.String()).Warn("a published port is not held any more")
	}
}

// listenDual opens a socket for both families.
func listenDual(ctx context.Context, proto Proto, port uint16) (io.Closer, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // the proxy could not splice
	at := netip.AddrPortFrom(netip.IPv6Unspecified(), port).String()
	switch proto {
	case TCP:
		l, err := lc.Listen(ctx, "tcp", at)
		if err != nil {
			return nil, err
		}
		return l, nil
	case UDP:
		c, err := lc.ListenPacket(ctx, "udp", at)
		if err != nil {
			return nil, err
		}
		return c.(*net.UDPConn), nil
	default:
		return nil, unix.EPROTONOSUPPORT
	}
}

// listen opens the socket. IPv6 sockets carry IPv6 only, so that both families
// can hold the same number.
func listen(ctx context.Context, p hostPort) (io.Closer, error) {
	family := "6"
	if p.addr.Addr().Is4() {
		family = "4"
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // the proxy could not splice
	switch p.proto {
	case TCP:
		l, err := lc.Listen(ctx, "tcp"+family, p.addr.String())
		if err != nil {
			return nil, err
		}
		return l, nil
	case UDP:
		c, err := lc.ListenPacket(ctx, "udp"+family, p.addr.String())
		if err != nil {
			return nil, err
		}
		return c.(*net.UDPConn), nil
	default:
		return bindSCTP(p.addr)
	}
}

// bindSCTP binds without listening: that is enough to keep others away, and
// there is no proxy that could serve an association.
func bindSCTP(a netip.AddrPort) (io.Closer, error) {
	family, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()})
	if a.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "sctp")
	if family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		err = unix.Bind(fd, sa)
	}
	if err != nil {
		return nil, errors.Join(os.NewSyscallError("bind", err), f.Close())
	}
	return f, nil
}

// boundPort reads the number that the kernel chose.
func boundPort(f *os.File) (uint16, error) {
	sa, err := unix.Getsockname(int(f.Fd()))
	if err != nil {
		return 0, fmt.Errorf("read chosen port: %w", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port), nil
	case *unix.SockaddrInet6:
		return uint16(sa.Port), nil
	}
	return 0, fmt.Errorf("read chosen port: address %T", sa)
}
