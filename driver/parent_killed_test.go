package driver

import (
	"strings"
	"testing"
)

// killedBeforeLink is a network on a parent and one endpoint, whose record is
// written and whose link the process did not live to make.
func killedBeforeLink(t *testing.T, mode string) *rig {
	t.Helper()
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"`+mode+`","parent":"eth0"}`))
	body := createEndpoint(net1, ep1, "10.1.0.2/24", "")
	if !r.killed(act{method: "CreateEndpoint", body: body}, 2, false) {
		t.Fatal("the call has no second step")
	}
	if len(r.kernel.children) > 0 || !strings.Contains(strings.Join(r.records(), " "), ep1) {
		t.Fatalf("children %v, records %q", r.kernel.children, r.records())
	}
	return r
}

// TestKilledBeforeLink: a sub-interface that is not on the host is not taken for
// one in a container if nobody joined it.
func TestKilledBeforeLink(t *testing.T) {
	for _, mode := range []string{modeMacvlan, modeIPvlan} {
		t.Run(mode+" address", func(t *testing.T) {
			r := killedBeforeLink(t, mode)
			r.must("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""))
			if n := r.warned("forgotten"); n != 1 {
				t.Errorf("said %d times", n)
			}
		})
		t.Run(mode+" while", func(t *testing.T) {
			r := killedBeforeLink(t, mode)
			r.idle()
			r.clock.pass(2 * joinTime)
			if lines := r.reconcile(); len(lines) != 1 || !strings.Contains(lines[0], "never joined") {
				t.Errorf("reconcile: %q", lines)
			}
		})
		t.Run(mode+" running", func(t *testing.T) {
			r := newRig(t)
			r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", `{"mode":"`+mode+`","parent":"eth0"}`))
			r.must("CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", ""))
			r.must("Join", joinBody(net1, ep1))
			r.kernel.carry(t)
			r.restart()
			r.clock.pass(2 * joinTime)
			r.idle()
			r.refused("CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", ""), "10.1.0.2 is in use")
		})
	}
}
