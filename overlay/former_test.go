package overlay

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// TestFormer: what others know of containers that no record names any more is said
// again, until they are gone or another has their place.
func TestFormer(t *testing.T) {
	c := newClock()
	e := func(n int, claim uint64) Endpoint {
		return Endpoint{MAC: mac(n), Addrs: addrs(n), Claim: claim}
	}
	before := later(part(0, 1, e(1, 3), e(2, 4), e(3, 5)), uint64(c.t.UnixNano()))
	c.pass(time.Hour)
	table := tableAt("a", c)
	says := func(what string, want ...int) {
		t.Helper()
		var got []int
		for _, x := range table.Own()[0].Endpoints {
			got = append(got, int(x.MAC[5]))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: says %v, want %v", what, got, want)
		}
	}
	table.Set(part(0, 1, e(1, 3)))
	merge(t, table, before, 0)
	says("all have records", 1)
	table.Keep(1, true)
	table.Keep(1, true)
	says("nobody has said yet", 1)
	merge(t, table, before, 0)
	says("somebody has", 1, 2, 3)
	version := table.Own()[0].Version
	merge(t, table, before, 0)
	if table.Own()[0].Version != version {
		t.Error("the same is said again as something new")
	}
	if host, ok := table.Holder(1, addr(2)); !ok || host != "host-0" {
		t.Errorf("the address is %q's, %t", host, ok)
	}
	if _, ok := table.Holder(1, addr(1)); ok {
		t.Error("an address with a record has another holder")
	}
	if got := table.Own()[0].Endpoints[1].Claim; got != 4 {
		t.Errorf("claim %d, want that of before", got)
	}
	table.Set(part(0, 1, e(1, 3), Endpoint{MAC: mac(9), Addrs: addrs(3), Claim: table.Claim()}))
	says("another has the address", 1, 2, 9)
	table.Set(part(0, 1, e(1, 3)))
	says("it is gone again", 1, 2, 3)
	// What was said by this process is nothing of before.
	now := table.Own()[0]
	now.Endpoints = append(slices.Clone(now.Endpoints), e(7, 6))
	merge(t, table, now, 0)
	says("others know more of this process", 1, 2, 3)
	table.Keep(1, false)
	says("they are gone", 1)
	if _, ok := table.Holder(1, addr(2)); ok {
		t.Error("the address is still held")
	}
	table.Keep(2, true) // a network that is not here
	table.Set(Part{Name: "host-0", VNI: 1, Gone: true})
	says("the network is gone")
}

func addrs(n int) []netip.Addr { return []netip.Addr{addr(n)} }

// TestGossipFormer: a host whose state was replaced by an older copy does not cut off
// what the copy does not name.
func TestGossipFormer(t *testing.T) {
	t.Parallel()
	w := newWires()
	nodes := w.cluster(t, 3)
	for i, x := range nodes {
		x.set(1, i+1)
	}
	host := nodes[1]
	host.set(1, 2, 12)
	for _, x := range []*node{nodes[0], nodes[2]} {
		within(t, 5*time.Second, "all know", func() bool { return x.sees(1, host, 2, 12) })
	}
	host.stop()
	c := w.host(1, nodes[0].addr.String())
	c.Bind = host.addr
	p := part(0, 1, Endpoint{MAC: mac(2), Addrs: addrs(2), Claim: 1})
	p.Name, p.VTEP = c.Name, c.Bind
	c.Table.Set(p)
	c.Table.Keep(1, true)
	host = w.run(t, c)
	within(t, 10*time.Second, "it says what it forgot", func() bool { return len(c.Table.Own()[0].Endpoints) == 2 })
	for _, x := range []*node{nodes[0], nodes[2]} {
		within(t, 5*time.Second, "all know again", func() bool { return x.sees(1, host, 2, 12) })
	}
	c.Table.Keep(1, false)
	for _, x := range []*node{nodes[0], nodes[2]} {
		within(t, 5*time.Second, "it is gone", func() bool { return x.sees(1, host, 2) })
	}
}
