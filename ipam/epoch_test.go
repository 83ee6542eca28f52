package ipam

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

// TestDisplacedRecords: a pool that another takes the place of goes with all its
// records, also when the disk fails at first.
func TestDisplacedRecords(t *testing.T) {
	for _, mode := range []string{"none", "fail", "uncertain before", "uncertain after"} {
		for at := range 2 {
			h := newHouse(t)
			f := &faulty{records: h.store, at: -1, mode: mode}
			h.store = f
			old := h.do("pool global 10.1.0.0/24")
			h.do("gw " + old)
			h.do("addr " + old)
			h.Elected()
			if f.n = 0; mode != "none" {
				f.at = at
			}
			got := h.do("pool global 10.1.0.0/16")
			if failed := strings.HasPrefix(got, "error"); failed != (mode != "none") {
				t.Errorf("%s at %d: %s", mode, at, got)
			}
			if n := h.settle(t.Context()); n != 0 {
				t.Errorf("%s at %d: %d left", mode, at, n)
			}
			if got := h.do("pool global 10.1.0.0/16"); got != "weft-global,10.1.0.0/16" {
				t.Errorf("%s at %d, again: %s", mode, at, got)
			}
			left, err := h.left()
			if err != nil || len(left) != 1 || left[0].Key != poolPrefix+"weft-global,10.1.0.0/16" {
				t.Errorf("%s at %d: left %v, error %v", mode, at, left, err)
			}
		}
	}
}

// TestRepeatAgainstOverlap: whichever comes first, one of the two has the subnet.
func TestRepeatAgainstOverlap(t *testing.T) {
	for range 50 {
		h := newHouse(t)
		old := h.do("pool global 10.1.0.0/24")
		h.do("addr " + old + " 10.1.0.7")
		h.Elected()
		calls := []string{"pool global 10.1.0.0/24", "addr " + old + " 10.1.0.7", "pool global 10.1.0.0/16", "pool global 10.1.0.0/25"}
		got := make([]string, len(calls))
		var wg sync.WaitGroup
		for n, call := range calls {
			wg.Go(func() { got[n] = h.do(call) })
		}
		wg.Wait()
		var pools []string
		for _, p := range h.Status(t.Context()).Pools {
			pools = append(pools, p.ID)
		}
		granted := 0
		for _, n := range []int{0, 2, 3} {
			if !strings.HasPrefix(got[n], "error") {
				granted++
			}
		}
		if len(pools) != 1 || granted != 1 {
			t.Fatalf("pools %q after %s", pools, fmt.Sprintf("%q", got))
		}
	}
}

// TestReclaimOnce: the last address that the allocator has not named is one
// task's.
func TestReclaimOnce(t *testing.T) {
	for range 50 {
		h := newHouse(t)
		const id = "weft-global,10.1.0.0/30"
		h.do("pool global 10.1.0.0/30")
		h.do("gw " + id)
		h.do("addr " + id)
		h.Elected()
		h.do("pool global 10.1.0.0/30")
		calls := []string{"addr " + id, "addr " + id}
		got := make([]string, len(calls))
		var wg sync.WaitGroup
		for n, call := range calls {
			wg.Go(func() { got[n] = h.do(call) })
		}
		wg.Wait()
		if (got[0] == "10.1.0.2/30") == (got[1] == "10.1.0.2/30") {
			t.Fatalf("got %q", got)
		}
	}
}
