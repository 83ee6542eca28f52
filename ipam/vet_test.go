package ipam

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
)

// TestSquatters: addresses that stations of the LAN have are passed over, or
// refused by name, and given back.
func TestSquatters(t *testing.T) {
	h := newHouse(t)
	squats := map[string]bool{"10.1.0.2": true, "10.1.0.3": true, "10.1.0.9": true}
	asked := map[string]int{}
	h.vet = func(_ context.Context, pool netip.Prefix, a netip.Addr) error {
		asked[pool.String()+" "+a.String()]++
		if squats[a.String()] {
			return errors.New("02:11:22:33:44:55 has it")
		}
		return nil
	}
	const id = "weft-local,10.1.0.0/24"
	for _, c := range []struct{ line, want string }{
		{"pool local 10.1.0.0/24", id},
		{"gw " + id + " 10.1.0.9", "10.1.0.9/24"}, // the router answers, as it should
		{"free " + id + " 10.1.0.9", ""},
		{"gw " + id, "10.1.0.1/24"},
		{"addr " + id, "10.1.0.4/24"},
		{"addr " + id, "10.1.0.5/24"},
		{"addr " + id + " 10.1.0.9", "error: 02:11:22:33:44:55 has it"},
		{"addr " + id + " 10.1.0.10", "10.1.0.10/24"},
	} {
		if got := h.do(c.line); c.want != "" && got != c.want {
			t.Errorf("%s: %s, want %s", c.line, got, c.want)
		}
	}
	delete(squats, "10.1.0.9")
	if got := h.do("addr " + id + " 10.1.0.9"); got != "10.1.0.9/24" {
		t.Errorf("after its holder has gone: %s", got)
	}
	if asked["10.1.0.0/24 10.1.0.1"] > 0 || asked["10.1.0.0/24 10.1.0.2"] != 1 || asked["10.1.0.0/24 10.1.0.9"] != 2 {
		t.Errorf("asked for %v", asked)
	}
	used := h.Status(t.Context()).Pools[0].Used
	h.restart()
	if again := h.Status(t.Context()).Pools[0].Used; again != used {
		t.Errorf("%v addresses are used after a restart, %v before", again, used)
	}
	if got := h.do("pool global 10.1.0.0/24"); !strings.HasPrefix(got, "weft-global") {
		t.Fatal(got)
	}
	h.vet = func(context.Context, netip.Prefix, netip.Addr) error { return errors.New("asked for a global one") }
	if got := h.do("addr weft-global,10.1.0.0/24"); strings.HasPrefix(got, "error") {
		t.Error(got)
	}
}

// TestAllSquatters: a LAN that has every address ends the search.
func TestAllSquatters(t *testing.T) {
	h := newHouse(t)
	h.vet = func(context.Context, netip.Prefix, netip.Addr) error { return errors.New("taken") }
	h.do("pool local 10.1.0.0/24")
	if got := h.do("addr weft-local,10.1.0.0/24"); !strings.Contains(got, "error: 128 addresses in a row") || !strings.Contains(got, "taken") {
		t.Error(got)
	}
	if n := h.Status(t.Context()).Pools[0].Used; n != 0 {
		t.Errorf("%v addresses are used", n)
	}
}

// TestVetHoldsNoLock: while the LAN is asked others get their addresses.
func TestVetHoldsNoLock(t *testing.T) {
	h := newHouse(t)
	const id = "weft-local,10.1.0.0/24"
	h.do("pool local 10.1.0.0/24")
	var wait sync.WaitGroup
	wait.Add(8)
	h.vet = func(context.Context, netip.Prefix, netip.Addr) error {
		wait.Done()
		wait.Wait() // until all eight are here
		return nil
	}
	var calls sync.WaitGroup
	for range 8 {
		calls.Go(func() {
			if got := h.do("addr " + id); strings.HasPrefix(got, "error") {
				t.Error(got)
			}
		})
	}
	calls.Wait()
}
