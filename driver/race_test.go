package driver

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
)

// numbered is an endpoint ID as the engine makes them.
func numbered(i int) string { return fmt.Sprintf("%012x%s", i, strings.Repeat("0", 52)) }

// TestHammer runs many containers' lives at once on three networks, one of
// which comes and goes, while repair runs without pause. Nothing that a call
// made may be taken away by repair, and repair must find nothing to do.
func TestHammer(t *testing.T) {
	r := newRig(t)
	r.kernel.wait = func() { time.Sleep(time.Millisecond) }
	networks := []string{net1, net2, swm1}
	for i, id := range networks {
		r.must("CreateNetwork", createNetwork(id, fmt.Sprintf("10.%d.0.0/24", i+1), ""))
	}
	stop := make(chan struct{})
	var repair, calls sync.WaitGroup
	repair.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if lines, err := r.d.Reconcile(t.Context()); err != nil || len(lines) > 0 {
				t.Errorf("repair: %q, %v", lines, err)
				return
			}
		}
	})
	for i := range 32 {
		calls.Go(func() { r.live(t, networks[i%2], i) })
	}
	calls.Go(func() {
		for range 10 {
			if _, err := r.call("DeleteNetwork", fmt.Sprintf(`{"NetworkID":%q}`, swm1)); err != nil {
				t.Error(err)
			}
			if _, err := r.call("CreateNetwork", createNetwork(swm1, "10.3.0.0/24", "")); err != nil {
				t.Error(err)
			}
		}
	})
	calls.Wait()
	close(stop)
	repair.Wait()
	for _, id := range networks {
		r.must("DeleteNetwork", fmt.Sprintf(`{"NetworkID":%q}`, id))
	}
	r.empty()
}

// live is container i started and stopped ten times; each time it must find in
// the kernel what the calls were answered for.
func (r *rig) live(t *testing.T, network string, i int) {
	t.Helper()
	addr := fmt.Sprintf("10.%d.0.%d/24", 1+i%2, 10+i)
	for round := range 10 {
		id := numbered(1 + i*100 + round)
		body := createEndpoint(network, id, addr, "")
		for _, c := range []struct{ method, body string }{
			{"CreateEndpoint", body}, {"Join", joinBody(network, id)},
			{"ProgramExternalConnectivity", program(network, id, binding(6, 80, "", uint16(20000+i), uint16(20000+i)), binding(17, 53, "", 0, 0))},
		} {
			if _, err := r.call(c.method, c.body); err != nil {
				t.Errorf("%s: %v", c.method, err)
				return
			}
			if c.method == "Join" {
				r.kernel.moveIn(hostEnd(id))
			}
		}
		if rand.IntN(3) == 0 {
			time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
		}
		text := r.kernel.text()
		for _, want := range []string{hostEnd(id), fmt.Sprintf("0.0.0.0/0 . tcp . %d", 20000+i), fmt.Sprintf("listen tcp [::]:%d", 20000+i)} {
			if !strings.Contains(text, want) {
				t.Errorf("container %d, round %d: %s is not there", i, round, want)
			}
		}
		for _, method := range []string{"RevokeExternalConnectivity", "Leave", "DeleteEndpoint"} {
			if _, err := r.call(method, ids(network, id)); err != nil {
				t.Errorf("%s: %v", method, err)
			}
		}
	}
}

// TestRemovalsOverlap: the kernel lets each deletion wait; a hundred of them
// must wait together.
func TestRemovalsOverlap(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	const count = 100
	for i := range count {
		r.must("CreateEndpoint", createEndpoint(net1, numbered(i+1), fmt.Sprintf("10.1.0.%d/24", i+2), ""))
		r.must("Join", joinBody(net1, numbered(i+1)))
	}
	var mu sync.Mutex
	inside, most := 0, 0
	all := make(chan struct{})
	r.kernel.wait = func() {
		mu.Lock()
		inside++
		if most = max(most, inside); inside == count {
			close(all)
		}
		mu.Unlock()
		select {
		case <-all:
		case <-time.After(4 * time.Second):
		}
	}
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() {
			if _, err := r.call("Leave", ids(net1, numbered(i+1))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most != count {
		t.Errorf("%d of %d removals ran at once", most, count)
	}
	r.kernel.wait = nil
	r.must("DeleteNetwork", `{"NetworkID":"`+net1+`"}`)
	r.empty()
}

// TestTwoForOneAddress: of calls at the same time for the same address one
// wins.
func TestTwoForOneAddress(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i := range 16 {
		wg.Go(func() {
			_, err := r.call("CreateEndpoint", createEndpoint(net1, numbered(i+1), "10.1.0.2/24", ""))
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if !strings.Contains(err.Error(), "in use") {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won != 1 || len(r.kernel.veths) != 1 {
		t.Errorf("%d calls won, %d links are there", won, len(r.kernel.veths))
	}
}
