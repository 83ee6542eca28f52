package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	wire "github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/internal/datapath"
)

// story is the life of one endpoint on a dual-stack network, each call with
// what the engine does for the endpoint between this call and the next.
var story = []struct {
	method, body string
	undoes       bool // the engine ignores its error and forgets
}{
	{"CreateNetwork", createDual(""), false},
	{"CreateEndpoint", createEndpoint(net1, ep1, "10.1.0.2/24", "fd00:1::2/64"), false},
	{"Join", joinBody(net1, ep1), false},
	{"ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080), binding(17, 53, "127.0.0.1", 0, 0), binding(6, 81, "", 9000, 9010)), false},
	{"RevokeExternalConnectivity", ids(net1, ep1), true},
	{"ProgramExternalConnectivity", program(net1, ep1, binding(6, 80, "", 8080, 8080)), false},
	{"Leave", ids(net1, ep1), true},
	{"Join", joinBody(net1, ep1), false},
	{"DeleteEndpoint", ids(net1, ep1), true},
	{"CreateEndpoint", createEndpoint(net1, ep2, "10.1.0.2/24", "fd00:1::2/64"), false},
	{"DeleteNetwork", `{"NetworkID":"` + net1 + `"}`, true},
}

// play runs the calls from until before to.
func (r *rig) play(from, to int) {
	r.t.Helper()
	for _, c := range story[from:to] {
		r.must(c.method, c.body)
		if c.method == "Join" {
			r.kernel.moveIn(veth1)
		}
	}
}

func TestStory(t *testing.T) {
	r := newRig(t)
	r.play(0, len(story))
	r.empty()
}

// TestFailEveryStep makes every call of the story fail at every call of its
// own to the kernel and the stores, before and after the work was done.
func TestFailEveryStep(t *testing.T) {
	for i, c := range story {
		for _, late := range []bool{false, true} {
			for k := 1; ; k++ {
				fired := false
				t.Run(fmt.Sprintf("%d %s %d late=%t", i, c.method, k, late), func(t *testing.T) {
					fired = failStep(t, i, k, late)
				})
				if !fired {
					if k == 1 && c.method != "Join" {
						t.Errorf("%s calls nothing", c.method)
					}
					break
				}
			}
		}
	}
}

// failStep plays the story up to call i, which fails in its k-th step; then the
// engine either goes on without it or repeats it. It reports whether there is a
// k-th step.
func failStep(t *testing.T, i, k int, late bool) (fired bool) {
	t.Helper()
	for _, again := range []bool{false, true} {
		r := newRig(t)
		r.play(0, i)
		before := r.kernel.text()
		records := strings.Join(r.records(), " ")
		r.faults.arm(k, late)
		_, err := r.call(story[i].method, story[i].body)
		fired = r.faults.fired
		r.faults.arm(0, false)
		if !fired {
			if err != nil {
				t.Error("no step failed, and yet:", err)
			}
			return false
		}
		if err == nil {
			t.Error("the call succeeded although a step failed")
		}
		if again {
			r.play(i, len(story))
			r.idle()
			r.empty()
			continue
		}
		if story[i].undoes { // the engine ignored the error: the next pass finishes it
			r.reconcile()
		}
		r.idle()
		if !story[i].undoes {
			if after := r.kernel.text(); trim(after) != trim(before) {
				t.Errorf("the call failed and left\n%s\nwhere there was\n%s", after, before)
			}
			if after := strings.Join(r.records(), " "); after != records {
				t.Errorf("the call failed and left the records %s where there were %s", after, records)
			}
		}
		r.restart()
		r.idle()
		if story[i].undoes {
			r.play(i+1, len(story))
		}
		r.must("DeleteEndpoint", ids(net1, ep1))
		r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
		r.empty()
	}
	return fired
}

// trim leaves forwarding out, which stays on.
func trim(text string) string {
	var keep []string
	for line := range strings.SplitSeq(text, "\n") {
		if !strings.HasPrefix(line, "sysctl ") {
			keep = append(keep, line)
		}
	}
	return strings.Join(keep, "\n")
}

// TestKillEveryStep is a process killed in every step of every call: what the
// next start finds is finished by it, by the engine's next calls, or after a
// while.
func TestKillEveryStep(t *testing.T) {
	for i, c := range story {
		for _, late := range []bool{false, true} {
			for k := 1; ; k++ {
				fired := false
				t.Run(fmt.Sprintf("%d %s %d late=%t", i, c.method, k, late), func(t *testing.T) {
					r := newRig(t)
					r.play(0, i)
					fired = r.killed(i, k, late)
					if !fired {
						return
					}
					r.clock.pass(2 * joinTime)
					r.reconcile()
					r.idle()
					// The engine knows no such network; unless all was done but
					// the answer, nothing is left of it.
					if answered := late && k == 3; i == 0 && !answered {
						r.empty()
					}
					r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
					r.empty()
				})
				if !fired {
					break
				}
			}
		}
	}
}

// killed runs call i on a driver that can do nothing from its k-th step on,
// and then starts another.
func (r *rig) killed(i, k int, late bool) (fired bool) {
	r.t.Helper()
	r.faults.dead = true
	r.faults.arm(k, late)
	_, _ = r.call(story[i].method, story[i].body)
	fired = r.faults.fired
	r.faults.dead = false
	r.faults.arm(0, false)
	r.restart()
	return fired
}

// TestAnsweredTooLate: a call whose time ran out while the kernel worked was
// answered with an error, and the engine does not delete what failed.
func TestAnsweredTooLate(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	r.kernel.seen = func(datapath.State) { cancel() }
	n, err := parseNetworkOptions(nil, []string{"bridge"})
	if err != nil {
		t.Fatal(err)
	}
	n.ID, n.Subnets = net1, []Subnet{subnet("10.1.0.0/24", "10.1.0.1/24")}
	if err := r.d.createNetwork(ctx, n); !errors.Is(err, context.Canceled) {
		t.Errorf("CreateNetwork: %v", err)
	}
	r.empty()

	r.kernel.seen = nil
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	before := r.kernel.text()
	ctx, cancel = context.WithCancel(t.Context())
	r.kernel.seen = func(datapath.State) { cancel() }
	_, err = r.d.handleCreateEndpoint(ctx, wire.CreateEndpointRequest{NetworkID: net1, EndpointID: ep1, Interface: &wire.EndpointInterface{Address: "10.1.0.2/24"}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("CreateEndpoint: %v", err)
	}
	r.kernel.seen = nil
	if after := r.kernel.text(); trim(after) != trim(before) {
		t.Errorf("left\n%s\nwhere there was\n%s", after, before)
	}
}
