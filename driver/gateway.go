package driver

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/internal/datapath"
)

// An engine hands every network a gateway, and takes the first address of the
// subnet where nobody typed one. On a LAN that is some station's address, so that
// there the router is the one that the host itself uses, or none.

// shares is the link by which the network shares a LAN's subnet and router; "" where
// it has its own.
func (n Network) shares() string {
	switch o := n.Options; {
	case n.Mode == modeBridge:
		return o.Bridge
	case !n.onParent(), o.layer3():
		return ""
	}
	return n.Options.Parent
}

// surroundingLAN is the link that a network shares, as far as it is there, and the
// routers that the host uses by it.
type surroundingLAN struct {
	datapath.LinkFacts
	routers []netip.Addr
}

func (d *Driver) lanOf(ctx context.Context, n Network) (l surroundingLAN, err error) {
	if l.LinkFacts, _, err = d.host.Link(ctx, n.shares()); err != nil {
		return l, err
	}
	l.routers, err = d.host.Routers(ctx, n.shares())
	return l, err
}

// router is the host's own router in a subnet, or the zero Addr.
func (l surroundingLAN) router(in netip.Prefix) netip.Addr {
	for _, a := range l.routers {
		if in.Contains(a) {
			return a
		}
	}
	return netip.Addr{}
}

// subnet is the LAN's, with a router if the host knows one; the zero Prefix where
// the host has no address of the family.
func (l surroundingLAN) subnet(f family) netip.Prefix {
	var found netip.Prefix
	for _, a := range l.Addrs {
		if !f.of(a.Addr()) || a.IsSingleIP() || a.Addr().IsLinkLocalUnicast() {
			continue
		}
		if l.router(a).IsValid() {
			return a.Masked()
		}
		if !found.IsValid() {
			found = a.Masked()
		}
	}
	return found
}

// askEngine reports whether the engine is to reserve a gateway's address although
// nobody typed one. Where the LAN's router has the first address that is what it
// takes, and keeps it from containers; anywhere else it would be wrong.
func (l surroundingLAN) askEngine(n Network, f family) bool {
	p := l.subnet(f)
	r := l.router(p)
	if !r.IsValid() {
		return !n.onParent()
	}
	return r == p.Addr().Next()
}

// skip is the answer to GwAllocCheck for one family.
func (d *Driver) skip(n Network, f family, l surroundingLAN) bool {
	return n.skipGateway(f) || n.shares() != "" && !l.askEngine(n, f)
}

// settleGateways gives the subnets of a network on a LAN the gateway that the LAN
// has, where nobody typed one. modern engines have asked for skip before.
func (d *Driver) settleGateways(ctx context.Context, n *Network, modern bool) error {
	if n.shares() == "" {
		return nil
	}
	l, err := d.lanOf(ctx, *n)
	if err != nil {
		return err
	}
	if n.onParent() && l.Name != "" && usable(l.LinkFacts, false) != nil {
		return nil //nolint:nilerr // refused as soon as it is looked for
	}
	d.mu.Lock()
	var before []Subnet
	if old := d.networks[n.ID]; old != nil && !old.doomed {
		before = old.rec.Subnets
	}
	d.mu.Unlock()
	for i := range n.Subnets {
		s := &n.Subnets[i]
		f := familyOf(s.Pool.Addr())
		guessed, typed := d.typed(*s, modern && d.skip(*n, f, l))
		if at := slices.IndexFunc(before, func(b Subnet) bool { return b.Pool == s.Pool }); at >= 0 {
			if !typed {
				s.Gateway = before[at].Gateway
			}
			continue
		}
		if err := d.refuseAutomatic(*n, *s, typed, l); err != nil {
			return err
		}
		if err := d.checkBridgeSubnet(*n, *s, l); err != nil {
			return err
		}
		if n.skipGateway(f) {
			continue
		}
		own, what := l.router(s.Pool), "the default gateway on"
		if !n.onParent() && !slices.ContainsFunc(l.routers, f.of) { // the host itself, as on a bridge of containers
			own, what = l.own(s.Pool), "the host's own address on"
		}
		switch {
		case guessed:
			d.replaceGuess(*n, s, own, what)
		case !typed && own.IsValid() && own != s.Gateway.Addr() && looksGuessed(*s):
			return fmt.Errorf("gateway %s: %s %s is %s: add --gateway %s; if you mean another one, add --ipam-driver weft:latest too",
				s.Gateway.Addr(), what, l.Name, own, own)
		}
		if err := checkOwnGateway(*n, *s, l); err != nil {
			return err
		}
	}
	return nil
}

// typed reports whether it is known that somebody typed the gateway of a subnet, or
// that nobody did: then it was guessed. asked: the engine does not guess here.
func (d *Driver) typed(s Subnet, asked bool) (guessed, typed bool) {
	if !s.Gateway.IsValid() {
		return true, false
	}
	if _, guess, ours := d.chosen(s.Pool, s.Gateway.Addr()); ours {
		return guess, !guess
	}
	return false, asked
}

// checkBridgeSubnet refuses a part of an existing bridge's subnet, and more than it,
// and says where the bridge is in another one.
func (d *Driver) checkBridgeSubnet(n Network, s Subnet, l surroundingLAN) error {
	if n.Options.Bridge == "" {
		return nil
	}
	if err := fits(n, "bridge", l.LinkFacts); err != nil {
		return err
	}
	has := l.subnet(familyOf(s.Pool.Addr()))
	if has.IsValid() && !l.overlaps(s.Pool) {
		d.log.WithField("network", n.ID).Warnf("subnet %s is not one of bridge %s, which has %s: the LAN's stations do not reach containers; if that is not meant, use --subnet %s",
			s.Pool, l.Name, netip.PrefixFrom(l.own(has), has.Bits()), has)
	}
	return nil
}

// replaceGuess takes the host's own router instead of a guess, or none; on a bridge
// without one the host's address there. what says which it is.
func (d *Driver) replaceGuess(n Network, s *Subnet, own netip.Addr, what string) {
	log := d.log.WithField("network", n.ID)
	switch {
	case own.IsValid():
		s.Gateway = netip.PrefixFrom(own, s.Pool.Bits())
		log.Infof("gateway %s: %s %s", own, what, n.shares())
	case !n.onParent():
		// The bridge has no address in the subnet: the first one, as always.
	case s.Pool.Addr().Is4():
		s.Gateway = netip.Prefix{}
		log.Warnf("subnet %s: no gateway: none was given, and this host has no default route by %s in it; containers reach only the LAN: create the network with --gateway",
			s.Pool, n.shares())
	default:
		s.Gateway = netip.Prefix{}
		log.Infof("subnet %s: no gateway was given: containers use the router that the LAN advertises", s.Pool)
	}
}

// refuseAutomatic refuses a subnet that nobody typed on a LAN that has another: no
// station there would know what to do with its addresses.
func (d *Driver) refuseAutomatic(n Network, s Subnet, typed bool, l surroundingLAN) error {
	lan := l.subnet(ipv4)
	if n.Internal || n.Options.Egress == EgressNone || !s.Pool.Addr().Is4() || !lan.IsValid() || l.overlaps(s.Pool) {
		return nil
	}
	automatic, _, ours := d.chosen(s.Pool, s.Gateway.Addr())
	if !ours {
		automatic = !typed && looksAutomatic(s.Pool)
	}
	if !automatic {
		return nil
	}
	gateway := "ADDRESS, that of the LAN's router"
	router := l.router(lan)
	if router.IsValid() {
		gateway = router.String()
	}
	lease := fmt.Sprintf("; or, for addresses from the LAN's DHCP server, --ipam-driver weft:latest --ipam-opt dhcp=%s", l.Name)
	if n.onParent() {
		return fmt.Errorf("subnet %s was chosen automatically, but parent %s is in %s: add --subnet %s --gateway %s%s", s.Pool, l.Name, lan, lan, gateway, lease)
	}
	if !router.IsValid() { // the host itself, as on a bridge of containers
		gateway, lease = l.own(lan).String(), ""
	}
	// Our IPAM asks who is there; that of the engine refuses a subnet of its own twice.
	return fmt.Errorf("subnet %s was chosen automatically, but bridge %s is in %s: add --ipam-driver weft:latest --subnet %s --gateway %s%s",
		s.Pool, l.Name, lan, lan, gateway, lease)
}

// overlaps reports whether the host has an address in the subnet, or in a part of it.
func (l surroundingLAN) overlaps(p netip.Prefix) bool {
	return slices.ContainsFunc(l.Addrs, func(a netip.Prefix) bool { return a.Masked().Overlaps(p) })
}

// own is the host's address in a subnet.
func (l surroundingLAN) own(in netip.Prefix) netip.Addr {
	for _, a := range l.Addrs {
		if a.Masked() == in {
			return a.Addr()
		}
	}
	return netip.Addr{}
}

// checkOwnGateway refuses the host itself as gateway: what hangs on a parent does not
// reach it, unless a switch sends its frames back.
func checkOwnGateway(n Network, s Subnet, l surroundingLAN) error {
	if !n.onParent() || n.Options.SubMode == "vepa" || !slices.ContainsFunc(l.Addrs, func(a netip.Prefix) bool { return a.Addr() == s.Gateway.Addr() }) {
		return nil
	}
	return fmt.Errorf("gateway %s is this host's own address on %s, which containers of mode %s do not reach: name the LAN's router with --gateway", s.Gateway.Addr(), l.Name, n.Mode)
}

// looksGuessed reports whether an IPAM may have chosen the gateway: it is the first
// address of the subnet, or one that a range begins with.
func looksGuessed(s Subnet) bool {
	b := s.Gateway.Addr().AsSlice()
	return s.Gateway.Addr() == s.Pool.Addr().Next() || b[len(b)-1]%8 == 0
}

// looksAutomatic reports whether the engine chooses subnets like p where it was not
// configured otherwise.
func looksAutomatic(p netip.Prefix) bool {
	return p.Bits() == 16 && netip.MustParsePrefix("172.16.0.0/12").Contains(p.Addr()) ||
		p.Bits() == 20 && netip.MustParsePrefix("192.168.0.0/16").Contains(p.Addr())
}

// checkRoom refuses a bridge without an address for a container.
func checkRoom(n Network) error {
	for _, s := range n.Subnets {
		if n.Mode == modeBridge && s.Pool.IsSingleIP() && s.Gateway.IsValid() {
			return fmt.Errorf("subnet %s has one address, which is the gateway's: choose a larger --subnet", s.Pool)
		}
	}
	return nil
}

// checkHostSubnets refuses a bridge whose subnet overlaps with one that the host is
// in: the host would look for the stations of that LAN on the bridge.
func (d *Driver) checkHostSubnets(ctx context.Context, n Network) error {
	if n.Mode != modeBridge || n.Options.Bridge != "" || len(gateways(n)) == 0 {
		return nil
	}
	links, err := d.host.Addressed(ctx)
	if err != nil {
		return err
	}
	for _, s := range n.Subnets {
		for _, name := range slices.Sorted(maps.Keys(links)) {
			for _, a := range links[name] {
				if name == n.Options.BridgeName || !a.Masked().Overlaps(s.Pool) {
					continue
				}
				// Behind a bridge are other containers more often than a LAN.
				if facts, ok, err := d.host.Link(ctx, name); err == nil && ok && facts.Kind == "bridge" {
					return fmt.Errorf("subnet %s: this host is in %s by %s (%s): choose another --subnet", s.Pool, a.Masked(), name, a.Addr())
				}
				return fmt.Errorf("subnet %s: this host is in %s by %s (%s): choose another --subnet; for containers with addresses of that LAN, use -o mode=macvlan -o parent=%s",
					s.Pool, a.Masked(), name, a.Addr(), name)
			}
		}
	}
	return nil
}
