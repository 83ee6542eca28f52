package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Numbers of linux/netfilter/nfnetlink_conntrack.h, and of net/netfilter/nf_internals.h
// for the filter (Linux 5.8).
const (
	ctSubsystem = 1 << 8
	ctGet       = ctSubsystem | 1
	ctDelete    = ctSubsystem | 2
	ctStats     = ctSubsystem | 5

	ctaStatsGlobalEntries = 1

	ctaTupleOrig, ctaTupleReply           = 1, 2
	ctaFilter, ctaFilterOrig              = 25, 1
	ctaTupleIP, ctaTupleProto             = 1, 2
	ctaProtoNum, ctaProtoSrc, ctaProtoDst = 1, 2, 3

	ctFilterProtoNum, ctFilterProtoDst = 1 << 3, 1 << 5
)

// conntrack is a socket for what the kernel tracks, in messages built by hand: the
// library parses everything of every flow, and there may be 200,000.
type conntrack struct {
	sockets map[int]*nl.SocketHandle
}

// newConntrack opens the socket in the calling thread's network namespace, which
// it stays in.
func newConntrack() (*conntrack, error) {
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	tv := unix.NsecToTimeval(answerTimeout.Nanoseconds())
	if err := errors.Join(s.SetReceiveTimeout(&tv), s.SetSendTimeout(&tv)); err != nil {
		s.Close()
		return nil, fmt.Errorf("set netlink timeout: %w", err)
	}
	c := &conntrack{map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: s}}}
	if _, err := c.count(); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *conntrack) close() {
	for _, s := range c.sockets {
		s.Close()
	}
}

func (c *conntrack) request(kind, flags int, family uint8) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Sockets = c.sockets
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	return req
}

// count is how many flows are tracked.
func (c *conntrack) count() (n uint32, err error) {
	// The answer claims to be one of many and no end follows it; the acknowledgement does.
	msgs, err := c.request(ctStats, unix.NLM_F_ACK, unix.AF_UNSPEC).Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return 0, fmt.Errorf("count tracked flows: %w", err)
	}
	for _, m := range msgs {
		if v := attribute(m[min(len(m), nl.SizeofNfgenmsg):], ctaStatsGlobalEntries); len(v) == 4 {
			return binary.BigEndian.Uint32(v), nil
		}
	}
	return 0, errors.New("count tracked flows: the kernel does not say")
}

// flow is a tracked connection: where its first packet was sent, and who
// answers; who sent it, and whom the answer is for, which differ where the source is
// translated.
type flow struct {
	to, from     netip.AddrPort
	client, back netip.Addr
}

// forget deletes the flows of one family and protocol that stale accepts; with a
// port, only of those sent to it. What does not match is left out by the kernel, or, in
// a kernel that cannot, here.
func (c *conntrack) forget(v6 bool, p Proto, port uint16, stale func(flow) bool) error {
	family := uint8(natFamily(v6))
	req := c.request(ctGet, unix.NLM_F_DUMP, family)
	tuple := nl.NewRtAttr(ctaTupleOrig|unix.NLA_F_NESTED, nil)
	proto := tuple.AddRtAttr(ctaTupleProto|unix.NLA_F_NESTED, nil)
	proto.AddRtAttr(ctaProtoNum, []byte{byte(p)})
	by := uint32(ctFilterProtoNum)
	if port != 0 {
		proto.AddRtAttr(ctaProtoDst, binary.BigEndian.AppendUint16(nil, port))
		by |= ctFilterProtoDst
	}
	filter := nl.NewRtAttr(ctaFilter|unix.NLA_F_NESTED, nil)
	filter.AddRtAttr(ctaFilterOrig, nl.Uint32Attr(by))
	req.AddData(tuple)
	req.AddData(filter)
	var doomed [][]byte
	err := req.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(m []byte) bool {
		if orig, w, ok := parseFlow(m, p); ok && stale(w) {
			doomed = append(doomed, append([]byte(nil), orig...))
		}
		return true
	})
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // then flows came or went, those we want stood still
		return err
	}
	for _, orig := range doomed {
		req := c.request(ctDelete, unix.NLM_F_ACK, family)
		req.AddData(nl.NewRtAttr(ctaTupleOrig|unix.NLA_F_NESTED, orig))
		if _, err := req.Execute(unix.NETLINK_NETFILTER, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

// parseFlow reads a flow of the protocol out of one message, and the attribute that
// names it.
func parseFlow(m []byte, proto Proto) (orig []byte, w flow, ok bool) {
	if len(m) < nl.SizeofNfgenmsg {
		return nil, w, false
	}
	m = m[nl.SizeofNfgenmsg:]
	orig = attribute(m, ctaTupleOrig)
	reply := attribute(m, ctaTupleReply)
	if p := attribute(attribute(orig, ctaTupleProto), ctaProtoNum); len(p) != 1 || p[0] != byte(proto) {
		return nil, w, false
	}
	w.to, ok = end(orig, true)
	if !ok {
		return nil, w, false
	}
	w.from, ok = end(reply, false)
	client, _ := end(orig, false)
	back, _ := end(reply, true)
	w.client, w.back = client.Addr(), back.Addr()
	return orig, w, ok
}

// end is the destination of a tuple, or its source.
func end(tuple []byte, destination bool) (netip.AddrPort, bool) {
	// Sources are 1 (IPv4) and 3 (IPv6), each before its destination.
	a, p := uint16(1), uint16(ctaProtoSrc)
	if destination {
		a, p = 2, ctaProtoDst
	}
	ip := attribute(tuple, ctaTupleIP)
	raw := attribute(ip, a)
	if raw == nil {
		raw = attribute(ip, a+2)
	}
	addr, ok := netip.AddrFromSlice(raw)
	port := attribute(attribute(tuple, ctaTupleProto), p)
	if !ok || len(port) != 2 {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(port)), true
}

// attribute finds one attribute's value, nil if there is none.
func attribute(b []byte, kind uint16) []byte {
	for len(b) >= unix.SizeofRtAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return nil
		}
		if binary.NativeEndian.Uint16(b[2:])&nl.NLA_TYPE_MASK == kind {
			return b[unix.SizeofRtAttr:n]
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}
