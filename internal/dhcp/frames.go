package dhcp

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Ports of both protocols.
const (
	serverPort4, clientPort4 = 67, 68
	serverPort6, clientPort6 = 547, 546
)

const (
	ipv4Len = 20
	ipv6Len = 40
	udpLen  = 8
)

// allServers is the group of DHCPv6 servers and relays (RFC 8415, 7.1).
var allServers = netip.MustParseAddr("ff02::1:2")

// datagram is a message from a client to all servers, with IP and UDP headers.
func datagram(from netip.Addr, message []byte) []byte {
	to, src, dst := netip.AddrFrom4([4]byte{255, 255, 255, 255}), uint16(clientPort4), uint16(serverPort4)
	head := ipv4Len
	if from.Is6() {
		to, src, dst, head = allServers, clientPort6, serverPort6, ipv6Len
	}
	b := make([]byte, head, head+udpLen+len(message))
	length := uint16(udpLen + len(message))
	udp := binary.BigEndian.AppendUint16(nil, src)
	udp = binary.BigEndian.AppendUint16(udp, dst)
	udp = binary.BigEndian.AppendUint16(udp, length)
	b = append(append(append(b, udp...), 0, 0), message...)

	if from.Is6() {
		b[0] = 6 << 4
		binary.BigEndian.PutUint16(b[4:], length)
		b[6], b[7] = unix.IPPROTO_UDP, 1
		copy(b[8:], from.AsSlice())
		copy(b[24:], to.AsSlice())
	} else {
		b[0] = 4<<4 | ipv4Len/4
		binary.BigEndian.PutUint16(b[2:], ipv4Len+length)
		b[8], b[9] = 64, unix.IPPROTO_UDP
		copy(b[12:], from.AsSlice())
		copy(b[16:], to.AsSlice())
		binary.BigEndian.PutUint16(b[10:], ^sum(0, b[:ipv4Len]))
	}
	// The checksum covers the addresses, the protocol and the length too.
	pseudo := sum(uint32(unix.IPPROTO_UDP)+uint32(length), append(from.AsSlice(), to.AsSlice()...))
	check := ^sum(uint32(pseudo), b[head:])
	if check == 0 {
		check = 0xffff // 0 would mean that there is none
	}
	binary.BigEndian.PutUint16(b[head+6:], check)
	return b
}

// sum is the ones' complement sum of 16-bit words.
func sum(s uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// payload is what a UDP datagram carries. That it is one the filter has seen.
// Checksums are not looked at: a virtual card leaves them to hardware that a
// frame from this machine never meets.
func payload(b []byte) ([]byte, bool) {
	head := ipv6Len
	if len(b) > 0 && b[0]>>4 == 4 {
		head = int(b[0]&0xf) * 4
	}
	if head < ipv4Len || len(b) < head+udpLen {
		return nil, false
	}
	length := int(binary.BigEndian.Uint16(b[head+4:])) // a short frame is padded
	if length < udpLen || len(b) < head+length {
		return nil, false
	}
	return b[head+udpLen : head+length], true
}

// The words of the filter's language.
const (
	loadByte = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS
	loadHalf = unix.BPF_LD | unix.BPF_H | unix.BPF_ABS
	loadWord = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	headX    = unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH // X: length of the IPv4 header
	halfAtX  = unix.BPF_LD | unix.BPF_H | unix.BPF_IND
	wordAtX  = unix.BPF_LD | unix.BPF_W | unix.BPF_IND
	and      = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	equal    = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	anyBit   = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
	ret      = unix.BPF_RET | unix.BPF_K

	protocol = 0xfffff000 // what the Ethernet header said (SKF_AD_OFF + SKF_AD_PROTOCOL)
)

// filter4 lets in answers of DHCPv4 to one transaction, whole ones.
func filter4(xid [4]byte) []unix.SockFilter {
	return []unix.SockFilter{
		{Code: loadHalf, K: protocol},
		{Code: equal, K: unix.ETH_P_IP, Jf: 10},
		{Code: loadByte, K: 9},
		{Code: equal, K: unix.IPPROTO_UDP, Jf: 8},
		{Code: loadHalf, K: 6},
		{Code: anyBit, K: 0x3fff, Jt: 6}, // a fragment
		{Code: headX},
		{Code: halfAtX, K: 2},
		{Code: equal, K: clientPort4, Jf: 3},
		{Code: wordAtX, K: udpLen + 4},
		{Code: equal, K: binary.BigEndian.Uint32(xid[:]), Jf: 1},
		{Code: ret, K: longest},
		{Code: ret, K: 0},
	}
}

// filter6 lets in answers of DHCPv6 to one transaction, without extension
// headers. The first byte of the transaction ID is not used.
func filter6(xid [4]byte) []unix.SockFilter {
	return []unix.SockFilter{
		{Code: loadHalf, K: protocol},
		{Code: equal, K: unix.ETH_P_IPV6, Jf: 8},
		{Code: loadByte, K: 6},
		{Code: equal, K: unix.IPPROTO_UDP, Jf: 6},
		{Code: loadHalf, K: ipv6Len + 2},
		{Code: equal, K: clientPort6, Jf: 4},
		{Code: loadWord, K: ipv6Len + udpLen},
		{Code: and, K: 0xffffff},
		{Code: equal, K: binary.BigEndian.Uint32(xid[:]) & 0xffffff, Jf: 1},
		{Code: ret, K: longest},
		{Code: ret, K: 0},
	}
}
