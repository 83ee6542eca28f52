package dhcp

import (
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Carrier is how often the carrier of a link of this host came or went since the
// link was made (IFLA_CARRIER_CHANGES), and whether it is there and the link is
// up. A link that cannot be looked at is not up.
func (c *Client) Carrier(link string) (changes uint32, up bool) {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return 0, false
	}
	defer func() { _ = conn.Close() }()
	ae := netlink.NewAttributeEncoder()
	ae.String(unix.IFLA_IFNAME, link)
	attrs, err := ae.Encode()
	if err != nil {
		return 0, false
	}
	msgs, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request},
		Data:   append(make([]byte, unix.SizeofIfInfomsg), attrs...),
	})
	if err != nil || len(msgs) != 1 || len(msgs[0].Data) < unix.SizeofIfInfomsg {
		return 0, false
	}
	ad, err := netlink.NewAttributeDecoder(msgs[0].Data[unix.SizeofIfInfomsg:])
	if err != nil {
		return 0, false
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.IFLA_CARRIER_CHANGES:
			changes = ad.Uint32()
		case unix.IFLA_OPERSTATE:
			// Devices without a state of their own stay unknown (RFC 2863).
			up = ad.Uint8() == operUp || ad.Uint8() == operUnknown
		}
	}
	return changes, up && ad.Err() == nil
}

// States of a link as include/uapi/linux/if.h numbers them.
const (
	operUnknown = 0
	operUp      = 6
)
