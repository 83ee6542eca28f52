package ipam

import (
	"net/netip"
	"testing"

	"github.com/weftnet/weft/internal/store"
)

// TestGatewaysOnDisk: whose gateways are is read as it was written. Of a record from
// before that was written down, each network has all. One that is nobody's, since the
// process died before it noted whose, goes.
func TestGatewaysOnDisk(t *testing.T) {
	key := poolKey{LocalSpace, netip.MustParsePrefix("10.1.0.0/24")}
	const a, b = "weft-local,10.1.0.0/24,10.1.0.64/26", "weft-local,10.1.0.0/24,10.1.0.128/25"
	for name, c := range map[string]struct{ record, ofB, one, other string }{
		"before":   {`"More":["10.1.0.128/25"]`, "10.1.0.2/24", "10.1.0.1", "10.1.0.2"},
		"written":  {`"More":["10.1.0.128/25"],"Gateways":{"10.1.0.64/26":["10.1.0.1"],"10.1.0.128/25":["10.1.0.2"]}`, "10.1.0.2/24", "10.1.0.1", "10.1.0.2"},
		"nobody's": {`"More":["10.1.0.128/25"],"Gateways":{"10.1.0.64/26":["10.1.0.1"],"10.1.0.128/25":[]}`, "10.1.0.1/24", "10.1.0.1", ""},
		"not there": {`"More":["10.1.0.128/25"],"Gateways":{"10.1.0.64/26":["10.1.0.1"],"10.1.0.128/25":["10.1.0.9"]}`,
			"10.1.0.1/24", "10.1.0.1", ""},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t)
			for _, r := range []store.Record{
				{Key: key.record(), Value: []byte(`{"Version":1,"SubPool":"10.1.0.64/26",` + c.record + `}`)},
				{Key: key.address(netip.MustParseAddr("10.1.0.1")), Value: []byte(`{"Version":1,"Kind":"gateway"}`)},
				{Key: key.address(netip.MustParseAddr("10.1.0.2")), Value: []byte(`{"Version":1,"Kind":"gateway"}`)},
			} {
				if _, err := h.bolt.Put(t.Context(), r); err != nil {
					t.Fatal(err)
				}
			}
			h.restart()
			for _, gw := range []string{"10.1.0.1", "10.1.0.2", "10.1.0.9"} {
				free := gw != c.one && gw != c.other
				if got := h.do("addr " + a + " " + gw); (got == gw+"/24") != free {
					t.Errorf("%s: %s", gw, got)
				} else if free {
					h.do("free " + a + " " + gw)
				}
			}
			if got := h.do("gw " + b); got != c.ofB {
				t.Errorf("the second network has %s, want %s", got, c.ofB)
			}
			h.do("unpool " + a)
			h.do("unpool " + b)
			if left, err := h.left(); err != nil || len(left) != 0 {
				t.Errorf("left %v, %v", left, err)
			}
		})
	}
}
