package overlay

import (
	"net/netip"
	"testing"
	"time"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/datapath"
)

// TestMoveWhileCutOff: a container moved here while its old host was cut off. When that
// is heard again, what it said before counts for a moment; it is no conflict.
func TestMoveWhileCutOff(t *testing.T) {
	b := newBench(t)
	b.run()
	n := blue(4242)
	if err := b.c.Admit(t.Context(), &n); err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr("10.44.2.2")
	old := other("10.44.0.0/16")
	old.Endpoints = []Endpoint{{MAC: datapath.MAC{2, 2}, Addrs: []netip.Addr{a}, Claim: 1}}
	b.c.Publish(n, nil)
	b.c.table.Heard("you", "there")
	if _, err := b.c.table.Merge(old, 0); err != nil {
		t.Fatal(err)
	}
	b.c.table.Silent("you")
	b.c.Publish(n, []driver.Endpoint{{MAC: datapath.MAC{2, 1}, Claim: 5, Addrs: []netip.Prefix{netip.PrefixFrom(a, 16)}}})
	b.c.table.Heard("you", "there")
	if len(b.c.table.View(4242).Conflicts) != 1 {
		t.Fatal("there is nothing to be tested")
	}
	time.Sleep(500 * time.Millisecond) // what it has now is under way
	now := old
	now.Version++
	now.Endpoints = nil
	if _, err := b.c.table.Merge(now, 0); err != nil {
		t.Fatal(err)
	}
	time.Sleep(conflictPause)
	if b.logged("is claimed by") || len(b.c.Status().Conflicts) > 0 {
		t.Errorf("a move is a conflict: %q", b.c.Status().Conflicts)
	}
}
