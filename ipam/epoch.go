package ipam

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
)

// epoch is a term of office of this host's swarm allocator. What was released
// while another host's was in office, nobody told us. But a new allocator
// repeats all pools and addresses that it knows before it asks for others, so
// what it has not named is what somebody else may have: it is unconfirmed.
type epoch struct {
	elected atomic.Bool // a new one has begun, of which the pools are not marked yet
	mu      sync.Mutex  // over marking and confirming; before the locks of pools
}

// Elected says that a swarm allocator was started on this host. It returns at
// once. It must not be said of an allocator that is in office already: that one
// repeats nothing.
func (i *IPAM) Elected() { i.epoch.elected.Store(true) }

// confirm says that the allocator has a pool. It waits for no other request: one
// that runs into its deadline has confirmed its pool all the same.
func (i *IPAM) confirm(k poolKey) {
	if k.space != GlobalSpace {
		return
	}
	known := i.global()
	i.epoch.mu.Lock()
	defer i.epoch.mu.Unlock()
	if i.epoch.elected.Swap(false) {
		for _, p := range known {
			p.doubt()
		}
	}
	if p := i.pool(k); p != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.unconfirmed = false
	}
}

// global returns the pools that are the allocator's. From 25.0 on an engine
// outside a swarm takes pools for its own networks from the global space too;
// those no allocator knows.
func (i *IPAM) global() (list []*pool) {
	i.mu.RLock()
	for k, p := range i.pools {
		if k.space == GlobalSpace {
			list = append(list, p)
		}
	}
	i.mu.RUnlock()
	kept := list[:0]
	for _, p := range list {
		if id, held := i.holder(p.prefix); !held || swarm(id) {
			kept = append(kept, p)
		}
	}
	return kept
}

func (p *pool) doubt() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unconfirmed, p.stale = true, p.taken.clone()
}

// displace makes room for a new pool: it drops the unconfirmed ones that overlap
// it, unless there is another one as well. The caller holds changes.
func (i *IPAM) displace(ctx context.Context, k poolKey) error {
	var gone []*pool
	for _, p := range i.overlaps(k) {
		p.mu.Lock()
		unconfirmed := p.unconfirmed
		p.mu.Unlock()
		if !unconfirmed {
			return i.inUse(k.prefix, p)
		}
		gone = append(gone, p)
	}
	for _, p := range gone {
		i.log.WithField("pool", p.prefix.String()).Info("the swarm's allocator does not know the pool any more: dropped")
		if err := i.drop(ctx, p); err != nil {
			i.later(cleanup{pool: p})
			return err
		}
	}
	return nil
}

// reclaim picks an address to be freed, of those that may be chosen, in a pool
// that the allocator has confirmed without naming the address, and marks it busy;
// p.mu is held. The gateway is left alone: it is the network's, not a task's.
func (p *pool) reclaim(id poolID) (netip.Addr, *busy) {
	if p.space != GlobalSpace || p.unconfirmed || p.stale.len() == 0 {
		return netip.Addr{}, nil
	}
	first, last := id.auto()
	for a := first; a.IsValid() && !last.Less(a); a = a.Next() {
		if _, gateway := p.gateways[a]; gateway || p.busy[a] != nil || !p.stale.remove(a) {
			continue
		}
		b := &busy{done: make(chan struct{})}
		p.busy[a] = b
		return a, b
	}
	return netip.Addr{}, nil
}
