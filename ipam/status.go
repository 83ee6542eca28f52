package ipam

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/internal/dhcp"
)

// Status is what weft status shows of the pools. Its JSON form is stable.
type Status struct {
	Pools []PoolStatus `json:"pools"`
}

// PoolStatus is one pool.
type PoolStatus struct {
	ID      string `json:"id"`
	Space   string `json:"space"`
	Pool    string `json:"pool"`
	SubPool string `json:"subPool,omitempty"`
	// MoreSubPools are those of further networks that share the pool.
	MoreSubPools []string `json:"moreSubPools,omitempty"`
	// Size is the number of usable addresses in decimal; IPv6 pools have more
	// than JSON's numbers can tell apart.
	Size string `json:"size"`
	Used uint64 `json:"used"` // by this host
	// UsedByAll is by all hosts, in a space that they share.
	UsedByAll uint64 `json:"usedByAll,omitempty"`
	Gateway   string `json:"gateway,omitempty"`
	// Resting is how many were released only just now.
	Resting int          `json:"resting,omitempty"`
	Names   []NameStatus `json:"names,omitempty"`
	// Stranded are addresses that were given out some time ago and that no
	// endpoint has; only for the networks of our own driver.
	Stranded []netip.Addr `json:"stranded,omitempty"`
	// DHCP is there for a pool whose addresses are leased.
	DHCP *DHCPStatus `json:"dhcp,omitempty"`
	// Warning says in one line that the pool is nearly used up.
	Warning string `json:"warning,omitempty"`
}

// Shared reports whether the pool is one of a space that hosts share.
func (s PoolStatus) Shared() bool { return strings.HasPrefix(s.ID, spaceOption) }

// NameStatus is a name that has an address in a pool.
type NameStatus struct {
	// Name is that of a container, or NoName: who had the address had asked for it
	// by number, and its name is not known.
	Name    string     `json:"name"`
	Address netip.Addr `json:"address"`
	MAC     string     `json:"mac,omitempty"` // where one is reserved
	// Reserved: by the user, not because a container of that name had it.
	Reserved bool `json:"reserved"`
	// Held: by a container. Otherwise Released says since when it is not, where
	// that is known.
	Held     bool      `json:"held"`
	Host     string    `json:"host,omitempty"` // that has it, where it is not this one
	Released time.Time `json:"released,omitzero"`
}

// NoName stands for the name of who asked for an address by number.
const NoName = "--ip"

// DHCPStatus is what there is to know of leases.
type DHCPStatus struct {
	Link   string        `json:"link"`
	Counts leaseCounts   `json:"counts"` // since the plugin started
	Leases []LeaseStatus `json:"leases"`
}

// LeaseStatus is one lease.
type LeaseStatus struct {
	Address netip.Addr `json:"address"`
	Name    string     `json:"name,omitempty"` // of the container, where it is known
	MAC     string     `json:"mac"`
	Lease   dhcp.Lease `json:"lease"` // as the server granted it
	Expires time.Time  `json:"expires"`
	Trouble string     `json:"trouble,omitempty"` // why it was not extended last time
}

// nearlyFull is the use of a pool, in percent, from which on status warns; pools
// of less than smallPool addresses are made to be full.
const (
	nearlyFull = 90
	smallPool  = 8
)

// Status returns the pools in order of space and address. What the disk does
// not say in time is left out.
func (i *IPAM) Status(ctx context.Context) Status {
	i.mu.RLock()
	pools := slices.Collect(maps.Values(i.pools))
	i.mu.RUnlock()
	slices.SortFunc(pools, func(a, b *pool) int {
		return cmp.Or(-cmp.Compare(a.space, b.space), a.prefix.Addr().Compare(b.prefix.Addr()), a.prefix.Bits()-b.prefix.Bits())
	})
	s := Status{Pools: []PoolStatus{}}
	for _, p := range pools {
		p.mu.Lock()
		st := PoolStatus{
			ID: poolID{p.poolKey, p.parts[0].sub}.String(), Space: p.space, Pool: p.prefix.String(),
			Size: p.size().String(), Used: p.taken.len(),
		}
		if p.shared() {
			st.Space, st.UsedByAll = p.spaceName(), st.Used
			st.Used -= uint64(len(p.others))
		}
		if sub := p.parts[0].sub; sub.IsValid() {
			st.SubPool = sub.String()
		}
		for _, o := range p.parts[1:] {
			st.MoreSubPools = append(st.MoreSubPools, o.sub.String())
		}
		if gw := p.gateway(p.parts[0].sub); gw.IsValid() {
			st.Gateway = gw.String()
		}
		lost := p.expire(i.now())
		st.Names, st.Warning = p.nameStatus(), p.warning()
		st.Resting = len(p.since) - len(p.current(p.kept))
		st.DHCP = p.dhcpStatus()
		if st.DHCP != nil && st.Gateway == "" {
			st.Gateway = p.learntRouter()
		}
		p.mu.Unlock()
		i.forgetNames(ctx, p, lost)
		st.Stranded = i.stranded(ctx, p)
		s.Pools = append(s.Pools, st)
	}
	return s
}

// learntRouter is the one that the server named last, "" for none that can be used; p.mu is
// held.
func (p *pool) learntRouter() string {
	var last dhcp.Lease
	for _, l := range p.leased {
		if l.Lease.Granted.After(last.Granted) && p.prefix.Contains(l.Lease.Router) {
			last = l.Lease
		}
	}
	if !last.Router.IsValid() {
		return ""
	}
	return last.Router.String()
}

// dhcpStatus lists the leases; p.mu is held.
func (p *pool) dhcpStatus() *DHCPStatus {
	if p.dhcp() == "" {
		return nil
	}
	s := &DHCPStatus{Link: p.dhcp(), Counts: p.counts, Leases: []LeaseStatus{}}
	for a, l := range p.leased {
		s.Leases = append(s.Leases, LeaseStatus{
			Address: a, Name: named(l.Key), MAC: net.HardwareAddr(l.Station.MAC[:]).String(),
			Lease: l.Lease, Expires: l.expires().UTC(), Trouble: l.trouble,
		})
	}
	slices.SortFunc(s.Leases, func(a, b LeaseStatus) int { return a.Address.Compare(b.Address) })
	return s
}

// nameStatus lists the names; p.mu is held.
func (p *pool) nameStatus() []NameStatus {
	var out []NameStatus
	for name, r := range p.reservations() {
		s := NameStatus{Name: name, Address: r.addr, Reserved: true, Held: p.taken.has(r.addr), Host: p.others[r.addr].Name}
		if r.mac != (MAC{}) {
			s.MAC = net.HardwareAddr(r.mac[:]).String()
		}
		out = append(out, s)
	}
	for _, b := range p.byName {
		name := b.name
		if strings.HasPrefix(name, fixedPrefix) {
			if name = NoName; p.taken.has(b.Address) {
				continue // as any other that is in use
			}
		}
		out = append(out, NameStatus{Name: name, Address: b.Address, Held: p.taken.has(b.Address), Host: p.others[b.Address].Name, Released: b.Released})
	}
	slices.SortFunc(out, func(a, b NameStatus) int { return cmp.Or(cmp.Compare(a.Name, b.Name), a.Address.Compare(b.Address)) })
	return out
}

// warning tells of a pool that is nearly full; p.mu is held.
func (p *pool) warning() string {
	size := p.size()
	if n := p.unleased(); n > 0 {
		return fmt.Sprintf("pool %s: %d addresses are of dhcp_fallback, because no DHCP server answered on %s when they were asked for: make the containers again when it is back",
			p.prefix, n, p.dhcp())
	}
	if p.dhcp() != "" { // how many there are is the server's business
		return ""
	}
	if !size.IsInt64() || size.Int64() < smallPool {
		return ""
	}
	if used := new(big.Int).SetUint64(p.taken.len()); used.Mul(used, big.NewInt(100)).Cmp(new(big.Int).Mul(size, big.NewInt(nearlyFull))) < 0 {
		return ""
	}
	return fmt.Sprintf("pool %s: %d of %s addresses are in use: make further networks, or look for stranded addresses", p.prefix, p.taken.len(), size)
}

// stranded lists what no endpoint has.
func (i *IPAM) stranded(ctx context.Context, p *pool) []netip.Addr {
	used, known := i.used(p.prefix)
	if !known || !p.named() {
		return nil
	}
	if p.shared() {
		return i.strandedHere(p, used)
	}
	list, err := i.store.List(ctx, p.addresses())
	if err != nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []netip.Addr
	for _, r := range list {
		var rec addressRecord
		_, a, err := parseAddressKey(r.Key)
		if err != nil || decode(r.Key, r.Value, &rec, &rec.Version) != nil {
			continue
		}
		if rec.Kind != kindGateway && !p.fresh(a, i.now()) && i.now().Sub(rec.Created) > strandedAfter && used(a) == "" {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// strandedHere lists what this host has claimed in a shared space and no endpoint
// has.
func (i *IPAM) strandedHere(p *pool, used func(netip.Addr) string) []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []netip.Addr
	for a, c := range p.mine {
		if i.now().Sub(c.since) > strandedAfter && used(a) == "" {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}
