package overlay

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

// TestGossipDeadPair: two hosts that hear each other only through a third know at once
// what the other has, also of a network that the third does not have.
func TestGossipDeadPair(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]func(w *wires, a, b *node){
		"nothing arrives": func(w *wires, a, b *node) { w.separate(true, []*node{a}, []*node{b}) },
		"no packet arrives": func(w *wires, a, b *node) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.mute[[2]netip.Addr{a.addr, b.addr}], w.mute[[2]netip.Addr{b.addr, a.addr}] = true, true
		},
		"no packet arrives one way": func(w *wires, a, b *node) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.mute[[2]netip.Addr{b.addr, a.addr}] = true
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWires()
			nodes := w.cluster(t, 3)
			a, b, between := nodes[0], nodes[1], nodes[2]
			cut(w, a, b)
			a.set(1, 1)
			b.set(1, 2)
			took := within(t, 3*time.Second, "a new network", func() bool { return a.sees(1, b, 2) && b.sees(1, a, 1) })
			t.Logf("a new network after %s", took)
			var all []time.Duration
			for i := range 5 {
				a.set(1, 10+i)
				all = append(all, within(t, 2*time.Second, "a new endpoint", func() bool { return b.sees(1, a, 10+i) }))
				within(t, 2*time.Second, "b has confirmed it", func() bool { return a.confirmed(b, 1) })
			}
			slices.Sort(all)
			t.Logf("new endpoints after %s", all)
			if between.table.knows("nobody") || len(between.table.Holders(1)) > 0 {
				t.Error("the host between took over a network that it does not have")
			}
			within(t, 30*time.Second, "both tell of it", func() bool { return !a.indirect(b).IsZero() && !b.indirect(a).IsZero() })
			if !a.indirect(between).IsZero() || !between.indirect(a).IsZero() {
				t.Error("a host that is heard directly is told of")
			}
			w.mu.Lock()
			clear(w.cut)
			clear(w.mute)
			w.mu.Unlock()
			within(t, 30*time.Second, "it is over", func() bool { return a.indirect(b).IsZero() && b.indirect(a).IsZero() })
		})
	}
}

// confirmed reports whether a host has said that it has all of ours.
func (x *node) confirmed(y *node, vni uint32) bool {
	mine, _ := x.table.part(x.id, vni)
	x.mu.Lock()
	defer x.mu.Unlock()
	d := x.peers[y.id].parts[vni]
	return d != nil && d.done == mine.Version
}

// indirect is since when no packet of a host answers one of ours.
func (x *node) indirect(y *node) time.Time {
	return x.Indirect()[y.id]
}

// TestPassOn: a host passes on what members say to members, once, and nothing else.
func TestPassOn(t *testing.T) {
	w := newWires()
	nodes := w.cluster(t, 3)
	between := nodes[1].Gossip
	for name, c := range map[string]struct {
		m    message
		want int
	}{
		"between members": {message{From: nodes[0].id, To: nodes[2].id, Via: between.id}, 1},
		"from a stranger": {message{From: "x", To: nodes[2].id, Via: between.id}, 0},
		"to a stranger":   {message{From: nodes[0].id, To: "x", Via: between.id}, 0},
		"by another":      {message{From: nodes[0].id, To: nodes[2].id, Via: nodes[2].id}, 0},
		"to its sender":   {message{From: nodes[0].id, To: nodes[0].id, Via: between.id}, 0},
	} {
		between.mu.Lock()
		between.passing = nil
		between.passOn(c.m, c.m.encode())
		if got := len(between.passing); got != c.want {
			t.Errorf("%s: %d passed on, want %d", name, got, c.want)
		}
		between.mu.Unlock()
	}
	between.mu.Lock()
	defer between.mu.Unlock()
	for range 2 * mostPassing {
		m := message{From: nodes[0].id, To: nodes[2].id, Via: between.id}
		between.passOn(m, m.encode())
	}
	if n := len(between.passing); n > mostPassing {
		t.Errorf("%d messages wait", n)
	}
	between.passing = nil
}

// TestDetoursByOldHosts: a host of an older release takes what it is to pass on for its
// own, and the versions that are confirmed in it for those of its parts.
func TestDetoursByOldHosts(t *testing.T) {
	w := newWires()
	nodes := w.cluster(t, 4)
	a, old, far := nodes[0], nodes[1], nodes[3]
	n := memberlist.Node{Name: memberName(old.id, old.addr), Addr: old.addr.AsSlice(), Meta: []byte(`{"host":"` + old.id + `","name":"old"}`)}
	delegate{a.Gossip}.NotifyUpdate(&n)
	a.mu.Lock()
	defer a.mu.Unlock()
	for range 50 {
		if ways := a.between(far.id); len(ways) != 1 || ways[0] != nodes[2].id {
			t.Fatalf("what is for %s goes by %q, want %s alone", far.id, ways, nodes[2].id)
		}
	}
}
