package ipam

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// FuzzAddrSet compares the set with a map. Each three bytes of the input are
// one call: what, and an offset from a base, so that chunks fill up.
func FuzzAddrSet(f *testing.F) {
	f.Add(true, []byte{0, 0, 1, 0, 0, 2, 2, 0, 0, 1, 0, 1, 3, 0, 0})
	f.Add(false, []byte("\x04\x00\x00\x04\x04\x00\x02\x00\x00\x03\x03\xff\x01\x00\x07"))
	f.Add(false, []byte("\x04\x00\x00\x04\x04\x00\x04\x08\x00\x02\x00\x00\x01\x04\x00\x02\x00\x00"))
	f.Fuzz(func(t *testing.T, v4 bool, calls []byte) {
		base := netip.MustParseAddr("fd00::ffff:ffff:ffff:f000") // carries into the upper half
		if v4 {
			base = netip.MustParseAddr("10.255.240.0")
		}
		at := func(n uint16) netip.Addr {
			i := index(base)
			if i.lo+uint64(n) < i.lo {
				i.hi++
			}
			i.lo += uint64(n)
			return i.addr(v4)
		}
		const span = 1<<13 - 1
		var s addrSet
		model := map[netip.Addr]bool{}
		for ; len(calls) >= 3; calls = calls[3:] {
			n := binary.BigEndian.Uint16(calls[1:]) & span
			a := at(n)
			switch calls[0] % 6 {
			case 0:
				if got := s.add(a); got == model[a] {
					t.Fatalf("add %s: %v", a, got)
				}
				model[a] = true
			case 1:
				if got := s.remove(a); got != model[a] {
					t.Fatalf("remove %s: %v", a, got)
				}
				delete(model, a)
			case 2, 3:
				last := at(span)
				if calls[0]%6 == 3 {
					last = at(min(n+3, span))
				}
				got, ok := s.next(a, last)
				want := a
				for model[want] && want.Less(last) {
					want = want.Next()
				}
				if ok == model[want] || ok && got != want {
					t.Fatalf("next from %s to %s: %s %v, want %s", a, last, got, ok, want)
				}
			case 4: // a chunk at once, or else no input ever fills one
				for i := range uint16(chunkLen) {
					b := at((n&^(chunkLen-1) + i) & span)
					s.add(b)
					model[b] = true
				}
			case 5:
				c := s.clone()
				s.remove(a)
				if c.has(a) != model[a] {
					t.Fatalf("a clone changed with its original")
				}
				s = c
			}
			if s.has(a) != model[a] || s.len() != uint64(len(model)) {
				t.Fatalf("has %s: %v, %d addresses, want %d", a, s.has(a), s.len(), len(model))
			}
		}
	})
}

func TestAddrSetEnds(t *testing.T) {
	for _, p := range []string{"255.255.255.0/24", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00/120", "0.0.0.0/24", "::/120"} {
		k := poolKey{prefix: netip.MustParsePrefix(p)}
		first, last := k.prefix.Addr(), k.prefix.Addr()
		for k.prefix.Contains(last.Next()) {
			last = last.Next()
		}
		var s addrSet
		for want := first; ; want = want.Next() {
			got, ok := s.next(first, last)
			if !ok || got != want {
				t.Fatalf("%s: next is %s %v, want %s", p, got, ok, want)
			}
			s.add(got)
			if want == last {
				break
			}
		}
		if got, ok := s.next(first, last); ok {
			t.Errorf("%s: %s although all are taken", p, got)
		}
	}
}

// TestAddrSetMemory: what is free costs nothing, whatever the pool.
func TestAddrSetMemory(t *testing.T) {
	var s addrSet
	for i := range 1 << 16 {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(i)+10<<24)
		s.add(netip.AddrFrom4(b))
	}
	if d := cmp.Diff([]int{64, 1}, []int{len(s.bits.chunks), len(s.bits.full.chunks)}); d != "" {
		t.Errorf("chunks for a /16 (-want +got):\n%s", d)
	}
	for i := range 1 << 16 {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(i)+10<<24)
		s.remove(netip.AddrFrom4(b))
	}
	if len(s.bits.chunks) != 0 || len(s.bits.full.chunks) != 0 {
		t.Errorf("%d and %d chunks left in an empty set", len(s.bits.chunks), len(s.bits.full.chunks))
	}
}

func FuzzParsePoolID(f *testing.F) {
	for _, s := range []string{
		"weft-local,10.0.0.0/24", "weft-global,fd00::/64,fd00::8000:0:0:0/80", "weft-local,10.0.0.0/24,", "weft-local,10.0.0.1/24",
		"weft-local,0.0.0.0/0", ",", "weft-local,fe80::%eth0/64", "weft-local,10.0.0.0/024", "weft-local,::ffff:10.0.0.0/120", "weft-local,10.0.0.0/24,10.0.0.255/32",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := parsePoolID(s)
		if err != nil {
			return
		}
		if id.String() != s {
			t.Fatalf("%q is read as %q", s, id)
		}
		first, last := id.auto()
		if last.Less(first) || !id.prefix.Contains(first) || !id.prefix.Contains(last) {
			t.Fatalf("%q: addresses %s to %s", s, first, last)
		}
		if b := sibling(id.sub); id.sub.IsValid() && (b.Overlaps(id.sub) || !id.prefix.Overlaps(b) || b.Bits() != id.sub.Bits() || b != b.Masked()) {
			t.Fatalf("%q: beside its range is %s", s, b)
		}
		if k, a, err := parseAddressKey(id.address(last)); err != nil || k != id.poolKey || a != last {
			t.Fatalf("key of %s in %q is read as %v %s, %v", last, s, k, a, err)
		}
	})
}

func FuzzParsePools(f *testing.F) {
	for _, s := range []string{"", "10.0.0.0/8:24", "10.0.0.0/8:24, fd00::/48:64", "10.0.0.0/8", "10.0.0.0/8:7", "10.0.0.0/8:31", "10.1.0.0/8:24", "10.0.0.0/8:24,10.1.0.0/16:24", "::/0:64", "10.0.0.0/8:-1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ranges, err := ParsePools(s)
		if err != nil {
			return
		}
		for _, r := range ranges {
			again, err := ParsePools(r.String())
			if err != nil || len(again) != 1 || again[0] != r {
				t.Fatalf("%s of %q is read as %v, %v", r, s, again, err)
			}
			p, err := choose([]PoolRange{r}, 0, nil)
			if err != nil || p.Bits() != r.Size || !r.Prefix.Contains(p.Addr()) || validPool(p) != nil {
				t.Fatalf("first pool of %s is %s, %v", r, p, err)
			}
		}
	})
}

func TestParsePoolsErrors(t *testing.T) {
	for _, s := range []string{"10.0.0.0/8", "10.0.0.0/8:7", "10.0.0.0/8:31", "10.0.0.1/8:24", "10.0.0.0/8:24,10.1.0.0/16:24", "::/0:64", "x:24", "10.0.0.0/8:24,", "fd00::/48:127"} {
		if r, err := ParsePools(s); err == nil {
			t.Errorf("%q is %v", s, r)
		}
	}
	if r, err := ParsePools(" 10.0.0.0/8:24 , fd00::/48:64"); err != nil || len(r) != 2 {
		t.Errorf("a good one is %v, %v", r, err)
	}
}

// TestFirstFree compares with trying every subnet.
func TestFirstFree(t *testing.T) {
	r := netip.MustParsePrefix("10.0.0.0/20")
	p := netip.MustParsePrefix
	for _, avoid := range [][]netip.Prefix{
		nil, {p("10.0.0.0/24")}, {p("10.0.0.0/22"), p("10.0.4.9/32")}, {p("10.0.0.0/8")}, {p("10.0.0.0/21"), p("10.0.1.0/24"), p("10.0.8.0/22")}, {p("0.0.0.0/1"), p("fd00::/8")},
	} {
		for size := 20; size <= 26; size++ {
			got, ok := firstFree(r, size, avoid)
			want, found := netip.Prefix{}, false
			for a := r.Addr(); r.Contains(a) && !found; a = a.Next() {
				c := netip.PrefixFrom(a, size)
				found = c == c.Masked()
				for _, o := range avoid {
					found = found && !o.Overlaps(c)
				}
				if found {
					want = c
				}
			}
			if ok != found || got != want {
				t.Errorf("/%d beside %v: %v %v, want %v", size, avoid, got, ok, want)
			}
		}
	}
}
