package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/plugin"
)

// spanning is a Backend like the real one of mode overlay, which this package
// does not know.
type spanning struct{ Bridge }

func (b spanning) Network(n Network) datapath.State {
	s := b.Bridge.Network(n)
	s.Bridges[0].Addrs = nil
	s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetTunnels, Port: n.Port})
	s.VXLANs = []datapath.VXLAN{{Name: "wfx" + s.Bridges[0].Name[3:], Master: s.Bridges[0].Name, VNI: n.VNI, Port: n.Port, Local: n.Underlay, MTU: n.MTU}}
	return s
}

// fakeCluster is other hosts that a test speaks for.
type fakeCluster struct {
	mu        sync.Mutex
	refuse    error
	clock     uint64
	elsewhere map[netip.Addr]string
	published map[uint32][]netip.Addr // nil once withdrawn
	ranges    map[string]netip.Prefix // by network
	remote    datapath.State
	vnis      map[string]uint32
	strangers map[uint32]bool
	nodes     []string
}

func (c *fakeCluster) Admit(_ context.Context, n *Network) error {
	n.VNI, n.Port, n.Underlay, n.MTU = 4242, 4793, netip.MustParseAddr("192.0.2.1"), 1450
	if n.Options.VNI != 0 {
		n.VNI = n.Options.VNI
	}
	return c.refuse
}

func (c *fakeCluster) Claim() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clock++
	return c.clock
}

func (c *fakeCluster) Holder(_ Network, a netip.Addr) (string, bool) {
	host, ok := c.elsewhere[a]
	return host, ok
}

func (c *fakeCluster) Publish(n Network, list []Endpoint) {
	c.mu.Lock()
	defer c.mu.Unlock()
	addrs := []netip.Addr{}
	for _, e := range list {
		addrs = append(addrs, e.addr(ipv4))
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	c.published[n.VNI] = addrs
	if c.ranges == nil {
		c.ranges = map[string]netip.Prefix{}
	}
	c.ranges[n.ID] = n.Subnets[0].Range
}

func (c *fakeCluster) Strangers(vni uint32, there bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.strangers == nil {
		c.strangers = map[uint32]bool{}
	}
	c.strangers[vni] = there
}

func (c *fakeCluster) Withdraw(n Network) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.published, n.VNI)
}

func (c *fakeCluster) Remote(Network) datapath.State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.remote
}

func (c *fakeCluster) Allocate(_ context.Context, n Network) (uint32, string, error) {
	if n.Options.VNI == 13 {
		return 0, "", errors.New("VNI 13 is taken")
	}
	c.vnis[n.ID] = 7
	return 7, "aa@192.0.2.1", nil
}

func (c *fakeCluster) Free(_ context.Context, id string) error {
	delete(c.vnis, id)
	return nil
}

func (c *fakeCluster) Discover(_ context.Context, a netip.Addr, self bool) error {
	c.nodes = append(c.nodes, fmt.Sprint(a, self))
	return nil
}

// newSpanningRig is a rig with mode overlay.
func newSpanningRig(t *testing.T) (*rig, *fakeCluster) {
	t.Helper()
	c := &fakeCluster{elsewhere: map[netip.Addr]string{}, published: map[uint32][]netip.Addr{}, vnis: map[string]uint32{}}
	r := newRigWith(t, func(conf *Config) {
		conf.Backends = maps.Clone(conf.Backends)
		conf.Backends[ModeOverlay] = spanning{}
		conf.Cluster = c
	})
	return r, c
}

// says is what was published of VNI 4242.
func (c *fakeCluster) says(t *testing.T, want ...string) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	var got []string
	for _, a := range c.published[4242] {
		got = append(got, a.String())
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("published (-want +got):\n%s", d)
	}
}

const overlayOptions = `{"mode":"overlay","vni":"4242"}`

// TestShare follows what others are told through the life of two endpoints.
func TestShare(t *testing.T) {
	r, c := newSpanningRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	if _, ok := c.published[4242]; !ok {
		t.Error("the network itself was not published")
	}
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	c.says(t, "10.1.0.2")
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", ""))
	c.says(t, "10.1.0.2", "10.1.0.3")
	r.must("Join", joinBody(net1, ep1))
	r.kernel.moveIn(veth1)
	r.must("Leave", ids(net1, ep1))
	c.says(t, "10.1.0.3")
	r.must("DeleteEndpoint", ids(net1, ep1))
	c.published = map[uint32][]netip.Addr{}
	r.restart()
	c.says(t, "10.1.0.3")
	r.must("DeleteEndpoint", ids(net1, ep2))
	c.says(t)
	r.must("DeleteNetwork", fmt.Sprintf(`{"NetworkID":%q}`, net1))
	if _, ok := c.published[4242]; ok {
		t.Error("the network is still published")
	}
	r.empty()
}

// TestShareLost withdraws an endpoint whose link somebody deleted.
func TestShareLost(t *testing.T) {
	r, c := newSpanningRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""))
	r.must("Join", joinBody(net1, ep2))
	r.kernel.moveIn(hostEnd(ep2))
	r.kernel.cut(hostEnd(ep2))
	r.reconcile()
	c.says(t)
}

func forward(mac byte, vtep string) datapath.Forward {
	return datapath.Forward{Link: "wfx1a2b3c4d5e6f", MAC: datapath.MAC{2, 0, 0, 0, 0, mac}, VTEP: netip.MustParseAddr(vtep)}
}

// TestFollow is what leads to others, as they come, move and go.
func TestFollow(t *testing.T) {
	r, c := newSpanningRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	follow := func(s datapath.State) {
		t.Helper()
		c.mu.Lock()
		c.remote = s
		c.mu.Unlock()
		if err := r.d.Follow(t.Context(), 4242); err != nil {
			t.Fatal(err)
		}
		have := r.kernel.owned()
		if d := cmp.Diff(s.String(), datapath.State{Forwards: have.Forwards, Neighbours: have.Neighbours}.String()); d != "" {
			t.Errorf("in the kernel (-want +got):\n%s", d)
		}
		r.idle()
	}
	neighbour := datapath.Neighbour{Link: "wfb1a2b3c4d5e6f", Addr: netip.MustParseAddr("10.1.0.9"), MAC: datapath.MAC{2, 0, 0, 0, 0, 1}}
	follow(datapath.State{Forwards: []datapath.Forward{forward(1, "192.0.2.2")}, Neighbours: []datapath.Neighbour{neighbour}})
	follow(datapath.State{Forwards: []datapath.Forward{forward(1, "192.0.2.3"), forward(2, "192.0.2.3")}, Neighbours: []datapath.Neighbour{neighbour}})
	follow(datapath.State{Forwards: []datapath.Forward{forward(2, "192.0.2.3")}})
	r.restart() // what was known is wanted from the start: the traffic goes on
	if n := len(r.kernel.owned().Forwards); n != 1 {
		t.Errorf("%d forwarding entries after a restart, want 1", n)
	}
	follow(datapath.State{})
	if err := r.d.Follow(t.Context(), 99); err != nil {
		t.Error("a network that is not here:", err)
	}
}

// A host that has two networks of ours is a member on account of both: it stays one
// until both are gone there, or here.
func TestFollowSharedMember(t *testing.T) {
	r, c := newSpanningRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	r.must("CreateNetwork", createNetwork(net2, "10.2.0.0/24", `{"mode":"overlay","vni":"4243"}`))
	other := datapath.State{Elements: []datapath.Element{{Set: datapath.SetMembers, Net: single(netip.MustParseAddr("192.0.2.2")), Port: 4793}}}
	follow := func(vni uint32, s datapath.State, want bool) {
		t.Helper()
		c.mu.Lock()
		c.remote = s
		c.mu.Unlock()
		if err := r.d.Follow(t.Context(), vni); err != nil {
			t.Fatal(err)
		}
		if got := slices.Contains(r.kernel.owned().Elements, other.Elements[0]); got != want {
			t.Errorf("VNI %d: a member in the kernel: %t, want %t", vni, got, want)
		}
		r.idle()
	}
	for _, vni := range []uint32{4242, 4243} {
		follow(vni, other, true)
	}
	follow(4242, datapath.State{}, true)
	follow(4242, other, true)
	r.must("DeleteNetwork", fmt.Sprintf(`{"NetworkID":%q}`, net1))
	if !slices.Contains(r.kernel.owned().Elements, other.Elements[0]) {
		t.Error("no member any more, and one network is still there")
	}
	r.idle()
	r.must("DeleteNetwork", fmt.Sprintf(`{"NetworkID":%q}`, net2))
	r.empty()
}

// What another network comes to want while one that has it goes stays.
func TestSharedMemberWantedMeanwhile(t *testing.T) {
	r, c := newSpanningRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	r.must("CreateNetwork", createNetwork(net2, "10.2.0.0/24", `{"mode":"overlay","vni":"4243"}`))
	member := datapath.Element{Set: datapath.SetMembers, Net: single(netip.MustParseAddr("192.0.2.2")), Port: 4793}
	c.mu.Lock()
	c.remote = datapath.State{Elements: []datapath.Element{member}}
	c.mu.Unlock()
	if err := r.d.Follow(t.Context(), 4242); err != nil {
		t.Fatal(err)
	}
	followed := false
	r.kernel.before = func(s datapath.State) {
		if followed || !slices.Contains(s.Elements, member) {
			return
		}
		followed = true
		if err := r.d.Follow(t.Context(), 4243); err != nil {
			t.Error(err)
		}
	}
	r.must("DeleteNetwork", fmt.Sprintf(`{"NetworkID":%q}`, net1))
	if !followed {
		t.Error("the member was not to be removed")
	}
	r.idle()
	r.must("DeleteNetwork", fmt.Sprintf(`{"NetworkID":%q}`, net2))
	r.empty()
}

// TestRehome is the host's address changing under its tunnels.
func TestRehome(t *testing.T) {
	r, c := newSpanningRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	c.remote = datapath.State{Forwards: []datapath.Forward{forward(1, "192.0.2.2")}}
	if err := r.d.Follow(t.Context(), 4242); err != nil {
		t.Fatal(err)
	}
	other := netip.MustParseAddr("192.0.2.77")
	if err := r.d.Rehome(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if have := r.kernel.owned(); have.VXLANs[0].Local != other || len(have.Forwards) != 1 {
		t.Errorf("after the move:\n%s", have)
	}
	r.idle()
}

func TestAdmit(t *testing.T) {
	r, c := newSpanningRig(t)
	c.refuse = errors.New("host other has it with subnet 10.2.0.0/24")
	r.refused("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions), "host other", "10.2.0.0/24")
	r.empty()
	c.refuse = nil
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	r.refused("CreateNetwork", createNetwork(net2, "10.2.0.0/24", overlayOptions), "VNI 4242", net1[:12])
	c.refuse = errors.New("not asked about what is there")
	// Another leader of a swarm names other hosts.
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"overlay","vni":"4242","weft.join":"@192.0.2.9"}`))
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	r.refused("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"overlay","vni":"5"}`), "other settings")
}

// TestClaimed refuses an address that another host has given out, and grants it
// in a swarm.
func TestClaimed(t *testing.T) {
	r, c := newSpanningRig(t)
	c.elsewhere[netip.MustParseAddr("10.1.0.2")] = "other"
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	r.refused("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""), "10.1.0.2", "host other")
	if host, ok := r.d.Elsewhere(netip.MustParsePrefix("10.1.0.0/24"))(netip.MustParseAddr("10.1.0.2")); host != "other" || !ok {
		t.Errorf("who has it elsewhere: %q", host)
	}
	r.must("CreateNetwork", createNetwork(swm1, "10.2.0.0/24", `{"mode":"overlay","vni":"5"}`))
	c.elsewhere[netip.MustParseAddr("10.2.0.2")] = "other"
	r.must("CreateEndpoint", createEndpoint(swm1, ep2, "10.2.0.2/24", ""))
	if r.d.Elsewhere(netip.MustParsePrefix("10.2.0.0/24")) != nil || r.d.Elsewhere(netip.MustParsePrefix("10.3.0.0/24")) != nil {
		t.Error("who has it elsewhere is asked of a swarm's network, or of none")
	}
	if e := r.d.networks[swm1].endpoints[ep2]; e.rec.Claim == 0 {
		t.Error("an endpoint without a claim")
	}
}

// TestSwarmScope is the leader's part.
func TestSwarmScope(t *testing.T) {
	c := &fakeCluster{elsewhere: map[netip.Addr]string{}, published: map[uint32][]netip.Addr{}, vnis: map[string]uint32{}}
	r := newRigWith(t, func(conf *Config) {
		conf.Backends = maps.Clone(conf.Backends)
		conf.Backends[ModeOverlay] = spanning{}
		conf.Cluster, conf.Swarm = c, c
	})
	body := `{"NetworkID":%q,"Options":%s,"IPv4Data":[{"AddressSpace":"","Pool":"10.1.0.0/24","Gateway":"10.1.0.1/24"}],"IPv6Data":null}`
	got := r.must("AllocateNetwork", fmt.Sprintf(body, swm1, `{"mtu":"1400"}`))
	if want := `{"Options":{"mode":"overlay","mtu":"1400","vni":"7","weft.join":"aa@192.0.2.1"}}`; got != want {
		t.Errorf("answer %s, want %s", got, want)
	}
	r.must("AllocateNetwork", fmt.Sprintf(body, swm1, `{"mode":"overlay","mtu":"1400","vni":"7","weft.join":"aa@192.0.2.1"}`))
	r.refused("AllocateNetwork", fmt.Sprintf(body, swm1, `{"vni":"13"}`), "VNI 13")
	r.refused("AllocateNetwork", fmt.Sprintf(body, swm1, `{"mode":"macvlan"}`), "macvlan", "--config-from")
	r.refused("AllocateNetwork", fmt.Sprintf(body, swm1, `{"vnni":"13"}`), "vni")
	r.refused("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"bridge"}`), "bridge", "--config-from")
	r.must("FreeNetwork", fmt.Sprintf(`{"NetworkID":%q}`, swm1))
	r.must("FreeNetwork", fmt.Sprintf(`{"NetworkID":%q}`, swm1))
	if len(c.vnis) != 0 {
		t.Errorf("still allocated: %v", c.vnis)
	}
	r.must("DiscoverNew", `{"DiscoveryType":1,"DiscoveryData":{"Address":"192.0.2.1","BindAddress":"192.0.2.1","Self":true}}`)
	r.must("DiscoverNew", `{"DiscoveryType":1,"DiscoveryData":{"Address":"192.0.2.2","BindAddress":"","Self":false}}`)
	r.must("DiscoverNew", `{"DiscoveryType":2,"DiscoveryData":{}}`)
	if got := strings.Join(c.nodes, ", "); got != "192.0.2.1 true, 192.0.2.2 false" {
		t.Errorf("nodes %s", got)
	}
}

// What comes to the port of a tunnel is taken from the network's hosts alone, so it
// must not be one that others use.
func TestTunnelPort(t *testing.T) {
	for port, want := range map[string]string{
		"1024": "", "4793": "", "65535": "",
		"0": "1024 to 65535", "53": "1024 to 65535", "1023": "1024 to 65535", "65536": "1024 to 65535", "x": `"x"`,
		"4789": "built-in overlay", "7946": "swarm", "2377": "swarm", "7947": "gossip", "8472": "flannel",
	} {
		n, err := parseNetworkOptions(map[string]any{plugin.OptionGeneric: map[string]any{"mode": "overlay", "port": port}}, []string{"overlay", "bridge"}, modeBridge)
		switch {
		case want == "" && (err != nil || strconv.Itoa(int(n.Options.Port)) != port):
			t.Errorf("port=%s: %d, %v", port, n.Options.Port, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("port=%s: %v, want an error that says %q", port, err, want)
		}
	}
}

// TestVetElsewhere: an automatic address that another host has is passed over.
func TestVetElsewhere(t *testing.T) {
	r, c := newSpanningRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	pool := netip.MustParsePrefix("10.1.0.0/24")
	c.elsewhere = map[netip.Addr]string{netip.MustParseAddr("10.1.0.2"): "two"}
	if err := r.d.Vet(t.Context(), pool, netip.MustParseAddr("10.1.0.2")); err == nil || !strings.Contains(err.Error(), "in use on host two") {
		t.Errorf("an address of another host: %v", err)
	}
	if err := r.d.Vet(t.Context(), pool, netip.MustParseAddr("10.1.0.3")); err != nil {
		t.Errorf("an address that nobody has: %v", err)
	}
	if err := r.d.Vet(t.Context(), netip.MustParsePrefix("10.1.0.0/16"), netip.MustParseAddr("10.1.0.2")); err != nil {
		t.Errorf("another pool: %v", err)
	}
}

// TestRangeRecorded: what this host chooses addresses from is part of what it tells
// the others, of a network of its own, and stays what it was when the network is made
// again.
func TestRangeRecorded(t *testing.T) {
	c := &fakeCluster{elsewhere: map[netip.Addr]string{}, published: map[uint32][]netip.Addr{}, vnis: map[string]uint32{}}
	part := netip.MustParsePrefix("10.1.0.128/25")
	r := newRigWith(t, func(conf *Config) {
		conf.Backends = maps.Clone(conf.Backends)
		conf.Backends[ModeOverlay] = spanning{}
		conf.Cluster = c
		conf.Range = func(p netip.Prefix) (netip.Prefix, bool) { return part, p != netip.MustParsePrefix("10.2.0.0/24") }
	})
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	r.must("CreateNetwork", createNetwork(net2, "10.2.0.0/24", `{"mode":"overlay","vni":"5"}`))
	r.must("CreateNetwork", createNetwork(swm1, "10.3.0.0/24", `{"mode":"overlay","vni":"6"}`))
	part = netip.MustParsePrefix("10.1.0.0/25")
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	for id, want := range map[string]string{net1: "10.1.0.128/25", net2: "invalid Prefix", swm1: "invalid Prefix"} {
		if got := c.ranges[id]; got.String() != want {
			t.Errorf("network %s: range %s, want %s", short(id), got, want)
		}
	}
	r.idle()
}
