package ipam

import (
	"crypto/rand"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"go4.org/netipx"
)

// PoolRange is where automatic pools come from: Prefix is cut into pools with
// a prefix length of Size.
type PoolRange struct {
	Prefix netip.Prefix
	Size   int
}

// String is the form that ParsePools reads.
func (r PoolRange) String() string { return fmt.Sprintf("%s:%d", r.Prefix, r.Size) }

// ParsePools parses a list of cidr:size, separated by commas, as in
// 10.0.0.0/8:24,fd00:1::/48:64. An empty one means the defaults.
func ParsePools(s string) ([]PoolRange, error) {
	if strings.TrimSpace(s) == "" {
		return nil, nil
	}
	var out []PoolRange
	for f := range strings.SplitSeq(s, ",") {
		f = strings.TrimSpace(f)
		at := strings.LastIndexByte(f, ':')
		if at < 0 {
			if _, err := netip.ParsePrefix(f); err != nil {
				return nil, fmt.Errorf("%q is not a subnet: write CIDR:SIZE as in 10.0.0.0/8:24", clip(f))
			}
			return nil, fmt.Errorf("%q has no size: write CIDR:SIZE as in 10.0.0.0/8:24", clip(f))
		}
		p, err := netip.ParsePrefix(f[:at])
		if err != nil {
			return nil, fmt.Errorf("%q is not a subnet: write CIDR:SIZE as in 10.0.0.0/8:24", clip(f))
		}
		if err := validPool(p); err != nil {
			return nil, fmt.Errorf("%q: %w", clip(f), err)
		}
		size, err := strconv.Atoi(f[at+1:])
		if most := p.Addr().BitLen() - 2; err != nil || size < p.Bits() || size > most {
			return nil, fmt.Errorf("%q: the size is a prefix length from %d to %d, as in %s:%d", clip(f), p.Bits(), most, p, min(max(p.Bits(), 24), most))
		}
		for _, o := range out {
			if o.Prefix.Overlaps(p) {
				return nil, fmt.Errorf("%s overlaps %s: leave one out", p, o.Prefix)
			}
		}
		out = append(out, PoolRange{p, size})
	}
	return out, nil
}

// defaultPools4 are used when the setting has no IPv4 range. The host's own
// networks tend to be in the others, so 172.16.0.0/12 comes first.
var defaultPools4 = []PoolRange{
	{netip.MustParsePrefix("172.16.0.0/12"), 24},
	{netip.MustParsePrefix("10.0.0.0/8"), 24},
	{netip.MustParsePrefix("192.168.0.0/16"), 24},
}

// swarmPools4 are the same for the networks of a swarm, which the host cannot see
// in its routes: those of another weft on it come from the other end, and so do
// those of the engine's own overlay.
var swarmPools4 = []PoolRange{
	{netip.MustParsePrefix("10.128.0.0/9"), 24},
	{netip.MustParsePrefix("192.168.0.0/16"), 24},
	{netip.MustParsePrefix("172.16.0.0/12"), 24},
	{netip.MustParsePrefix("10.0.0.0/9"), 24},
}

// ForSwarm adds the default IPv4 ranges of a swarm's networks where there is no
// IPv4 range.
func ForSwarm(ranges []PoolRange) []PoolRange {
	for _, r := range ranges {
		if r.Prefix.Addr().Is4() {
			return ranges
		}
	}
	return append(ranges, swarmPools4...)
}

// ulaSize is the prefix length of pools in our own RFC 4193 prefix.
const ulaSize = 64

// newULA makes a /48 of the kind that RFC 4193 tells everybody to make.
func newULA() netip.Prefix {
	b := [16]byte{0xfd}
	_, _ = rand.Read(b[1:6]) // documented never to fail
	return netip.PrefixFrom(netip.AddrFrom16(b), 48)
}

// choose returns the first free pool in the ranges. bits is a wanted prefix
// length, or 0 for each range's own.
func choose(ranges []PoolRange, bits int, avoid []netip.Prefix) (netip.Prefix, error) {
	var tried []string
	for _, r := range ranges {
		size := r.Size
		if bits != 0 {
			size = bits
		}
		if size < r.Prefix.Bits() {
			continue
		}
		tried = append(tried, r.Prefix.String())
		if p, ok := firstFree(r.Prefix, size, avoid); ok {
			return p, nil
		}
	}
	what := "no free pool"
	if bits != 0 {
		what = fmt.Sprintf("no free /%d", bits)
	}
	if len(tried) == 0 {
		return netip.Prefix{}, fmt.Errorf("%s: no range of POOLS is that large, give a subnet or set POOLS", what)
	}
	return netip.Prefix{}, fmt.Errorf("%s left in %s beside %d networks in use by pools and by the host's routes, addresses and resolvers: remove networks, give a subnet, or set POOLS",
		what, strings.Join(tried, ", "), len(avoid))
}

// firstFree goes through the subnets of r in order and jumps over each
// network that is in the way as a whole.
func firstFree(r netip.Prefix, size int, avoid []netip.Prefix) (netip.Prefix, bool) {
	for at := r.Addr(); at.IsValid() && r.Contains(at); {
		p := netip.PrefixFrom(at, size)
		end := netip.Addr{}
		for _, a := range avoid {
			if !p.Overlaps(a) {
				continue
			}
			if a.Bits() > size {
				a = p
			}
			if last := netipx.PrefixLastIP(a); !end.IsValid() || end.Less(last) {
				end = last
			}
		}
		if !end.IsValid() {
			return p, true
		}
		at = end.Next() // aligned: both the subnet and what is in the way end on a boundary
	}
	return netip.Prefix{}, false
}
