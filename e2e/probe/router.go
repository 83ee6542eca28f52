//go:build e2e

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// advertise sends one router advertisement (RFC 4861, section 4.2) to every
// station of the interface's link: this machine is a router for half an hour,
// stations make themselves an address of the /64, the link takes packets of that
// size, and to routed it is this machine that leads.
func advertise(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: probe advertise interface prefix mtu")
	}
	prefix, err := netip.ParsePrefix(args[1])
	if err != nil {
		return err
	}
	mtu, err := strconv.ParseUint(args[2], 10, 32)
	if err != nil {
		return err
	}
	from, err := linkLocal(args[0])
	if err != nil {
		return err
	}
	c, err := net.ListenIP("ip6:ipv6-icmp", from)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }() // what was to be sent is sent
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	// Stations drop what a router may have passed on: it has less than 255.
	if err := raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255)
	}); err != nil || set != nil {
		return errors.Join(err, set)
	}
	_, err = c.WriteTo(advertisement(prefix, uint32(mtu)), &net.IPAddr{IP: net.IPv6linklocalallnodes, Zone: args[0]})
	return err
}

// routed is what a border router of Thread has behind it (RFC 4191, section 2.3).
var routed = netip.MustParsePrefix("fd00:77::/64")

// linkLocal is the only kind of address that stations take a router's word
// from.
func linkLocal(name string) (*net.IPAddr, error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	addrs, err := link.Addrs()
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() == nil && n.IP.IsLinkLocalUnicast() {
			return &net.IPAddr{IP: n.IP, Zone: name}, nil
		}
	}
	return nil, fmt.Errorf("%s has no link-local address", name)
}

// advertisement is the message; its checksum is the kernel's to write.
func advertisement(prefix netip.Prefix, mtu uint32) []byte {
	const lifetime = 1800
	b := []byte{
		134, 0, 0, 0, // type, code, checksum
		64, 0, // hop limit; neither addresses nor other settings by DHCP
	}
	b = binary.BigEndian.AppendUint16(b, lifetime)
	b = append(b, make([]byte, 8)...) // timers of neighbour discovery: as they are
	b = append(b, 5, 1, 0, 0)         // MTU option of 8 bytes
	b = binary.BigEndian.AppendUint32(b, mtu)
	b = append(b, 3, 4, byte(prefix.Bits()), 0xc0) // prefix option of 32 bytes; on the link, and autonomous
	b = binary.BigEndian.AppendUint32(b, lifetime) // valid
	b = binary.BigEndian.AppendUint32(b, lifetime) // preferred
	b = append(b, 0, 0, 0, 0)                      // reserved
	b = append(b, prefix.Masked().Addr().AsSlice()...)
	b = append(b, 24, 2, byte(routed.Bits()), 0) // route information option of 16 bytes, of medium preference
	b = binary.BigEndian.AppendUint32(b, lifetime)
	return append(b, routed.Addr().AsSlice()[:8]...)
}
