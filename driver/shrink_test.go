package driver

import (
	"strings"
	"testing"
)

// TestShrink: a network with a lesser MTU gives it to new containers; those that run
// keep theirs, over a restart too.
func TestShrink(t *testing.T) {
	r, _ := newSpanningRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions))
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	shrink := func(mtu, want int) {
		t.Helper()
		if before, err := r.d.Shrink(t.Context(), 4242, mtu); err != nil || before != want {
			t.Fatalf("to %d: it was %d, %v; want %d", mtu, before, err, want)
		}
		r.idle()
	}
	shrink(1450, 0)
	shrink(1500, 0)
	shrink(100, 0) // nothing lives with that
	shrink(1400, 1450)
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", ""))
	shrink(1300, 1400)
	for range 2 {
		have := r.kernel.owned()
		if have.Bridges[0].MTU != 1300 {
			t.Errorf("the bridge has MTU %d", have.Bridges[0].MTU)
		}
		for _, v := range have.Veths {
			if want := map[string]int{hostEnd(ep1): 1450, hostEnd(ep2): 1400}[v.Name]; v.MTU != want {
				t.Errorf("%s has MTU %d, want %d", v.Name, v.MTU, want)
			}
		}
		if s, err := r.d.Status(t.Context()); err != nil || s.Networks[0].MTU != 1300 {
			t.Errorf("status: %+v, %v", s.Networks, err)
		}
		r.restart()
		r.idle()
	}
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", overlayOptions)) // again: it is the same
	for _, e := range []string{ep1, ep2} {
		r.must("DeleteEndpoint", ids(net1, e))
	}
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	r.empty()
	if before, err := r.d.Shrink(t.Context(), 4242, 1000); err != nil || before != 0 {
		t.Errorf("without the network: %d, %v", before, err)
	}

	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", strings.Replace(overlayOptions, "}", `,"mtu":"1420"}`, 1)))
	if before, err := r.d.Shrink(t.Context(), 4242, 1300); err != nil || before != 0 {
		t.Errorf("an MTU that was asked for: %d, %v", before, err)
	}
}
