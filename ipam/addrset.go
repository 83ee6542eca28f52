package ipam

import (
	"encoding/binary"
	"maps"
	"math/bits"
	"net/netip"
)

// addrSet is a set of addresses of one family. What it costs depends on the
// addresses in it, never on the size of the pool: bits in chunks, a chunk only
// where there is an address, and the full chunks form a set of the same kind,
// so that the next free address is found without walking over taken ones.
type addrSet struct{ bits bitSet }

func (s *addrSet) add(a netip.Addr) bool    { return s.bits.add(index(a)) }
func (s *addrSet) remove(a netip.Addr) bool { return s.bits.remove(index(a)) }
func (s *addrSet) has(a netip.Addr) bool    { return s.bits.has(index(a)) }
func (s *addrSet) len() uint64              { return s.bits.n }
func (s *addrSet) clone() addrSet           { return addrSet{s.bits.clone()} }

// next returns the first address that is not in the set, from first to last.
func (s *addrSet) next(first, last netip.Addr) (netip.Addr, bool) {
	i, ok := s.bits.next(index(first), index(last))
	if !ok {
		return netip.Addr{}, false
	}
	return i.addr(first.Is4()), true
}

// u128 is an address as a number.
type u128 struct{ hi, lo uint64 }

func index(a netip.Addr) u128 {
	b := a.As16()
	return u128{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

func (u u128) addr(is4 bool) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], u.hi)
	binary.BigEndian.PutUint64(b[8:], u.lo)
	a := netip.AddrFrom16(b)
	if is4 {
		return a.Unmap()
	}
	return a
}

func (u u128) less(v u128) bool { return u.hi < v.hi || u.hi == v.hi && u.lo < v.lo }

func (u u128) inc() u128 {
	lo, carry := bits.Add64(u.lo, 1, 0)
	return u128{u.hi + carry, lo}
}

const (
	chunkBits = 10
	chunkLen  = 1 << chunkBits
)

// shr is the chunk that an index is in, shl the index at an offset of a chunk.
func (u u128) shr() u128 { return u128{u.hi >> chunkBits, u.hi<<(64-chunkBits) | u.lo>>chunkBits} }
func (u u128) shl(at uint64) u128 {
	return u128{u.hi<<chunkBits | u.lo>>(64-chunkBits), u.lo<<chunkBits | at}
}
func (u u128) offset() uint64 { return u.lo & (chunkLen - 1) }

type chunk struct {
	bits [chunkLen / 64]uint64
	n    int
}

// next returns the first clear bit at or after at.
func (c *chunk) next(at uint64) (uint64, bool) {
	for w := at / 64; w < uint64(len(c.bits)); w++ {
		free := ^c.bits[w]
		if w == at/64 {
			free &= ^uint64(0) << (at % 64)
		}
		if free != 0 {
			return w*64 + uint64(bits.TrailingZeros64(free)), true
		}
	}
	return 0, false
}

// bitSet is a sparse set of numbers; the zero value is empty.
type bitSet struct {
	chunks map[u128]*chunk
	full   *bitSet // of chunk numbers; nil while there was never a full one
	n      uint64
}

func (s *bitSet) has(i u128) bool {
	c := s.chunks[i.shr()]
	return c != nil && c.bits[i.offset()/64]>>(i.offset()%64)&1 == 1
}

func (s *bitSet) add(i u128) bool {
	if s.has(i) {
		return false
	}
	if s.chunks == nil {
		s.chunks = map[u128]*chunk{}
	}
	c := s.chunks[i.shr()]
	if c == nil {
		c = &chunk{}
		s.chunks[i.shr()] = c
	}
	c.bits[i.offset()/64] |= 1 << (i.offset() % 64)
	c.n++
	s.n++
	if c.n == chunkLen {
		if s.full == nil {
			s.full = &bitSet{}
		}
		s.full.add(i.shr())
	}
	return true
}

func (s *bitSet) remove(i u128) bool {
	if !s.has(i) {
		return false
	}
	c := s.chunks[i.shr()]
	if c.n == chunkLen {
		s.full.remove(i.shr())
	}
	c.bits[i.offset()/64] &^= 1 << (i.offset() % 64)
	c.n--
	s.n--
	if c.n == 0 {
		delete(s.chunks, i.shr())
	}
	return true
}

// next returns the first number from first to last that is not in the set.
func (s *bitSet) next(first, last u128) (u128, bool) {
	for !last.less(first) {
		ci := first.shr()
		c := s.chunks[ci]
		if c == nil {
			return first, true
		}
		if at, ok := c.next(first.offset()); ok {
			i := ci.shl(at)
			return i, !last.less(i)
		}
		ci = ci.inc()
		if last.shr().less(ci) {
			break
		}
		if s.full != nil {
			var ok bool
			if ci, ok = s.full.next(ci, last.shr()); !ok {
				break
			}
		}
		first = ci.shl(0) // not full: the next round ends it
	}
	return u128{}, false
}

func (s *bitSet) clone() bitSet {
	c := bitSet{chunks: maps.Clone(s.chunks), n: s.n}
	for i, p := range c.chunks {
		d := *p
		c.chunks[i] = &d
	}
	if s.full != nil {
		f := s.full.clone()
		c.full = &f
	}
	return c
}
