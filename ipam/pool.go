package ipam

import (
	"fmt"
	"math/big"
	"net/netip"
	"strings"

	"go4.org/netipx"
)

// The two address spaces. The engine keeps the names in its own store.
const (
	LocalSpace  = "weft-local"
	GlobalSpace = "weft-global"
)

// poolKey names a pool: what the addresses belong to.
type poolKey struct {
	space  string
	prefix netip.Prefix
}

// poolID is a pool with the part of it that addresses are chosen from.
type poolID struct {
	poolKey
	sub netip.Prefix // zero: the whole pool
}

// String is the form that the engine stores: space,pool or space,pool,sub-pool.
func (id poolID) String() string {
	s := id.space + "," + id.prefix.String()
	if id.sub.IsValid() {
		s += "," + id.sub.String()
	}
	return s
}

// parsePoolID accepts exactly what String prints.
func parsePoolID(s string) (poolID, error) {
	f := strings.Split(s, ",")
	var id poolID
	var err error
	if len(f) == 2 || len(f) == 3 {
		id.space = f[0]
		id.prefix, err = netip.ParsePrefix(f[1])
		if err == nil && len(f) == 3 {
			id.sub, err = netip.ParsePrefix(f[2])
		}
		if err == nil {
			err = id.validate()
		}
	}
	if err != nil {
		return poolID{}, fmt.Errorf("pool ID %q: %w", s, err)
	}
	if id.String() != s || len(f) < 2 {
		return poolID{}, fmt.Errorf("pool ID %q is not one of ours: want space,pool or space,pool,sub-pool", s)
	}
	return id, nil
}

func (id poolID) validate() error {
	if id.shared() {
		if err := checkSpaceName(id.spaceName()); err != nil {
			return err
		}
	} else if link := id.dhcp(); link != "" {
		if err := checkLink(link); err != nil {
			return err
		}
	} else if id.space != LocalSpace && id.space != GlobalSpace {
		return fmt.Errorf("there is no address space %q, only %s and %s", id.space, LocalSpace, GlobalSpace)
	}
	if err := validPool(id.prefix); err != nil {
		return err
	}
	if !id.sub.IsValid() {
		return nil
	}
	if id.sub.Bits() <= id.prefix.Bits() || !id.prefix.Contains(id.sub.Addr()) || id.sub != id.sub.Masked() {
		return fmt.Errorf("ip-range %s is not a part of subnet %s: choose one that is", id.sub, id.prefix)
	}
	if first, last := id.auto(); last.Less(first) {
		return fmt.Errorf("ip-range %s of subnet %s has no usable address: choose a larger one", id.sub, id.prefix)
	}
	return nil
}

// validPool refuses what no container can have an address from.
func validPool(p netip.Prefix) error {
	a := p.Addr()
	switch {
	case p != p.Masked():
		return fmt.Errorf("subnet %s has bits outside its mask: write %s", p, p.Masked())
	case p.Bits() == 0, a.Is4In6(), a.Zone() != "":
		return fmt.Errorf("subnet %s is not one: write it as 10.0.0.0/24 or fd00:1::/64", p)
	case a.IsMulticast(), a.IsLoopback(), a.IsUnspecified():
		return fmt.Errorf("subnet %s is multicast, loopback or unspecified: choose another", p)
	}
	return nil
}

// usable returns the first and last address that may be used. Not used are an
// IPv4 subnet's network and broadcast address and an IPv6 subnet's anycast
// address of its routers (RFC 4291 2.6.1); where the prefix leaves two addresses
// or one, both are used (RFC 3021, RFC 6164).
func (k poolKey) usable() (first, last netip.Addr) {
	first, last = k.prefix.Addr(), netipx.PrefixLastIP(k.prefix)
	if k.prefix.Bits() < first.BitLen()-1 {
		first = first.Next()
		if first.Is4() {
			last = last.Prev()
		}
	}
	return first, last
}

// auto returns the first and last address that may be chosen automatically.
func (id poolID) auto() (first, last netip.Addr) {
	first, last = id.usable()
	if !id.sub.IsValid() {
		return first, last
	}
	if a := id.sub.Addr(); first.Less(a) {
		first = a
	}
	if a := netipx.PrefixLastIP(id.sub); a.Less(last) {
		last = a
	}
	return first, last
}

// size is how many usable addresses there are; a /8 of IPv6 has more than
// a machine word can count.
func (k poolKey) size() *big.Int { return count(k.usable()) }

func count(first, last netip.Addr) *big.Int {
	n := new(big.Int).SetBytes(last.AsSlice())
	n.Sub(n, new(big.Int).SetBytes(first.AsSlice()))
	return n.Add(n, big.NewInt(1))
}

// with gives an address the pool's mask.
func (k poolKey) with(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, k.prefix.Bits()) }

// Keys of records. An address's key is not below its pool's: releasing a pool
// deletes its own record first, and a crash then leaves addresses without
// a pool, which Load sweeps, rather than a pool that nobody will release again.
const (
	poolPrefix    = "ipam/pool/"
	addressPrefix = "ipam/addr/"
	namePrefix    = "ipam/name/"
	ulaKey        = "ipam/ula"
)

func (k poolKey) record() string              { return poolPrefix + k.space + "," + k.prefix.String() }
func (k poolKey) addresses() string           { return addressPrefix + k.space + "," + k.prefix.String() + "/" }
func (k poolKey) address(a netip.Addr) string { return k.addresses() + a.String() }

// parseAddressKey is the reverse of address.
func parseAddressKey(key string) (poolKey, netip.Addr, error) {
	at := strings.LastIndexByte(key, '/')
	rest, ok := strings.CutPrefix(key[:max(at, 0)], addressPrefix)
	if !ok {
		return poolKey{}, netip.Addr{}, fmt.Errorf("record %s is not that of an address", key)
	}
	id, err := parsePoolID(rest)
	if err != nil {
		return poolKey{}, netip.Addr{}, fmt.Errorf("record %s: %w", key, err)
	}
	a, err := netip.ParseAddr(key[at+1:])
	if err != nil {
		return poolKey{}, netip.Addr{}, fmt.Errorf("record %s: %w", key, err)
	}
	if id.sub.IsValid() || !id.prefix.Contains(a) || id.address(a) != key {
		return poolKey{}, netip.Addr{}, fmt.Errorf("record %s: the address is not one of the pool", key)
	}
	return id.poolKey, a, nil
}
