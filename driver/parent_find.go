package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/weftnet/weft/internal/datapath"
)

// vlanParts are the links that a parent's name stands for, the lowest first:
// eth0.10.20 is VLAN 20 in VLAN 10 of eth0.
func vlanParts(name string) ([]datapath.Parent, error) {
	if _, err := netip.ParseAddr(name); err == nil {
		return nil, fmt.Errorf("parent %s: name an interface, not an address: ip -br addr shows which has it", name)
	}
	parts := strings.Split(name, ".")
	list := []datapath.Parent{{Name: parts[0]}}
	for i, p := range parts[1:] {
		id, err := strconv.Atoi(p)
		if err != nil || id < 1 || id > 4094 || p[0] < '1' || p[0] > '9' {
			return nil, fmt.Errorf("parent %s does not exist, and %q is not a VLAN ID of 1 to 4094 that it could be made for: name an interface that ip link shows, or a VLAN as in eth0.10", name, clip(p))
		}
		list = append(list, datapath.Parent{Name: strings.Join(parts[:i+2], "."), Lower: list[i].Name, VLAN: id})
	}
	if len(list) > 3 {
		return nil, fmt.Errorf("parent %s: more than two VLAN tags: use at most two, as in eth0.10.20", name)
	}
	return list, nil
}

// findParent fills in the links that the network hangs on, and what depends on
// them. Those that exist and are not ours are used as they are.
func (d *Driver) findParent(ctx context.Context, rec *Network, old *network) error {
	if old != nil {
		rec.Parents, rec.OwnMAC, rec.Hop4, rec.Hop6 = old.rec.Parents, old.rec.OwnMAC, old.rec.Hop4, old.rec.Hop6
		rec.Access = old.rec.Access
		return nil
	}
	o := rec.Options
	if o.Parent == "" {
		rec.Parents = []datapath.Parent{{Name: dummyName(rec.ID)}}
		rec.identify(datapath.MAC{})
		return nil
	}
	below, err := d.parents(ctx, rec, o.Parent)
	if err != nil {
		return err
	}
	if rec.Options.MTU > below.MTU {
		return fmt.Errorf("mtu %d is more than the %d of parent %s: give at most %d, or leave it out", rec.Options.MTU, below.MTU, o.Parent, below.MTU)
	}
	if least, f := rec.leastMTU(); rec.Options.MTU == 0 && below.MTU < least {
		return fmt.Errorf("parent %s has an MTU of %d, too small: IPv%d needs %d: run ip link set %s mtu %d", below.Name, below.MTU, f, least, below.Name, least)
	}
	rec.identify(below.MAC)
	if rec.Mode == modeIPvlan && o.HostAccess && !o.layer3() && below.Strict {
		// What an ipvlan does not know comes out of its parent, but the way back
		// leads by the host's own sub-interface.
		return fmt.Errorf("option host_access=true: reverse path filtering on %s is strict and would drop what its containers send to the host: run sysctl -w net.ipv4.conf.%s.rp_filter=2", below.Name, below.Name)
	}
	if below.Name == o.Parent && !o.layer3() {
		return fits(*rec, "parent", below)
	}
	return nil
}

// parents finds the links from the parent down to one that exists, and
// describes that one.
func (d *Driver) parents(ctx context.Context, rec *Network, name string) (datapath.LinkFacts, error) {
	var made []datapath.Parent
	for {
		f, ok, err := d.host.Link(ctx, name)
		if err != nil {
			return f, err
		}
		if ok && (!f.Ours || f.Kind != "vlan") {
			rec.Parents = append([]datapath.Parent{{Name: name, Existing: true}}, made...)
			return f, usable(f, len(made) > 0)
		}
		parts, err := vlanParts(name)
		if err != nil {
			return f, err
		}
		if len(parts) == 1 {
			return f, fmt.Errorf("parent %s does not exist: name one that ip link shows", name)
		}
		made = append([]datapath.Parent{parts[len(parts)-1]}, made...)
		name = parts[len(parts)-2].Name
	}
}

// usable refuses a link that cannot be a parent. One that is down can: its
// sub-interfaces work once it is up, and until then status says so. The kernel sets
// no VLAN sub-interface up on it, though.
func usable(f datapath.LinkFacts, vlan bool) error {
	switch {
	case f.Name == "lo":
		return errors.New("parent lo is the loopback interface, which leads to no LAN: name a network card")
	case f.Ours:
		return fmt.Errorf("parent %s belongs to another network of this plugin: name a network card, or leave the parent out", f.Name)
	case f.Master != "":
		return fmt.Errorf("parent %s is a port of %s: use parent=%s, or mode=bridge with bridge=%s", f.Name, f.Master, f.Master, f.Master)
	case !f.Up && vlan:
		return fmt.Errorf("VLAN on %s: the interface is down: run ip link set %s up", f.Name, f.Name)
	}
	return nil
}

// fits refuses subnets that overlap with those of the parent, or of the bridge,
// without being the same: one of the two sides would not know what is on the link.
func fits(n Network, what string, f datapath.LinkFacts) error {
	for _, s := range n.Subnets {
		for _, a := range f.Addrs {
			if p := a.Masked(); p.Overlaps(s.Pool) && p != s.Pool && !p.IsSingleIP() {
				return fmt.Errorf("subnet %s does not fit %s %s, which has %s: use --subnet %s; for a part of it add --ip-range, with a DHCP server give the part there", s.Pool, what, f.Name, a, p)
			}
		}
	}
	return nil
}

// identify chooses the addresses of the host's own sub-interface. The parent's
// hardware address keeps two hosts apart that have networks of the same ID.
func (n *Network) identify(parent datapath.MAC) {
	seed := "own " + n.ID + " " + parent.String()
	n.OwnMAC = hashMAC(seed)
	n.Hop4, n.Hop6 = hashLinkLocal(seed), hashULA(seed)
}

// atOdds says why two networks cannot be on one parent, if they cannot: the
// kernel keeps macvlan and ipvlan apart, the mode and the flag of ipvlan belong to
// the parent (a second mode would change the first network's), and one in mode
// passthru is alone.
func (n Network) atOdds(o Network) error {
	if n.VNI != 0 && n.VNI == o.VNI {
		return fmt.Errorf("VNI %d is that of network %s: give another with -o vni=", n.VNI, short(o.ID))
	}
	if !n.onParent() || !o.onParent() || n.parent() != o.parent() {
		return nil
	}
	a, b := n.Options, o.Options
	what := ""
	switch {
	case n.Mode != o.Mode:
		what = "mode=" + o.Mode
	case a.SubMode == "passthru" || b.SubMode == "passthru":
		return fmt.Errorf("parent %s: a network with macvlan_mode=passthru is alone on its parent, and network %s is there: use another parent or VLAN", n.parent(), short(o.ID))
	case n.Mode == modeIPvlan && a.SubMode != b.SubMode:
		what = "ipvlan_mode=" + b.SubMode
	case n.Mode == modeIPvlan && a.SubFlag != b.SubFlag:
		what = "ipvlan_flag=" + b.SubFlag
	default:
		return nil
	}
	return fmt.Errorf("parent %s is used by network %s with %s, and the kernel allows one for all: use that, or another parent or VLAN", n.parent(), short(o.ID), what)
}

// tryParent makes a sub-interface and takes it away again, so that what the
// kernel refuses is said when the network is made and not with its first
// container. One that stays because of an error goes with the pending network.
func (d *Driver) tryParent(ctx context.Context, n *network) error {
	s := datapath.State{Children: d.trial(n)}
	if s.Empty() {
		return nil
	}
	if _, err := d.kernel.Ensure(ctx, s); err != nil {
		return err
	}
	return d.kernel.Remove(ctx, s)
}

// trial is what tryParent makes.
func (d *Driver) trial(n *network) []datapath.Child {
	if !n.rec.onParent() {
		return nil
	}
	return d.backends[n.rec.Mode].Endpoint(n.rec, Endpoint{ID: n.rec.ID}).Children
}
