package driver

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

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
		return fmt.Errorf("option egress=%s needs a parent: without one the network leads nowhere: add -o parent=, or leave egress out", o.Egress)
	}
	n.Internal = n.Internal || o.Parent == "" // as the built-in drivers have it
	if err := checkEgress(n); err != nil {
		return err
	}
	if o.MTU != 0 {
		if err := checkMTU(*n); err != nil {
			return err
		}
	}
	if len(o.HostAddrs) > 0 && !o.HostAccess {
		return errors.New("option host_address has no meaning without host_access=true: add it, or leave host_address out")
	}
	if o.HostAccess && !o.reachable() {
		return fmt.Errorf("option host_access=true: %s keeps the host out as well: it needs %s", o.keepsOut(b.Kind), o.letsIn(b.Kind))
	}
	for i, a := range o.HostAddrs {
		s, ok := n.subnet(a)
		if !ok {
			return fmt.Errorf("option host_address: %s is in none of the network's subnets (%s): %s", a, pools(*n), n.oneOf(a))
		}
		if a == s.Gateway.Addr() {
			return fmt.Errorf("option host_address: %s is the gateway's address: choose one that no device of the LAN has", a)
		}
		if i > 0 && a.Is4() == o.HostAddrs[0].Is4() {
			return fmt.Errorf("option host_address: %s and %s are of one family: give at most one IPv4 and one IPv6 address", o.HostAddrs[0], a)
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

// isLAN reports whether it is a LAN network: by its link a container reaches others
// past the host.
func (n Network) isLAN() bool { return n.onParent() || n.Options.Bridge != "" }

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
	if n.Internal { // by the host too it leads to the host alone
		s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetInternal, Link: own.Name})
	}
	s.Hook = true
	return s
}

func (b Parent) child(n Network, name string, mac datapath.MAC) datapath.Child {
	c := datapath.Child{Name: name, Parent: n.parent(), Kind: b.Kind, Mode: n.Options.SubMode, Flag: n.Options.SubFlag, MTU: n.Options.MTU}
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
	c := b.child(n, peerEnd(e.ID), e.MAC)
	c.MTU = cmp.Or(e.MTU, c.MTU)
	s := datapath.State{Children: []datapath.Child{c}}
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
			s.Elements = append(s.Elements, n.near(e, a.Addr())...)
		}
		s.Forward4 = s.Forward4 || a.Addr().Is4()
		s.Forward6 = s.Forward6 || a.Addr().Is6()
	}
	s.Add(published(e.Ports, nil))
	return s
}

// near are the host's addresses that the endpoint answers at once.
func (n Network) near(e Endpoint, a netip.Addr) []datapath.Element {
	var list []datapath.Element
	for _, h := range slices.Concat(e.Host, n.Options.HostAddrs) {
		if h.Is4() == a.Is4() {
			list = append(list, datapath.Element{Set: datapath.SetNear, Net: single(h), To: a})
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

// wayBack are the routes to the host.
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
	return list
}
