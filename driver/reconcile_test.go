package driver

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
)

// newRunningRig has two networks; the first with a running container that
// publishes a port.
func newRunningRig(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.must("CreateNetwork", createDual(""))
	r.must("CreateNetwork", createNetwork(net2, "10.2.0.0/24", ""))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", "fd00:1::2/64"))
	r.must("Join", joinBody(net1, ep1))
	r.kernel.moveIn(veth1)
	r.must("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080)))
	r.idle()
	return r
}

// TestRepair damages one thing after the other.
func TestRepair(t *testing.T) {
	key := datapath.Element{Set: datapath.SetPublished, Net: netip.MustParsePrefix("0.0.0.0/0"), Proto: datapath.TCP, Port: 8080}
	sock := datapath.Socket{Proto: datapath.TCP, Host: netip.MustParseAddrPort("0.0.0.0:8080")}
	for name, c := range map[string]struct {
		damage func(*fakeKernel)
		lines  int
		words  []string
	}{
		"nothing":        {func(*fakeKernel) {}, 0, nil},
		"table flushed":  {func(k *fakeKernel) { clear(k.elements) }, 12, []string{"published { 0.0.0.0/0 . tcp . 8080", "bridges { wfb2a2b3c4d5e6f"}},
		"hook removed":   {func(k *fakeKernel) { k.hook = false }, 1, []string{"hook"}},
		"forwarding off": {func(k *fakeKernel) { k.forward4 = false }, 1, []string{"forwarding"}},
		"bridge without address": {func(k *fakeKernel) {
			b := k.bridges["wfb2a2b3c4d5e6f"]
			b.Addrs = nil
			k.bridges[b.Name] = b
		}, 1, []string{"wfb2a2b3c4d5e6f"}},
		"bridge down": {func(k *fakeKernel) {
			b := k.bridges["wfb2a2b3c4d5e6f"]
			b.Down = true
			k.bridges[b.Name] = b
		}, 1, []string{"wfb2a2b3c4d5e6f"}},
		"bridge gone": {func(k *fakeKernel) { delete(k.bridges, "wfb2a2b3c4d5e6f") }, 1, []string{"link add wfb2a2b3c4d5e6f"}},
		"port out of its bridge": {func(k *fakeKernel) {
			v := k.veths[veth1]
			v.Master = ""
			k.veths[veth1] = v
		}, 1, []string{veth1}},
		"bridge gone under its port": {func(k *fakeKernel) {
			delete(k.bridges, "wfb1a2b3c4d5e6f")
			v := k.veths[veth1]
			v.Master = ""
			k.veths[veth1] = v
		}, 2, []string{"link add wfb1a2b3c4d5e6f", veth1}},
		"port leads elsewhere": {func(k *fakeKernel) {
			e := k.elements[key]
			e.To = netip.MustParseAddr("10.1.0.66")
			k.elements[key] = e
		}, 2, []string{"10.1.0.66", "10.1.0.2"}},
		"socket leads elsewhere": {func(k *fakeKernel) {
			x := k.sockets[sock]
			x.To = netip.MustParseAddrPort("10.1.0.66:80")
			k.sockets[sock] = x
		}, 2, []string{"10.1.0.66", "10.1.0.2"}},
		"strays": {func(k *fakeKernel) {
			stray := datapath.Element{Set: datapath.SetBridges, Link: "wfb0"}
			k.elements[stray] = stray
		}, 1, []string{"wfb0", "not wanted"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRunningRig(t)
			want := r.kernel.text()
			r.log.Reset()
			r.kernel.mu.Lock()
			c.damage(r.kernel)
			r.kernel.mu.Unlock()
			lines := r.reconcile()
			if len(lines) != c.lines {
				t.Errorf("%d lines, want %d:\n%s", len(lines), c.lines, strings.Join(lines, "\n"))
			}
			for _, w := range c.words {
				if !strings.Contains(strings.Join(lines, "\n"), w) {
					t.Errorf("no line says %q:\n%s", w, strings.Join(lines, "\n"))
				}
			}
			if got := r.kernel.text(); got != want {
				t.Errorf("not as before: %s", cmp.Diff(want, got))
			}
			if r.kernel.made[veth1] != 1 {
				t.Errorf("the link was made %d times", r.kernel.made[veth1])
			}
			if got := r.warned("repaired: "); got != c.lines {
				t.Errorf("%d warnings, want %d", got, c.lines)
			}
			r.idle()
			if got := r.warned("repaired: "); got != c.lines {
				t.Errorf("%d warnings after another pass, want %d", got, c.lines)
			}
		})
	}
}

// TestLostLink: the container's end went with it, so it is not made again, and
// what led to it goes.
func TestLostLink(t *testing.T) {
	r := newRunningRig(t)
	r.kernel.cut(veth1)
	if lines := r.reconcile(); !strings.Contains(strings.Join(lines, "\n"), "link "+veth1+" is gone") {
		t.Errorf("lines %q", lines)
	}
	if got := r.kernel.text(); strings.Contains(got, veth1) || strings.Contains(got, "8080") {
		t.Errorf("left:\n%s", got)
	}
	r.idle()
	r.idle()
	if n := r.warned("its link " + veth1 + " is gone"); n != 1 {
		t.Errorf("said %d times", n)
	}
	if s, err := r.d.Status(t.Context()); err != nil || len(s.Endpoints) != 1 || s.Endpoints[0].State != "lost" {
		t.Errorf("status %+v, %v", s, err)
	}
	if by, ok := r.d.Used(netip.MustParsePrefix("10.1.0.0/24")); !ok || by(netip.MustParseAddr("10.1.0.2")) != "" {
		t.Errorf("%v, its address counts as used", ok)
	}
	r.refused("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080)), "link is gone")
	r.must("RevokeExternalConnectivity", ids(net1, ep1))
	// The address is free for the next, and deleting the old takes nothing
	// from it.
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", "fd00:1::2/64"))
	r.must("ProgramExternalConnectivity", program(net1, ep2, binding(6, 80, "", 8080, 8080)))
	want := r.kernel.text()
	r.must("Leave", ids(net1, ep1))
	r.must("DeleteEndpoint", ids(net1, ep1))
	if got := r.kernel.text(); got != want {
		t.Errorf("deleting took something: %s", cmp.Diff(want, got))
	}
	r.must("DeleteEndpoint", ids(net1, ep2))
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	r.must("DeleteNetwork", `{"NetworkID":"`+net2+`"}`)
	r.empty()
}

// TestLostLinkComesBack with the engine's next Join.
func TestLostLinkComesBack(t *testing.T) {
	r := newRunningRig(t)
	r.kernel.cut(veth1)
	r.reconcile()
	r.must("Join", joinBody(net1, ep1))
	if !strings.Contains(r.kernel.text(), veth1) || !strings.Contains(r.kernel.text(), "8080") {
		t.Errorf("there is\n%s", r.kernel.text())
	}
}

// TestAddressOfLostLink: the next endpoint need not wait for the next pass.
func TestAddressOfLostLink(t *testing.T) {
	r := newRunningRig(t)
	r.refused("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""), "in use")
	r.kernel.cut(veth1)
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""))
}

// TestRecoverLeavesForwarding: the plugin starts before the engine has set its
// FORWARD policy.
func TestRecoverLeavesForwarding(t *testing.T) {
	r := newRunningRig(t)
	r.kernel.forward4, r.kernel.forward6 = false, false
	r.restart()
	if r.kernel.forward4 || r.kernel.forward6 {
		t.Error("the start switched forwarding on")
	}
	if lines := r.reconcile(); len(lines) != 1 {
		t.Errorf("the next pass changed %q", lines)
	}
	if !r.kernel.forward4 || !r.kernel.forward6 {
		t.Error("the next pass left it off")
	}
}

// TestRestartSaysNothing: ports that our death let go of are no damage.
func TestRestartSaysNothing(t *testing.T) {
	r := newRunningRig(t)
	r.restart()
	if s, err := r.d.Status(t.Context()); err != nil || len(s.Drift.Repaired) > 0 {
		t.Errorf("drift %+v, %v", s.Drift, err)
	}
	for _, e := range r.log.AllEntries() {
		t.Errorf("said %q", e.Message)
	}
}

func TestReboot(t *testing.T) {
	r := newRunningRig(t)
	want := r.kernel.text()
	r.stop()
	r.kernel.reboot()
	deleteAll(t, r.eps) // as a store does that ends with the boot
	r.start()
	r.idle()
	if r.kernel.forward4 {
		t.Error("forwarding is on before there is a container")
	}
	r.must("Leave", ids(net1, ep1))
	r.must("DeleteEndpoint", ids(net1, ep1))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", "fd00:1::2/64"))
	r.must("Join", joinBody(net1, ep1))
	r.must("ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080)))
	r.kernel.moveIn(veth1)
	if got := r.kernel.text(); got != want {
		t.Errorf("not as before: %s", cmp.Diff(want, got))
	}
}

func deleteAll(t *testing.T, s *store.Bolt) {
	t.Helper()
	list, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, rec := range list {
		if err := s.Delete(t.Context(), rec.Key); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPortTakenWhileDown: one port that cannot be held again keeps nothing else
// from being restored.
func TestPortTakenWhileDown(t *testing.T) {
	r := newRunningRig(t)
	want := r.kernel.text()
	r.kernel.taken[netip.MustParseAddrPort("0.0.0.0:8080")] = true
	r.stop()
	r.kernel.reboot()
	v := datapath.Veth{Name: veth1, Peer: "wfce11111111111", Master: "wfb1a2b3c4d5e6f", MTU: 1450, Hairpin: true}
	r.kernel.veths[veth1] = v // this link alone is left
	r.start()
	if got := r.kernel.text(); !strings.Contains(got, "link add wfb1a2b3c4d5e6f") || !strings.Contains(got, "link add wfb2a2b3c4d5e6f") {
		t.Errorf("there is only\n%s", got)
	}
	if s, err := r.d.Status(t.Context()); err != nil || !strings.Contains(s.Drift.Error, "8080") || !strings.Contains(s.Drift.Error, "endpoint e11111111111") {
		t.Errorf("status says %q, %v", s.Drift.Error, err)
	}
	delete(r.kernel.taken, netip.MustParseAddrPort("0.0.0.0:8080"))
	r.reconcile()
	if got := r.kernel.text(); got != want {
		t.Errorf("not as before: %s", cmp.Diff(want, got))
	}
}

// TestForeignBridgeVanishes: it is told, and what can be mended comes back with it.
func TestForeignBridgeVanishes(t *testing.T) {
	r := newRig(t)
	r.kernel.foreign["br0"] = true
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"bridge":"br0"}`))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	want := r.kernel.text()
	delete(r.kernel.foreign, "br0")
	v := r.kernel.veths[veth1]
	v.Master = ""
	r.kernel.veths[veth1] = v
	for range 2 {
		if _, err := r.d.Reconcile(t.Context()); err == nil || !strings.Contains(err.Error(), "br0 does not exist") {
			t.Errorf("got %v", err)
		}
	}
	r.kernel.foreign["br0"] = true
	r.reconcile()
	if got := r.kernel.text(); got != want {
		t.Errorf("not as before: %s", cmp.Diff(want, got))
	}
}

func TestRunTellsOnceAndEnds(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.d.Run(ctx) }()
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Run goes on")
	}
}

// TestDamagedRecords are refused by name, and stay as they are.
func TestDamagedRecords(t *testing.T) {
	for key, value := range map[string]string{
		"network/x":                 `{"Version":1,"ID":"x"`,
		"network/y":                 `{"Version":1,"ID":"z","Mode":"bridge"}`,
		"network/v":                 `{"Version":2,"ID":"v","Mode":"bridge"}`,
		"network/m":                 `{"Version":1,"ID":"m","Mode":"macvlan"}`,
		"endpoint/" + net1 + "/bad": `{"Version":1,"ID":"bad","Network":"` + net1 + `","Addrs":["10.0.0"]}`,
	} {
		t.Run(key, func(t *testing.T) {
			r := newRunningRig(t)
			s := r.nets
			if strings.HasPrefix(key, "endpoint") {
				s = r.eps
			}
			rec, err := s.Put(t.Context(), store.Record{Key: key, Value: []byte(value)})
			if err != nil {
				t.Fatal(err)
			}
			before := r.kernel.text()
			d, err := New(Config{Networks: r.nets, Endpoints: r.eps, Kernel: r.kernel, Backends: map[string]Backend{"bridge": Bridge{}},
				Host: newFakeHost(newFakeKernel(&faults{}), 1500), Log: quiet()})
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Recover(t.Context()); err == nil || !strings.Contains(err.Error(), key) {
				t.Errorf("got %v", err)
			}
			if got, err := s.Get(t.Context(), key); err != nil || got.Rev != rec.Rev {
				t.Errorf("the record is now %+v, %v", got, err)
			}
			if after := r.kernel.text(); after != before {
				t.Errorf("the kernel changed: %s", cmp.Diff(before, after))
			}
			if err := s.Delete(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestKernelCannotBeRead(t *testing.T) {
	r := newRunningRig(t)
	before := r.kernel.text()
	r.kernel.broken = errors.New("no such kernel")
	if _, err := r.d.Reconcile(t.Context()); err == nil || !strings.Contains(err.Error(), "no such kernel") {
		t.Errorf("got %v", err)
	}
	r.kernel.broken = nil
	if after := r.kernel.text(); after != before {
		t.Errorf("it changed: %s", cmp.Diff(before, after))
	}
}

func TestNewWantsEverything(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("an empty Config was accepted")
	}
}

// TestRunDamaged: damage that is told of is repaired at once, and not in 30 s.
func TestRunDamaged(t *testing.T) {
	damaged := make(chan struct{}, 1)
	r := newRigWith(t, func(c *Config) { c.Damaged = damaged })
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.d.Run(ctx) }()
	elements := func() []datapath.Element {
		have, err := r.kernel.Owned(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return have.Elements
	}
	for range 2 {
		gone := datapath.State{Elements: elements()}
		if err := r.kernel.Remove(ctx, gone); err != nil {
			t.Fatal(err)
		}
		damaged <- struct{}{}
		for stop := time.Now().Add(5 * time.Second); len(elements()) != len(gone.Elements); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(stop) {
				t.Fatal("not repaired")
			}
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestGuardIsLifted: the host keeps others' packets back for as long as a container
// of the family needs forwarding.
func TestGuardIsLifted(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createDual(""))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", "fd00:1::3/64"))
	want := func(when string, want ...string) {
		t.Helper()
		r.reconcile()
		if s, err := r.d.Status(t.Context()); err != nil || !slices.Equal(s.Guard, want) {
			t.Errorf("%s: guards %q, %v, want %q", when, s.Guard, err, want)
		}
	}
	want("both", "ipv4", "ipv6")
	r.must("DeleteEndpoint", ids(net1, ep2))
	want("IPv4 alone", "ipv4")
	r.must("DeleteEndpoint", ids(net1, ep1))
	want("none")
}
