package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weftnet/weft/internal/datapath"
)

// The values of -o mode= whose networks hang on a parent.
const (
	modeMacvlan = "macvlan"
	modeIPvlan  = "ipvlan"
)

// Parent is the Backend of -o mode=macvlan and -o mode=ipvlan: sub-interfaces of
// a link of the host. Kind is one of the two.
type Parent struct{ Kind string }

// Validate implements Backend.
func (b Parent) Validate(n *Network) error {
	o := &n.Options
	if o.Prefix == "" {
		o.Prefix = "eth"
	}
	switch {
	case b.Kind == modeMacvlan && o.SubMode == "":
		o.SubMode = "bridge"
	case b.Kind == modeIPvlan && o.SubMode == "":
		o.SubMode = "l2"
	}
	if b.Kind == modeIPvlan && o.SubFlag == "" {
		o.SubFlag = "bridge"
	}
	if o.Parent == "" && o.Egress != "" && o.Egress != EgressNone {
		return fmt.Errorf("option egress=%s needs a parent: without one the network leads nowhere", o.Egress)
	}
	n.Internal = n.Internal || o.Parent == "" // as the built-in drivers have it
	if err := checkEgress(n); err != nil {
		return err
	}
	if least := leastMTU(*n); n.MTU < least {
		return fmt.Errorf("mtu %d is too small: IPv6 needs %d", n.MTU, least)
	}
	if len(o.HostAddrs) > 0 && !o.HostAccess {
		return errors.New("option host_address has no meaning without host_access=true")
	}
	if o.HostAccess && !o.reachable() {
		return fmt.Errorf("option host_access=true: %s keeps the host out as well: it needs %s", o.keepsOut(b.Kind), o.letsIn(b.Kind))
	}
	for i, a := range o.HostAddrs {
		s, ok := n.subnet(a)
		if !ok {
			return fmt.Errorf("option host_address: %s is in none of the network's subnets (%s)", a, pools(*n))
		}
		if a == s.Gateway.Addr() {
			return fmt.Errorf("option host_address: %s is the gateway's address", a)
		}
		if i > 0 && a.Is4() == o.HostAddrs[0].Is4() {
			return fmt.Errorf("option host_address: %s and %s: one of each family", o.HostAddrs[0], a)
		}
	}
	return checkRoutes(*n)
}

// reachable reports whether a sub-interface of the host reaches those of the
// containers. Private ones reach none, those of mode vepa by way of a switch
// that has to send frames back, and one of mode passthru is alone.
func (o Options) reachable() bool {
	return o.SubMode == "bridge" || o.SubFlag == "bridge"
}

func (o Options) keepsOut(kind string) string {
	if kind == modeIPvlan {
		return "ipvlan_flag=" + o.SubFlag
	}
	return "macvlan_mode=" + o.SubMode
}

func (o Options) letsIn(kind string) string {
	if kind == modeIPvlan {
		return "ipvlan_flag=bridge"
	}
	return "macvlan_mode=bridge"
}

// layer3 reports whether the parent routes instead of switching: no broadcast,
// no neighbour discovery, and hence no gateway.
func (o Options) layer3() bool { return o.SubMode == "l3" || o.SubMode == "l3s" }

// onParent reports whether the network hangs on a link of the host.
func (n Network) onParent() bool { return n.Mode == modeMacvlan || n.Mode == modeIPvlan }

// parent is the link that the network hangs on.
func (n Network) parent() string {
	if len(n.Parents) == 0 {
		return ""
	}
	return n.Parents[len(n.Parents)-1].Name
}

// Network implements Backend.
func (b Parent) Network(n Network) datapath.State {
	s := datapath.State{Parents: n.Parents}
	if !n.Access {
		return s
	}
	own := b.child(n, ownLink(n.ID), n.OwnMAC)
	own.Stays = true
	for _, f := range families {
		if n.has(f) {
			own.Addrs = append(own.Addrs, single(n.hop(f)))
		}
	}
	for _, a := range n.Options.HostAddrs {
		own.Addrs = append(own.Addrs, single(a))
	}
	s.Children = []datapath.Child{own}
	s.Elements = []datapath.Element{{Set: datapath.SetOwn, Link: own.Name}}
	s.Hook = true
	return s
}

func (b Parent) child(n Network, name string, mac datapath.MAC) datapath.Child {
	c := datapath.Child{Name: name, Parent: n.parent(), Kind: b.Kind, Mode: n.Options.SubMode, Flag: n.Options.SubFlag, MTU: n.MTU}
	if b.Kind == modeMacvlan {
		c.MAC = mac
	}
	return c
}

// hop is the address of the host's own sub-interface, by which containers send
// to the host. It is nobody's on the LAN.
func (n Network) hop(f family) netip.Addr {
	if f == ipv4 {
		return n.Hop4
	}
	return n.Hop6
}

// Endpoint implements Backend.
func (b Parent) Endpoint(n Network, e Endpoint) datapath.State {
	s := datapath.State{Children: []datapath.Child{b.child(n, peerEnd(e.ID), e.MAC)}}
	if !e.Reach {
		return s
	}
	own := ownLink(n.ID)
	for _, a := range e.Addrs {
		r := datapath.Route{Link: own, To: a.Addr(), From: n.parent()}
		if b.Kind == modeMacvlan {
			r.MAC = e.MAC
		}
		if i := slices.IndexFunc(n.Options.HostAddrs, func(h netip.Addr) bool { return h.Is4() == a.Addr().Is4() }); i >= 0 {
			r.Src = n.Options.HostAddrs[i]
		}
		s.Routes = append(s.Routes, r)
		s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetAttached, Link: own, Net: single(a.Addr())})
		if n.Options.HostAccess {
			s.Elements = append(s.Elements, b.access(n, e, own, a.Addr())...)
		}
		s.Forward4 = s.Forward4 || a.Addr().Is4()
		s.Forward6 = s.Forward6 || a.Addr().Is6()
	}
	s.Add(published(e.Ports, nil))
	return s
}

// access lets the endpoint and the containers on the host's bridges reach each
// other.
func (b Parent) access(n Network, e Endpoint, own string, a netip.Addr) []datapath.Element {
	in := own
	if b.Kind == modeIPvlan {
		in = n.parent() // what an ipvlan does not know comes out of its parent
	}
	list := []datapath.Element{{Set: datapath.SetAccess, Link: in, Net: single(a)}}
	near := slices.Clone(e.Near)
	for _, h := range e.Host {
		near = append(near, single(h))
	}
	for _, p := range near {
		if p.Addr().Is4() == a.Is4() {
			list = append(list, datapath.Element{Set: datapath.SetNear, Net: p, To: a})
		}
	}
	return list
}

// Attach implements Backend.
func (b Parent) Attach(n Network, e Endpoint) Attachment {
	at := Attachment{Link: peerEnd(e.ID), Prefix: n.Options.Prefix}
	out := n.Options.Egress == EgressDriver
	for _, a := range e.Addrs {
		f := familyOf(a.Addr())
		if e.Reach {
			at.Routes = append(at.Routes, n.wayBack(e, f)...)
		}
		s, ok := n.subnet(a.Addr())
		switch {
		case !out:
		case n.Options.layer3():
			at.Routes = append(at.Routes, Route{Destination: f.all()})
		case ok && s.Gateway.IsValid():
			at.Gateways = append(at.Gateways, s.Gateway.Addr())
		}
		for _, r := range n.Options.Routes {
			if familyOf(r.NextHop) == f {
				at.Routes = append(at.Routes, r)
			}
		}
	}
	at.NoGateway = n.Options.Egress != EgressEngine && !slices.ContainsFunc(at.Gateways, netip.Addr.Is4)
	return at
}

// wayBack are the routes to the host, and to the containers on its bridges.
func (n Network) wayBack(e Endpoint, f family) []Route {
	hop := n.hop(f)
	list := []Route{{Destination: single(hop)}}
	if n.Options.layer3() {
		return list // the parent's namespace routes the rest
	}
	for _, a := range e.Host {
		if f.of(a) {
			list = append(list, Route{Destination: single(a), NextHop: hop})
		}
	}
	for _, p := range e.Near {
		if f.of(p.Addr()) {
			list = append(list, Route{Destination: p, NextHop: hop})
		}
	}
	return list
}

// vlanParts are the links that a parent's name stands for, the lowest first:
// eth0.10.20 is VLAN 20 in VLAN 10 of eth0.
func vlanParts(name string) ([]datapath.Parent, error) {
	parts := strings.Split(name, ".")
	list := []datapath.Parent{{Name: parts[0]}}
	for i, p := range parts[1:] {
		id, err := strconv.Atoi(p)
		if err != nil || id < 1 || id > 4094 || p[0] < '1' || p[0] > '9' {
			return nil, fmt.Errorf("parent %s does not exist, and %q is not a VLAN ID of 1 to 4094 that it could be made for", name, clip(p))
		}
		list = append(list, datapath.Parent{Name: strings.Join(parts[:i+2], "."), Lower: list[i].Name, VLAN: id})
	}
	if len(list) > 3 {
		return nil, fmt.Errorf("parent %s: more than two VLAN tags", name)
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
		return fmt.Errorf("mtu %d is more than the %d of parent %s", rec.Options.MTU, below.MTU, o.Parent)
	}
	if rec.Options.MTU == 0 {
		rec.MTU = below.MTU
	}
	rec.identify(below.MAC)
	if rec.Mode == modeIPvlan && o.HostAccess && !o.layer3() && below.Strict {
		// What an ipvlan does not know comes out of its parent, but the way back
		// leads by the host's own sub-interface.
		return fmt.Errorf("option host_access=true: reverse path filtering on %s is strict and would drop what its containers send to the host: sysctl -w net.ipv4.conf.%s.rp_filter=2", below.Name, below.Name)
	}
	if below.Name == o.Parent && !o.layer3() {
		return fits(*rec, below)
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
		if ok && !(f.Ours && f.Kind == "vlan") {
			rec.Parents = append([]datapath.Parent{{Name: name, Existing: true}}, made...)
			return f, usable(f)
		}
		parts, err := vlanParts(name)
		if err != nil {
			return f, err
		}
		if len(parts) == 1 {
			return f, fmt.Errorf("parent %s does not exist: ip link shows the interfaces of this host", name)
		}
		made = append([]datapath.Parent{parts[len(parts)-1]}, made...)
		name = parts[len(parts)-2].Name
	}
}

// usable refuses a link that cannot be a parent.
func usable(f datapath.LinkFacts) error {
	switch {
	case f.Name == "lo":
		return errors.New("parent lo is the loopback interface, which leads to no LAN")
	case f.Ours:
		return fmt.Errorf("parent %s belongs to another network of this plugin: name a network card, or leave the parent out", f.Name)
	case f.Master != "":
		return fmt.Errorf("parent %s is a port of %s: use parent=%s, or mode=bridge with bridge=%s", f.Name, f.Master, f.Master, f.Master)
	case !f.Up:
		return fmt.Errorf("parent %s is down: ip link set %s up", f.Name, f.Name)
	}
	return nil
}

// fits refuses subnets that overlap with the parent's without being the same:
// one of the two sides would not know what is on the link.
func fits(n Network, f datapath.LinkFacts) error {
	for _, s := range n.Subnets {
		for _, a := range f.Addrs {
			if p := a.Masked(); p.Overlaps(s.Pool) && p != s.Pool && !p.IsSingleIP() {
				return fmt.Errorf("subnet %s does not fit parent %s, which has %s: use --subnet %s, with --ip-range for a part of it", s.Pool, f.Name, a, p)
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
	if !n.onParent() || !o.onParent() || n.parent() != o.parent() {
		return nil
	}
	a, b := n.Options, o.Options
	what := ""
	switch {
	case n.Mode != o.Mode:
		what = "mode=" + o.Mode
	case a.SubMode == "passthru" || b.SubMode == "passthru":
		return fmt.Errorf("parent %s: a network with macvlan_mode=passthru is alone on its parent, and network %s is there", n.parent(), short(o.ID))
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
// container.
func (d *Driver) tryParent(ctx context.Context, n *network) error {
	if !n.rec.onParent() {
		return nil
	}
	s := datapath.State{Children: d.backends[n.rec.Mode].Endpoint(n.rec, Endpoint{ID: n.rec.ID}).Children}
	if _, err := d.kernel.Ensure(ctx, s); err != nil {
		return err
	}
	err := d.kernel.Remove(ctx, s)
	if err != nil {
		ctx, cancel := cleanup(ctx)
		defer cancel()
		err = join(err, d.kernel.Remove(ctx, s))
	}
	return err
}

// openAccess makes the host's own sub-interface for published ports, if the
// network has none yet and one would be of use.
func (d *Driver) openAccess(ctx context.Context, id string) error {
	d.mu.Lock()
	n := d.networks[id]
	need := n != nil && !n.doomed && n.rec.onParent() && !n.rec.Access && n.rec.Options.reachable() && n.rec.Options.Egress == EgressDriver
	d.mu.Unlock()
	if !need {
		return nil
	}
	d.change.Lock()
	defer d.change.Unlock()
	n = d.networks[id] // change is held: the table stands still
	if n == nil || n.doomed || n.rec.Access {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	old, before := n.rec, d.networkState(n)
	rec := old
	rec.Access = true
	err := d.saveNetwork(ctx, n, rec)
	if err == nil {
		_, err = d.kernel.Ensure(ctx, d.networkState(n))
	}
	if err != nil {
		ctx, cancel := cleanup(ctx)
		defer cancel()
		return join(err, d.kernel.Remove(ctx, without(d.networkState(n), before)), d.saveNetwork(ctx, n, old))
	}
	return nil
}

// arrive is what Join does for an endpoint on a parent: from now on its link is
// the container's, and it is given the way back to the host if the host is to
// reach it.
func (d *Driver) arrive(ctx context.Context, n *network, e *endpoint) error {
	if !n.rec.onParent() {
		return nil
	}
	rec := e.rec
	rec.Joined, rec.Reach = true, n.rec.Access
	rec.Host, rec.Near = nil, nil
	if n.rec.Options.HostAccess {
		var err error
		if rec.Host, rec.Near, err = d.surroundings(ctx, n.rec); err != nil {
			return err
		}
	}
	return d.become(ctx, n, e, rec)
}

// surroundings are the host's addresses on the parent, and the subnets of its
// bridges that are not the network's own.
func (d *Driver) surroundings(ctx context.Context, n Network) (hosts []netip.Addr, near []netip.Prefix, err error) {
	f, _, err := d.host.Link(ctx, n.parent())
	if err != nil {
		return nil, nil, err
	}
	for _, p := range f.Addrs {
		if !slices.Contains(hosts, p.Addr()) {
			hosts = append(hosts, p.Addr())
		}
	}
	bridged, err := d.host.Bridged(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range bridged {
		if !slices.ContainsFunc(n.Subnets, func(s Subnet) bool { return s.Pool.Overlaps(p) }) && !n.Options.layer3() {
			near = append(near, p)
		}
	}
	return hosts, near, nil
}
