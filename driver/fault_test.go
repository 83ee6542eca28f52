package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	wire "github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/plugin"
)

// act is one call of a story.
type act struct {
	method, body string
	undoes       bool // the engine ignores its error and forgets
	// opens is set where a call that fails may leave the network with a
	// sub-interface of the host's, which stays until the network goes.
	opens bool
}

// story is the life of one endpoint on a dual-stack network.
type story struct {
	acts []act
	// steps are those of CreateNetwork; after the last one only the answer is
	// missing.
	steps int
	// between is what the engine does for the endpoint after a call.
	between func(r *rig, method string)
}

var stories = map[string]story{
	"bridge": {acts: bridgeActs, steps: 3, between: func(r *rig, method string) {
		if method == "Join" {
			r.kernel.moveIn(veth1)
		}
	}},
	"macvlan, host access": {acts: parentActs(`{"mode":"macvlan","parent":"eth0.10","host_access":"true"}`), steps: 5, between: carried},
	"macvlan, ports":       {acts: parentActs(`{"mode":"macvlan","parent":"eth0"}`), steps: 5, between: carried},
	"ipvlan":               {acts: parentActs(`{"mode":"ipvlan","parent":"eth0.10.20"}`), steps: 5, between: carried},
}

// carried is what the engine does with a sub-interface.
func carried(r *rig, method string) {
	switch method {
	case "Join":
		r.kernel.carry(r.t)
	case "Leave":
		r.kernel.carryBack(child1)
	}
}

func parentActs(options string) []act {
	port := binding(6, 80, "", 8080, 8080)
	return []act{
		{method: "CreateNetwork", body: createDual(options)},
		{method: "CreateEndpoint", body: createEndpoint(net1, ep1, "10.1.0.2/24", "fd00:1::2/64")},
		{method: "Join", body: program(net1, ep1, port), opens: true},
		{method: "ProgramExternalConnectivity", body: program(net1, ep1, port)},
		{method: "RevokeExternalConnectivity", body: ids(net1, ep1), undoes: true},
		{method: "ProgramExternalConnectivity", body: program(net1, ep1, port)},
		{method: "Leave", body: ids(net1, ep1), undoes: true},
		{method: "Join", body: program(net1, ep1, port)},
		{method: "Leave", body: ids(net1, ep1), undoes: true},
		{method: "DeleteEndpoint", body: ids(net1, ep1), undoes: true},
		{method: "CreateEndpoint", body: createEndpoint(net1, ep2, "10.1.0.2/24", "fd00:1::2/64")},
		{method: "DeleteNetwork", body: `{"NetworkID":"` + net1 + `"}`, undoes: true},
	}
}

var bridgeActs = []act{
	{method: "CreateNetwork", body: createDual("")},
	{method: "CreateEndpoint", body: createEndpoint(net1, ep1, "10.1.0.2/24", "fd00:1::2/64")},
	{method: "Join", body: joinBody(net1, ep1)},
	{method: "ProgramExternalConnectivity", body: program(net1, ep1, binding(6, 80, "", 8080, 8080), binding(17, 53, "127.0.0.1", 0, 0), binding(6, 81, "", 9000, 9010))},
	{method: "RevokeExternalConnectivity", body: ids(net1, ep1), undoes: true},
	{method: "ProgramExternalConnectivity", body: program(net1, ep1, binding(6, 80, "", 8080, 8080))},
	{method: "Leave", body: ids(net1, ep1), undoes: true},
	{method: "Join", body: joinBody(net1, ep1)},
	{method: "DeleteEndpoint", body: ids(net1, ep1), undoes: true},
	{method: "CreateEndpoint", body: createEndpoint(net1, ep2, "10.1.0.2/24", "fd00:1::2/64")},
	{method: "DeleteNetwork", body: `{"NetworkID":"` + net1 + `"}`, undoes: true},
}

// play runs acts of a story one after the other.
func (r *rig) play(s story, acts []act) {
	r.t.Helper()
	for _, c := range acts {
		r.must(c.method, c.body)
		s.between(r, c.method)
	}
}

// eachAct runs f for every act of every story, with its number.
func eachAct(t *testing.T, f func(t *testing.T, s story, i int)) {
	t.Helper()
	for name, s := range stories {
		t.Run(name, func(t *testing.T) {
			for i := range s.acts {
				f(t, s, i)
			}
		})
	}
}

func TestStory(t *testing.T) {
	for name, s := range stories {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			for _, c := range s.acts {
				r.play(s, []act{c})
				r.idle()
			}
			r.empty()
		})
	}
}

// TestFailEveryStep makes every call of the story fail at every call of its
// own to the kernel and the stores, before and after the work was done.
func TestFailEveryStep(t *testing.T) {
	eachAct(t, func(t *testing.T, s story, i int) {
		t.Helper()
		c := s.acts[i]
		for _, late := range []bool{false, true} {
			for k := 1; ; k++ {
				fired := false
				t.Run(fmt.Sprintf("%d %s %d late=%t", i, c.method, k, late), func(t *testing.T) {
					fired = failStep(t, s, i, k, late)
				})
				if !fired {
					if k == 1 && c.method != "Join" {
						t.Errorf("%s calls nothing", c.method)
					}
					break
				}
			}
		}
	})
}

// failStep plays the story up to call i, which fails in its k-th step; then the
// engine either goes on without it or repeats it. It reports whether there is a
// k-th step.
func failStep(t *testing.T, s story, i, k int, late bool) (fired bool) {
	t.Helper()
	for _, again := range []bool{false, true} {
		r := newRig(t)
		r.play(s, s.acts[:i])
		before := r.kernel.text()
		records := strings.Join(r.records(), " ")
		r.faults.arm(k, late)
		_, err := r.call(s.acts[i].method, s.acts[i].body)
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
			r.play(s, s.acts[i:])
			r.idle()
			r.empty()
			continue
		}
		if s.acts[i].undoes { // the engine ignored the error: the next pass finishes it
			r.reconcile()
		}
		r.idle()
		if !s.acts[i].undoes && !s.acts[i].opens {
			if after := r.kernel.text(); trim(after) != trim(before) {
				t.Errorf("the call failed and left\n%s\nwhere there was\n%s", after, before)
			}
			if after := strings.Join(r.records(), " "); after != records {
				t.Errorf("the call failed and left the records %s where there were %s", after, records)
			}
		}
		r.restart()
		r.idle()
		if s.acts[i].undoes {
			s.between(r, s.acts[i].method)
			r.play(s, s.acts[i+1:])
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
	eachAct(t, func(t *testing.T, s story, i int) {
		t.Helper()
		c := s.acts[i]
		for _, late := range []bool{false, true} {
			for k := 1; ; k++ {
				fired := false
				t.Run(fmt.Sprintf("%d %s %d late=%t", i, c.method, k, late), func(t *testing.T) {
					r := newRig(t)
					r.play(s, s.acts[:i])
					fired = r.killed(c, k, late)
					if !fired {
						return
					}
					r.clock.pass(2 * joinTime)
					r.reconcile()
					r.idle()
					// The engine knows no such network; unless all was done but
					// the answer, nothing is left of it.
					if answered := late && k == s.steps; i == 0 && !answered {
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
	})
}

// killed makes a call on a driver that can do nothing from its k-th step on,
// and then starts another.
func (r *rig) killed(c act, k int, late bool) (fired bool) {
	r.t.Helper()
	r.faults.dead = true
	r.faults.arm(k, late)
	_, _ = r.call(c.method, c.body)
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
	n, err := parseNetworkOptions(nil, []string{"bridge"}, modeBridge)
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
	req := plugin.CreateEndpointRequest{NetworkID: net1, EndpointID: ep1, Interface: &wire.EndpointInterface{Address: "10.1.0.2/24"}}
	_, err = r.d.handleCreateEndpoint(ctx, req)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("CreateEndpoint: %v", err)
	}
	r.kernel.seen = nil
	if after := r.kernel.text(); trim(after) != trim(before) {
		t.Errorf("left\n%s\nwhere there was\n%s", after, before)
	}
}
