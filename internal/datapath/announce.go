package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Announce tells the stations on a link, by one unsolicited frame, and the host
// itself, that one of them has an address: an ARP announcement (RFC 5227, section 3) or an
// unsolicited neighbour advertisement (RFC 4861, section 7.2.6). Whoever knew
// another one under that address knows better then. The zero MAC is the link's
// own. It returns at once, and one that is lost is lost.
//
// Out of a bridge with a VXLAN port it reaches the containers of this host
// only: the bridge keeps announcements from ports that suppress neighbour
// requests. Other hosts announce to their own.
func (k *Kernel) Announce(link string, a netip.Addr, mac MAC) error {
	own, err := k.links.change.get(link)
	if err != nil {
		return fmt.Errorf("announce %s on %s: %w", a, link, err)
	}
	if mac == (MAC{}) {
		mac = own.mac
	}
	to := unix.SockaddrLinklayer{Ifindex: own.index, Halen: 6}
	// A socket that stays open: closing one waits for an RCU grace period.
	err = unix.Sendto(k.links.packet, announcement(a, mac), 0, &to)
	if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.ENETDOWN) {
		return fmt.Errorf("announce %s on %s: %w", a, link, err)
	}
	if err := k.links.change.hear(own.index, a, mac); err != nil {
		return fmt.Errorf("announce %s on %s to the host: %w", a, link, err)
	}
	return nil
}

// hear does for the host what the announcement does for others: nobody hears
// what he says himself. An entry that somebody made for good stays, and none is
// made.
func (c *rtnl) hear(index int, a netip.Addr, mac MAC) error {
	n := neigh{family: unix.AF_INET6, index: index, dst: a, mac: mac, state: unix.NUD_STALE}
	if a.Is4() {
		n.family = unix.AF_INET
	}
	ask := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, 0)
	ask.AddData(&netlink.Ndmsg{Family: n.family, Index: uint32(index)})
	ask.AddData(nl.NewRtAttr(unix.NDA_DST, a.AsSlice()))
	have, err := c.neighs(ask, index)
	if errors.Is(err, unix.ENOENT) || err == nil && (len(have) == 0 || have[0].mac == mac || have[0].state&(unix.NUD_PERMANENT|unix.NUD_NOARP) != 0) {
		return nil
	}
	if err != nil {
		return err
	}
	req := n.request(unix.RTM_NEWNEIGH, unix.NLM_F_REPLACE|unix.NLM_F_ACK)
	req.Sockets = c.sockets
	_, err = req.Execute(unix.NETLINK_ROUTE, 0)
	if absent(err) { // just now
		return nil
	}
	return err
}

// announcement is the whole frame: its source is the station announced, so
// that switches learn where that is.
func announcement(a netip.Addr, mac MAC) []byte {
	if a.Is4() {
		b := arpProbe(mac, a)
		copy(b[14:], a.AsSlice()) // the sender has it
		return ethernet(MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac, unix.ETH_P_ARP, b)
	}
	const override, targetLinkLayer = 0x20, 2
	b := make([]byte, neighbourLen+8)
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)-ipv6Len))
	b[6], b[7] = unix.IPPROTO_ICMPV6, neighbourHops
	copy(b[8:], a.AsSlice())
	copy(b[24:], netip.IPv6LinkLocalAllNodes().AsSlice())
	m := b[ipv6Len:]
	m[0], m[4] = typeAdvert, override
	copy(m[8:], a.AsSlice())
	m[24], m[25] = targetLinkLayer, 1
	copy(m[26:], mac[:])
	binary.BigEndian.PutUint16(m[2:], checksum(b))
	return ethernet(MAC{0x33, 0x33, 0, 0, 0, 1}, mac, unix.ETH_P_IPV6, b)
}

func ethernet(to, from MAC, proto uint16, payload []byte) []byte {
	b := make([]byte, 0, 14+len(payload))
	b = append(append(b, to[:]...), from[:]...)
	return append(binary.BigEndian.AppendUint16(b, proto), payload...)
}
