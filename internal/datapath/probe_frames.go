package datapath

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// answer reports whether a frame from that station says that the address is
// taken. Our own questions come back from some switches and access points.
func (q *asker) answer(b []byte, from MAC) (holder MAC, ok bool) {
	if q.addr.Is4() {
		m, ok := parseARP(b)
		return m.sender, ok && m.sender != q.own && m.claims(q.addr)
	}
	m, ok := parseNeighbour(b)
	return from, ok && from != q.own && m.claims(q.addr)
}

// The fixed parts of the frames, without the Ethernet header.
const (
	arpLen       = 28
	ipv6Len      = 40
	neighbourLen = ipv6Len + 24 // with the target, without options
)

// Operations of ARP, types of ICMPv6.
const (
	arpRequest, arpReply         = 1, 2
	typeSolicit, typeAdvert      = 135, 136
	neighbourHops           byte = 255 // what was forwarded has less
)

// arp is an ARP packet for IPv4 on Ethernet.
type arp struct {
	op       uint16
	sender   MAC
	from, to netip.Addr
}

// parseARP reads a packet without its Ethernet header; it may be longer.
func parseARP(b []byte) (arp, bool) {
	if len(b) < arpLen || binary.BigEndian.Uint16(b) != unix.ARPHRD_ETHER || binary.BigEndian.Uint16(b[2:]) != unix.ETH_P_IP ||
		b[4] != 6 || b[5] != 4 {
		return arp{}, false
	}
	return arp{
		op:     binary.BigEndian.Uint16(b[6:]),
		sender: MAC(b[8:14]),
		from:   netip.AddrFrom4([4]byte(b[14:18])),
		to:     netip.AddrFrom4([4]byte(b[24:28])),
	}, true
}

// claims reports whether the sender has the address, or asks for it in order
// to take it (RFC 5227, 2.1.1).
func (m arp) claims(a netip.Addr) bool {
	switch m.op {
	case arpRequest:
		return m.from == a || m.from.IsUnspecified() && m.to == a
	case arpReply:
		return m.from == a
	}
	return false
}

// arpProbe asks who has an address without saying who asks, so that nobody
// learns anything from the question.
func arpProbe(own MAC, a netip.Addr) []byte {
	b := make([]byte, arpLen)
	binary.BigEndian.PutUint16(b, unix.ARPHRD_ETHER)
	binary.BigEndian.PutUint16(b[2:], unix.ETH_P_IP)
	b[4], b[5] = 6, 4
	binary.BigEndian.PutUint16(b[6:], arpRequest)
	copy(b[8:], own[:])
	copy(b[24:], a.AsSlice())
	return b
}

// neighbour is a neighbour solicitation or advertisement.
type neighbour struct {
	kind         byte // typeSolicit or typeAdvert
	from, target netip.Addr
}

// parseNeighbour reads an IPv6 packet; it may be longer.
//
// The checksum is not looked at. A virtual card may leave it to the hardware
// that a frame from this machine never meets, and what the Ethernet checksum
// let through damaged would have to name just this address to matter.
func parseNeighbour(b []byte) (neighbour, bool) {
	if len(b) < neighbourLen || b[0]>>4 != 6 || binary.BigEndian.Uint16(b[4:]) < neighbourLen-ipv6Len ||
		b[6] != unix.IPPROTO_ICMPV6 || b[7] != neighbourHops {
		return neighbour{}, false
	}
	kind, code := b[ipv6Len], b[ipv6Len+1]
	if kind != typeSolicit && kind != typeAdvert || code != 0 {
		return neighbour{}, false
	}
	return neighbour{
		kind:   kind,
		from:   netip.AddrFrom16([16]byte(b[8:24])),
		target: netip.AddrFrom16([16]byte(b[48:64])),
	}, true
}

// claims reports whether the sender has the address, or asks for it in order
// to take it (RFC 4862, 5.4.3).
func (m neighbour) claims(a netip.Addr) bool {
	if m.kind == typeAdvert {
		return m.target == a
	}
	return m.from == a || m.from.IsUnspecified() && m.target == a
}

// solicitation is the question of duplicate address detection, from nobody
// (::) to the solicited-node group of an address. It has no nonce (RFC 7527):
// our own questions are known by their Ethernet source.
func solicitation(a netip.Addr) []byte {
	b := make([]byte, neighbourLen)
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], neighbourLen-ipv6Len)
	b[6], b[7] = unix.IPPROTO_ICMPV6, neighbourHops
	target := a.As16()
	group := [16]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff, 13: target[13], 14: target[14], 15: target[15]}
	copy(b[24:], group[:])
	b[ipv6Len] = typeSolicit
	copy(b[48:], target[:])
	binary.BigEndian.PutUint16(b[42:], checksum(b))
	return b
}

// checksum is that of an ICMPv6 packet whose own is still 0: of both addresses,
// length, protocol and what follows the IPv6 header.
func checksum(b []byte) uint16 {
	sum := uint32(binary.BigEndian.Uint16(b[4:])) + uint32(b[6])
	for i := 8; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// sourceOf is the hardware address in a packet socket's address.
func sourceOf(sa unix.Sockaddr) (m MAC) {
	if ll, ok := sa.(*unix.SockaddrLinklayer); ok {
		copy(m[:], ll.Addr[:])
	}
	return m
}

// networkOrder is a protocol as addresses of packet sockets have it.
func networkOrder(proto int) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, uint16(proto)))
}
