package driver

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/datapath"
)

// onLAN is the body of a network on eth0, which is in 10.1.0.0/24 and
// fd00:1::/64: of 28.5, or of 20.10. Gateways are without their mask.
func onLAN(modern bool, options, pool, gateway, pool6, gateway6 string) string {
	data := func(pool, gateway string) string {
		if pool == "" {
			return "[]"
		}
		if gateway != "" {
			_, bits, _ := strings.Cut(pool, "/")
			gateway = fmt.Sprintf(`,"Gateway":"%s/%s"`, gateway, bits)
		}
		return fmt.Sprintf(`[{"AddressSpace":"x","Pool":%q%s}]`, pool, gateway)
	}
	engine := ""
	if modern {
		engine = `"com.docker.network.enable_ipv4":true,`
	}
	return fmt.Sprintf(`{"NetworkID":%q,"Options":{%s"com.docker.network.enable_ipv6":%t,"com.docker.network.generic":%s},"IPv4Data":%s,"IPv6Data":%s}`,
		net1, engine, pool6 != "", options, data(pool, gateway), data(pool6, gateway6))
}

// TestLANGateway: containers on a LAN get the gateway that was typed, else the
// host's own, else none; never one that an IPAM made up.
func TestLANGateway(t *testing.T) {
	const macvlan = `{"mode":"macvlan","parent":"eth0"}`
	guessed := func(string) (bool, bool, bool) { return false, true, true }
	typed := func(string) (bool, bool, bool) { return false, false, true }
	automatic := func(string) (bool, bool, bool) { return true, true, true }
	for _, c := range []struct {
		name            string
		modern          bool
		options         string
		routers         []string
		ipam            func(gateway string) (subnet, address, ours bool)
		pool, gateway   string
		pool6, gateway6 string
		want            string   // gateways; "-" for none
		refused         []string // else
	}{
		{name: "engine 28, none typed", modern: true, options: macvlan, routers: []string{"10.1.0.254"}, pool: "10.1.0.0/24", want: "10.1.0.254/24"},
		{name: "engine 28, another typed", modern: true, options: macvlan, routers: []string{"10.1.0.254"}, pool: "10.1.0.0/24", gateway: "10.1.0.1", want: "10.1.0.1/24"},
		{name: "engine 28, no default route", modern: true, options: macvlan, pool: "10.1.0.0/24", want: "-"},
		{name: "engine 28, the router has the first address", modern: true, options: macvlan, routers: []string{"10.1.0.1"}, pool: "10.1.0.0/24", gateway: "10.1.0.1", want: "10.1.0.1/24"},
		{name: "engine 28, the same with a range", modern: true, options: macvlan, routers: []string{"10.1.0.1"}, pool: "10.1.0.0/24", gateway: "10.1.0.192",
			refused: []string{"gateway 10.1.0.192", "eth0 is 10.1.0.1", "--gateway 10.1.0.1", "--ipam-driver weft:latest"}},
		{name: "engine 28, our IPAM, with a range", modern: true, options: macvlan, routers: []string{"10.1.0.1"}, ipam: guessed, pool: "10.1.0.0/24", gateway: "10.1.0.192", want: "10.1.0.1/24"},
		{name: "engine 28, another subnet", modern: true, options: macvlan, routers: []string{"10.1.0.254"}, pool: "10.7.0.0/24", want: "-"},
		{name: "our IPAM, none typed", options: macvlan, routers: []string{"10.1.0.254"}, ipam: guessed, pool: "10.1.0.0/24", gateway: "10.1.0.1", want: "10.1.0.254/24"},
		{name: "our IPAM, none typed, no default route", options: macvlan, ipam: guessed, pool: "10.1.0.0/24", gateway: "10.1.0.1", want: "-"},
		{name: "our IPAM, typed", options: macvlan, routers: []string{"10.1.0.254"}, ipam: typed, pool: "10.1.0.0/24", gateway: "10.1.0.1", want: "10.1.0.1/24"},
		{name: "engine 20, its IPAM, first address", options: macvlan, routers: []string{"10.1.0.254"}, pool: "10.1.0.0/24", gateway: "10.1.0.1",
			refused: []string{"gateway 10.1.0.1", "eth0 is 10.1.0.254", "--gateway 10.1.0.254"}},
		{name: "engine 20, its IPAM, the router", options: macvlan, routers: []string{"10.1.0.254"}, pool: "10.1.0.0/24", gateway: "10.1.0.254", want: "10.1.0.254/24"},
		{name: "engine 20, its IPAM, evidently typed", options: macvlan, routers: []string{"10.1.0.254"}, pool: "10.1.0.0/24", gateway: "10.1.0.253", want: "10.1.0.253/24"},
		{name: "engine 20, its IPAM, no default route", options: macvlan, pool: "10.1.0.0/24", gateway: "10.1.0.1", want: "10.1.0.1/24"},
		{name: "IPv6, none typed", modern: true, options: macvlan, routers: []string{"10.1.0.1", "fe80::1"}, pool: "10.1.0.0/24", gateway: "10.1.0.1", pool6: "fd00:1::/64", want: "10.1.0.1/24 -"},
		{name: "IPv6, our IPAM guessed", options: macvlan, routers: []string{"10.1.0.254"}, ipam: guessed, pool: "10.1.0.0/24", gateway: "10.1.0.1", pool6: "fd00:1::/64", gateway6: "fd00:1::1", want: "10.1.0.254/24 -"},
		{name: "IPv6, the host's router", modern: true, options: macvlan, routers: []string{"10.1.0.1", "fd00:1::5"}, pool: "10.1.0.0/24", gateway: "10.1.0.1", pool6: "fd00:1::/64", want: "10.1.0.1/24 fd00:1::5/64"},
		{name: "the host itself", modern: true, options: macvlan, pool: "10.1.0.0/24", gateway: "10.1.0.10", refused: []string{"10.1.0.10", "this host's own", "--gateway"}},
		{name: "the host itself, sent back by the switch", modern: true, options: `{"mode":"macvlan","parent":"eth0","macvlan_mode":"vepa"}`, pool: "10.1.0.0/24", gateway: "10.1.0.10", want: "10.1.0.10/24"},
		{name: "automatic subnet, our IPAM", options: macvlan, routers: []string{"10.1.0.254"}, ipam: automatic, pool: "172.16.3.0/24", gateway: "172.16.3.1",
			refused: []string{"172.16.3.0/24", "parent eth0 is in 10.1.0.0/24", "--subnet 10.1.0.0/24 --gateway 10.1.0.254", "--ipam-opt dhcp=eth0"}},
		{name: "automatic subnet, the engine's IPAM", options: macvlan, pool: "172.18.0.0/16", gateway: "172.18.0.1", refused: []string{"172.18.0.0/16", "--subnet 10.1.0.0/24", "--ipam-driver weft:latest --ipam-opt dhcp=eth0"}},
		{name: "automatic subnet, engine 28's", modern: true, options: macvlan, pool: "192.168.16.0/20", refused: []string{"192.168.16.0/20", "--subnet 10.1.0.0/24"}},
		{name: "such a subnet typed", modern: true, options: macvlan, pool: "172.18.0.0/16", gateway: "172.18.0.1", want: "172.18.0.1/16"},
		{name: "automatic subnet, internal", options: `{"mode":"macvlan","parent":"eth0","egress":"none"}`, ipam: automatic, pool: "172.16.3.0/24", gateway: "172.16.3.1", want: "172.16.3.1/24"},
		{name: "automatic subnet on a VLAN to be made", modern: true, options: `{"mode":"macvlan","parent":"eth0.30"}`, ipam: automatic, pool: "172.16.3.0/24", want: "-"},
		{name: "automatic subnet without a parent", options: `{"mode":"macvlan"}`, ipam: automatic, pool: "172.16.3.0/24", gateway: "172.16.3.1", want: "172.16.3.1/24"},
		{name: "automatic subnet, routed by the parent", options: `{"mode":"ipvlan","parent":"eth0","ipvlan_mode":"l3"}`, ipam: automatic, pool: "172.16.3.0/24", gateway: "172.16.3.1", want: "172.16.3.1/24"},
		{name: "existing bridge, guessed", options: `{"bridge":"br0"}`, routers: []string{"10.8.0.254"}, ipam: guessed, pool: "10.8.0.0/24", gateway: "10.8.0.1", want: "10.8.0.254/24"},
		{name: "existing bridge, automatic subnet", options: `{"bridge":"br0"}`, ipam: automatic, pool: "172.16.3.0/24", gateway: "172.16.3.1",
			refused: []string{"172.16.3.0/24", "bridge br0 is in 10.8.0.0/24", "add --ipam-driver weft:latest --subnet 10.8.0.0/24 --gateway 10.8.0.2"}},
		{name: "existing bridge, engine 28's automatic subnet", modern: true, options: `{"bridge":"br0"}`, routers: []string{"10.8.0.254"}, pool: "172.18.0.0/16",
			refused: []string{"172.18.0.0/16", "bridge br0 is in 10.8.0.0/24", "--subnet 10.8.0.0/24 --gateway 10.8.0.254", "--ipam-opt dhcp=br0"}},
		{name: "existing bridge, engine 20's automatic subnet", options: `{"bridge":"br0"}`, pool: "172.18.0.0/16", gateway: "172.18.0.1", refused: []string{"bridge br0 is in 10.8.0.0/24"}},
		{name: "existing bridge by the built-in's option, automatic subnet", options: `{"com.docker.network.bridge.name":"br0"}`, ipam: automatic, pool: "172.16.3.0/24", gateway: "172.16.3.1",
			refused: []string{"bridge br0 is in 10.8.0.0/24", "--subnet 10.8.0.0/24"}},
		{name: "existing bridge, another subnet typed", options: `{"bridge":"br0"}`, ipam: typed, pool: "172.16.3.0/24", gateway: "172.16.3.1", want: "172.16.3.1/24"},
		{name: "existing bridge without a router", options: `{"bridge":"br0"}`, ipam: guessed, pool: "10.8.0.0/24", gateway: "10.8.0.1", want: "10.8.0.2/24"},
		{name: "existing bridge with a router of another subnet", options: `{"bridge":"br0"}`, routers: []string{"10.8.1.1"}, ipam: guessed, pool: "10.8.0.0/24", gateway: "10.8.0.1", want: "10.8.0.1/24"},
		{name: "existing bridge without a router, typed", options: `{"bridge":"br0"}`, ipam: typed, pool: "10.8.0.0/24", gateway: "10.8.0.1", want: "10.8.0.1/24"},
		{name: "existing bridge without a router, the engine's IPAM", options: `{"bridge":"br0"}`, pool: "10.8.0.0/24", gateway: "10.8.0.1",
			refused: []string{"gateway 10.8.0.1", "br0 is 10.8.0.2", "add --gateway 10.8.0.2"}},
		{name: "existing bridge without a router, its address typed", modern: true, options: `{"bridge":"br0"}`, pool: "10.8.0.0/24", gateway: "10.8.0.2", want: "10.8.0.2/24"},
		{name: "existing bridge without an address there", options: `{"bridge":"br0"}`, ipam: guessed, pool: "10.9.0.0/24", gateway: "10.9.0.1", want: "10.9.0.1/24"},
		{name: "existing bridge, a part of its subnet", options: `{"bridge":"br0"}`, ipam: typed, pool: "10.8.0.0/25", gateway: "10.8.0.1",
			refused: []string{"subnet 10.8.0.0/25 does not fit bridge br0, which has 10.8.0.2/24", "--subnet 10.8.0.0/24"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRigWith(t, func(conf *Config) {
				if c.ipam != nil {
					conf.Chosen = func(_ netip.Prefix, a netip.Addr) (bool, bool, bool) { return c.ipam(a.String()) }
				}
			})
			r.host.bridge("br0", "10.8.0.2/24")
			for _, a := range c.routers {
				r.host.routers["eth0"] = append(r.host.routers["eth0"], netip.MustParseAddr(a))
				r.host.routers["br0"] = append(r.host.routers["br0"], netip.MustParseAddr(a))
			}
			body := onLAN(c.modern, c.options, c.pool, c.gateway, c.pool6, c.gateway6)
			if c.refused != nil {
				r.refused("CreateNetwork", body, c.refused...)
				r.empty()
				return
			}
			r.must("CreateNetwork", body)
			r.must("CreateNetwork", body) // as a swarm's node does after a crash
			var got []string
			for _, s := range r.d.networks[net1].rec.Subnets {
				if s.Gateway.IsValid() {
					got = append(got, s.Gateway.String())
				} else {
					got = append(got, "-")
				}
			}
			if text := strings.Join(got, " "); text != c.want {
				t.Errorf("gateways %s, want %s", text, c.want)
			}
			strange := strings.Contains(c.options, "bridge") && !strings.HasPrefix(c.pool, "10.8.0.") && strings.Contains(c.options, "br0")
			if said := slices.ContainsFunc(r.log.AllEntries(), func(e *logrus.Entry) bool {
				return strings.HasPrefix(e.Message, "subnet "+c.pool+" is not one of bridge br0, which has 10.8.0.2/24")
			}); said != strange {
				t.Errorf("another subnet than the bridge's is said: %t", said)
			}
		})
	}
}

// TestLANRouterIsNobodys: the router that the driver found is no container's,
// whatever the IPAM knows.
func TestLANRouterIsNobodys(t *testing.T) {
	r := newRig(t)
	r.host.routers["eth0"] = []netip.Addr{netip.MustParseAddr("10.1.0.254")}
	r.must("CreateNetwork", onLAN(true, `{"mode":"macvlan","parent":"eth0","probe":"false"}`, "10.1.0.0/24", "", "", ""))
	r.refused("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.254/24", ""), "10.1.0.254 is the gateway's", "--ip-range")
	if err := r.d.Vet(t.Context(), netip.MustParsePrefix("10.1.0.0/24"), netip.MustParseAddr("10.1.0.254")); err == nil {
		t.Error("our IPAM hands the gateway's address out")
	}
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.1/24", ""))
	if answer := r.must("Join", joinBody(net1, ep1)); !strings.Contains(answer, `"Gateway":"10.1.0.254"`) {
		t.Errorf("join: %s", answer)
	}
}

// TestGwAllocCheckOnLAN: the engine is to keep the first address only where the LAN's
// router has it.
func TestGwAllocCheckOnLAN(t *testing.T) {
	for _, c := range []struct{ options, router, want string }{
		{`{"mode":"macvlan","parent":"eth0"}`, "10.1.0.1", `{"SkipIPv4":false,"SkipIPv6":true}`},
		{`{"mode":"macvlan","parent":"eth0"}`, "10.1.0.254", `{"SkipIPv4":true,"SkipIPv6":true}`},
		{`{"mode":"macvlan","parent":"eth0"}`, "fd00:1::1", `{"SkipIPv4":true,"SkipIPv6":false}`},
		{`{"mode":"ipvlan","parent":"eth0.5"}`, "10.1.0.1", `{"SkipIPv4":true,"SkipIPv6":true}`},
		{`{"bridge":"br0"}`, "10.1.0.1", `{"SkipIPv4":false,"SkipIPv6":false}`},
		{`{"bridge":"br0"}`, "10.8.0.254", `{"SkipIPv4":true,"SkipIPv6":false}`},
		{`{}`, "10.1.0.254", `{"SkipIPv4":false,"SkipIPv6":false}`},
	} {
		r := newRig(t)
		r.host.bridge("br0", "10.8.0.2/24")
		for _, link := range []string{"eth0", "br0"} {
			r.host.routers[link] = []netip.Addr{netip.MustParseAddr(c.router)}
		}
		if got := r.must("GwAllocCheck", `{"Options":{"com.docker.network.generic":`+c.options+`}}`); got != c.want {
			t.Errorf("%s, router %s: %s, want %s", c.options, c.router, got, c.want)
		}
	}
}

// TestHostSubnetOnBridge: a bridge with the subnet of a card would take the host off
// that LAN.
func TestHostSubnetOnBridge(t *testing.T) {
	r := newRig(t)
	r.host.addressed = map[string][]netip.Prefix{
		"eth0": {netip.MustParsePrefix("192.168.1.10/24"), netip.MustParsePrefix("2001:db8::10/64")},
		"lo":   {netip.MustParsePrefix("127.0.0.1/8")},
	}
	refused := func(options, pool, gateway, pool6, gateway6 string) {
		t.Helper()
		r.refused("CreateNetwork", onLAN(true, options, pool, gateway, pool6, gateway6), "eth0", "choose another --subnet", "-o mode=macvlan -o parent=eth0")
		r.empty()
	}
	refused("{}", "192.168.1.0/24", "192.168.1.1", "", "")
	refused("{}", "192.168.1.128/25", "192.168.1.129", "", "")
	refused("{}", "192.168.0.0/16", "192.168.0.1", "", "")
	refused(`{"egress":"none"}`, "192.168.1.0/24", "192.168.1.1", "", "")
	refused("{}", "10.9.0.0/24", "10.9.0.1", "2001:db8::/64", "2001:db8::1")
	r.host.card(datapath.LinkFacts{Name: "docker0", Kind: "bridge", Up: true, MTU: 1500})
	r.host.addressed["docker0"] = []netip.Prefix{netip.MustParsePrefix("172.17.0.1/16")}
	body := onLAN(true, "{}", "172.17.5.0/24", "172.17.5.1", "", "")
	if _, err := r.call("CreateNetwork", body); err == nil || !strings.Contains(err.Error(), "docker0") || strings.Contains(err.Error(), "macvlan") {
		t.Errorf("on docker0's subnet: %v", err)
	}
	for _, ok := range []string{
		onLAN(true, "{}", "192.168.2.0/24", "192.168.2.1", "", ""),
		onLAN(true, `{"com.docker.network.bridge.inhibit_ipv4":"true"}`, "192.168.1.0/24", "192.168.1.1", "", ""),
		onLAN(true, `{"bridge":"eth0"}`, "192.168.1.0/24", "192.168.1.1", "", ""),
		onLAN(true, `{"mode":"macvlan","parent":"eth0"}`, "192.168.1.0/24", "192.168.1.1", "", ""),
	} {
		r.must("CreateNetwork", ok)
		r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	}
}

// TestSubnetWithoutRoom: the gateway would take the only address.
func TestSubnetWithoutRoom(t *testing.T) {
	r := newRig(t)
	for _, options := range []string{"{}", `{"bridge":"br0"}`} {
		r.refused("CreateNetwork", onLAN(true, options, "10.9.0.1/32", "10.9.0.1", "", ""), "10.9.0.1/32 has one address", "larger --subnet")
		r.refused("CreateNetwork", onLAN(true, options, "10.9.0.0/24", "10.9.0.1", "fd00:9::1/128", "fd00:9::1"), "fd00:9::1/128 has one address")
	}
	r.must("CreateNetwork", onLAN(true, "{}", "10.9.0.0/31", "10.9.0.0", "", ""))
}
