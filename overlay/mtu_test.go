package overlay

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/weftnet/weft/driver"
)

// TestMTUOfOthers: hosts that made a network before they heard of each other agree on
// the lesser MTU, unless one was asked for.
func TestMTUOfOthers(t *testing.T) {
	b := newBench(t)
	b.run()
	for _, vni := range []uint32{4242, 4243} {
		n := blue(vni)
		if vni == 4243 {
			n.Options.MTU = 1440
		}
		if err := b.c.Admit(t.Context(), &n); err != nil {
			t.Fatal(err)
		}
		b.c.Publish(n, nil)
	}
	own := func(vni uint32) int { p, _ := b.c.table.part("me", vni); return p.MTU }
	if own(4242) != 1450 || own(4243) != 1440 {
		t.Fatalf("MTU %d and %d at first", own(4242), own(4243))
	}
	p := other("10.44.0.0/16")
	p.MTU = 1400
	if _, err := b.c.table.Merge(p, 0); err != nil {
		t.Fatal(err)
	}
	b.soon("it was looked at", func() bool { return slices.Contains(b.followed, 4242) })
	if own(4242) != 1450 {
		t.Error("a host that was never heard lowers the MTU")
	}
	b.c.table.Heard("you", "there")
	b.soon("the MTU is lowered", func() bool { return own(4242) == 1400 })
	b.soon("it is told", func() bool { return b.logged("the MTU is now 1400, and was 1450: host there has it with that") })
	p.VNI = 4243
	if _, err := b.c.table.Merge(p, 0); err != nil {
		t.Fatal(err)
	}
	const line = "host there has VNI 4243 with another mtu 1400, and here 1440"
	b.soon("the other one is a conflict", func() bool { return slices.Contains(b.c.Status().Conflicts, line) })
	if own(4243) != 1440 {
		t.Errorf("the MTU that was asked for is %d", own(4243))
	}
	// One that is larger changes nothing.
	p.VNI, p.Version, p.MTU = 4242, p.Version+1, 8950
	if _, err := b.c.table.Merge(p, 0); err != nil {
		t.Fatal(err)
	}
	b.soon("that is a conflict", func() bool {
		return slices.Contains(b.c.Status().Conflicts, "host there has VNI 4242 with another mtu 8950, and here 1400")
	})
}

// TestMTUOfUnderlay: an underlay whose MTU is lowered is noticed.
func TestMTUOfUnderlay(t *testing.T) {
	b := newBench(t)
	for _, vni := range []uint32{4242, 4243} {
		n := blue(vni)
		if vni == 4243 {
			n.Options.MTU = 1440
		}
		if err := b.c.Admit(t.Context(), &n); err != nil {
			t.Fatal(err)
		}
		b.c.Publish(n, nil)
	}
	own := func(vni uint32) int { p, _ := b.c.table.part("me", vni); return p.MTU }
	now := time.Now()
	look := func(mtu int) {
		u := b.under
		u.MTU = mtu
		b.c.fitUnderlay(t.Context(), b, u, now)
		now = now.Add(fitTime - time.Millisecond)
		b.c.fitUnderlay(t.Context(), b, u, now)
		if mtu == 1280 {
			return // for a moment
		}
		now = now.Add(time.Millisecond)
		b.c.fitUnderlay(t.Context(), b, u, now)
	}
	look(1500)
	look(1280)
	look(1500)
	if len(b.shrunk) > 0 || len(b.c.Status().Troubles) > 0 {
		t.Errorf("lowered %q, troubles %+v", b.shrunk, b.c.Status().Troubles)
	}
	look(1400)
	look(1400)
	if own(4242) != 1350 || own(4243) != 1440 || !b.logged("the MTU is now 1350, and was 1450: eth0 carries 1400") {
		t.Errorf("MTU %d and %d", own(4242), own(4243))
	}
	list := b.c.Status().Troubles
	if len(list) != 1 || list[0].Reason != "mtu 1440 does not fit into the underlay any more: eth0 carries 1400 and the tunnel adds 50, at most 1350" {
		t.Errorf("troubles %+v", list)
	}
	look(1500)
	if own(4242) != 1350 || len(b.c.Status().Troubles) != 0 {
		t.Errorf("MTU %d, troubles %+v", own(4242), b.c.Status().Troubles)
	}
}

// TestMTUTooSmall: an underlay that carries less than IPv6 needs is told of; nothing can
// be lowered to that.
func TestMTUTooSmall(t *testing.T) {
	b := newBench(t)
	n := blue(4242)
	n.Subnets = append(n.Subnets, driver.Subnet{Pool: netip.MustParsePrefix("fd00:44::/64")})
	if err := b.c.Admit(t.Context(), &n); err != nil {
		t.Fatal(err)
	}
	b.c.Publish(n, nil)
	u := b.under
	for _, c := range []struct{ carries, troubles int }{{1500, 0}, {1300, 1}, {1330, 0}} {
		u.MTU = c.carries
		now := time.Now()
		for _, at := range []time.Time{now, now.Add(fitTime)} {
			b.c.fitUnderlay(t.Context(), b, u, at)
		}
		list := b.c.Status().Troubles
		if len(list) != c.troubles || c.troubles > 0 && list[0].Reason != "mtu 1450 does not fit into the underlay any more: eth0 carries 1300 and the tunnel adds 50, at most 1250" {
			t.Errorf("%d: troubles %+v", c.carries, list)
		}
	}
	if !slices.Equal(b.shrunk, []string{"4242 1280"}) {
		t.Errorf("lowered %q", b.shrunk)
	}
}
