package ipam

import (
	"strings"
	"testing"
	"time"
)

// TestRefusedNeighbour: an address whose endpoint is there stays, however shortly
// before another container of the network was refused one of the other family.
func TestRefusedNeighbour(t *testing.T) {
	h := newClock(t)
	id4, id6 := h.do("pool local 10.1.0.0/24"), h.do("pool local fd77::/64")
	has := h.inhabited("10.1.0.0/24", "fd77::/64")
	a4, _, _ := strings.Cut(h.addressFor(id4, "", ""), "/")
	a6, _, _ := strings.Cut(h.addressFor(id6, "", ""), "/")
	has[a4], has[a6] = true, true
	h.after(time.Second)
	if got := h.do("addr " + id4 + " " + a4); !strings.HasPrefix(got, "error") {
		t.Fatal(got)
	}
	for _, line := range []string{"addr " + id4 + " " + a4, "addr " + id6 + " " + a6} {
		if got := h.do(line); !strings.Contains(got, "in use") {
			t.Errorf("%s: %s, but its container runs", line, got)
		}
	}
}
