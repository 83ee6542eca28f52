package ipam

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"strings"

	"github.com/weftnet/weft/internal/store"
)

// What this host knows of the spaces of the cluster comes from three sides: its
// own writes, which are certain; what it is told of the others' (Follow), which
// is late; and refusals. News about an address of ours that is older than our
// own write is no news. Everything else may be wrong for a while without harm:
// what decides is the write.

// loadShared reads what this host has in the spaces of the cluster, once. Until
// it has succeeded every request for one of them tries it, and fails with its
// error.
func (i *IPAM) loadShared(ctx context.Context) error {
	s := i.shared
	if s.claims == nil {
		return errNoCluster
	}
	s.mu.Lock()
	loaded := s.loaded
	s.mu.Unlock()
	if loaded {
		return nil
	}
	release, err := i.change(ctx)
	if err != nil {
		return err
	}
	defer release()
	if s.loaded { // changes with changes only
		return nil
	}
	list, err := s.List(ctx, spaceKeys)
	if err != nil {
		return err
	}
	tables, held, err := readSpaces(list)
	if err != nil {
		return err
	}
	pools := map[poolKey]*pool{}
	for space, t := range tables {
		for prefix, tp := range t.Pools {
			m, ok := tp.Hosts[s.host]
			if !ok {
				continue
			}
			p := newPool(poolID{poolKey{space, prefix}, m.SubPool})
			p.rev, p.adoptable = 1, true
			pools[p.poolKey] = p
		}
	}
	for k, addrs := range held {
		if p := pools[k]; p != nil {
			p.own(s.host, addrs)
		} else if t := tables[k.space]; t.Pools[k.prefix] == nil {
			err = errors.Join(err, s.sweep(ctx, k, addrs))
		}
	}
	if err == nil {
		err = i.loadOwed(ctx, pools)
	}
	if err != nil {
		return err
	}
	i.mu.Lock()
	maps.Copy(i.pools, pools)
	i.mu.Unlock()
	s.mu.Lock()
	s.loaded = true
	s.mu.Unlock()
	return nil
}

// own fills a pool that no other goroutine knows yet.
func (p *pool) own(host string, addrs map[netip.Addr]heldClaim) {
	newest := uint64(0)
	for a, h := range addrs {
		if h.Host != host || h.Kind == kindGateway {
			p.take(a, h)
			continue
		}
		p.taken.add(a)
		p.mine[a] = h.rev
		if h.Kind == kindAuto && h.rev > newest {
			newest, p.cursor = h.rev, a.Next()
		}
	}
}

// sweep finishes the release of a pool that nobody has any more, where this
// host died in it.
func (s *shared) sweep(ctx context.Context, k poolKey, addrs map[netip.Addr]heldClaim) error {
	for a, h := range addrs {
		if h.Host != s.host {
			continue
		}
		if err := s.Remove(ctx, store.Record{Key: k.claim(a), Rev: h.rev}); err != nil && !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
	return nil
}

// loadOwed goes on with the releases that could not be finished before the
// process ended.
func (i *IPAM) loadOwed(ctx context.Context, pools map[poolKey]*pool) error {
	list, err := i.shared.disk.List(ctx, owedKeys)
	if err != nil {
		return err
	}
	for _, r := range list {
		key := strings.TrimPrefix(r.Key, owedKeys)
		i.shared.mu.Lock()
		i.shared.owed[key] = true
		i.shared.mu.Unlock()
		k, a, ok := parseSpaceKey(key)
		p := pools[k]
		if ok && p != nil && !a.IsValid() {
			p.releasing, p.closed = true, true
			i.later(cleanup{pool: p})
			continue
		}
		if ok && p != nil && p.mine[a] != 0 {
			i.stray(p, a)
			continue
		}
		if err := i.shared.forget(ctx, key); err != nil {
			return err
		}
	}
	return nil
}

// stray puts an address on the list of Run that this host has and should not
// have; p.mu is held, or nobody else knows p.
func (i *IPAM) stray(p *pool, a netip.Addr) {
	b := &busy{done: make(chan struct{}), queued: true}
	close(b.done)
	p.taken.add(a)
	p.busy[a] = b
	i.later(cleanup{pool: p, addr: a, busy: b})
}

// readSpaces sorts the records of the cluster.
func readSpaces(list []store.Record) (map[string]table, map[poolKey]map[netip.Addr]heldClaim, error) {
	tables, held := map[string]table{}, map[poolKey]map[netip.Addr]heldClaim{}
	for _, r := range list {
		k, a, ok := parseSpaceKey(r.Key)
		switch {
		case !ok:
		case !a.IsValid():
			t, err := decodeTable(r)
			if err != nil {
				return nil, nil, err
			}
			tables[k.space] = t
		default:
			if held[k] == nil {
				held[k] = map[netip.Addr]heldClaim{}
			}
			held[k][a] = decodeClaim(r)
		}
	}
	return tables, held, nil
}

// follow keeps what is known of the cluster up to date until ctx ends.
func (i *IPAM) follow(ctx context.Context) error {
	err := i.feed.Follow(ctx, spaceKeys, func(list []store.Record) { i.snapshot(ctx, list) }, i.event)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (i *IPAM) snapshot(ctx context.Context, list []store.Record) {
	if err := i.loadShared(ctx); err != nil {
		i.log.WithError(err).Warn("the address spaces of the cluster cannot be read; the next request for one tries again")
		return
	}
	tables, held, err := readSpaces(list)
	if err != nil {
		i.log.WithError(err).Warn("the address spaces of the cluster cannot be read")
		return
	}
	for _, p := range i.sharedPools() {
		i.refresh(p, held[p.poolKey])
		if _, ok := tables[p.space]; !ok {
			i.noteTable(p.space, table{})
		}
	}
	for space, t := range tables {
		i.noteTable(space, t)
	}
}

func (i *IPAM) event(e store.Event) {
	k, a, ok := parseSpaceKey(e.Key)
	if !ok {
		return
	}
	if !a.IsValid() {
		if t, err := decodeTable(e.Record); err == nil {
			i.noteTable(k.space, t)
		}
		return
	}
	p := i.pool(k)
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.Deleted {
		i.noteGone(p, a, e.Rev)
	} else {
		i.note(p, a, decodeClaim(e.Record))
	}
}

func (i *IPAM) sharedPools() []*pool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	var out []*pool
	for k, p := range i.pools {
		if k.shared() {
			out = append(out, p)
		}
	}
	return out
}

// relist reads the addresses of one pool.
func (i *IPAM) relist(ctx context.Context, p *pool) error {
	list, err := i.shared.List(ctx, p.poolKey.claims())
	if err != nil {
		return err
	}
	_, held, err := readSpaces(list)
	if err == nil {
		i.refresh(p, held[p.poolKey])
	}
	return err
}

// refresh takes over all addresses of a pool as they were some time ago.
func (i *IPAM) refresh(p *pool, held map[netip.Addr]heldClaim) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for a := range p.others {
		if _, ok := held[a]; !ok {
			i.noteGone(p, a, 0)
		}
	}
	for a, rev := range p.mine {
		if _, ok := held[a]; !ok {
			i.noteGone(p, a, rev+1) // to be looked at
		}
	}
	for a, h := range held {
		i.note(p, a, h)
	}
}

// note takes over that somebody has an address; p.mu is held.
func (i *IPAM) note(p *pool, a netip.Addr, h heldClaim) {
	rev, mine := p.mine[a]
	ours := h.Host == i.shared.host && h.Kind != kindGateway
	switch {
	case p.busy[a] != nil || mine && (ours || h.rev < rev):
	case ours && i.shared.doubted(h.Nonce):
		i.stray(p, a) // a write that was given up has landed
	default:
		if mine {
			delete(p.mine, a)
			i.log.WithField("pool", p.prefix.String()).Warnf("address %s %s, and was given to a container of this host before", a, &heldError{h})
		}
		p.take(a, h)
	}
}

// take marks an address as somebody else's; p.mu is held.
func (p *pool) take(a netip.Addr, h heldClaim) {
	p.taken.add(a)
	p.others[a] = h
	if h.Kind == kindGateway {
		p.gateways[a] = h.rev
	}
}

// noteGone takes over that a record was deleted, at a revision; p.mu is held.
func (i *IPAM) noteGone(p *pool, a netip.Addr, at uint64) {
	if p.busy[a] != nil {
		return
	}
	if _, ok := p.others[a]; ok {
		delete(p.others, a)
		delete(p.gateways, a)
		p.taken.remove(a)
		return
	}
	if rev, mine := p.mine[a]; mine && rev < at {
		i.later(cleanup{pool: p, addr: a, restore: true})
	}
}

// noteTable compares a table with the pools of this host.
func (i *IPAM) noteTable(space string, t table) {
	for _, p := range i.sharedPools() {
		tp := t.Pools[p.prefix]
		if p.space == space && p.open() && (tp == nil || tp.Hosts[i.shared.host].Nonce == "") {
			i.later(cleanup{pool: p, restore: true})
		}
	}
	for prefix, tp := range t.Pools {
		m := tp.Hosts[i.shared.host]
		if !i.shared.doubted(m.Nonce) {
			continue
		}
		i.mu.Lock()
		if k := (poolKey{space, prefix}); i.pools[k] == nil { // a write that was given up has landed
			p := newPool(poolID{k, m.SubPool})
			p.releasing, p.closed = true, true
			i.pools[k] = p
			i.later(cleanup{pool: p})
		}
		i.mu.Unlock()
	}
}

// restore writes a record again that this host had and that somebody deleted,
// or that went with the cluster's data: containers go on using the address.
func (i *IPAM) restore(ctx context.Context, c cleanup) error {
	p := c.pool
	if !c.addr.IsValid() {
		release, err := i.change(ctx)
		if err != nil {
			return err
		}
		defer release()
		if i.pool(p.poolKey) != p || !p.open() {
			return nil
		}
		p.mu.Lock()
		next := &pool{poolKey: p.poolKey, sub: p.sub}
		p.mu.Unlock()
		return i.shared.putPool(ctx, next)
	}
	p.mu.Lock()
	if _, mine := p.mine[c.addr]; !mine || p.closed || p.busy[c.addr] != nil {
		p.mu.Unlock()
		return nil
	}
	b := &busy{done: make(chan struct{})}
	p.busy[c.addr] = b
	p.mu.Unlock()
	rev, err := i.shared.putAddress(ctx, p.poolKey, c.addr, kindExplicit)
	p.mu.Lock()
	defer p.mu.Unlock()
	close(b.done)
	delete(p.busy, c.addr)
	var held *heldError
	switch {
	case err == nil:
		p.mine[c.addr] = rev
	case errors.As(err, &held):
		i.note(p, c.addr, held.heldClaim) // ours still, or somebody's
		return nil
	}
	return err
}

// within gives a request to the cluster its time.
func (k poolKey) within(ctx context.Context) (context.Context, context.CancelFunc) {
	if !k.shared() {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, sharedTime)
}
