package ipam

import (
	"cmp"
	"context"
	"maps"
	"slices"
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
	// Size is the number of usable addresses in decimal; IPv6 pools have more
	// than JSON's numbers can tell apart.
	Size string `json:"size"`
	Used uint64 `json:"used"` // by this host
	// UsedByAll is by all hosts, in a space that they share.
	UsedByAll uint64 `json:"usedByAll,omitempty"`
	Gateway   string `json:"gateway,omitempty"`
}

// Status returns the pools in order of space and address. It waits for no
// disk, so the context is there for stores that are elsewhere.
func (i *IPAM) Status(context.Context) Status {
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
			ID: poolID{p.poolKey, p.sub}.String(), Space: p.space, Pool: p.prefix.String(),
			Size: p.size().String(), Used: p.taken.len(),
		}
		if p.shared() {
			st.Space, st.UsedByAll = p.spaceName(), st.Used
			st.Used -= uint64(len(p.others))
		}
		if p.sub.IsValid() {
			st.SubPool = p.sub.String()
		}
		if gw := p.gateway(); gw.IsValid() {
			st.Gateway = gw.String()
		}
		p.mu.Unlock()
		s.Pools = append(s.Pools, st)
	}
	return s
}
