package driver

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/internal/store"
)

// copied are the records of a store.
func (r *rig) copied(s *store.Bolt) []store.Record {
	r.t.Helper()
	list, err := s.List(r.t.Context(), "")
	if err != nil {
		r.t.Fatal(err)
	}
	return list
}

// restore stops the plugin and starts it again with older records, in the same boot.
func (r *rig) restore(nets, eps []store.Record) {
	r.t.Helper()
	r.stop()
	r.kernel.die()
	dir := r.t.TempDir()
	for name, x := range map[string]struct {
		s    **store.Bolt
		list []store.Record
	}{"weft.db": {&r.nets, nets}, "run.db": {&r.eps, eps}} {
		b, err := store.Open(filepath.Join(dir, name), store.Options{NoSync: true}) // in use until the rig's own end
		if err != nil {
			r.t.Fatal(err)
		}
		for _, rec := range x.list {
			rec.Rev = 0
			if _, err := b.Put(r.t.Context(), rec); err != nil {
				r.t.Fatal(err)
			}
		}
		*x.s = b
	}
	r.start()
}

// TestStateRestored: a container that an older copy of the state does not name goes on
// working, with its published ports, beside those that it names.
func TestStateRestored(t *testing.T) {
	for mode, options := range map[string]string{"bridge": "", "gateway_mode": `{"com.docker.network.bridge.gateway_mode_ipv4":"routed"}`} {
		t.Run(mode, func(t *testing.T) {
			r := newRig(t)
			r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", options))
			start := func(id, addr string, port uint16) {
				t.Helper()
				r.must("CreateEndpoint", createEndpoint(net1, id, addr+"/24", ""))
				r.must("Join", joinBody(net1, id))
				r.kernel.moveIn(hostEnd(id))
				r.must("ProgramExternalConnectivity", program(net1, id, binding(6, 80, "", port, port)))
			}
			start(ep1, "10.1.0.2", 8080)
			r.idle()
			nets, eps := r.copied(r.nets), r.copied(r.eps)
			start(ep2, "10.1.0.3", 8081)
			r.idle()
			want := r.kernel.text()
			r.restore(nets, eps)
			for range 2 {
				r.idle()
				if got := r.kernel.text(); got != want {
					t.Fatalf("the kernel was changed: %s", cmp.Diff(want, got))
				}
			}
			// What was left of an interrupted change of the one that is named goes all the same.
			r.must("RevokeExternalConnectivity", ids(net1, ep1))
			r.must("Leave", ids(net1, ep1))
			r.must("DeleteEndpoint", ids(net1, ep1))
			r.idle()
			if got := r.kernel.text(); strings.Contains(got, "10.1.0.2") || !strings.Contains(got, "10.1.0.3") {
				t.Errorf("after the other one went:\n%s", got)
			}
			// The engine stops the container.
			r.must("Leave", ids(net1, ep2))
			r.must("DeleteEndpoint", ids(net1, ep2))
			r.idle()
			if got := r.kernel.text(); strings.Contains(got, "10.1.0.3") || strings.Contains(got, hostEnd(ep2)) {
				t.Errorf("left of the container:\n%s", got)
			}
		})
	}
}

// TestStrangersAreTold: other hosts keep what they know of this one while containers
// run on the network that no record names.
func TestStrangersAreTold(t *testing.T) {
	r, c := newSpanningRig(t)
	told := func(want bool) {
		t.Helper()
		r.idle()
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.strangers[4242] != want {
			t.Errorf("strangers %t, want %t", c.strangers[4242], want)
		}
	}
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	nets, eps := r.copied(r.nets), r.copied(r.eps)
	for id, addr := range map[string]string{ep1: "10.1.0.2/24", ep2: "10.1.0.3/24"} {
		r.must("CreateEndpoint", createEndpoint(net1, id, addr, ""))
		r.must("Join", joinBody(net1, id))
		r.kernel.moveIn(hostEnd(id))
	}
	told(false)
	r.restart()
	told(false)
	r.restore(nets, eps)
	told(true)
	r.must("Leave", ids(net1, ep1))
	told(true)
	r.must("Leave", ids(net1, ep2))
	told(false)
}
