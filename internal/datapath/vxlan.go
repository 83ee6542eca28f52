package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const kindVXLAN = "vxlan"

// tunnel is what a VXLAN device is made with and keeps for life.
type tunnel struct {
	vni      int
	port     uint16
	local    netip.Addr
	learning bool // can be changed, but with what was learned until then the device is not worth mending
}

// parse reads IFLA_INFO_DATA.
func (t *tunnel) parse(b []byte) error {
	return eachAttr(b, func(kind uint16, b []byte) error {
		switch kind {
		case nl.IFLA_VXLAN_ID:
			return intAttr(b, &t.vni)
		case nl.IFLA_VXLAN_PORT:
			if len(b) == 2 {
				t.port = binary.BigEndian.Uint16(b)
			}
		case nl.IFLA_VXLAN_LOCAL, nl.IFLA_VXLAN_LOCAL6:
			t.local, _ = netip.AddrFromSlice(b)
		case nl.IFLA_VXLAN_LEARNING:
			t.learning = len(b) > 0 && b[0] != 0
		}
		return nil
	})
}

// data is the way back. No group and no lower device: where frames go is said
// by forwarding entries, and which way the host's routes say.
//
// Outer UDP checksums are sent, the kernel's own choice in both families. They
// cost nothing by size, since the kernel works them out from the inner checksum
// that is still open (local checksum offload), and at the other end any card
// verifies them, from which the kernel knows the inner packet to be good and
// puts segments together (GRO). Without them that takes a card which looks into
// tunnels.
//
// A receiver drops IPv6 without a checksum unless told otherwise. Tunnels may
// send that (RFC 6935 section 5) where the inner packets are protected and a
// wrong host would know that they are not its own (RFC 6936 section 4): here the
// VNI and the hardware address tell it. So it is accepted, for the sake of
// hosts that cannot help it, and not sent, which is the default of RFC 6935.
// IPv4 needs no such flag, and must not have it: devices share the socket of
// their port only with equal flags, and Swarm's have none.
func (t tunnel) data() []*nl.RtAttr {
	list := []*nl.RtAttr{
		nl.NewRtAttr(nl.IFLA_VXLAN_ID, nl.Uint32Attr(uint32(t.vni))),
		nl.NewRtAttr(nl.IFLA_VXLAN_PORT, binary.BigEndian.AppendUint16(nil, t.port)),
		nl.NewRtAttr(nl.IFLA_VXLAN_LEARNING, flagAttr(t.learning)),
	}
	if t.local.Is4() {
		return append(list, nl.NewRtAttr(nl.IFLA_VXLAN_LOCAL, t.local.AsSlice()))
	}
	return append(list, nl.NewRtAttr(nl.IFLA_VXLAN_LOCAL6, t.local.AsSlice()),
		nl.NewRtAttr(nl.IFLA_VXLAN_UDP_ZERO_CSUM6_RX, flagAttr(true)))
}

// vxlan makes or mends a VXLAN device. One that differs in what cannot be
// changed is made again, without its forwarding entries: they are ensured after
// it where they are in the same State, and else missing at the next look.
func (l *links) vxlan(ctx context.Context, v VXLAN, d *done) error {
	master, err := l.index(v.Master)
	if err != nil {
		return fmt.Errorf("create vxlan %s: bridge %s: %w", v.Name, v.Master, err)
	}
	want := link{name: v.Name, kind: kindVXLAN, master: master, mtu: v.MTU, mac: v.MAC, up: true, suppress: true,
		tunnel: tunnel{vni: int(v.VNI), port: v.Port, local: v.Local}}
	have, err := l.change.get(v.Name)
	how := "made"
	switch {
	case errors.Is(err, ErrAbsent):
	case err != nil:
		return err
	default:
		if err := have.own(kindVXLAN); err != nil {
			return fmt.Errorf("vxlan %w", err)
		}
		if have.tunnel == want.tunnel {
			return l.mendVXLAN(have, want, d)
		}
		if err := l.removeOne(ctx, doomed{v.Name, kindVXLAN}); err != nil {
			return err
		}
		how = "made again"
	}
	if err := l.newVXLAN(want, v); err != nil {
		return err
	}
	d.made.VXLANs = append(d.made.VXLANs, v)
	d.say("vxlan %s: %s in %s", v.Name, how, v.Master)
	if have, err = l.change.get(v.Name); err != nil {
		return fmt.Errorf("create vxlan %s: %w", v.Name, err)
	}
	want.index = have.index
	if err := l.change.setPort(want); err != nil {
		return fmt.Errorf("create vxlan %s: set port flags: %w", v.Name, err)
	}
	return nil
}

// newVXLAN makes the device in one message. The kernel cuts an MTU only by that
// of a lower device, and there is none.
func (l *links) newVXLAN(want link, v VXLAN) error {
	err := l.change.create(want, want.tunnel.data()...)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EEXIST): // not the name, which was free
		return fmt.Errorf("create vxlan %s: this host has another VXLAN device with VNI %d on UDP port %d, perhaps in another network namespace: choose another vni or port", v.Name, v.VNI, v.Port)
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("create vxlan %s: UDP port %d is taken by another program, or by a VXLAN device that cannot share it: choose another port", v.Name, v.Port)
	case l.existing(v.Master) != nil:
		return fmt.Errorf("create vxlan %s: %w", v.Name, l.existing(v.Master))
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("create vxlan %s: this kernel has no VXLAN devices: modprobe vxlan", v.Name)
	case errors.Is(err, unix.EXFULL):
		return fmt.Errorf("create vxlan %s: bridge %s has no port left (the kernel allows 1023)", v.Name, v.Master)
	}
	return fmt.Errorf("create vxlan %s in %s: %w", v.Name, v.Master, err)
}

func (l *links) mendVXLAN(have, want link, d *done) error {
	if err := l.mend(have, want, d); err != nil {
		return err
	}
	if have.master == want.master && have.fit() {
		return nil
	}
	want.index = have.index
	if err := l.change.setPort(want); err != nil {
		return fmt.Errorf("vxlan %s: set port flags: %w", have.name, err)
	}
	d.say("vxlan %s: neighbour suppression on, learning off", have.name)
	return nil
}

// fit reports whether the flags of a VXLAN port are those that we set.
func (l link) fit() bool { return l.suppress && !l.learning }

func (l link) asVXLAN(master string) VXLAN {
	t := l.tunnel
	return VXLAN{Name: l.name, Master: master, VNI: uint32(t.vni), Port: t.port, Local: t.local, MTU: l.mtu, MAC: l.mac, Down: !l.up,
		Altered: t.learning || !l.fit()}
}
