package datapath

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// answerTimeout bounds the wait for one answer of the kernel. Deletes wait for
// an RCU grace period (some 17 ms) and for each other; nothing waits for
// seconds unless the kernel is in trouble.
const answerTimeout = 10 * time.Second

// skipStatistics is RTEXT_FILTER_SKIP_STATS; counters are most of a link's
// description and nobody here reads them.
const skipStatistics = 1 << 3

// rtnl is one NETLINK_ROUTE socket for link messages built by hand. The
// library needs three round trips for what the kernel does in one, and its
// lookups parse far more than is asked. A socket serves one request at a time.
type rtnl struct {
	sockets map[int]*nl.SocketHandle
	group   uint32 // of what is ours
}

// newRTNL opens the socket in the calling thread's network namespace, which it
// stays in.
func newRTNL(group uint32) (*rtnl, error) {
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	// Extended acknowledgements put the kernel's own words into the error;
	// a kernel that has none is no reason to stop.
	_ = s.SetExtAck(true)
	tv := unix.NsecToTimeval(answerTimeout.Nanoseconds())
	if err := errors.Join(s.SetReceiveTimeout(&tv), s.SetSendTimeout(&tv)); err != nil {
		s.Close()
		return nil, fmt.Errorf("set netlink timeout: %w", err)
	}
	return &rtnl{group: group, sockets: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}}, nil
}

func (c *rtnl) close() {
	for _, s := range c.sockets {
		s.Close()
	}
}

// link is what we want to know about a network interface.
type link struct {
	index, master int
	peer          int  // index of a veth's other end, or of the link below, in its own namespace
	away          bool // that namespace is another one
	name, kind    string
	group         uint32
	mine          bool // the group is ours
	mtu           int
	mac           MAC
	up            bool
	isolated      bool // as a bridge port
	hairpin       bool // as a bridge port
	learning      bool // as a bridge port
	suppress      bool // as a bridge port: neighbour requests do not leave by it where they can be answered
	noARP         bool
	noSnooping    bool   // as a bridge
	tunnel        tunnel // of a VXLAN device
	// What the kinds vlan, macvlan and ipvlan have of their own, in the
	// kernel's numbers: a VLAN ID; a mode; flags of ipvlan.
	vlan, mode, flags int
}

func (l link) ours() bool { return l.mine }

// request starts a message about the link with that index, or none (0).
func (c *rtnl) request(kind, flags int, info nl.IfInfomsg) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Sockets = c.sockets
	req.AddData(&info)
	return req
}

func linkInfo(index int, up bool) nl.IfInfomsg {
	m := nl.NewIfInfomsg(unix.AF_UNSPEC)
	m.Index = int32(index)
	if up {
		m.Flags, m.Change = unix.IFF_UP, unix.IFF_UP
	}
	return *m
}

// ErrAbsent is wrapped where a link does not exist.
var ErrAbsent = errors.New("does not exist")

// get finds a link by its name.
func (c *rtnl) get(name string) (link, error) {
	req := c.request(unix.RTM_GETLINK, 0, linkInfo(0, false))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStatistics)))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if errors.Is(err, unix.ENODEV) {
		return link{}, ErrAbsent
	}
	if err != nil {
		return link{}, fmt.Errorf("look up link %s: %w", name, err)
	}
	if len(msgs) != 1 {
		return link{}, fmt.Errorf("look up link %s: %d answers", name, len(msgs))
	}
	return c.parse(msgs[0])
}

// list returns all links of the namespace.
func (c *rtnl) list(ctx context.Context) ([]link, error) {
	return dump(ctx, func() ([]link, error) { return c.listOnce() })
}

func (c *rtnl) listOnce() ([]link, error) {
	req := c.request(unix.RTM_GETLINK, unix.NLM_F_DUMP, linkInfo(0, false))
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStatistics)))
	// Read first, then parsed: what delays the next read makes room for a
	// change that interrupts the dump.
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return nil, err
	}
	links := make([]link, 0, len(msgs))
	for _, msg := range msgs {
		l, err := c.parse(msg)
		if err != nil {
			return nil, err
		}
		links = append(links, l)
	}
	return links, nil
}

// dumpTries bounds the repetitions of a dump. Measured while links were added
// and removed all the time, one dump of 1000 links in five was interrupted.
const dumpTries = 200

// dump runs list again while the kernel says that the table changed under it.
// It is the only place where dumps are made: the result of an interrupted one
// looks complete and is not.
func dump[T any](ctx context.Context, list func() (T, error)) (T, error) {
	var zero T
	for try := 1; ; try++ {
		if err := ctx.Err(); err != nil {
			return zero, err
		}
		got, err := list()
		if err == nil {
			return got, nil
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == dumpTries {
			return zero, err
		}
	}
}

// create makes a link of ours in one message; data is what its kind needs to know: the
// other end of a veth pair, the mode of a sub-interface, the VNI of a tunnel.
func (c *rtnl) create(l link, data ...*nl.RtAttr) error {
	req := c.request(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, linkInfo(0, l.up))
	for _, a := range l.attributes() {
		req.AddData(a)
	}
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(l.name)))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(c.group)))
	if l.peer != 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_LINK, nl.Uint32Attr(uint32(l.peer))))
	}
	req.AddData(kindAttr(l.kind, data))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// kindAttr is IFLA_LINKINFO.
func kindAttr(kind string, data []*nl.RtAttr) *nl.RtAttr {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated(kind))
	if len(data) > 0 {
		inner := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
		for _, a := range data {
			inner.AddChild(a)
		}
	}
	return info
}

// snoopingOff is what makes a bridge send multicast to all ports.
func snoopingOff() *nl.RtAttr { return nl.NewRtAttr(nl.IFLA_BR_MCAST_SNOOPING, flagAttr(false)) }

// vethPeer describes the other end of a pair. It is not set up here: the
// kernel refuses IFF_UP for it (ENOTCONN), and the engine does it in the
// container.
func vethPeer(v Veth) *nl.RtAttr {
	info := linkInfo(0, false)
	peer := nl.NewRtAttr(nl.VETH_INFO_PEER, nil)
	peer.AddChild(&info)
	for _, a := range (link{mtu: v.MTU, mac: v.PeerMAC}).attributes() {
		peer.AddChild(a)
	}
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.Peer))
	return peer
}

// attributes are those of a link that can be changed later, where they are
// not left to the kernel.
func (l link) attributes() []*nl.RtAttr {
	var a []*nl.RtAttr
	if l.master != 0 {
		a = append(a, nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(l.master))))
	}
	if l.mtu != 0 {
		a = append(a, nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(l.mtu))))
	}
	if l.mac != (MAC{}) {
		a = append(a, nl.NewRtAttr(unix.IFLA_ADDRESS, l.mac[:]))
	}
	return a
}

// set gives the link with l's index what l has: master, MTU, address, up; and
// data, which only its kind knows.
func (c *rtnl) set(l link, data ...*nl.RtAttr) error {
	req := c.request(unix.RTM_NEWLINK, unix.NLM_F_ACK, linkInfo(l.index, l.up))
	for _, a := range l.attributes() {
		req.AddData(a)
	}
	if len(data) > 0 {
		req.AddData(kindAttr(l.kind, data))
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// setPort gives the bridge port with l's index l's port flags. The kernel
// takes them only once the port is in its bridge, hence never when creating.
func (c *rtnl) setPort(l link) error {
	info := linkInfo(l.index, false)
	info.Family = unix.AF_BRIDGE
	req := c.request(unix.RTM_SETLINK, unix.NLM_F_ACK, info)
	port := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	if l.kind == kindVXLAN {
		port.AddRtAttr(nl.IFLA_BRPORT_NEIGH_SUPPRESS, flagAttr(l.suppress))
		port.AddRtAttr(nl.IFLA_BRPORT_LEARNING, flagAttr(l.learning))
	} else {
		port.AddRtAttr(nl.IFLA_BRPORT_ISOLATED, flagAttr(l.isolated))
		port.AddRtAttr(nl.IFLA_BRPORT_MODE, flagAttr(l.hairpin))
	}
	req.AddData(port)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func flagAttr(on bool) []byte {
	if on {
		return []byte{1}
	}
	return []byte{0}
}

// remove deletes a link; one that is gone is success.
func (c *rtnl) remove(index int) error {
	req := c.request(unix.RTM_DELLINK, unix.NLM_F_ACK, linkInfo(index, false))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

func (c *rtnl) parse(msg []byte) (link, error) {
	l, err := parseLink(msg)
	l.mine = l.group == c.group
	return l, err
}

// parseLink reads one RTM_NEWLINK message without its netlink header.
func parseLink(msg []byte) (link, error) {
	var l link
	if len(msg) < unix.SizeofIfInfomsg {
		return l, fmt.Errorf("link message of %d bytes", len(msg))
	}
	l.index = int(int32(binary.NativeEndian.Uint32(msg[4:8])))
	flags := binary.NativeEndian.Uint32(msg[8:12])
	l.up, l.noARP = flags&unix.IFF_UP != 0, flags&(unix.IFF_NOARP|unix.IFF_LOOPBACK) != 0
	err := eachAttr(msg[unix.SizeofIfInfomsg:], func(kind uint16, b []byte) error {
		switch kind {
		case unix.IFLA_IFNAME:
			l.name = string(bytes.TrimRight(b, "\x00"))
		case unix.IFLA_ADDRESS:
			if len(b) == len(l.mac) {
				l.mac = MAC(b)
			}
		case unix.IFLA_MTU:
			return intAttr(b, &l.mtu)
		case unix.IFLA_MASTER:
			return intAttr(b, &l.master)
		case unix.IFLA_LINK:
			return intAttr(b, &l.peer)
		case unix.IFLA_LINK_NETNSID:
			l.away = true
		case unix.IFLA_GROUP:
			var g int
			err := intAttr(b, &g)
			l.group = uint32(g)
			return err
		case unix.IFLA_LINKINFO:
			return l.parseInfo(b)
		}
		return nil
	})
	return l, err
}

// parseInfo reads IFLA_LINKINFO: the kind, and what the bridge says about its
// port.
func (l *link) parseInfo(b []byte) error {
	var data, port []byte
	var master string
	err := eachAttr(b, func(kind uint16, b []byte) error {
		switch kind {
		case nl.IFLA_INFO_KIND:
			l.kind = string(bytes.TrimRight(b, "\x00"))
		case nl.IFLA_INFO_DATA:
			data = b
		case nl.IFLA_INFO_SLAVE_KIND:
			master = string(bytes.TrimRight(b, "\x00"))
		case nl.IFLA_INFO_SLAVE_DATA:
			port = b
		}
		return nil
	})
	if err == nil {
		err = l.parseKind(data)
	}
	if err != nil || master != "bridge" {
		return err
	}
	return eachAttr(port, func(kind uint16, b []byte) error {
		switch kind {
		case nl.IFLA_BRPORT_MODE:
			l.hairpin = len(b) > 0 && b[0] != 0
		case nl.IFLA_BRPORT_ISOLATED:
			l.isolated = len(b) > 0 && b[0] != 0
		case nl.IFLA_BRPORT_LEARNING:
			l.learning = len(b) > 0 && b[0] != 0
		case nl.IFLA_BRPORT_NEIGH_SUPPRESS:
			l.suppress = len(b) > 0 && b[0] != 0
		}
		return nil
	})
}

// parseKind reads IFLA_INFO_DATA of the kinds whose settings repair compares.
func (l *link) parseKind(b []byte) error {
	fields := map[uint16]*int{}
	switch l.kind {
	case "bridge":
		return l.parseSnooping(b)
	case kindVXLAN:
		return l.tunnel.parse(b)
	case "vlan":
		fields[nl.IFLA_VLAN_ID] = &l.vlan
	case kindMacvlan:
		fields[nl.IFLA_MACVLAN_MODE] = &l.mode
	case kindIPvlan:
		fields[nl.IFLA_IPVLAN_MODE], fields[nl.IFLA_IPVLAN_FLAG] = &l.mode, &l.flags
	default:
		return nil
	}
	return eachAttr(b, func(kind uint16, b []byte) error {
		to := fields[kind]
		switch {
		case to == nil:
			return nil
		case len(b) == 2:
			*to = int(binary.NativeEndian.Uint16(b))
			return nil
		}
		return intAttr(b, to)
	})
}

// parseSnooping reads whether a bridge looks at who has joined a group. One of
// a kernel that cannot says nothing about it.
func (l *link) parseSnooping(b []byte) error {
	l.noSnooping = true
	return eachAttr(b, func(kind uint16, b []byte) error {
		if kind == nl.IFLA_BR_MCAST_SNOOPING {
			l.noSnooping = len(b) > 0 && b[0] == 0
		}
		return nil
	})
}

func intAttr(b []byte, to *int) error {
	if len(b) != 4 {
		return fmt.Errorf("netlink attribute of %d bytes where 4 belong", len(b))
	}
	*to = int(binary.NativeEndian.Uint32(b))
	return nil
}

// eachAttr calls f for every attribute of a netlink message.
func eachAttr(b []byte, f func(kind uint16, data []byte) error) error {
	for len(b) >= unix.SizeofRtAttr {
		n := int(binary.NativeEndian.Uint16(b[0:2]))
		if n < unix.SizeofRtAttr || n > len(b) {
			return fmt.Errorf("netlink attribute of length %d in %d bytes", n, len(b))
		}
		kind := binary.NativeEndian.Uint16(b[2:4]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		if err := f(kind, b[unix.SizeofRtAttr:n]); err != nil {
			return err
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}
