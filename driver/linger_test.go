package driver

import "testing"

// A sub-interface that was deleted while it was not on the host keeps its hardware
// address for a while: the next one with it waits, and no other does.
func TestLinger(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"macvlan","parent":"eth0"}`))
	again := func(endpoint string) {
		t.Helper()
		r.must("Leave", ids(net1, endpoint))
		r.must("DeleteEndpoint", ids(net1, endpoint))
		r.must("CreateEndpoint", createEndpoint(net1, endpoint, "10.1.0.2/24", ""))
		r.must("Join", joinBody(net1, endpoint))
	}
	r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
	r.must("Join", joinBody(net1, ep1))
	again(ep1)
	if len(r.host.settled) > 0 {
		t.Errorf("waited for %q, which was on the host", r.host.settled)
	}
	r.host.away = map[string]bool{peerEnd(ep1): true}
	again(ep1)
	r.host.away = nil
	r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.3/24", ""))
	if len(r.host.settled) != 1 || r.host.settled[0] != peerEnd(ep1) {
		t.Errorf("waited for %q, want %s", r.host.settled, peerEnd(ep1))
	}
}
