package datapath

import (
	"strings"
	"testing"

	"github.com/weftnet/weft/internal/netnstest"
)

// mtuOf is a link's MTU as ip prints it.
func mtuOf(host *netnstest.NS, link string) string {
	_, after, _ := strings.Cut(host.Exec("ip", "link", "show", link), " mtu ")
	mtu, _, _ := strings.Cut(after, " ")
	return mtu
}

// TestLANParentMTU: sub-interfaces without an MTU of their own have their parent's,
// also after that was changed; one that was given stays.
func TestLANParentMTU(t *testing.T) {
	k, host, _ := lanWorld(t)
	s := lanNetwork()
	for i := range s.Children {
		s.Children[i].MTU = 0
	}
	host.Exec("ip", "link", "set", "lan0", "mtu", "1400")
	ensure(t, k, s)
	want := s
	want.Parents = nil
	idle := func(mtu string) {
		t.Helper()
		have := owned(t, k)
		if d := want.Minus(have); !d.Empty() {
			t.Errorf("lacks %s", d)
		}
		if d := have.Minus(want); !d.Empty() {
			t.Errorf("has besides %s", d)
		}
		if got := mtuOf(host, "wfsnet"); got != mtu {
			t.Errorf("MTU %s, want %s", got, mtu)
		}
	}
	idle("1400")
	host.Exec("ip", "link", "set", "lan0", "mtu", "1500")
	if want.Minus(owned(t, k)).Empty() {
		t.Error("Owned does not show that the parent's MTU grew")
	}
	if lines := ensure(t, k, s); len(lines) == 0 {
		t.Error("nothing mended")
	}
	idle("1500")
	host.Exec("ip", "link", "set", "lan0", "mtu", "1300") // the kernel takes the others along
	idle("1300")
	if lines := ensure(t, k, s); len(lines) != 0 {
		t.Errorf("mended again: %q", lines)
	}

	given := lanNetwork()
	for i := range given.Children {
		given.Children[i].MTU = 1280
	}
	ensure(t, k, given)
	want = given
	want.Parents = nil
	idle("1280")
	_, err := k.Ensure(t.Context(), State{Children: []Child{{Name: "wfb", Parent: "lan0", Kind: "macvlan", Mode: "bridge", MTU: 1400}}})
	wantError(t, err, "parent lan0", "MTU 1400")
}
