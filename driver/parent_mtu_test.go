package driver

import (
	"encoding/json"
	"testing"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
)

// TestParentMTU: only an MTU that was given is asked of the kernel, which refuses
// one above the parent's; that may change.
func TestParentMTU(t *testing.T) {
	for _, c := range []struct {
		options string
		want    int
	}{
		{`{"mode":"macvlan","parent":"eth0"}`, 0},
		{`{"mode":"ipvlan","parent":"eth0","host_access":"true"}`, 0},
		{`{"mode":"macvlan","parent":"eth0.10"}`, 0},
		{`{"mode":"macvlan"}`, 0}, // of its own dummy, which has 1500
		{`{"mode":"macvlan","parent":"eth0","mtu":"1400"}`, 1400},
	} {
		r := newRig(t)
		r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", c.options))
		r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
		check := func() {
			t.Helper()
			for _, child := range r.kernel.children {
				if child.MTU != c.want {
					t.Errorf("%s: %s has MTU %d, want %d", c.options, child.Name, child.MTU, c.want)
				}
			}
			if s, err := r.d.Status(t.Context()); err != nil || s.Networks[0].MTU != c.want {
				t.Errorf("%s: status %d, %v, want %d", c.options, s.Networks[0].MTU, err, c.want)
			}
		}
		check()
		// Records of before have the MTU that the parent had.
		rec := r.d.networks[net1].rec
		rec.MTU = max(c.want, 1350)
		value, err := json.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		old, err := r.nets.Get(t.Context(), networkKey(net1))
		if err == nil {
			_, err = r.nets.Put(t.Context(), store.Record{Key: old.Key, Value: value, Rev: old.Rev})
		}
		if err != nil {
			t.Fatal(err)
		}
		r.restart()
		check()
		r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", ""))
		check()
	}
}

// TestParentMTUTooSmall: the parent's own MTU has to do for the network's protocols.
func TestParentMTUTooSmall(t *testing.T) {
	r := newRig(t)
	r.host.card(datapath.LinkFacts{Name: "thin0", Up: true, MTU: 1200})
	r.refused("CreateNetwork", createDual(`{"mode":"macvlan","parent":"thin0"}`), "parent thin0", "MTU of 1200", "IPv6 needs 1280", "ip link set thin0 mtu 1280")
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"thin0"}`))
}
