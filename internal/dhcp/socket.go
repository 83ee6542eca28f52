package dhcp

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// errTime is a receive whose time is over.
var errTime = os.ErrDeadlineExceeded

// Longer answers are cut off, and so malformed.
const longest = 4096

// socket is a packet socket for one exchange. It hears nothing but answers with
// its own transaction ID, so that hundreds at a time cost no copies.
type socket struct {
	file *os.File // non-blocking: no thread waits
	conn syscall.RawConn
	to   *unix.SockaddrLinklayer
	from netip.Addr // source of what is sent: :: or 0.0.0.0 or a link-local one
	buf  [longest]byte
}

// dial looks a link up, by name each time because a card may be pulled and
// plugged in again, and opens a socket on it.
func dial(link string, s Station, six bool) (_ dialect, _ *socket, err error) {
	// Without a protocol it hears nothing until it is bound. The kernel makes and
	// removes the Ethernet header, with the link's own address as the source.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open packet socket: %w", err)
	}
	c := &socket{file: os.NewFile(uintptr(fd), "dhcp"), from: netip.IPv4Unspecified()}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if c.conn, err = c.file.SyscallConn(); err != nil {
		return nil, nil, fmt.Errorf("open packet socket: %w", err)
	}
	index, err := usable(fd, link)
	if err != nil {
		return nil, nil, err
	}
	var xid [4]byte
	_, _ = rand.Read(xid[:]) // never fails
	var words dialect = &v4{station: s, xid: xid}
	filter := filter4(xid)
	c.to = &unix.SockaddrLinklayer{Ifindex: index, Protocol: networkOrder(unix.ETH_P_IP), Halen: 6,
		Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	if six {
		if c.from, err = linkLocal(index); err != nil {
			return nil, nil, err
		}
		words, filter = &v6{station: s, xid: [3]byte(xid[1:])}, filter6(xid)
		c.to.Protocol, c.to.Addr = networkOrder(unix.ETH_P_IPV6), [8]byte{0x33, 0x33, 0, 1, 0, 2} // ff02::1:2
	} else if err := hearMAC(fd, index, s.MAC); err != nil {
		return nil, nil, err
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
		return nil, nil, fmt.Errorf("filter packet socket: %w", err)
	}
	// Of all protocols, not of one: what a bridge or a macvlan on the link takes
	// for itself is seen only by sockets of all protocols, which come before.
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: index, Protocol: networkOrder(unix.ETH_P_ALL)}); err != nil {
		return nil, nil, fmt.Errorf("bind packet socket: %w", err)
	}
	return words, c, nil
}

// usable is the index of a link that leads somewhere.
func usable(fd int, link string) (int, error) {
	req, err := unix.NewIfreq(link)
	if err != nil {
		return 0, fmt.Errorf("%q is not the name of a link", link)
	}
	var flags, hardware uint16
	if err = unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err == nil {
		flags = req.Uint16()
		err = unix.IoctlIfreq(fd, unix.SIOCGIFHWADDR, req)
		hardware = req.Uint16()
	}
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req)
	}
	switch {
	case errors.Is(err, unix.ENODEV):
		return 0, errors.New("there is no such link: check the name")
	case err != nil:
		return 0, fmt.Errorf("look up link: %w", err)
	case flags&unix.IFF_LOOPBACK != 0 || hardware != unix.ARPHRD_ETHER:
		return 0, errors.New("the link is not an Ethernet one: name the one to the LAN")
	case flags&unix.IFF_UP == 0:
		return 0, notYet("the link is down: set it up")
	case flags&unix.IFF_RUNNING == 0:
		return 0, notYet("the link has no carrier: check the cable, or a bridge's ports")
	}
	return int(req.Uint32()), nil
}

// notYet is an error that may pass.
type notYet string

func (e notYet) Error() string        { return string(e) }
func (e notYet) Is(target error) bool { return target == errNotYet }

// hearMAC has the card let in what servers that know no broadcast flag send to
// the station itself.
func hearMAC(fd, index int, mac [6]byte) error {
	m := unix.PacketMreq{Ifindex: int32(index), Type: unix.PACKET_MR_UNICAST, Alen: uint16(len(mac))}
	copy(m.Address[:], mac[:])
	if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &m); err != nil {
		return fmt.Errorf("hear %x: %w", mac, err)
	}
	return nil
}

// linkLocal is the address that DHCPv6 messages are from (RFC 8415, 13.1).
func linkLocal(index int) (netip.Addr, error) {
	list, err := (&net.Interface{Index: index}).Addrs()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list addresses: %w", err)
	}
	for _, x := range list {
		n, ok := x.(*net.IPNet)
		if !ok {
			continue
		}
		if a, ok := netip.AddrFromSlice(n.IP); ok && a.Is6() && !a.Is4In6() && a.IsLinkLocalUnicast() {
			return a, nil
		}
	}
	return netip.Addr{}, notYet("the link has no IPv6 link-local address: DHCPv6 needs one, check that IPv6 is on there")
}

// until sets the end of what is received from now on. An error is that of a
// context that ended: only now, because the end just set may have undone wake.
func (c *socket) until(ctx context.Context, t time.Time) error {
	if err := c.file.SetReadDeadline(t); err != nil {
		return err
	}
	return ctx.Err()
}

// wake ends a receive.
func (c *socket) wake() { _ = c.file.SetReadDeadline(time.Unix(1, 0)) }

// send sends a message to all servers. One that a full queue drops is lost like
// one on the wire.
func (c *socket) send(message []byte) error {
	b := datagram(c.from, message)
	var err error
	if e := c.conn.Control(func(fd uintptr) { err = unix.Sendto(int(fd), b, 0, c.to) }); e != nil {
		return e
	}
	switch {
	case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EAGAIN):
		return nil
	case err != nil:
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

// receive waits for the next answer; it is valid until the one after.
func (c *socket) receive() ([]byte, error) {
	for {
		n, err := c.file.Read(c.buf[:])
		if err != nil {
			return nil, fmt.Errorf("receive: %w", err)
		}
		if b, ok := payload(c.buf[:n]); ok {
			return b, nil
		}
	}
}

func (c *socket) close() { _ = c.file.Close() }

// networkOrder is a protocol as addresses of packet sockets have it.
func networkOrder(proto int) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, uint16(proto)))
}
