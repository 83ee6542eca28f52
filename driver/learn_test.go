package driver

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weftnet/weft/internal/datapath"
)

func learntRoute(to, via string) Route {
	r := Route{Destination: netip.MustParsePrefix(to)}
	if via != "" {
		r.NextHop = netip.MustParseAddr(via)
	}
	return r
}

// TestLearnt: a container gets the routes and the MTU of the DHCP server of its
// address, after a restart too, and the first network of a container alone gives it
// a route that two have.
func TestLearnt(t *testing.T) {
	said := Learnt{MTU: 1300, Routes: []Route{learntRoute("10.80.0.0/12", "10.1.0.254"), learntRoute("10.1.2.0/24", "")}}
	r := newRigWith(t, func(c *Config) {
		c.Learnt = func(pool netip.Prefix, a netip.Addr) (Learnt, bool) { return said, pool.Contains(a) && a.Is4() }
	})
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"eth0"}`))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	links := func(mtu int) {
		t.Helper()
		have, err := r.kernel.Owned(t.Context())
		if err != nil || !slices.ContainsFunc(have.Children, func(c datapath.Child) bool { return c.Name == peerEnd(ep1) && c.MTU == mtu }) {
			t.Errorf("links %v, want MTU %d", have.Children, mtu)
		}
	}
	links(1300)
	r.restart()
	want := `"StaticRoutes":[{"Destination":"10.80.0.0/12","RouteType":0,"NextHop":"10.1.0.254"},{"Destination":"10.1.2.0/24","RouteType":1,"NextHop":""}]`
	if answer := r.must("Join", joinBody(net1, ep1)); !strings.Contains(answer, want) {
		t.Errorf("join answers %s, want %s", answer, want)
	}
	e := r.d.tables().Endpoints[0]
	if got := fmt.Sprint(e.MTU, e.Routes, e.LeftOut); got != "1300 [{10.80.0.0/12 10.1.0.254} {10.1.2.0/24 invalid IP}] []" {
		t.Errorf("status has %s", got)
	}
	// Another endpoint of the same container: the kernel takes no destination twice.
	said.Routes[1] = learntRoute("10.3.0.0/24", "10.1.0.254")
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", ""))
	want = `"StaticRoutes":[{"Destination":"10.3.0.0/24","RouteType":0,"NextHop":"10.1.0.254"}]`
	if answer := r.must("Join", joinBody(net1, ep2)); !strings.Contains(answer, want) {
		t.Errorf("join answers %s, want %s", answer, want)
	}
}

// TestLearntOfAnybody: whoever answers on the LAN cannot keep containers off other
// networks, or starts from happening, or records small.
func TestLearntOfAnybody(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net2, "10.5.0.0/24", ""))
	r.host.addressed = map[string][]netip.Prefix{"wg0": {netip.MustParsePrefix("10.8.0.1/16"), netip.MustParsePrefix("fd00:8::1/64")}}
	n := Network{ID: net1, Mode: modeMacvlan, MTU: 1500, Subnets: []Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/24")}},
		Options: Options{Routes: []Route{learntRoute("10.90.0.0/16", "10.1.0.9")}}}
	others, err := r.d.otherSubnets(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr("10.1.0.2")
	for _, c := range []struct {
		to, via string
		left    string // "": taken; "-": left out without a word
	}{
		{"10.80.0.0/12", "10.1.0.254", ""},
		{"10.81.0.0/24", "", ""},
		{"10.90.0.0/16", "10.1.0.254", "-"},
		{"10.1.0.128/25", "10.1.0.254", "-"},
		{"10.0.0.0/8", "10.1.0.254", "covers the network's own subnet"},
		{"0.0.0.0/1", "10.1.0.254", "covers addresses that no router leads to"},
		{"128.0.0.0/1", "10.1.0.254", "covers addresses that no router leads to"},
		{"0.0.0.0/0", "", "covers addresses that no router leads to"},
		{"169.254.169.254/32", "10.1.0.254", "covers addresses that no router leads to"},
		{"10.5.0.0/24", "10.1.0.254", "covers 10.5.0.0/24, which is that of network " + short(net2)},
		{"10.5.0.7/32", "10.1.0.254", "covers 10.5.0.0/24, which is that of network " + short(net2)},
		{"10.8.0.0/13", "10.1.0.254", "covers 10.8.0.0/16, which is that of wg0 on the host"},
		{"10.81.0.0/16", "10.2.0.1", "is by a router that is not in 10.1.0.0/24"},
		{"10.81.0.0/16", "10.1.0.2", "is by a router that is not in 10.1.0.0/24"},
		{"fd00:9::/64", "", "covers addresses that no router leads to"},
	} {
		var e Endpoint
		left := strings.Join(n.fitRoutes(&e, a, Learnt{Routes: []Route{learntRoute(c.to, c.via)}}, others), "; ")
		want := fmt.Sprintf("route %s %s", c.to, c.left)
		if c.left == "" || c.left == "-" {
			want = ""
		}
		if left != want || (len(e.Routes) == 1) != (c.left == "") {
			t.Errorf("%s via %s: took %v, left out %q, want %q", c.to, c.via, e.Routes, left, want)
		}
	}
	// Thousands, of which some are the same.
	var many Learnt
	many.More = 100
	for i := range 5000 {
		many.Routes = append(many.Routes, learntRoute(fmt.Sprintf("100.%d.%d.0/24", 64+i/250, i%250), "10.1.0.254"), learntRoute("100.64.0.0/24", "10.1.0.254"),
			learntRoute("10.5.0.0/24", "10.1.0.254"))
	}
	var e Endpoint
	left := n.fitRoutes(&e, a, many, others)
	if len(e.Routes) != mostLearnt || len(left) > mostLeft+1 || len(strings.Join(left, "; ")) > 1000 {
		t.Errorf("%d routes taken, left out %q", len(e.Routes), left)
	}
	for mtu, want := range map[int]int{0: 0, 68: 0, 575: 0, 576: 576, 1499: 1499, 1500: 0, 65535: 0} {
		e = Endpoint{}
		note := n.fitMTU(&e, mtu)
		if e.MTU != want || (note != "") != (mtu > 0 && mtu < 576) {
			t.Errorf("MTU %d: taken %d, %q", mtu, e.MTU, note)
		}
	}
}

// TestLearntOnABridge: the server's MTU is not that of a bridge, which has the least of
// its ports': the host itself, and all that is on its LAN, would have it.
func TestLearntOnABridge(t *testing.T) {
	r := newRigWith(t, func(c *Config) {
		c.Learnt = func(pool netip.Prefix, a netip.Addr) (Learnt, bool) { return Learnt{MTU: 576}, pool.Contains(a) }
	})
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	have, err := r.kernel.Owned(t.Context())
	if err != nil || len(have.Veths) != 1 || have.Veths[0].MTU != r.d.tables().Networks[0].MTU {
		t.Errorf("links %v: %v, want the network's MTU", have.Veths, err)
	}
	if left := strings.Join(r.d.tables().Endpoints[0].LeftOut, "; "); !strings.Contains(left, "MTU 576 would be the bridge's, too, and so the host's") {
		t.Errorf("left out is %q", left)
	}
}
