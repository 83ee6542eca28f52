package driver

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/plugin"
)

// parentCase is a network as a user types it, with two endpoints; the host
// reaches the first.
type parentCase struct {
	name     string
	options  string // key=value, space separated
	internal bool
	v4, v6   bool
}

var parentCases = []parentCase{
	{name: "macvlan", options: "mode=macvlan parent=eth0", v4: true},
	{name: "macvlan-access", options: "mode=macvlan parent=eth0 host_access=true", v4: true, v6: true},
	{name: "macvlan-address", options: "mode=macvlan parent=eth0 host_access=true host_address=10.1.0.77", v4: true},
	{name: "macvlan-private", options: "mode=macvlan parent=eth0 macvlan_mode=private mtu=1400", v4: true},
	{name: "macvlan-passthru", options: "mode=macvlan parent=eth0 macvlan_mode=passthru", v4: true},
	{name: "macvlan-internal", options: "mode=macvlan parent=eth0", internal: true, v4: true},
	{name: "macvlan-alone", options: "mode=macvlan", v4: true},
	{name: "macvlan-vlan", options: "mode=macvlan parent=eth0.10", v6: true},
	{name: "macvlan-engine", options: "mode=macvlan parent=eth0 egress=engine routes=10.8.0.0/16_via_10.1.0.254", v4: true},
	{name: "ipvlan", options: "mode=ipvlan parent=eth0 host_access=true", v4: true, v6: true},
	{name: "ipvlan-l3", options: "mode=ipvlan parent=eth0 ipvlan_mode=l3 host_access=true", v4: true, v6: true},
	{name: "ipvlan-l3s", options: "mode=ipvlan parent=eth0.10.20 ipvlan_mode=l3s ipvlan_flag=private", v4: true},
}

// network is what createNetwork would store.
func (c parentCase) network(t *testing.T, d *Driver) (Network, error) {
	t.Helper()
	generic := map[string]any{}
	for word := range strings.FieldsSeq(c.options) {
		k, v, _ := strings.Cut(word, "=")
		generic[k] = strings.ReplaceAll(v, "_via_", " via ")
	}
	n, err := parseNetworkOptions(map[string]any{plugin.OptionGeneric: generic, plugin.OptionInternal: c.internal}, d.modes(), modeBridge)
	if err != nil {
		return n, err
	}
	n.ID = net1
	if c.v4 {
		n.Subnets = append(n.Subnets, subnet("10.1.0.0/24", "10.1.0.1/24"))
	}
	if c.v6 {
		n.Subnets = append(n.Subnets, subnet("fd00:1::/64", "fd00:1::1/64"))
	}
	return n, d.complete(t.Context(), &n, nil)
}

// TestParent compares what the backend wants with files that people can read.
func TestParent(t *testing.T) {
	for _, c := range parentCases {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			r.must("CreateNetwork", createNetwork(net2, "10.9.0.0/24", ""))
			r.must("CreateNetwork", createNetwork(net3, "10.8.0.0/24", `{"egress":"none"}`)) // reaches nobody
			d := r.d
			n, err := c.network(t, d)
			if err != nil {
				t.Fatal(err)
			}
			b := d.backends[n.Mode]
			var out strings.Builder
			fmt.Fprintf(&out, "# network %s internal=%t\n%s", c.options, n.Internal, b.Network(n))
			for i, addrs := range [][]string{{"10.1.0.2/24", "fd00:1::2/64"}, {"10.1.0.3/24"}} {
				e := Endpoint{ID: []string{ep1, ep2}[i], Network: n.ID, Reach: n.Access && i == 0}
				for _, a := range addrs {
					if p := netip.MustParsePrefix(a); n.has(familyOf(p.Addr())) {
						e.Addrs = append(e.Addrs, p)
					}
				}
				e.MAC = endpointMAC(e.ID, e.Addrs)
				if e.Reach && n.Options.HostAccess {
					if e.Host, err = d.hostAddrs(t.Context(), n); err != nil {
						t.Fatal(err)
					}
				}
				if e.Reach {
					e.Ports = chosen(t, n, e, web)
				}
				fmt.Fprintf(&out, "\n# endpoint %v\n%s", e.Addrs, b.Endpoint(n, e))
				at := b.Attach(n, e)
				fmt.Fprintf(&out, "# join: %s as %s, gateways %v, no gateway service %t\n", at.Link, at.Prefix, at.Gateways, at.NoGateway)
				for _, r := range at.Routes {
					fmt.Fprintf(&out, "# join: route %s via %s\n", r.Destination, r.NextHop)
				}
			}
			golden(t, "parent/"+c.name+".txt", out.String())
		})
	}
}

// TestParentRefused is every bad input of a network on a parent.
func TestParentRefused(t *testing.T) {
	r := newRig(t)
	r.host.card(datapath.LinkFacts{Name: "down0", MTU: 1500})
	r.host.card(datapath.LinkFacts{Name: "port0", Up: true, MTU: 1500, Master: "br0"})
	r.host.card(datapath.LinkFacts{Name: "lo", Up: true, MTU: 65536})
	r.host.card(datapath.LinkFacts{Name: "wfv1", Kind: "veth", Ours: true, Up: true, MTU: 1500})
	r.host.card(datapath.LinkFacts{Name: "strict0", Up: true, MTU: 1500, Strict: true})
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"eth0.10"}`))
	r.must("CreateNetwork", createNetwork(net3, "10.3.0.0/24", `{"mode":"ipvlan","parent":"eth0.30"}`))
	for _, c := range []struct {
		pool, options string
		want          []string
	}{
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth7"}`, []string{"parent eth7 does not exist", "ip link"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth7.10"}`, []string{"parent eth7 does not exist"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth0.x"}`, []string{"eth0.x", "VLAN ID"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth0.4095"}`, []string{"4095", "1 to 4094"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth0.1.2.3"}`, []string{"more than two VLAN tags"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"192.168.1.10"}`, []string{"parent 192.168.1.10: name an interface, not an address"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"down0.5"}`, []string{"VLAN on down0", "is down", "ip link set down0 up"}},
		{"10.2.0.0/24", `{"mode":"ipvlan","parent":"port0"}`, []string{"port0 is a port of br0", "parent=br0", "bridge=br0"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"lo"}`, []string{"loopback"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"wfv1"}`, []string{"wfv1 belongs to another network"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth0","mtu":"9000"}`, []string{"mtu 9000", "1500 of parent eth0"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth0","macvlan_mode":"l2"}`, []string{"macvlan_mode", "bridge, private, vepa, passthru"}},
		{"10.2.0.0/24", `{"mode":"ipvlan","parent":"eth0","macvlan_mode":"bridge"}`, []string{"macvlan_mode", "mode ipvlan", "ipvlan_mode"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth0","bridge":"br0"}`, []string{"bridge", "mode macvlan"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth0","host_access":"true","macvlan_mode":"private"}`, []string{"host_access=true", "macvlan_mode=private", "macvlan_mode=bridge"}},
		{"10.2.0.0/24", `{"mode":"ipvlan","parent":"eth0","host_access":"true","ipvlan_flag":"vepa"}`, []string{"ipvlan_flag=vepa", "ipvlan_flag=bridge"}},
		{"10.2.0.0/24", `{"mode":"ipvlan","parent":"strict0","host_access":"true"}`, []string{"host_access=true", "strict0", "rp_filter=2"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth0","host_address":"10.2.0.9"}`, []string{"host_address", "host_access=true"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth0","host_access":"true","host_address":"10.9.0.9"}`, []string{"10.9.0.9", "10.2.0.0/24"}},
		{"10.2.0.0/24", `{"mode":"macvlan","egress":"driver"}`, []string{"egress=driver", "parent"}},
		{"10.1.0.0/16", `{"mode":"macvlan","parent":"eth0"}`, []string{"10.1.0.0/16", "eth0", "10.1.0.10/24", "--ip-range"}},
		{"10.2.0.0/24", `{"mode":"ipvlan","parent":"eth0.10"}`, []string{"eth0.10", "network 1a2b3c4d5e6f", "mode=macvlan"}},
		{"10.2.0.0/24", `{"mode":"macvlan","parent":"eth0.10","macvlan_mode":"passthru"}`, []string{"passthru", "network 1a2b3c4d5e6f"}},
		{"10.2.0.0/24", `{"mode":"ipvlan","parent":"eth0.30","ipvlan_mode":"l3"}`, []string{"network 3a2b3c4d5e6f", "ipvlan_mode=l2"}},
	} {
		before := strings.Join(r.records(), " ") + r.kernel.text()
		body := strings.ReplaceAll(createNetwork(net2, "10.2.0.0/24", c.options), "10.2.0.0/24", c.pool)
		if c.pool == "10.1.0.0/16" {
			body = strings.ReplaceAll(body, "10.2.0.1/24", "10.1.0.1/16")
		}
		r.refused("CreateNetwork", body, c.want...)
		if after := strings.Join(r.records(), " ") + r.kernel.text(); after != before {
			t.Errorf("%s left\n%s\nwhere there was\n%s", c.options, after, before)
		}
	}
}

// TestVLANsAreShared: what two networks need goes with the second, and what was
// there before stays.
func TestVLANsAreShared(t *testing.T) {
	r := newRig(t)
	r.host.card(datapath.LinkFacts{Name: "eth0.5", Kind: "vlan", Up: true, MTU: 1500})
	drop := func(id string) { r.must("DeleteNetwork", `{"NetworkID":"`+id+`"}`) }
	r.must("CreateNetwork", createNetwork(net1, "10.2.0.0/24", `{"mode":"macvlan","parent":"eth0.10"}`))
	one := r.kernel.text()
	r.must("CreateNetwork", createNetwork(net2, "10.3.0.0/24", `{"mode":"ipvlan","parent":"eth0.10.20"}`))
	r.must("CreateNetwork", createNetwork(net3, "10.4.0.0/24", `{"mode":"macvlan","parent":"eth0.5"}`))
	if _, made := r.kernel.parents["eth0.5"]; made {
		t.Error("eth0.5 was made although it is there")
	}
	drop(net3)
	r.restart()
	r.idle()
	drop(net2)
	if two := r.kernel.text(); two != one {
		t.Errorf("left\n%s\nwant\n%s", two, one)
	}
	drop(net1)
	r.empty()
}

// TestParentAway: a parent that vanishes takes what hangs on it with it; when it
// is back, so is the network.
func TestParentAway(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"eth0.10","host_access":"true"}`))
	whole := r.kernel.text()
	r.kernel.mu.Lock()
	delete(r.kernel.foreign, "eth0")
	clear(r.kernel.parents)
	clear(r.kernel.children)
	r.kernel.mu.Unlock()
	if _, err := r.d.Reconcile(t.Context()); err == nil || !strings.Contains(err.Error(), "eth0 does not exist") {
		t.Errorf("reconcile says %v", err)
	}
	r.restart()
	r.kernel.mu.Lock()
	r.kernel.foreign["eth0"] = true
	r.kernel.mu.Unlock()
	if lines := r.reconcile(); len(lines) == 0 {
		t.Error("nothing was repaired")
	}
	if now := r.kernel.text(); now != whole {
		t.Errorf("repaired to\n%s\nwant\n%s", now, whole)
	}
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	r.empty()
}

// TestParentMAC: ipvlan and passthru have the parent's; the rest the address's.
func TestParentMAC(t *testing.T) {
	with := strings.Replace(createEndpoint(net1, ep1, "10.1.0.2/24", ""), `"MacAddress":""`, `"MacAddress":"02:11:22:33:44:55"`, 1)
	for _, c := range []struct{ options, want string }{
		{`{"mode":"macvlan","parent":"eth0"}`, "02:42:0a:01:00:02"},
		{`{"mode":"macvlan","parent":"eth0","macvlan_mode":"passthru"}`, ""},
		{`{"mode":"ipvlan","parent":"eth0"}`, ""},
	} {
		r := newRig(t)
		r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", c.options))
		answer := r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
		if got := strings.Contains(answer, "02:"); got != (c.want != "") || !strings.Contains(answer, c.want) {
			t.Errorf("%s: answer %s, want the MAC %q", c.options, answer, c.want)
		}
		r.must("DeleteEndpoint", ids(net1, ep1))
		if strings.Contains(c.options, "ipvlan") {
			r.refused("CreateEndpoint", with, "02:11:22:33:44:55", "ipvlan", "mode=macvlan")
			continue
		}
		r.must("CreateEndpoint", with)
		if m := r.kernel.children[child1].MAC.String(); m != "02:11:22:33:44:55" {
			t.Errorf("%s: the link has %s", c.options, m)
		}
	}
}

// TestPortsWithoutAWayIn: the host cannot reach the container, so that ports
// cannot be published.
func TestPortsWithoutAWayIn(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"eth0","macvlan_mode":"vepa"}`))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	r.must("Join", program(net1, ep1, binding(6, 80, "", 8080, 8080)))
	r.refused("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080)), "port 80/tcp", "macvlan_mode=vepa", "macvlan_mode=bridge")
	r.must("ProgramExternalConnectivity", program(net1, ep1))
	if len(r.kernel.routes)+len(r.kernel.sockets) > 0 {
		t.Errorf("left:\n%s", r.kernel.text())
	}
}

// TestProbe: an address that somebody on the LAN has is refused by name, asked
// for once, and never asked for while it is an endpoint's of ours.
func TestProbe(t *testing.T) {
	r := newRig(t)
	pool, free, taken := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.1.0.3")
	r.host.holders[taken] = datapath.MAC{2, 0x11, 0x22, 0x33, 0x44, 0x55}
	for _, options := range []string{`{"mode":"macvlan","parent":"eth0"}`, `{"bridge":"br0"}`, `{"mode":"ipvlan","parent":"eth0"}`} {
		r.kernel.foreign["br0"] = true
		r.host.probes = nil
		r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", options))
		if err := r.d.Vet(t.Context(), pool, free); err != nil {
			t.Error(err)
		}
		if err := r.d.Vet(t.Context(), pool, taken); err == nil || !strings.Contains(err.Error(), "02:11:22:33:44:55") || !strings.Contains(err.Error(), "probe=false") {
			t.Errorf("taken: %v", err)
		}
		r.host.addressed = map[string][]netip.Prefix{"eth9": {netip.PrefixFrom(taken, 24)}}
		if err := r.d.Vet(t.Context(), pool, taken); err == nil || !strings.Contains(err.Error(), "this host's own, on eth9") || strings.Contains(err.Error(), "probe=false") {
			t.Errorf("the host's own: %v", err)
		}
		r.host.addressed = nil
		if err := r.d.Vet(t.Context(), netip.MustParsePrefix("10.1.0.0/25"), taken); err != nil {
			t.Errorf("another pool: %v", err)
		}
		r.refused("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.3/24", ""), "10.1.0.3", "02:11:22:33:44:55")
		r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
		r.clock.pass(2 * vetTime)
		r.host.holders[free] = datapath.MAC{2, 2} // our own container answers
		if err := r.d.Vet(t.Context(), pool, free); err != nil {
			t.Errorf("our own: %v", err)
		}
		r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
		delete(r.host.holders, free)
		if n := len(r.host.probes); n != 4 {
			t.Errorf("%s: %d probes: %v", options, n, r.host.probes)
		}
		r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	}
	for _, options := range []string{`{"mode":"macvlan","parent":"eth0","probe":"false"}`, `{"mode":"ipvlan","parent":"eth0","ipvlan_mode":"l3"}`, `{"mode":"macvlan"}`, `{}`} {
		r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", options))
		if err := r.d.Vet(t.Context(), pool, taken); err != nil {
			t.Errorf("%s: %v", options, err)
		}
		r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.3/24", ""))
		r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	}
}

func TestHostAddressInUse(t *testing.T) {
	r := newRig(t)
	r.host.holders[netip.MustParseAddr("10.1.0.77")] = datapath.MAC{2, 0x11, 0x22, 0x33, 0x44, 0x55}
	r.refused("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"eth0","host_access":"true","host_address":"10.1.0.77"}`),
		"host_address", "10.1.0.77", "02:11:22:33:44:55")
	body := createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"eth0","host_access":"true","host_address":"10.1.0.78"}`)
	r.must("CreateNetwork", body)
	r.host.holders[netip.MustParseAddr("10.1.0.78")] = datapath.MAC{2, 2} // the host itself
	r.must("CreateNetwork", body)
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
}

// TestParentDown: a network on a card that is down or has gone is made, and status says
// why its containers reach nobody.
func TestParentDown(t *testing.T) {
	r := newRig(t)
	r.host.card(datapath.LinkFacts{Name: "down0", MTU: 1500})
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"down0"}`))
	warning := func() string {
		t.Helper()
		s, err := r.d.Status(t.Context())
		if err != nil || len(s.Networks) != 1 {
			t.Fatal(s, err)
		}
		return s.Networks[0].Warning
	}
	if got, want := warning(), "parent down0 is down: run ip link set down0 up"; got != want {
		t.Errorf("status says %q, want %q", got, want)
	}
	r.host.card(datapath.LinkFacts{Name: "down0", Up: true, MTU: 1500})
	if got := warning(); got != "" {
		t.Errorf("status says %q of one that is up", got)
	}
}

// TestParentStrictSince: reverse path filtering that became strict after the network
// was made, as by sysctl --system, is said.
func TestParentStrictSince(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"ipvlan","parent":"eth0","host_access":"true"}`))
	f, _, err := r.host.Link(t.Context(), "eth0")
	if err != nil {
		t.Fatal(err)
	}
	f.Strict = true
	r.host.card(f)
	s, err := r.d.Status(t.Context())
	if err != nil || len(s.Networks) != 1 || !strings.Contains(s.Networks[0].Warning, "net.ipv4.conf.eth0.rp_filter=2") {
		t.Error(s, err)
	}
}

// TestAnnounce: the LAN hears of an endpoint three times, and no more when it is
// gone; those on a bridge of ours hear of one once.
func TestAnnounce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newFakeKernel(&faults{})
		h := newFakeHost(k, 1500)
		d := &Driver{host: h, lan: h, log: quiet(), networks: map[string]*network{}, backends: allBackends(), news: make(chan news, mostNews)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- d.Announce(ctx) }()
		add := func(id string, o Options, mode string) (*network, *endpoint) {
			n := newNetwork(Network{ID: id, Mode: mode, Options: o, Parents: []datapath.Parent{{Name: o.Parent, Existing: true}}})
			e := &endpoint{rec: Endpoint{ID: ep1, Network: id, MAC: datapath.MAC{2, 2}, Addrs: []netip.Prefix{netip.MustParsePrefix("10.1.0.2/24"), netip.MustParsePrefix("fd00:1::2/64")}}}
			d.mu.Lock()
			d.networks[id] = n
			n.enter(e)
			d.mu.Unlock()
			return n, e
		}
		n, e := add(net1, Options{Parent: "eth0", NoProbe: true}, modeMacvlan)
		gone, left := add(net2, Options{Bridge: "br0"}, modeBridge)
		plain, one := add(net3, Options{}, modeBridge)
		d.tell(n, e)
		d.tell(gone, left)
		d.tell(plain, one)
		time.Sleep(announceInterval / 2)
		d.mu.Lock()
		left.rec.Left = true
		d.mu.Unlock()
		time.Sleep(10 * announceInterval)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		count := map[string]int{}
		for _, a := range h.announced {
			count[a]++
		}
		want := map[string]int{"eth0 10.1.0.2 02:02:00:00:00:00": 3, "eth0 fd00:1::2 02:02:00:00:00:00": 3, "br0 10.1.0.2 02:02:00:00:00:00": 1, "br0 fd00:1::2 02:02:00:00:00:00": 1,
			bridgeName(net3) + " 10.1.0.2 02:02:00:00:00:00": 1, bridgeName(net3) + " fd00:1::2 02:02:00:00:00:00": 1}
		if !maps.Equal(count, want) {
			t.Errorf("announced %v, want %v", count, want)
		}
	})
}

// TestSweep: the engine does not wait for a sub-interface to be gone; what is
// left when the process ends is done by then, and what is left by one that was
// killed by the next.
func TestSweep(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"eth0"}`))
	before := r.kernel.text()
	life := func() {
		t.Helper()
		r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
		r.must("Join", joinBody(net1, ep1))
		r.kernel.carry(t)
		r.must("Leave", ids(net1, ep1))
		r.kernel.carryBack(child1)
	}
	life()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.d.Sweep(ctx) }()
	for !r.d.sweeping.Load() {
		time.Sleep(time.Millisecond)
	}
	r.kernel.mu.Lock() // the kernel takes its time
	r.must("DeleteEndpoint", ids(net1, ep1))
	r.kernel.mu.Unlock()
	// The address is free at once.
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""))
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	r.idle()
	r.must("DeleteEndpoint", ids(net1, ep2))
	if after := r.kernel.text(); after != before {
		t.Errorf("left\n%s\nwhere there was\n%s", after, before)
	}

	life()
	r.restart() // killed before the deletion was done
	r.idle()
	r.clock.pass(2 * joinTime)
	if lines := r.reconcile(); len(lines) != 1 || !strings.Contains(lines[0], "interrupted") {
		t.Errorf("reconcile: %q", lines)
	}
	if after := r.kernel.text(); after != before {
		t.Errorf("left\n%s\nwhere there was\n%s", after, before)
	}
}
