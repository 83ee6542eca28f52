package ipam

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// The engine makes an endpoint right after it got the addresses for it, or never: when
// the second family's address is refused it forgets the first one's without a word,
// and tries again as often as the container is started. An address is awaited until
// its endpoint is there.

const (
	// awaitTime is how long an address waits: the other family's request and
	// CreateEndpoint are to come, each with 10 s, and a repeat.
	awaitTime = 45 * time.Second
	// awaitEvery is how often those that wait are looked at.
	awaitEvery = 10 * time.Second
	// siblingTime is how long after one family's address the engine asks for the
	// other's, at most: there is nothing in between.
	siblingTime = 2 * time.Second
)

// await notes that an address was handed out, to whom the engine has told nothing yet.
func (i *IPAM) await(r addressRequest, a netip.Addr) {
	p := i.pool(r.id.poolKey)
	if p == nil || !p.named() || r.kind == kindGateway {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken.has(a) && !p.foreign(a) {
		p.awaited[a] = i.now()
	}
}

// abandon frees the address of the other family that was handed out for an endpoint
// whose address of this one was just refused. The engine makes one network's endpoints
// one after the other, so that it is the one that no endpoint has; where another
// network has the same subnet there may be two, which are left to forsake.
func (i *IPAM) abandon(ctx context.Context, r addressRequest, asked time.Time) {
	id, held := i.holder(r.id.prefix)
	if !held || swarm(id) || r.kind == kindGateway || !r.id.named() {
		return
	}
	i.mu.RLock()
	var siblings []*pool
	for k, p := range i.pools {
		if k.named() && k.prefix.Addr().Is4() != r.id.prefix.Addr().Is4() {
			siblings = append(siblings, p)
		}
	}
	i.mu.RUnlock()
	var p *pool
	var a netip.Addr
	var since time.Time
	n := 0
	for _, s := range siblings {
		if other, held := i.holder(s.prefix); !held || other != id {
			continue
		}
		lost := i.endless(s) // not under the lock: it asks the driver
		s.mu.Lock()
		for b, at := range s.awaited {
			if d := asked.Sub(at); d >= 0 && d <= siblingTime && lost(b) {
				p, a, since = s, b, at
				n++
			}
		}
		s.mu.Unlock()
	}
	if n != 1 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	i.forsakeOne(ctx, p, a, since, "its endpoint was refused the address of the other family")
}

// forsake frees addresses that no endpoint came for, until ctx ends.
func (i *IPAM) forsake(ctx context.Context) error {
	tick := time.NewTicker(awaitEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			i.forsakeDue(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// forsakeDue frees the addresses that have waited long enough and that no endpoint
// has.
func (i *IPAM) forsakeDue(ctx context.Context) {
	i.mu.RLock()
	all := slices.Collect(maps.Values(i.pools))
	i.mu.RUnlock()
	now := i.now()
	for _, p := range all {
		due := map[netip.Addr]time.Time{}
		p.mu.Lock()
		for a, at := range p.awaited {
			if now.Sub(at) >= awaitTime {
				due[a] = at
			}
		}
		p.mu.Unlock()
		if len(due) == 0 {
			continue
		}
		lost := i.endless(p)
		for a, at := range due {
			if lost(a) {
				one, cancel := p.within(ctx)
				i.forsakeOne(one, p, a, at, "no endpoint has it")
				cancel()
				continue
			}
			p.mu.Lock()
			delete(p.awaited, a)
			p.mu.Unlock()
		}
	}
}

// endless returns what tells of an address of a pool that no endpoint has it. Of the
// networks of other drivers, and in a swarm, that is not known.
func (i *IPAM) endless(p *pool) func(netip.Addr) bool {
	used, known := i.used(p.prefix)
	if id, held := i.holder(p.prefix); !known || held && swarm(id) {
		return func(netip.Addr) bool { return false }
	}
	return func(a netip.Addr) bool { return used(a) == "" }
}

// forsakeOne frees an address that has been waiting since then; since is the zero
// Time for one that waits no more.
func (i *IPAM) forsakeOne(ctx context.Context, p *pool, a netip.Addr, since time.Time, why string) {
	p.mu.Lock()
	if !p.awaited[a].Equal(since) || p.closed || !p.taken.has(a) || p.foreign(a) || p.busy[a] != nil {
		p.mu.Unlock()
		return
	}
	b := &busy{done: make(chan struct{})}
	p.busy[a] = b
	delete(p.awaited, a)
	p.mu.Unlock()
	log := i.log.WithField("pool", p.prefix.String())
	if err := i.free(ctx, p, a, b); err != nil { // Run goes on
		log.WithError(err).Debugf("address %s cannot be freed yet", a)
		return
	}
	log.Infof("address %s is free again: %s", a, why)
}
