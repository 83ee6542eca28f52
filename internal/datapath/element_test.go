package datapath

import (
	"net/netip"
	"slices"
	"testing"
)

// TestElementKey: an element's key is what its set has as key, whichever the set.
func TestElementKey(t *testing.T) {
	for _, d := range setDefs() {
		e := Element{Set: d.set, To: netip.MustParseAddr("192.0.2.7"), ToPort: 80}
		if want := !slices.Contains(d.data, fieldTo); want != e.Key().To.IsValid() {
			t.Errorf("%s: the address that it leads to is part of the key: %t, in the kernel %t", d.name(), !want, want)
		}
		if e.Key().ToPort == 80 && slices.Contains(d.data, fieldToPort) {
			t.Errorf("%s: the port that it leads to is part of the key", d.name())
		}
	}
}
