package ipam

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"
)

const leasedSubnet6 = "fd77::/64"

// inhabited has the pools of a house be those of one network, whose endpoints have
// the addresses that are in the map returned.
func (h *house) inhabited(subnets ...string) map[string]bool {
	for _, s := range subnets {
		h.hold(s, localID)
	}
	has := map[string]bool{}
	h.used = func(netip.Prefix) (func(netip.Addr) string, bool) {
		return func(a netip.Addr) string {
			if has[a.String()] {
				return "endpoint e"
			}
			return ""
		}, true
	}
	return has
}

// TestRefusedFamily: what was leased for an endpoint whose IPv6 address is refused is
// given back at once, and what others have stays. The engine says nothing.
func TestRefusedFamily(t *testing.T) {
	l := newLeasing(t, nil)
	has := l.inhabited(leasedSubnet, leasedSubnet6)
	id6 := l.do("pool local " + leasedSubnet6)
	first := strings.TrimSuffix(l.addressFor(leasedPool, "", ""), "/24")
	has[first] = true
	l.clock = l.clock.Add(time.Minute)
	l.forsakeDue(t.Context())
	l.vet = func(_ context.Context, p netip.Prefix, _ netip.Addr) error {
		if p.Addr().Is6() {
			return errors.New("somebody has it")
		}
		return nil
	}
	for n := range 2 * leasedSize {
		if got := l.addressFor(leasedPool, "", ""); strings.HasPrefix(got, "error") {
			t.Fatalf("start %d: %s", n, got)
		}
		if got := l.addressFor(id6, "", ""); !strings.HasPrefix(got, "error") {
			t.Fatal(got)
		}
		l.clock = l.clock.Add(3 * time.Second) // of the restart policy
	}
	if len(l.server.leases) != 1 || l.only().taken.len() != 1 || !l.only().taken.has(netip.MustParseAddr(first)) {
		t.Errorf("leased %v, taken %d, the one with an endpoint is %s", l.server.leases, l.only().taken.len(), first)
	}
	// Two that wait: it cannot be told which of them is meant.
	l.addressFor(leasedPool, "", "")
	l.addressFor(leasedPool, "", "")
	l.addressFor(id6, "", "")
	if n := l.only().taken.len(); n != 3 {
		t.Errorf("%d taken", n)
	}
	l.clock = l.clock.Add(time.Minute)
	l.forsakeDue(t.Context())
	if n := l.only().taken.len(); n != 1 || len(l.server.leases) != 1 {
		t.Errorf("after a minute %d taken, leased %v", n, l.server.leases)
	}
}

// TestNoEndpointCame: an address without an endpoint is free within a minute, also
// where the process has died meanwhile, and all others stay.
func TestNoEndpointCame(t *testing.T) {
	for _, restart := range []bool{false, true} {
		h := newClock(t)
		id := h.do("pool local 10.1.0.0/24")
		gw := h.do("gw " + id)
		h.do("addr " + id + " 10.1.0.5") // as an auxiliary one
		kept := strings.TrimSuffix(h.do("addr "+id), "/24")
		h.do("addr " + id)
		h.do("pool local 10.2.0.0/24") // of another driver
		h.do("addr weft-local,10.2.0.0/24")
		if restart {
			h.restart()
		}
		has := h.inhabited("10.1.0.0/24")
		has[kept], has["10.1.0.5"] = true, true
		one := h.used
		h.used = func(p netip.Prefix) (func(netip.Addr) string, bool) {
			by, _ := one(p)
			return by, p.String() == "10.1.0.0/24"
		}
		used := func() (n uint64) {
			for _, p := range h.Status(t.Context()).Pools {
				n += p.Used
			}
			return n
		}
		h.clock = h.clock.Add(awaitTime - time.Second)
		h.forsakeDue(t.Context())
		if n := used(); n != 5 {
			t.Errorf("restart %v: %d used before it is time", restart, n)
		}
		h.clock = h.clock.Add(time.Second)
		h.forsakeDue(t.Context())
		if n := used(); n != 4 {
			t.Errorf("restart %v: %d used of %s, 10.1.0.5, %s and the other driver's", restart, n, gw, kept)
		}
		delete(has, kept) // its endpoint was there: the engine will give it back
		h.clock = h.clock.Add(time.Hour)
		h.forsakeDue(t.Context())
		if n := used(); n != 4 {
			t.Errorf("restart %v: %d used, an hour later", restart, n)
		}
		h.restart()
		h.hold("10.1.0.0/24", swarmID)
		h.hold("10.2.0.0/24", swarmID)
		h.used = one
		h.clock = h.clock.Add(time.Hour)
		h.forsakeDue(t.Context())
		if n := used(); n != 4 {
			t.Errorf("restart %v: %d used, in a swarm", restart, n)
		}
	}
}

// TestNoEndpointNoExtension: a lease is not asked for when no endpoint has its address
// any more, but given back.
func TestNoEndpointNoExtension(t *testing.T) {
	l := newLeasing(t, nil)
	has := l.inhabited(leasedSubnet)
	a := strings.TrimSuffix(l.addressFor(leasedPool, "", ""), "/24")
	has[a] = true
	l.clock = l.clock.Add(time.Minute)
	l.forsakeDue(t.Context())
	l.clock = l.clock.Add(31 * time.Minute)
	l.run()
	if l.server.asked != 1 || len(l.server.leases) != 1 {
		t.Errorf("asked %d times, leased %v", l.server.asked, l.server.leases)
	}
	delete(has, a)
	l.clock = l.clock.Add(31 * time.Minute)
	l.run()
	if l.server.asked != 1 || len(l.server.leases) != 0 || l.only().taken.len() != 0 {
		t.Errorf("without an endpoint: asked %d times, leased %v", l.server.asked, l.server.leases)
	}
}
