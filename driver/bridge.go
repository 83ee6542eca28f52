package driver

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft/internal/datapath"
)

// Bridge is the Backend of -o mode=bridge: veth pairs in a Linux bridge of our
// own, or in one that exists already. The zero value is ready to use.
type Bridge struct{}

// Validate implements Backend.
func (Bridge) Validate(n *Network) error {
	o := &n.Options
	if err := checkEgress(n); err != nil {
		return err
	}
	if o.Prefix == "" {
		o.Prefix = "eth"
	}
	for _, mode := range []*GatewayMode{&o.Gateway4, &o.Gateway6} {
		if *mode == "" {
			*mode = GatewayNAT
		}
		if *mode == GatewayIsolated && !n.Internal {
			return errors.New("gateway mode isolated needs an internal network: add --internal")
		}
	}
	for _, f := range families {
		if o.host(f).IsValid() && !o.Masquerade {
			return fmt.Errorf("option com.docker.network.host_ipv%d: nothing is masqueraded here: leave it out, or set com.docker.network.bridge.enable_ip_masquerade=true", f)
		}
	}
	if err := checkMTU(*n); err != nil {
		return err
	}
	if err := checkExisting(*n); err != nil {
		return err
	}
	return checkRoutes(*n)
}

// checkEgress fills in who takes the containers out and refuses what the choice
// makes meaningless.
func checkEgress(n *Network) error {
	o := &n.Options
	if n.Internal {
		if o.Egress != "" && o.Egress != EgressNone {
			return fmt.Errorf("option egress=%s contradicts --internal: an internal network has no way out: leave one of the two out", o.Egress)
		}
		o.Egress = EgressNone // the built-in driver accepts all else there
		return nil
	}
	if o.Egress == "" {
		o.Egress = EgressDriver
	}
	if o.Egress == EgressDriver {
		return nil
	}
	for name, given := range map[string]bool{
		"com.docker.network.bridge.gateway_mode_ipv4":       o.Gateway4 != "" && o.Gateway4 != GatewayNAT,
		"com.docker.network.bridge.gateway_mode_ipv6":       o.Gateway6 != "" && o.Gateway6 != GatewayNAT,
		"com.docker.network.bridge.host_binding_ipv4":       o.HostBinding.IsValid(),
		"com.docker.network.bridge.trusted_host_interfaces": len(o.Trusted) > 0,
		"com.docker.network.host_ipv4":                      o.Host4.IsValid(),
		"com.docker.network.host_ipv6":                      o.Host6.IsValid(),
	} {
		if given {
			return fmt.Errorf("option %s has no meaning with egress=%s: it needs egress=driver", name, o.Egress)
		}
	}
	return nil
}

// checkExisting refuses what would need a bridge of our own.
func checkExisting(n Network) error {
	o := n.Options
	switch {
	case o.Bridge == "":
		return nil
	case o.BridgeName != "":
		return fmt.Errorf("options bridge=%s and com.docker.network.bridge.name=%s contradict each other: the first attaches to a bridge that exists, the second makes one", o.Bridge, o.BridgeName)
	case n.Internal:
		return fmt.Errorf("option bridge=%s contradicts --internal: others on that bridge would be reached: use -o egress=none instead, which leaves the gateway out", o.Bridge)
	case o.InhibitIPv4:
		return fmt.Errorf("option com.docker.network.bridge.inhibit_ipv4 has no meaning with bridge=%s, which gets no address anyway: leave it out", o.Bridge)
	case len(o.Trusted) > 0:
		return fmt.Errorf("option com.docker.network.bridge.trusted_host_interfaces has no meaning with bridge=%s, which is not kept apart: leave it out", o.Bridge)
	case o.Gateway4 != GatewayNAT || o.Gateway6 != GatewayNAT:
		return fmt.Errorf("gateway modes have no meaning with bridge=%s, which is not kept apart: leave it out", o.Bridge)
	}
	return nil
}

func checkRoutes(n Network) error {
	for _, r := range n.Options.Routes {
		if _, ok := n.subnet(r.NextHop); !ok {
			return fmt.Errorf("option routes: next hop %s is in none of the network's subnets (%s): %s", r.NextHop, pools(n), n.oneOf(r.NextHop))
		}
		if s, ok := n.subnet(r.Destination.Addr()); ok && s.Pool.Bits() <= r.Destination.Bits() {
			return fmt.Errorf("option routes: destination %s is inside the network's own subnet %s, which needs no route: leave it out", r.Destination, s.Pool)
		}
	}
	return nil
}

// oneOf says what to do about an address that is in no subnet of the network.
func (n Network) oneOf(a netip.Addr) string {
	if f := familyOf(a); f == ipv6 && !n.has(f) {
		return "create it with --ipv6 --subnet, or leave the address out"
	}
	return "choose one that is"
}

func pools(n Network) string {
	if len(n.Subnets) == 0 {
		return "it has none"
	}
	list := make([]string, len(n.Subnets))
	for i, s := range n.Subnets {
		list[i] = s.Pool.String()
	}
	return strings.Join(list, ", ")
}

// The smallest MTU that hosts have to be able to use: RFC 791, 3.1, and RFC 8200, 5.
const (
	leastIPv4 = 576
	leastIPv6 = 1280
)

// leastMTU is what the protocols of the network need, and which of them does.
func (n Network) leastMTU() (int, family) {
	if n.has(ipv6) {
		return leastIPv6, ipv6
	}
	return leastIPv4, ipv4
}

// checkMTU refuses one that the protocols of the network cannot live with.
func checkMTU(n Network) error {
	if least, f := n.leastMTU(); n.MTU < least {
		return fmt.Errorf("mtu %d is too small: IPv%d needs %d: give -o mtu=%d or more", n.MTU, f, least, least)
	}
	return nil
}

// link is the bridge that a network uses.
func (Bridge) link(n Network) string {
	switch o := n.Options; {
	case o.Bridge != "":
		return o.Bridge
	case o.BridgeName != "":
		return o.BridgeName
	}
	return bridgeName(n.ID)
}

// Network implements Backend.
func (b Bridge) Network(n Network) datapath.State {
	s := datapath.State{Hook: true}
	br := b.link(n)
	if n.Options.Bridge != "" {
		s.Bridges = []datapath.Bridge{{Name: br, Existing: true}}
		if n.Options.ICC {
			s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetPass, Link: br, Out: br})
		}
		s.Elements = append(s.Elements, b.outside(n, br)...)
		return s
	}
	s.Bridges = []datapath.Bridge{{Name: br, MAC: bridgeMAC(n.ID), MTU: n.MTU, Addrs: gateways(n)}}
	s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetBridges, Link: br})
	if n.Options.ICC {
		s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetPass, Link: br, Out: br})
	}
	if n.Options.Egress == EgressNone {
		s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetInternal, Link: br})
		if len(s.Bridges[0].Addrs) == 0 {
			s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetSwitched, Link: br})
		}
	}
	s.Elements = append(s.Elements, b.outside(n, br)...)
	return s
}

// gateways are the addresses of our own bridge. The host keeps its address on
// a network without a way out: that is how it reaches the containers.
func gateways(n Network) []netip.Prefix {
	var addrs []netip.Prefix
	for _, s := range n.Subnets {
		f := familyOf(s.Pool.Addr())
		if s.Gateway.IsValid() && n.Options.gateway(f) != GatewayIsolated && (f == ipv6 || !n.Options.InhibitIPv4) {
			addrs = append(addrs, s.Gateway)
		}
	}
	return addrs
}

// outside is what a network needs to be reached from and to reach elsewhere.
func (Bridge) outside(n Network, br string) []datapath.Element {
	if n.Options.Egress != EgressDriver {
		return nil
	}
	var out []datapath.Element
	for _, s := range n.Subnets {
		f := familyOf(s.Pool.Addr())
		mode := n.Options.gateway(f)
		if mode != GatewayNAT && mode != GatewayUnprotected {
			continue
		}
		switch to := n.Options.host(f); {
		case !n.Options.Masquerade:
		case to.IsValid():
			out = append(out, datapath.Element{Set: datapath.SetSNAT, Net: s.Pool, To: to})
		default:
			out = append(out, datapath.Element{Set: datapath.SetMasquerade, Net: s.Pool})
		}
		if n.Options.Bridge != "" {
			// What stays on that LAN is not on its way out.
			out = append(out, datapath.Element{Set: datapath.SetHome, Net: s.Pool, Link: br})
		} else {
			out = append(out, datapath.Element{Set: datapath.SetHairpin, Net: s.Pool, Link: br})
		}
	}
	for _, f := range families {
		if !n.has(f) {
			continue
		}
		switch n.Options.gateway(f) {
		case GatewayUnprotected:
			out = append(out, datapath.Element{Set: datapath.SetOpen, Link: br, Net: f.all()})
		case GatewayRouted:
			out = append(out, datapath.Element{Set: datapath.SetRouted, Link: br, Net: f.all()})
		case GatewayNAT, GatewayIsolated:
		}
	}
	return out
}

// Endpoint implements Backend.
func (b Bridge) Endpoint(n Network, e Endpoint) datapath.State {
	s := datapath.State{Veths: []datapath.Veth{{
		Name: hostEnd(e.ID), Peer: peerEnd(e.ID), Master: b.link(n), MTU: cmp.Or(e.MTU, n.FirstMTU()), PeerMAC: e.MAC,
		Isolated: !n.Options.ICC, Hairpin: e.Hairpin,
	}}}
	existing := n.Options.Bridge != ""
	for _, a := range e.Addrs {
		if existing {
			s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetAttached, Link: b.link(n), Net: single(a.Addr())})
		}
		// Forwarding belongs to endpoints: at our start, before the engine has
		// set its own networks up, it must not be switched on for their sake.
		// A LAN's own bridge needs it for published ports only.
		if n.Options.Egress == EgressDriver && (!existing || len(e.Ports) > 0) {
			s.Forward4 = s.Forward4 || a.Addr().Is4()
			s.Forward6 = s.Forward6 || a.Addr().Is6()
		}
	}
	s.Add(published(e.Ports, n.Options.Trusted))
	return s
}

// single is the prefix of one address.
func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// Attach implements Backend.
func (Bridge) Attach(n Network, e Endpoint) Attachment {
	at := Attachment{Link: peerEnd(e.ID), Prefix: n.Options.Prefix}
	for _, a := range e.Addrs {
		s, ok := n.subnet(a.Addr())
		if ok && s.Gateway.IsValid() && n.Options.Egress == EgressDriver {
			at.Gateways = append(at.Gateways, s.Gateway.Addr())
		}
		for _, r := range n.Options.Routes {
			if familyOf(r.NextHop) == familyOf(a.Addr()) {
				at.Routes = append(at.Routes, r)
			}
		}
	}
	// Engines before 28 count only an IPv4 gateway as a way out, and all
	// engines add docker_gwbridge where they see none. Said together with an IPv4
	// gateway it would hide that gateway from the engine's count, and a second
	// network of the container would get docker_gwbridge.
	at.NoGateway = n.Options.Egress != EgressEngine && !slices.ContainsFunc(at.Gateways, netip.Addr.Is4)
	return at
}
