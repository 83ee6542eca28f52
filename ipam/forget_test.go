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
	prefix, still := netip.MustParsePrefix(leasedSubnet), true
	l.used = func(netip.Prefix) (func(netip.Addr) string, bool) {
		return func(netip.Addr) string { return "" }, still
	}
	if stays, err := l.ForgetPool(t.Context(), prefix); err != nil || !stays {
		t.Errorf("stays %v, %v", stays, err)
	}
	if n := len(l.Status(t.Context()).Pools); n != 2 || len(l.server.leases) != 2 {
		t.Errorf("%d pools, leased %v: want both", n, l.server.leases)
	}
	still = false
	if stays, err := l.ForgetPool(t.Context(), prefix); err != nil || stays {
		t.Errorf("the last one: stays %v, %v", stays, err)
	}
	if n := len(l.Status(t.Context()).Pools); n != 0 || len(l.server.leases) != 0 {
		t.Errorf("%d pools left, leased %v", n, l.server.leases)
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
	if stays, err := h.ForgetPool(t.Context(), netip.MustParsePrefix("10.1.0.0/24")); err != nil || !stays {
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
		if _, err := h.ForgetPool(t.Context(), netip.MustParsePrefix("10.1.0.0/24")); err == nil {
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
