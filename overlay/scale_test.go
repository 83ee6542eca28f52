package overlay

import (
	"runtime"
	"slices"
	"testing"
	"time"
)

// TestGossipScale runs many hosts in one process, all started at once. With
// WEFT_SOAK set it is the size that is promised: 200 hosts, 50 networks of 20
// endpoints.
func TestGossipScale(t *testing.T) {
	hosts, networks, endpoints, idle, pace := 30, 10, 20, 3*time.Second, 20*time.Millisecond
	if soak() {
		hosts, networks, idle, pace = 200, 50, 30*time.Second, 100*time.Millisecond // one machine is not 200
	}
	w := newWires()
	w.memory = true
	before := heap()
	// Endpoint e of network v is on host (7v + e) mod hosts.
	mine := make([]map[uint32][]int, hosts)
	for v := range uint32(networks) {
		for e := range endpoints {
			i := (7*int(v) + e) % hosts
			if mine[i] == nil {
				mine[i] = map[uint32][]int{}
			}
			mine[i][v+1] = append(mine[i][v+1], int(v)*endpoints+e)
		}
	}
	var nodes []*node
	on := map[uint32][]*node{}
	for i := range hosts {
		var peers []string
		for _, j := range []int{i - 1, i / 2} { // a chain and a tree
			if j >= 0 && j < i {
				peers = append(peers, nodes[j].addr.String())
			}
		}
		c := w.host(i, peers...)
		c.Keys = [][]byte{testKey(1)}
		x := w.run(t, c)
		for v, l := range mine[i] {
			x.set(v, l...)
			on[v] = append(on[v], x)
		}
		nodes = append(nodes, x)
		time.Sleep(pace)
	}
	complete := func() bool {
		for v, holders := range on {
			for _, x := range holders {
				if len(x.table.View(v).VTEPs) != len(holders)-1 || len(x.table.View(v).Forwards) < endpoints-(endpoints+hosts-1)/hosts {
					return false
				}
			}
		}
		return true
	}
	start := within(t, time.Minute, "all see all", func() bool { time.Sleep(10 * time.Millisecond); return complete() })
	members := start + within(t, 2*time.Minute, "all are members", func() bool {
		time.Sleep(50 * time.Millisecond)
		return !slices.ContainsFunc(nodes, func(x *node) bool { return x.members() < hosts-1 })
	})
	t.Logf("%d hosts, %d networks of %d endpoints: all see all after %s, all are members after %s; %.0f kB per host",
		hosts, networks, endpoints, start, members, w.rate(hosts)/1e3)

	time.Sleep(time.Second)
	w.rate(hosts)
	time.Sleep(idle)
	t.Logf("idle: %.0f bytes per host and second", w.rate(hosts)/idle.Seconds())

	var took []time.Duration
	changes := time.Now()
	for i := range 100 {
		v := uint32(i%networks + 1)
		x := on[v][i%len(on[v])]
		x.set(v, 10000+i)
		took = append(took, within(t, 10*time.Second, "a change is everywhere", func() bool {
			return !slices.ContainsFunc(on[v], func(y *node) bool { return y != x && !y.sees(v, x, 10000+i) })
		}))
		time.Sleep(50*time.Millisecond - min(took[i], 50*time.Millisecond)) // 20 a second
	}
	passed := time.Since(changes)
	slices.Sort(took)
	logTimes(t, "one change on all hosts that have the network", took)
	t.Logf("%.0f changes a second in all: %.0f bytes per host and second", 100/passed.Seconds(), w.rate(hosts)/passed.Seconds())
	t.Logf("%.0f kB of memory per host, %d goroutines", float64(heap()-before)/float64(hosts)/1e3, runtime.NumGoroutine()/hosts)

	last := nodes[hosts-1]
	last.stop()
	silent := within(t, 15*time.Second, "a stopped host is silent everywhere", func() bool {
		time.Sleep(20 * time.Millisecond)
		return !slices.ContainsFunc(nodes[:hosts-1], func(x *node) bool { return !x.silent(last) })
	})
	t.Logf("a stopped host is silent everywhere after %s", silent)
	if silent > 10*time.Second {
		t.Error("that is too late")
	}
	wrong := 0
	for _, x := range nodes[:hosts-1] {
		wrong += len(x.logged("is silent")) - 1
	}
	t.Logf("%d times a host was taken for silent that only had no processor", wrong)
}

// rate is how much a host has sent on average since the last call.
func (w *wires) rate(hosts int) float64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	sum := 0
	for _, n := range w.bytes {
		sum += n
	}
	clear(w.bytes)
	return float64(sum) / float64(hosts)
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}
