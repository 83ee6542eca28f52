package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A container's start waits for a probe. Who is there answers within a
// millisecond or so; the standards wait for seconds because of links that come
// up slowly. More than one, because a frame may be lost.
const (
	probeTimes    = 3
	probeInterval = 100 * time.Millisecond
)

// Probe asks on a link, the parent of macvlan or ipvlan networks or a bridge,
// whether somebody on that LAN, or this host on whichever link, has an address
// or is asking for it in order to take it. A free one takes some 300 ms, and so
// does one whose holder is silent.
//
// It does not see containers below the same parent on this host: what a parent
// sends never reaches the links above it. A link that is down, has no carrier
// or no use for ARP leads to nobody.
func (k *Kernel) Probe(ctx context.Context, link string, a netip.Addr) (holder MAC, taken bool, err error) {
	a = a.Unmap().WithZone("")
	holder, taken, err = k.probe(ctx, link, a)
	if errors.Is(err, ErrAbsent) {
		err = fmt.Errorf("the link %w", err)
	}
	if err != nil {
		return MAC{}, false, fmt.Errorf("probe %s on %s: %w", a, link, err)
	}
	return holder, taken, nil
}

func (k *Kernel) probe(ctx context.Context, link string, a netip.Addr) (MAC, bool, error) {
	if !a.IsValid() {
		return MAC{}, false, errors.New("not an address")
	}
	index, err := k.links.index(link)
	if err != nil {
		return MAC{}, false, err
	}
	// The host does not hear its own question.
	if mac, have, err := k.links.holder(ctx, a); have || err != nil {
		return mac, have, err
	}
	if yes, err := k.links.connected(link); !yes || err != nil {
		return MAC{}, false, err
	}
	q, err := newAsker(index, a)
	if err != nil {
		return MAC{}, false, err
	}
	defer func() { _ = q.file.Close() }()
	mac, taken, err := q.ask(ctx)
	if errors.Is(err, unix.ENETDOWN) { // just now
		return MAC{}, false, nil
	}
	return mac, taken, err
}

// holder looks for an address among the host's own; the kernel's link-local
// ones count too, unlike in addressesOf.
func (l *links) holder(ctx context.Context, a netip.Addr) (MAC, bool, error) {
	list, err := dump(ctx, func() ([]netlink.Addr, error) { return l.lib.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return MAC{}, false, fmt.Errorf("list addresses: %w", err)
	}
	for _, x := range list {
		if p, ok := prefixOf(x.IPNet); !ok || p.Addr() != a {
			continue
		}
		all, err := l.list(ctx)
		if err != nil {
			return MAC{}, false, fmt.Errorf("list links: %w", err)
		}
		for _, y := range all {
			if y.index == x.LinkIndex {
				return y.mac, true, nil
			}
		}
		return MAC{}, true, nil // the link is going, and this is its address's last moment
	}
	return MAC{}, false, nil
}

// connected reports whether a link is Ethernet, with ARP, and leads somewhere.
func (l *links) connected(name string) (bool, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return false, fmt.Errorf("link name: %w", err)
	}
	var flags, hardware uint16
	if err = unix.IoctlIfreq(l.ioctl, unix.SIOCGIFFLAGS, req); err == nil {
		flags = req.Uint16()
		err = unix.IoctlIfreq(l.ioctl, unix.SIOCGIFHWADDR, req)
		hardware = req.Uint16()
	}
	if errors.Is(err, unix.ENODEV) {
		return false, ErrAbsent
	}
	if err != nil {
		return false, fmt.Errorf("look up link: %w", err)
	}
	const want = unix.IFF_UP | unix.IFF_RUNNING // the kernel drops what is sent before RUNNING
	return flags&(want|unix.IFF_NOARP|unix.IFF_LOOPBACK) == want && hardware == unix.ARPHRD_ETHER, nil
}

// asker is one probe: the question, and a socket for it alone.
type asker struct {
	addr     netip.Addr
	own      MAC // of the link
	question []byte
	to       *unix.SockaddrLinklayer
	file     *os.File // non-blocking: no thread waits
	conn     syscall.RawConn
}

// newAsker opens the socket, in the calling thread's network namespace.
func newAsker(index int, a netip.Addr) (_ *asker, err error) {
	// Without a protocol it hears nothing until it is bound: neither other
	// links nor what the filter holds back. The kernel makes and removes the
	// Ethernet header.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	q := &asker{addr: a, file: os.NewFile(uintptr(fd), "probe")}
	defer func() {
		if err != nil {
			_ = q.file.Close()
		}
	}()
	if q.conn, err = q.file.SyscallConn(); err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	proto, dst := unix.ETH_P_ARP, MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	if a.Is6() {
		b := a.As16()
		proto, dst = unix.ETH_P_IPV6, MAC{0x33, 0x33, 0xff, b[13], b[14], b[15]}
		if err := hearNeighbours(fd, index, dst); err != nil {
			return nil, err
		}
	}
	q.to = &unix.SockaddrLinklayer{Ifindex: index, Protocol: networkOrder(proto), Halen: uint8(len(dst))}
	if err := unix.Bind(fd, q.to); err != nil {
		return nil, fmt.Errorf("bind packet socket: %w", err)
	}
	copy(q.to.Addr[:], dst[:])
	name, err := unix.Getsockname(fd)
	if err != nil {
		return nil, fmt.Errorf("read hardware address: %w", err)
	}
	if q.own = sourceOf(name); a.Is4() {
		q.question = arpProbe(q.own, a)
	} else {
		q.question = solicitation(a)
	}
	return q, nil
}

// hearNeighbours keeps all but neighbour discovery from the socket, and lets
// in by the card's filter the groups of answers and of others' questions.
func hearNeighbours(fd, index int, solicited MAC) error {
	const (
		load  = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
	)
	filter := []unix.SockFilter{
		{Code: load, K: 6}, // next header
		{Code: equal, K: unix.IPPROTO_ICMPV6, Jf: 4},
		{Code: load, K: 40}, // ICMPv6 type
		{Code: equal, K: typeSolicit, Jt: 1},
		{Code: equal, K: typeAdvert, Jf: 1},
		{Code: ret, K: neighbourLen},
		{Code: ret, K: 0},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
		return fmt.Errorf("filter packet socket: %w", err)
	}
	allNodes := MAC{0x33, 0x33, 0, 0, 0, 1} // ff02::1
	for _, group := range []MAC{allNodes, solicited} {
		m := unix.PacketMreq{Ifindex: int32(index), Type: unix.PACKET_MR_MULTICAST, Alen: uint16(len(group))}
		copy(m.Address[:], group[:])
		if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &m); err != nil {
			return fmt.Errorf("join %s: %w", group, err)
		}
	}
	return nil
}

// ask sends the question until there is an answer, or no more time.
func (q *asker) ask(ctx context.Context) (MAC, bool, error) {
	stop := context.AfterFunc(ctx, func() { _ = q.file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for range probeTimes {
		// From now, not from the beginning: on a busy host too every question
		// has its time.
		if err := q.file.SetReadDeadline(time.Now().Add(probeInterval)); err != nil {
			return MAC{}, false, fmt.Errorf("set deadline: %w", err)
		}
		if err := ctx.Err(); err != nil { // only now: the deadline just set may have undone that of a context that ended
			return MAC{}, false, err
		}
		if err := q.send(); err != nil {
			return MAC{}, false, fmt.Errorf("send: %w", err)
		}
		holder, err := q.listen()
		if err == nil {
			return holder, true, nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return MAC{}, false, fmt.Errorf("receive: %w", err)
		}
	}
	return MAC{}, false, ctx.Err()
}

// send sends the question. One that a full queue or the other end of a veth
// drops is lost like one on the wire.
func (q *asker) send() error {
	var err error
	if e := q.conn.Control(func(fd uintptr) { err = unix.Sendto(int(fd), q.question, 0, q.to) }); e != nil {
		return e
	}
	if errors.Is(err, unix.ENOBUFS) {
		return nil
	}
	return err
}

// listen reads up to an answer; there is no other end than that and the
// deadline.
func (q *asker) listen() (MAC, error) {
	var b [neighbourLen]byte
	for {
		var n int
		var name unix.Sockaddr
		var err error
		if e := q.conn.Read(func(fd uintptr) bool {
			n, name, err = unix.Recvfrom(int(fd), b[:], 0)
			return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
		}); e != nil {
			return MAC{}, e
		}
		if err != nil {
			return MAC{}, err
		}
		// The rest is for others, or of a VLAN that is not this link's.
		ll, ok := name.(*unix.SockaddrLinklayer)
		if !ok || ll.Pkttype > unix.PACKET_MULTICAST {
			continue
		}
		if holder, ok := q.answer(b[:n], sourceOf(name)); ok {
			return holder, nil
		}
	}
}
