package ipam

import (
	"net/netip"
	"strings"
	"testing"
)

// TestForgetOneOfTwo: two networks of a LAN have the same subnet, each with a pool
// of its own; which of them a pool is of is not known, so the first that is
// forgotten takes none with it.
func TestForgetOneOfTwo(t *testing.T) {
	l := newLeasing(t, nil)
	other, err := l.pooled(leasedSubnet, map[string]string{"dhcp": "lan0"})
	if err != nil || other != "dhcp=lan0:2,"+leasedSubnet {
		t.Fatal(other, err)
	}
	for _, id := range []string{leasedPool, other} {
		l.addressFor(id, "", "")
	}
	prefix := netip.MustParsePrefix(leasedSubnet)
	if stays, err := l.ForgetPool(t.Context(), prefix, []string{"lan0"}); err != nil || !stays {
		t.Errorf("stays %v, %v", stays, err)
	}
	if n := len(l.Status(t.Context()).Pools); n != 2 || len(l.server.leases) != 2 {
		t.Errorf("%d pools, leased %v: want both", n, l.server.leases)
	}
	if stays, err := l.ForgetPool(t.Context(), prefix, nil); err != nil || stays {
		t.Errorf("the last one: stays %v, %v", stays, err)
	}
	if n := len(l.Status(t.Context()).Pools); n != 0 || len(l.server.leases) != 0 {
		t.Errorf("%d pools left, leased %v", n, l.server.leases)
	}
}

// TestForgetOnAnotherLink: where the other network with the subnet is elsewhere, the
// pool is that of the forgotten one, and its lease goes back.
func TestForgetOnAnotherLink(t *testing.T) {
	for name, c := range map[string]struct {
		others []string
		keeps  bool // the pool of network B, which the engine's words alone name
	}{
		"a bridge":     {[]string{""}, true},
		"another VLAN": {[]string{"lan0.5"}, true},
		"both gone":    {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLeasing(t, nil)
			l.addressFor(leasedPool, "", "")
			if c.keeps {
				if _, err := l.pooled(leasedSubnet, nil); err != nil {
					t.Fatal(err)
				}
			}
			stays, err := l.ForgetPool(t.Context(), netip.MustParsePrefix(leasedSubnet), c.others)
			if err != nil || stays != c.keeps {
				t.Errorf("stays %v, %v", stays, err)
			}
			if len(l.server.leases) != 0 {
				t.Errorf("still leased: %v", l.server.leases)
			}
			for _, p := range l.Status(t.Context()).Pools {
				if p.DHCP != nil {
					t.Errorf("pool %s is left", p.ID)
				}
			}
		})
	}
}

// TestForgetKeepsWhatIsUsed: another network uses what this pool leased, whatever link
// it is on.
func TestForgetKeepsWhatIsUsed(t *testing.T) {
	l := newLeasing(t, nil)
	has := netip.MustParsePrefix(l.addressFor(leasedPool, "", "")).Addr()
	l.used = func(netip.Prefix) (func(netip.Addr) string, bool) {
		return func(a netip.Addr) string { return map[netip.Addr]string{has: "endpoint e1"}[a] }, true
	}
	if stays, err := l.ForgetPool(t.Context(), netip.MustParsePrefix(leasedSubnet), []string{"lan0.5"}); err != nil || !stays || len(l.server.leases) != 1 {
		t.Errorf("stays %v, %v, leased %v", stays, err, l.server.leases)
	}
}

// TestForgottenSubnet: a subnet that was kept for another network can be had when that
// is gone, too.
func TestForgottenSubnet(t *testing.T) {
	h, still := newHouse(t), true
	id := h.do("pool local 10.1.0.0/24")
	h.do("addr " + id)
	h.hold("10.1.0.0/24", localID)
	h.used = func(netip.Prefix) (func(netip.Addr) string, bool) {
		return func(netip.Addr) string { return "" }, still
	}
	if stays, err := h.ForgetPool(t.Context(), netip.MustParsePrefix("10.1.0.0/24"), []string{""}); err != nil || !stays {
		t.Errorf("stays %v, %v", stays, err)
	}
	if got := h.do("pool local 10.1.0.0/24"); !strings.HasPrefix(got, "error") {
		t.Errorf("another network has it: %s", got)
	}
	still = false
	delete(h.held, netip.MustParsePrefix("10.1.0.0/24"))
	if got := h.do("pool local 10.1.0.0/24"); got != id {
		t.Error(got)
	}
}

// TestForgetGoesOn: what a disk that fails keeps of a forgotten pool goes later, as
// nobody asks again, and its subnet can be had at once.
func TestForgetGoesOn(t *testing.T) {
	for _, again := range []bool{false, true} {
		h := newHouse(t)
		h.do("addr " + h.do("pool local 10.1.0.0/24"))
		f := &faulty{records: h.store, at: 0, mode: "fail"}
		h.store = f
		if _, err := h.ForgetPool(t.Context(), netip.MustParsePrefix("10.1.0.0/24"), nil); err == nil {
			t.Error("no error")
		}
		if again {
			if id := h.do("pool local 10.1.0.0/24"); id != "weft-local,10.1.0.0/24" {
				t.Error(id)
			}
		}
		if n := h.settle(t.Context()); n != 0 {
			t.Errorf("%d left to do", n)
		}
		if st := h.Status(t.Context()); len(st.Pools) != map[bool]int{false: 0, true: 1}[again] || again && st.Pools[0].Used != 0 {
			t.Errorf("made again %v: %+v", again, st.Pools)
		}
	}
}
