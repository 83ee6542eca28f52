package driver

import (
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
)

// lose is the plugin removed by force and installed again: the kernel stays, the
// records are gone.
func (r *rig) lose() { r.loseOf(map[string]**store.Bolt{"weft.db": &r.nets, "run.db": &r.eps}) }

// loseOf loses some of the stores.
func (r *rig) loseOf(stores map[string]**store.Bolt) {
	r.t.Helper()
	r.stop()
	r.kernel.die()
	dir := r.t.TempDir()
	for name, s := range stores {
		b, err := store.Open(filepath.Join(dir, name), store.Options{NoSync: true}) // in use until the rig's own end
		if err != nil {
			r.t.Fatal(err)
		}
		*s = b
	}
	r.start()
}

// TestStateLost: what no record names goes on working until the engine or somebody
// says that it is not needed.
func TestStateLost(t *testing.T) {
	r := newRunningRig(t)
	want := r.kernel.text()
	r.lose()
	for range 2 {
		r.idle()
		if got := r.kernel.text(); got != want {
			t.Fatalf("the kernel was changed: %s", cmp.Diff(want, got))
		}
	}
	if n := r.warned("in no record of ours"); n != 1 {
		t.Errorf("said %d times", n)
	}
	s, err := r.d.Status(t.Context())
	if err != nil || !strings.Contains(strings.Join(s.Unclaimed, "\n"), veth1) {
		t.Errorf("status: %v, %q", err, s.Unclaimed)
	}
	r.restart() // known from now on, and no reason to remove it either
	if got := r.kernel.text(); got != want {
		t.Fatalf("the kernel was changed by a restart: %s", cmp.Diff(want, got))
	}
	r.refused("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", ""), "not known to this plugin", "docker network rm", "create it again")
	// Other networks come and go beside it.
	r.must("CreateNetwork", createNetwork(strings.Repeat("9", 64), "10.9.0.0/24", ""))
	r.idle() // what both need is wanted now
	r.must("DeleteNetwork", `{"NetworkID":"`+strings.Repeat("9", 64)+`"}`)
	r.idle()
	if got := r.kernel.text(); got != want {
		t.Fatalf("the kernel was changed by another network: %s", cmp.Diff(want, got))
	}
	// The engine stops the container and removes the network.
	r.must("Leave", `{"NetworkID":"`+net1+`","EndpointID":"`+ep1+`"}`)
	if got := r.kernel.text(); strings.Contains(got, veth1) {
		t.Errorf("left of the endpoint:\n%s", got)
	}
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	if got := r.kernel.text(); strings.Contains(got, "10.1.0") || strings.Contains(got, "wfb1a2b3c4d5e6f") || !strings.Contains(got, "wfb2a2b3c4d5e6f") {
		t.Errorf("left of the network:\n%s", got)
	}
	if done, err := r.d.ForgetUnclaimed(t.Context()); err != nil || !strings.Contains(done, "1 links") {
		t.Errorf("forget what is left: %q, %v", done, err)
	}
	if got := r.kernel.text(); strings.Contains(got, "wfb") {
		t.Errorf("left:\n%s", got)
	}
	if done, err := r.d.ForgetUnclaimed(t.Context()); err != nil || done != "nothing is unclaimed" {
		t.Errorf("again: %q, %v", done, err)
	}
}

// The network is removed and made again at once, with the same port.
func TestStateLostPort(t *testing.T) {
	r := newRunningRig(t)
	r.lose()
	r.must("Leave", `{"NetworkID":"`+net1+`","EndpointID":"`+ep1+`"}`)
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	r.must("DeleteNetwork", `{"NetworkID":"`+net2+`"}`)
	r.must("CreateNetwork", createDual(""))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", "fd00:1::2/64"))
	r.must("Join", joinBody(net1, ep1))
	r.kernel.moveIn(veth1)
	r.must("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080)))
	r.idle()
}

// The networks' records are on the disk, those of their endpoints are not.
func TestNetworksLost(t *testing.T) {
	r := newRunningRig(t)
	want := r.kernel.text()
	r.loseOf(map[string]**store.Bolt{"weft.db": &r.nets})
	r.idle()
	if got := r.kernel.text(); got != want {
		t.Errorf("the kernel was changed: %s", cmp.Diff(want, got))
	}
	if n := r.warned("in no record of ours"); n != 1 {
		t.Errorf("said %d times", n)
	}
	r.restart()
	if got := r.kernel.text(); got != want {
		t.Errorf("the kernel was changed by a restart: %s", cmp.Diff(want, got))
	}
	r.must("Leave", ids(net1, ep1))
	r.must("DeleteEndpoint", ids(net1, ep1))
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	r.must("DeleteNetwork", `{"NetworkID":"`+net2+`"}`)
	r.idle()
	r.empty()
}

// The sub-interface of a container without a record is seen only when the engine
// has moved it back to the host.
func TestStateLostOnLAN(t *testing.T) {
	for name, lose := range map[string]func(*rig){
		"all":       (*rig).lose,
		"networks":  func(r *rig) { r.loseOf(map[string]**store.Bolt{"weft.db": &r.nets}) },
		"endpoints": func(r *rig) { r.loseOf(map[string]**store.Bolt{"run.db": &r.eps}) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"eth0"}`))
			r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
			r.must("Join", joinBody(net1, ep1))
			r.kernel.carry(t)
			lose(r)
			r.idle()
			r.must("Leave", ids(net1, ep1))
			r.kernel.carryBack(child1)
			r.must("DeleteEndpoint", ids(net1, ep1))
			r.idle()
			if got := r.kernel.text(); strings.Contains(got, child1) {
				t.Errorf("left of the endpoint:\n%s", got)
			}
			r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
			r.empty()
		})
	}
}

// Containers with records do not wait for networks that come and go.
func TestLeaveBesideUnclaimed(t *testing.T) {
	r := newRunningRig(t)
	r.lose()
	third := strings.Repeat("9", 64)
	r.must("CreateNetwork", createNetwork(third, "10.9.0.0/24", ""))
	r.must("CreateEndpoint", createEndpoint(third, ep2, "10.9.0.2/24", ""))
	r.must("Join", joinBody(third, ep2))
	r.d.change.Lock()
	_, err := r.call("Leave", ids(third, ep2))
	r.d.change.Unlock()
	if err != nil {
		t.Error(err)
	}
	r.must("DeleteEndpoint", ids(third, ep2))
}

// A sub-interface that was made to try the parent and could not be removed is no
// container's.
func TestTrialLeft(t *testing.T) {
	const steps = 5 // of CreateNetwork
	for k := 1; k <= steps; k++ {
		r := newRig(t)
		r.faults.arm(k, true)
		r.faults.dead = true
		r.refused("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"eth0.10"}`), "fault")
		r.faults.arm(0, false)
		r.reconcile()
		r.idle()
		r.empty()
		if s, err := r.d.Status(t.Context()); err != nil || len(s.Unclaimed) > 0 {
			t.Errorf("step %d: unclaimed %q, %v", k, s.Unclaimed, err)
		}
	}
}

// The same of the host's own sub-interface, which the first published port needs.
func TestAccessLeft(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"eth0"}`))
	own := ownLink(net1)
	r.kernel.children[own] = datapath.Child{Name: own, Parent: "eth0", Kind: modeMacvlan, Stays: true}
	if lines := r.reconcile(); len(lines) != 1 || !strings.Contains(lines[0], own) {
		t.Errorf("changed %q", lines)
	}
	r.idle()
}

// Nothing is left of what no record names once the engine has removed it all.
func TestStateLostAndRemoved(t *testing.T) {
	r := newRunningRig(t)
	r.lose()
	r.must("Leave", ids(net1, ep1))
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	r.must("DeleteNetwork", `{"NetworkID":"`+net2+`"}`)
	r.idle()
	r.empty()
}

// Tunnels have their port, and the other hosts, in common.
func TestStateLostTunnels(t *testing.T) {
	r, c := newSpanningRig(t)
	c.remote = datapath.State{Elements: []datapath.Element{{Set: datapath.SetMembers, Net: netip.MustParsePrefix("192.0.2.7/32"), Port: 4793}}}
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	r.restart() // the others' state is there from a start on
	want := r.kernel.text()
	for _, word := range []string{"tunnels", "members"} {
		if !strings.Contains(want, word) {
			t.Fatalf("no %s in\n%s", word, want)
		}
	}
	r.lose()
	r.must("CreateNetwork", createNetwork(net3, "10.9.0.0/24", `{"mode":"overlay","vni":"77"}`))
	if err := r.d.Follow(t.Context(), 77); err != nil {
		t.Fatal(err)
	}
	r.idle()
	remote := c.remote
	c.mu.Lock()
	c.remote = datapath.State{}
	c.mu.Unlock()
	if err := r.d.Follow(t.Context(), 77); err != nil { // this one leaves the new network
		t.Fatal(err)
	}
	r.idle()
	c.mu.Lock()
	c.remote = remote
	c.mu.Unlock()
	if err := r.d.Follow(t.Context(), 77); err != nil { // and is back
		t.Fatal(err)
	}
	r.idle()
	r.must("DeleteNetwork", `{"NetworkID":"`+net3+`"}`)
	if got := r.kernel.text(); got != want {
		t.Errorf("the kernel was changed: %s", cmp.Diff(want, got))
	}
	r.idle()
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	r.idle()
	r.empty()
}

// An old copy of the state knows some of what is there; the rest is left alone too.
func TestStateOld(t *testing.T) {
	r := newRunningRig(t)
	// A record of a younger container that the copy does not have.
	r.kernel.mu.Lock()
	r.kernel.veths["wfvyounger"] = datapath.Veth{Name: "wfvyounger", Master: "wfb1a2b3c4d5e6f", MTU: 1450}
	r.kernel.mu.Unlock()
	r.restart()
	r.idle()
	if got := r.kernel.text(); !strings.Contains(got, "wfvyounger") {
		t.Errorf("the younger container's link was removed:\n%s", got)
	}
	if done, err := r.d.ForgetUnclaimed(t.Context()); err != nil || !strings.Contains(done, "1 links") {
		t.Errorf("%q, %v", done, err)
	}
}

// Trouble elsewhere is no reason to keep what is unclaimed; a kernel that cannot be
// read is.
func TestForgetUnclaimedInTrouble(t *testing.T) {
	r := newRunningRig(t)
	r.lose()
	r.kernel.foreign["br0"] = true
	r.must("CreateNetwork", createNetwork(strings.Repeat("9", 64), "10.9.0.0/24", `{"bridge":"br0"}`))
	r.kernel.foreign["br0"] = false
	r.kernel.broken = errors.New("no such kernel")
	if done, err := r.d.ForgetUnclaimed(t.Context()); err == nil || !strings.Contains(err.Error(), "no such kernel") {
		t.Errorf("%q, %v", done, err)
	}
	r.kernel.broken = nil
	if done, err := r.d.ForgetUnclaimed(t.Context()); err != nil || !strings.Contains(done, "3 links") {
		t.Errorf("%q, %v", done, err)
	}
	if got := r.kernel.text(); strings.Contains(got, "wf") || !strings.Contains(got, "iptables hook") {
		t.Errorf("there is\n%s", got)
	}
	r.kernel.foreign["br0"] = true
}

// A container that starts while its network is being forgotten is seen.
func TestForgetNetworkInUse(t *testing.T) {
	r := newRunningRig(t)
	n, unlock := r.d.find(net2)
	done := make(chan error)
	go func() {
		_, _, err := r.d.Forget(t.Context(), net2)
		done <- err
	}()
	for r.d.change.TryLock() { // until Forget has it
		r.d.change.Unlock()
	}
	time.Sleep(20 * time.Millisecond) // it waits for the endpoint now
	err := r.d.createEndpoint(t.Context(), n, Endpoint{Version: recordVersion, ID: ep2, Network: net2, Addrs: []netip.Prefix{netip.MustParsePrefix("10.2.0.2/24")}})
	unlock()
	if err != nil {
		t.Error(err)
	}
	if err := <-done; err == nil || !strings.Contains(err.Error(), "1 running containers") {
		t.Errorf("forgotten: %v", err)
	}
}

// TestForgetNetwork: the engine removed it while the plugin was not there.
func TestForgetNetwork(t *testing.T) {
	r := newRunningRig(t)
	third := strings.Repeat("3", 64)
	r.refused("CreateNetwork", createNetwork(third, "10.2.0.0/24", ""), "weft network forget "+short(net2), "docker network ls")
	for id, words := range map[string]string{"": "weft status networks", "zz": "weft status networks", net1: "1 running containers"} {
		if _, _, err := r.d.Forget(t.Context(), id); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("forget %q: %v", id, err)
		}
	}
	done, subnets, err := r.d.Forget(t.Context(), short(net2))
	if err != nil || !strings.Contains(done, short(net2)) || len(subnets) != 1 || subnets[0].String() != "10.2.0.0/24" {
		t.Errorf("%q, %v, %v", done, subnets, err)
	}
	r.must("CreateNetwork", createNetwork(third, "10.2.0.0/24", ""))
}

// A network that is refused for a name which is not ours leaves nothing behind.
func TestBridgeNameOfACard(t *testing.T) {
	r := newRig(t)
	r.refused("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"com.docker.network.bridge.name":"eth0"}`), "bridge.name=eth0", "choose another name")
	if got := r.records(); len(got) != 0 {
		t.Errorf("records %q", got)
	}
	r.idle()
	if s, err := r.d.Status(t.Context()); err != nil || s.Drift.Error != "" {
		t.Errorf("%v, %q", err, s.Drift.Error)
	}
}

// TestLinksWith: which links networks with a subnet are on, as far as they share a LAN.
func TestLinksWith(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	if got := r.d.LinksWith(netip.MustParsePrefix("10.1.0.0/24")); len(got) != 1 || got[0] != "" {
		t.Errorf("a bridge: %q", got)
	}
	if got := r.d.LinksWith(netip.MustParsePrefix("10.1.0.0/25")); len(got) != 0 {
		t.Errorf("another subnet: %q", got)
	}
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	r.must("CreateNetwork", onLAN(true, `{"mode":"macvlan","parent":"eth0"}`, "10.1.0.0/24", "", "", ""))
	if got := r.d.LinksWith(netip.MustParsePrefix("10.1.0.0/24")); len(got) != 1 || got[0] != "eth0" {
		t.Errorf("a LAN: %q", got)
	}
}

// TestUsedWithoutRecords: where the records of endpoints were lost nobody may conclude
// from them that an address is free.
func TestUsedWithoutRecords(t *testing.T) {
	for _, lost := range []bool{false, true} {
		r := newRigWith(t, func(c *Config) { c.RecordsLost = lost })
		r.must("CreateNetwork", createDual(""))
		if _, known := r.d.Used(netip.MustParsePrefix("10.1.0.0/24")); known == lost {
			t.Errorf("records lost %t: what is in use is known: %t", lost, known)
		}
	}
}
