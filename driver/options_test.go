package driver

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/plugin"
)

var sameAddr = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
var samePrefix = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

func TestParseOptions(t *testing.T) {
	base := Options{ICC: true, Masquerade: true}
	with := func(f func(*Options)) Options {
		o := base
		f(&o)
		return o
	}
	for _, c := range []struct {
		generic map[string]any
		want    Options
	}{
		{nil, base},
		{map[string]any{"mode": "bridge"}, base},
		{map[string]any{"mtu": "1400"}, with(func(o *Options) { o.MTU = 1400 })},
		{map[string]any{"com.docker.network.driver.mtu": "9000", "mtu": "9000"}, with(func(o *Options) { o.MTU = 9000 })},
		{map[string]any{"egress": "engine"}, with(func(o *Options) { o.Egress = EgressEngine })},
		{map[string]any{"com.docker.network.bridge.enable_icc": "false"}, with(func(o *Options) { o.ICC = false })},
		{map[string]any{"com.docker.network.bridge.enable_icc": "0"}, with(func(o *Options) { o.ICC = false })},
		{map[string]any{"com.docker.network.bridge.enable_icc": false}, with(func(o *Options) { o.ICC = false })},
		{map[string]any{"com.docker.network.bridge.enable_ip_masquerade": "false"}, with(func(o *Options) { o.Masquerade = false })},
		{map[string]any{"bridge": "br0"}, with(func(o *Options) { o.Bridge, o.Masquerade = "br0", false })},
		{map[string]any{"bridge": "br0", "com.docker.network.bridge.enable_ip_masquerade": "true"}, with(func(o *Options) { o.Bridge = "br0" })},
		{map[string]any{"com.docker.network.bridge.name": "lan7"}, with(func(o *Options) { o.BridgeName = "lan7" })},
		{map[string]any{"com.docker.network.bridge.host_binding_ipv4": "192.0.2.1"}, with(func(o *Options) { o.HostBinding = netip.MustParseAddr("192.0.2.1") })},
		{map[string]any{"com.docker.network.bridge.inhibit_ipv4": "true"}, with(func(o *Options) { o.InhibitIPv4 = true })},
		{map[string]any{"com.docker.network.bridge.gateway_mode_ipv4": "routed", "com.docker.network.bridge.gateway_mode_ipv6": "nat-unprotected"},
			with(func(o *Options) { o.Gateway4, o.Gateway6 = GatewayRouted, GatewayUnprotected })},
		{map[string]any{"com.docker.network.bridge.trusted_host_interfaces": "a:b"}, with(func(o *Options) { o.Trusted = []string{"a", "b"} })},
		{map[string]any{"com.docker.network.container_iface_prefix": "lan"}, with(func(o *Options) { o.Prefix = "lan" })},
		{map[string]any{"com.docker.network.host_ipv4": "192.0.2.1", "com.docker.network.host_ipv6": "2001:db8::1"},
			with(func(o *Options) {
				o.Host4, o.Host6 = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
			})},
		{map[string]any{"routes": "10.0.0.0/8 via 10.1.0.254,fd00::/8  via  fd01::1"}, with(func(o *Options) {
			o.Routes = []Route{
				{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParseAddr("10.1.0.254")},
				{netip.MustParsePrefix("fd00::/8"), netip.MustParseAddr("fd01::1")}}
		})},
		{map[string]any{"com.docker.network.advertise_addr_nmsgs": "3", "com.docker.network.advertise_addr_ms": "100",
			"com.docker.network.enable_ipv4": "true", "com.docker.network.enable_ipv6": "false"}, base},
		{map[string]any{"mode": "macvlan", "parent": "eth0.10", "macvlan_mode": "vepa", "probe": "false"}, Options{ICC: true, Parent: "eth0.10", SubMode: "vepa", NoProbe: true}},
		{map[string]any{"mode": "ipvlan", "ipvlan_mode": "l3s", "ipvlan_flag": "private"}, Options{ICC: true, SubMode: "l3s", SubFlag: "private"}},
		{map[string]any{"mode": "macvlan", "host_access": "true", "host_address": "192.0.2.9, 2001:db8::9"}, Options{ICC: true, HostAccess: true,
			HostAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")}}},
	} {
		n, err := parseNetworkOptions(map[string]any{plugin.OptionGeneric: c.generic}, []string{"bridge", "macvlan", "ipvlan"}, modeBridge)
		if err != nil {
			t.Errorf("%v: %v", c.generic, err)
			continue
		}
		if diff := cmp.Diff(c.want, n.Options, sameAddr, samePrefix); diff != "" {
			t.Errorf("%v: %s", c.generic, diff)
		}
		want, ok := c.generic["mode"]
		if !ok {
			want = "bridge"
		}
		if n.Mode != want || n.Internal {
			t.Errorf("%v: mode %q, internal %t", c.generic, n.Mode, n.Internal)
		}
	}
	for _, raw := range []map[string]any{
		{plugin.OptionInternal: true},
		{plugin.OptionGeneric: map[string]any{"com.docker.network.internal": "true"}},
	} {
		if n, err := parseNetworkOptions(raw, []string{"bridge"}, modeBridge); err != nil || !n.Internal {
			t.Errorf("%v: internal %t, %v", raw, n.Internal, err)
		}
	}
}

func TestRefusedOptions(t *testing.T) {
	for _, c := range []struct {
		key   string
		value any
		want  []string
	}{
		{"com.docker.network.bridge.enable_iccc", "true", []string{`"com.docker.network.bridge.enable_iccc"`, "mode bridge", `did you mean "com.docker.network.bridge.enable_icc"`, "valid are bridge, com.docker"}},
		{"enable_icc", "true", []string{`did you mean "com.docker.network.bridge.enable_icc"`}},
		{"gateway_mode_ipv4", "nat", []string{`did you mean "com.docker.network.bridge.gateway_mode_ipv4"`}},
		{"brigde", "br0", []string{`did you mean "bridge"`}},
		{"MTU", "1500", []string{`did you mean "mtu"`}},
		{"mode", "macvlan", []string{`"macvlan"`, "valid are bridge, overlay"}},
		{"mtu", "575", []string{"option mtu", "576 to 65535", "IPv6 1280"}},
		{"mtu", "65536", []string{"576 to 65535"}},
		{"mtu", "1500 ", []string{"1500 "}},
		{"mtu", "", []string{"576 to 65535"}},
		{"mtu", 1500.0, []string{"mtu", "1500", "not a string"}},
		{"egress", "host", []string{`"host"`, "driver, engine, none"}},
		{"com.docker.network.bridge.enable_icc", "yes", []string{"enable_icc", `"yes"`, "true or false"}},
		{"com.docker.network.bridge.enable_ip_masquerade", "", []string{"true or false"}},
		{"com.docker.network.bridge.gateway_mode_ipv4", "NAT", []string{"nat, nat-unprotected, routed, isolated"}},
		{"com.docker.network.host_ipv4", "2001:db8::1", []string{"2001:db8::1", "not an IPv4 address"}},
		{"com.docker.network.host_ipv6", "192.0.2.1", []string{"not an IPv6 address"}},
		{"com.docker.network.host_ipv6", "fe80::1%eth0", []string{"not an IPv6 address"}},
		{"com.docker.network.bridge.host_binding_ipv4", "localhost", []string{"localhost"}},
		{"bridge", "a-name-of-16-byt", []string{"1 to 15 bytes"}},
		{"bridge", "", []string{"1 to 15 bytes"}},
		{"bridge", "a/b", []string{"a/b"}},
		{"com.docker.network.bridge.name", "..", []string{`".."`}},
		{"com.docker.network.container_iface_prefix", "fourteen-bytes", []string{"1 to 13 bytes"}},
		{"com.docker.network.bridge.trusted_host_interfaces", "a::b", []string{`""`}},
		{"routes", "", []string{"not a route"}},
		{"routes", "10.0.0.0/8", []string{"10.0.0.0/8", "via"}},
		{"routes", "10.0.0.1/8 via 10.1.0.1", []string{"10.0.0.0/8"}},
		{"routes", "10.0.0.0/8 via fd00::1", []string{"mixes"}},
		{"routes", "::ffff:10.0.0.0/104 via fd00::1", []string{"mixes"}},
		{"routes", "0.0.0.0/0 via 10.1.0.1", []string{"--gateway"}},
		{"routes", "10.0.0.0/8 via 10.1.0.1, 10.0.0.0/8 via 10.1.0.2", []string{"twice"}},
		{"routes", "10.0.0.0/8 via 0.0.0.0", []string{"0.0.0.0"}},
		{"routes", "10.0.0.0/8 dev eth0", []string{"via"}},
		{"com.docker.network.internal", "maybe", []string{"maybe"}},
	} {
		_, err := parseNetworkOptions(map[string]any{plugin.OptionGeneric: map[string]any{c.key: c.value}}, []string{"overlay", "bridge"}, modeBridge)
		if err == nil {
			t.Errorf("%s=%v: accepted", c.key, c.value)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s=%v: error %q does not say %q", c.key, c.value, err, w)
			}
		}
	}
	for _, raw := range []map[string]any{{plugin.OptionGeneric: "x"}, {plugin.OptionInternal: "yes"}} {
		if _, err := parseNetworkOptions(raw, []string{"bridge"}, modeBridge); err == nil {
			t.Errorf("%v: accepted", raw)
		}
	}
}

// TestOptionOfAnotherMode: what means something in bridge mode does not in
// another.
func TestOptionOfAnotherMode(t *testing.T) {
	_, err := parseNetworkOptions(map[string]any{plugin.OptionGeneric: map[string]any{"mode": "overlay", "bridge": "br0"}}, []string{"overlay", "bridge"}, modeBridge)
	if err == nil || !strings.Contains(err.Error(), "mode overlay") || strings.Contains(err.Error(), "enable_icc") {
		t.Errorf("got %v", err)
	}
}

func FuzzNetworkOptions(f *testing.F) {
	for name := range options {
		for _, v := range []string{"true", "1500", "nat", "10.0.0.0/8 via 10.1.0.1", "192.0.2.1", "eth0:eth1", ""} {
			f.Add(name, v, "mode", "bridge", true)
			f.Add(name, v, "mode", "macvlan", false)
			f.Add(name, v, "mode", "ipvlan", false)
		}
	}
	f.Fuzz(func(t *testing.T, key1, value1, key2, value2 string, internal bool) {
		raw := map[string]any{plugin.OptionInternal: internal, plugin.OptionGeneric: map[string]any{key1: value1, key2: value2}}
		backends := allBackends()
		n, err := parseNetworkOptions(raw, []string{modeBridge, modeMacvlan, modeIPvlan}, modeBridge)
		if err == nil {
			n.ID, n.MTU = net1, max(n.Options.MTU, 576)
			n.Subnets = []Subnet{subnet("10.1.0.0/24", "10.1.0.1/24")}
			n.identify(datapath.MAC{})
			if n.Parents, err = vlanParts(n.Options.Parent); err == nil {
				err = backends[n.Mode].Validate(&n)
			}
		}
		if err != nil {
			if err.Error() == "" || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q", err)
			}
			return
		}
		// What is accepted survives the store and means the same after it.
		n.Version = recordVersion
		b, err := json.Marshal(n)
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeNetwork(networkKey(n.ID), b)
		if err != nil {
			t.Fatal(err)
		}
		if a, b := backends[n.Mode].Network(n).String(), backends[n.Mode].Network(back).String(); a != b {
			t.Errorf("%v is\n%s\nand after the store\n%s", raw, a, b)
		}
		if !n.Internal && n.Options.Egress == EgressNone != slices.Contains([]string{value1, value2}, "none") {
			t.Errorf("%v has egress %s", raw, n.Options.Egress)
		}
	})
}

func FuzzParentName(f *testing.F) {
	for _, name := range []string{"eth0", "eth0.10", "eth0.10.20", "eth0.010", "eth0.", ".5", "eth0.4095", ""} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		list, err := vlanParts(name)
		if err != nil {
			return
		}
		if top := list[len(list)-1]; top.Name != name || len(list) > 3 {
			t.Errorf("%q is %v", name, list)
		}
		for i, p := range list[1:] {
			if p.Lower != list[i].Name || p.VLAN < 1 || p.VLAN > 4094 || p.Name != fmt.Sprintf("%s.%d", p.Lower, p.VLAN) {
				t.Errorf("%q is %v", name, list)
			}
		}
	})
}

func FuzzRoutes(f *testing.F) {
	f.Add("10.0.0.0/8 via 10.1.0.254, fd00::/8 via fd01::1")
	f.Add("10.0.0.0/8 via 10.1.0.254,")
	f.Add("::ffff:10.0.0.0/104 via ::ffff:10.0.0.1")
	f.Fuzz(func(t *testing.T, text string) {
		routes, err := parseRoutes(text)
		if err != nil {
			return
		}
		var words []string
		for _, r := range routes {
			if r.Destination != r.Destination.Masked() || r.Destination.Bits() == 0 || r.NextHop.Is4() != r.Destination.Addr().Is4() {
				t.Errorf("%q has the route %v", text, r)
			}
			words = append(words, r.Destination.String()+" via "+r.NextHop.String())
		}
		again, err := parseRoutes(strings.Join(words, ", "))
		if err != nil || !slices.Equal(routes, again) {
			t.Errorf("%q is %v, and written out %v, %v", text, routes, again, err)
		}
	})
}

func FuzzEndpointOptions(f *testing.F) {
	f.Add([]byte(`{"com.docker.network.endpoint.macaddress":"AhEiM0RV","com.docker.network.portmap":[{"Proto":6,"Port":80,"HostPort":8080,"HostPortEnd":8090}]}`))
	f.Add([]byte(`{"mykey":"v"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var raw map[string]any
		if json.Unmarshal(text, &raw) != nil {
			return
		}
		_, _, err := parseEndpointOptions("bridge", raw)
		if _, named := raw[plugin.OptionIfName]; named {
			return
		}
		var users, engines bool // a key of neither side; one that a later engine may send, or that is misspelt
		for k := range raw {
			users = users || !strings.HasPrefix(k, engineKeys) && !slices.Contains(toldOptions, k)
			engines = engines || strings.HasPrefix(k, engineKeys) && !slices.Contains(endpointKeys, k)
		}
		if users && err == nil || !users && !engines && err != nil || err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", text, err)
		}
		n, e := Network{Options: Options{Egress: EgressDriver, Gateway4: GatewayNAT, Gateway6: GatewayNAT}}, Endpoint{Addrs: []netip.Prefix{netip.MustParsePrefix("10.1.0.2/24")}}
		wishes, err := parseWishes(n, e, raw)
		if err != nil {
			return
		}
		for _, w := range wishes {
			if len(w.targets) == 0 || w.last < w.first || w.freedom() < 1 {
				t.Errorf("%s: wish %+v", text, w)
			}
			for _, p := range w.under(1) {
				if s := published([]PublishedPort{p}, nil); len(s.Sockets) != 1 || s.Sockets[0].To.Addr() != e.Addrs[0].Addr() {
					t.Errorf("%s: port %+v is %v", text, p, s)
				}
			}
		}
	})
}
