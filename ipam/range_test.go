package ipam

import (
	"net/netip"
	"testing"
)

// TestRange: what this host alone chooses from is the --ip-range, or the pool; where
// other hosts choose as well, or another IPAM does, there is none.
func TestRange(t *testing.T) {
	h := newClock(t)
	h.do("pool local 10.1.0.0/24")
	h.do("pool local 10.2.0.0/24 sub 10.2.0.128/25")
	for pool, want := range map[string]string{"10.1.0.0/24": "10.1.0.0/24", "10.2.0.0/24": "10.2.0.128/25", "10.3.0.0/24": "", "10.2.0.0/16": ""} {
		got, ok := h.Range(netip.MustParsePrefix(pool))
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%s: %s, %t; want %q", pool, got, ok, want)
		}
	}
}
