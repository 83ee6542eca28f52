package overlay

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store/etcdtest"
)

// TestGossipTwin: two hosts with one ID are told of on both, and on a third.
func TestGossipTwin(t *testing.T) {
	t.Parallel()
	w := newWires()
	nodes := w.cluster(t, 2)
	nodes[0].set(1, 1)
	nodes[1].set(1, 2)
	twin := w.run(t, w.host(1, nodes[0].addr.String()))
	twin.set(1, 3)
	all := []*node{nodes[0], nodes[1], twin}
	within(t, twinPause+5*time.Second, "all complain", func() bool {
		for _, x := range all {
			if len(x.logged("they have one ID, id-1")) != 1 {
				return false
			}
		}
		return true
	})
	t.Log(twin.logged("one ID"))
	for _, x := range all {
		list := x.Troubles()
		if len(list) != 1 || !list[0].Twin || !strings.Contains(list[0].Peer, "host-1 at "+twin.addr.String()) || !strings.Contains(list[0].Peer, "host-1 at "+nodes[1].addr.String()) {
			t.Errorf("%s: %+v", x.name, list)
		}
	}
	if nodes[0].silent(nodes[1]) {
		t.Error("the ID is silent")
	}
	twin.stop()
	within(t, 15*time.Second, "it is over", func() bool { return len(nodes[0].Troubles())+len(nodes[1].Troubles()) == 0 })
}

// TestTurns: a host that moves is one host, two that write by turns are two.
func TestTurns(t *testing.T) {
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	now := time.Now()
	var x turns
	for _, at := range []netip.Addr{a, a, b, b, a} {
		now = now.Add(time.Second)
		x.note(at, now)
	}
	if _, ok := x.twin(now); ok {
		t.Error("a host that moved there and back has a twin")
	}
	first := now.Add(-3 * time.Second)
	x.note(a, now)
	x.note(b, now)
	if since, ok := x.twin(now); !ok || !since.Equal(first.Add(time.Second)) && !since.Equal(first) {
		t.Errorf("twins since %v, %t", since, ok)
	}
	if _, ok := x.twin(now.Add(turnTime)); ok {
		t.Error("twins that are quiet for long are still told of")
	}
}

// TestFormerID: what others still have of this host, under the ID that it had before,
// leads nowhere and contradicts nothing.
func TestFormerID(t *testing.T) {
	for _, former := range []string{"0", "z"} { // an equal claim goes to the higher ID
		c := newClock()
		table := tableAt("a", c)
		e := Endpoint{MAC: mac(1), Addrs: []netip.Addr{addr(1)}, Claim: 5}
		table.Set(part(0, 1, e))
		old := later(part(0, 1, e), 1)
		old.Host = former
		table.Heard(former, "host-0")
		merge(t, table, old, 0)
		if v := table.View(1); fmt.Sprint(v.VTEPs, v.Forwards, v.Conflicts) != fmt.Sprint([]netip.Addr(nil), map[datapath.MAC]netip.Addr{}, []string(nil)) {
			t.Errorf("former ID %s: %+v", former, v)
		}
		// The same on a third host.
		third := tableAt("m", c)
		third.Set(part(12, 1))
		third.Heard(former, "host-0")
		third.Heard("a", "host-0")
		merge(t, third, old, 0)
		merge(t, third, later(part(0, 1, e), 1), 0)
		if v := third.View(1); len(v.Conflicts) != 0 || v.Forwards[mac(1)] != vtep(0) {
			t.Errorf("former ID %s on a third host: %+v", former, v)
		}
	}
}

// TestEtcdTwin: two hosts that write one record are told of on both, and on a third;
// they do not keep the store busy.
func TestEtcdTwin(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{Members: 1})
	hosts := etcdHosts(t, c, 2, time.Minute)
	twin := newEtcdHost(t, c.Endpoints, 9, time.Minute)
	twin.id, twin.table = hosts[1].id, NewTable(hosts[1].id, time.Minute)
	twin.open(t, c.Endpoints)
	twin.set(7, 1)
	twin.run(t)
	until(t, 10*time.Second, "all tell of it", func() bool {
		for _, h := range []*etcdHost{hosts[0], hosts[1], twin} {
			list := h.engine.Troubles()
			if len(list) != 1 || !list[0].Twin || list[0].Peer != "hosts 192.0.2.2 and 192.0.2.9" || !strings.Contains(list[0].Reason, "one ID, id-2") {
				return false
			}
		}
		return true
	})
	rev := func() uint64 {
		r, err := hosts[0].store.Get(t.Context(), fmt.Sprint(partKeys, "7/id-2"))
		if err != nil {
			t.Fatal(err)
		}
		return r.Rev
	}
	before := rev()
	time.Sleep(2 * time.Second)
	if n := rev() - before; n > 6 {
		t.Errorf("%d writes in 2 s", n)
	}
}
