package overlay

import (
	"fmt"
	"net/netip"
	"testing"
)

// TestHolderFollows: who has an address is what was heard last, however often it was
// asked before.
func TestHolderFollows(t *testing.T) {
	table := tableAt("a", newClock())
	holder := func() string { name, _ := table.Holder(1, addr(1)); return name }
	want := func(what, name string) {
		t.Helper()
		if got := holder(); got != name {
			t.Errorf("%s: %q, want %q", what, got, name)
		}
	}
	table.Set(part(0, 1))
	table.Heard("b", "host-1")
	want("before", "")
	p := part(1, 1, Endpoint{MAC: mac(1), Addrs: []netip.Addr{addr(1)}})
	for _, v := range []uint64{1, 2, 3} {
		p.Version = v
		if v == 2 {
			p.Endpoints = nil
		} else {
			p.Endpoints = []Endpoint{{MAC: mac(1), Addrs: []netip.Addr{addr(1)}}}
		}
		if _, err := table.Merge(p, 0); err != nil {
			t.Fatal(err)
		}
		want(fmt.Sprint("version ", v), map[bool]string{true: "host-1"}[v != 2])
	}
	table.Heard("b", "renamed")
	want("another name", "renamed")
	table.Silent("b")
	want("silent", "")
	table.Heard("b", "host-1")
	want("back", "host-1")
	table.Set(part(0, 1, Endpoint{MAC: mac(9), Addrs: []netip.Addr{addr(9)}}))
	want("an endpoint here", "host-1")
	table.Set(Part{Name: "host-0", VNI: 1, Gone: true})
	want("gone here", "")
}

// BenchmarkHolder asks for the 10,000 addresses that other hosts have, as a
// search for a free address does.
func BenchmarkHolder(b *testing.B) {
	table := NewTable("self", 0)
	table.Set(part(0, 1))
	n := 0
	for h := range 20 {
		id := fmt.Sprintf("other%d", h)
		p := part(1, 1)
		p.Host, p.Version = id, 1
		for range 500 {
			p.Endpoints = append(p.Endpoints, Endpoint{MAC: mac(n + 1), Addrs: []netip.Addr{addr(n)}})
			n++
		}
		table.Heard(id, id)
		if _, err := table.Merge(p, 0); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		for i := range n {
			if _, ok := table.Holder(1, addr(i)); !ok {
				b.Fatal(addr(i))
			}
		}
	}
}
