package ipam

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
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
	if s.known() {
		return nil
	}
	release, err := i.change(ctx)
	if err != nil {
		return err
	}
	defer release()
	if s.known() {
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
			p.rev = 1
			p.idleParts()
			if err := p.adopt(tp); err != nil {
				return fmt.Errorf("pool %s of space %s: %w", prefix, p.spaceName(), err)
			}
			p.reserve()
			i.recall(p)
			pools[p.poolKey] = p
		}
	}
	for k, addrs := range held {
		if p := pools[k]; p != nil {
			p.own(s.host, addrs)
		}
	}
	if err := s.loadOwed(ctx); err != nil {
		return err
	}
	i.mu.Lock()
	maps.Copy(i.pools, pools)
	i.mu.Unlock()
	s.mu.Lock()
	s.loaded = true
	s.mu.Unlock()
	// Not before: who has a release to write down now sees that it is not needed.
	return i.resume(ctx)
}

// known reports whether the pools of this host are.
func (s *shared) known() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.loaded
}

// own takes over what there is in a pool that was just found or joined; p.mu is
// held, or nobody else knows p.
func (p *pool) own(host string, addrs map[netip.Addr]heldClaim) {
	newest := uint64(0)
	for a, h := range addrs {
		if p.taken.has(a) {
			continue // there is newer news
		}
		if h.Host != host || h.Kind == kindGateway {
			p.mark(a, h)
			continue
		}
		p.taken.add(a)
		p.mine[a] = ownClaim{h.rev, h.Created}
		p.nameIt(a, h)
		if h.Kind == kindAuto && h.rev > newest {
			newest, p.cursor = h.rev, a.Next()
		}
	}
}

// loadOwed reads the releases that could not be finished before the process
// ended.
func (s *shared) loadOwed(ctx context.Context) error {
	list, err := s.disk.List(ctx, owedKeys)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range list {
		s.owed[strings.TrimPrefix(r.Key, owedKeys)] = true
	}
	return err
}

// resume goes on with them. The caller holds changes.
func (i *IPAM) resume(ctx context.Context) error {
	i.shared.mu.Lock()
	owed := slices.Collect(maps.Keys(i.shared.owed))
	i.shared.mu.Unlock()
	for _, key := range owed {
		k, a, ok := parseSpaceKey(key)
		p := i.pool(k)
		if ok && !a.IsValid() && p == nil { // left already, but not all of its addresses are gone
			p = newPool(poolID{poolKey: k})
			i.mu.Lock()
			i.pools[k] = p
			i.mu.Unlock()
		}
		if !ok || p == nil || !i.resumeOne(p, a) {
			if err := i.shared.forget(ctx, key); err != nil {
				return err
			}
		}
	}
	return nil
}

// resumeOne reports whether there is anything to release.
func (i *IPAM) resumeOne(p *pool, a netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !a.IsValid():
		p.releasing, p.closed = true, true
		i.later(cleanup{pool: p})
	case p.busy[a] != nil: // somebody is at it
	case p.mine[a].rev != 0:
		i.later(p.stray(a))
	default:
		return false
	}
	return true
}

// stray is what Run has to do about an address that this host has and should
// not have; p.mu is held, or nobody else knows p.
func (p *pool) stray(a netip.Addr) cleanup {
	b := &busy{done: make(chan struct{}), queued: true}
	close(b.done)
	p.taken.add(a)
	p.busy[a] = b
	return cleanup{pool: p, addr: a, busy: b}
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
	if ctx.Err() == nil {
		return err
	}
	return nil
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
	for k, addrs := range held {
		for _, h := range addrs {
			i.noteLate(k, h.Host, h.Nonce)
		}
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
	if !p.open() {
		if !e.Deleted {
			h := decodeClaim(e.Record)
			i.noteLate(k, h.Host, h.Nonce)
		}
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

// fill tells a new pool what others have in it, and what this host has there
// if somebody deleted its reference. Where that fails, refusals will tell.
func (i *IPAM) fill(ctx context.Context, p *pool) {
	list, err := i.shared.List(ctx, p.claims())
	if err != nil {
		return
	}
	if _, held, err := readSpaces(list); err == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.own(i.shared.host, held[p.poolKey])
	}
}

// relist reads the addresses of one pool.
func (i *IPAM) relist(ctx context.Context, p *pool) error {
	list, err := i.shared.List(ctx, p.claims())
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
			i.noteGone(p, a, math.MaxUint64)
		}
	}
	for a, c := range p.mine {
		if _, ok := held[a]; !ok {
			i.noteGone(p, a, c.rev+1) // to be looked at
		}
	}
	newest := uint64(0)
	for _, h := range held {
		newest = max(newest, h.rev)
	}
	for a := range p.byAddr {
		if _, ok := held[a]; !ok && !p.taken.has(a) {
			i.noteGone(p, a, newest+1) // what was kept since is not in held yet
		}
	}
	for a, h := range held {
		i.note(p, a, h)
	}
}

// note takes over that somebody has an address; p.mu is held.
func (i *IPAM) note(p *pool, a netip.Addr, h heldClaim) {
	if b := p.busy[a]; b != nil {
		b.news = func() { i.note(p, a, h) }
		return
	}
	own, mine := p.mine[a]
	ours := h.Host == i.shared.host && h.Kind != kindGateway
	switch {
	case mine && h.rev < own.rev:
	case mine && ours:
		p.mine[a] = ownClaim{h.rev, own.since}
		p.nameIt(a, h) // which another host may have dropped
	case mine && h.Kind == kindKept: // a release that was given up has landed
		i.later(cleanup{pool: p, addr: a, restore: true})
	case ours && i.shared.late(h):
		i.later(p.stray(a))
	default:
		if mine {
			delete(p.mine, a)
			i.lost(p, a, h)
		}
		p.mark(a, h)
	}
}

// mark takes over who has an address that is not this host's, or which name
// keeps it; p.mu is held. What is reserved is no other name's: whoever reserved it
// may have died before the claim was deleted, which is replaced when the address
// is given to whom it is reserved for.
func (p *pool) mark(a netip.Addr, h heldClaim) {
	if h.Kind != kindKept {
		p.take(a, h)
		return
	}
	delete(p.others, a)
	delete(p.gateways, a)
	p.taken.remove(a)
	p.nameIt(a, h)
	if !p.reserved(a) {
		p.restIn(&p.kept, release{a, h.Released})
	}
}

// take marks an address as somebody else's; p.mu is held.
func (p *pool) take(a netip.Addr, h heldClaim) {
	p.woken(a)
	p.taken.add(a)
	p.others[a] = h
	p.nameIt(a, h)
	delete(p.gateways, a)
	if h.Kind == kindGateway {
		p.gateways[a] = h.rev
	}
}

// nameIt takes over which name an address is kept for; p.mu is held. Should
// there be two addresses for one, the newer one is the name's, and the other
// rests as any that is kept, until the pool needs it.
func (p *pool) nameIt(a netip.Addr, h heldClaim) {
	if b := p.byAddr[a]; b != nil {
		p.unbind(b)
	}
	if h.Owner == "" || p.reserved(a) {
		return
	}
	b := &binding{Version: recordVersion, Address: a, Released: h.Released, name: h.Owner, rev: h.rev}
	p.byAddr[a] = b
	if o := p.byName[b.name]; o == nil || o.rev < b.rev {
		p.byName[b.name] = b
	}
}

// noteGone takes over that a record was deleted, at a revision; p.mu is held.
func (i *IPAM) noteGone(p *pool, a netip.Addr, at uint64) {
	if b := p.busy[a]; b != nil {
		b.news = func() { i.noteGone(p, a, at) }
		return
	}
	if h, ok := p.others[a]; ok && at < h.rev {
		return
	} else if ok {
		delete(p.others, a)
		delete(p.gateways, a)
		p.taken.remove(a)
		p.nameIt(a, heldClaim{})
		if h.Kind != kindGateway {
			p.rested(a, i.now(), true)
		}
		return
	}
	own, mine := p.mine[a]
	b := p.byAddr[a]
	switch {
	case mine && own.rev < at:
		i.later(cleanup{pool: p, addr: a, restore: true})
	case !mine && b != nil && b.rev < at:
		p.unbind(b)
		p.woken(a)
	}
}

// noteTable compares a table with the pools of this host.
func (i *IPAM) noteTable(space string, t table) {
	for _, p := range i.sharedPools() {
		tp := t.Pools[p.prefix]
		switch {
		case p.space != space || !p.open():
		case tp == nil || tp.Hosts[i.shared.host].Nonce == "":
			i.later(cleanup{pool: p, restore: true})
		default:
			i.noteAgreed(p, tp)
		}
	}
	for prefix, tp := range t.Pools {
		i.noteLate(poolKey{space, prefix}, i.shared.host, tp.Hosts[i.shared.host].Nonce)
	}
}

// noteLate takes over what a host has written of a pool that this one has not, or
// is just giving up. Where that is this one's own, of a write whose outcome was
// unknown, it gives the pool up after that, once more.
func (i *IPAM) noteLate(k poolKey, host, nonce string) {
	if host == i.shared.host && i.shared.doubted(nonce) && !i.pool(k).open() {
		p := newPool(poolID{poolKey: k})
		p.releasing = true
		i.later(cleanup{pool: p})
	}
}

// noteAgreed takes over what a host has reserved.
func (i *IPAM) noteAgreed(p *pool, t *tablePool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if maps.Equal(p.opts.raw, t.Options) && maps.Equal(reservedTexts(p.added), t.Reserved) {
		return
	}
	if err := p.adopt(t); err != nil {
		i.log.WithField("pool", p.prefix.String()).WithError(err).Warn("what other hosts have reserved in the pool cannot be read")
		return
	}
	if lost := p.reserve(); lost != nil {
		i.later(cleanup{pool: p, names: lost})
	}
}

// look asks the cluster about an address that a name has a right to and another
// host has, as far as this one knows: it may have been released just now.
func (i *IPAM) look(ctx context.Context, p *pool, name string) error {
	if name == "" || !p.shared() {
		return nil
	}
	p.mu.Lock()
	a, _, _ := p.wish(name)
	foreign := p.foreign(a)
	p.mu.Unlock()
	if !foreign {
		return nil
	}
	r, err := i.shared.Get(ctx, p.claim(a))
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("address in pool %s of space %s: %w", p.prefix, p.spaceName(), err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		i.noteGone(p, a, math.MaxUint64)
	} else {
		i.note(p, a, decodeClaim(r))
	}
	return nil
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
		next := p.draft(p.parts)
		p.mu.Unlock()
		return i.shared.putPool(ctx, next, store.Batch{})
	}
	p.mu.Lock()
	if _, mine := p.mine[c.addr]; !mine || p.closed || p.busy[c.addr] != nil {
		p.mu.Unlock()
		return nil
	}
	b := &busy{done: make(chan struct{})}
	p.busy[c.addr] = b
	owner := ""
	if b := p.byAddr[c.addr]; b != nil {
		owner = b.name
	}
	p.mu.Unlock()
	rev, err := i.shared.putAddress(ctx, p.poolKey, c.addr, grant{as: kindExplicit, name: owner}, store.Batch{})
	p.mu.Lock()
	defer p.mu.Unlock()
	close(b.done)
	defer p.idle(c.addr, b)
	var held *heldError
	switch {
	case err == nil:
		p.mine[c.addr] = ownClaim{rev, i.now()}
	case errors.As(err, &held) && held.Host == i.shared.host:
		return nil // it was there all the time
	case errors.As(err, &held):
		delete(p.mine, c.addr)
		p.mark(c.addr, held.heldClaim)
		i.lost(p, c.addr, held.heldClaim)
		return nil
	}
	return err
}

// lost tells that a host has what a container of this one has too.
func (i *IPAM) lost(p *pool, a netip.Addr, h heldClaim) {
	i.log.WithField("pool", p.prefix.String()).Warnf("address %s %s, and was given to a container of this host before", a, &heldError{h})
}

// idle ends an address's being busy, and goes on with what was heard of it
// meanwhile; p.mu is held.
func (p *pool) idle(a netip.Addr, b *busy) {
	delete(p.busy, a)
	if b.news != nil {
		b.news()
	}
}

// within gives a request to the cluster its time.
func (k poolKey) within(ctx context.Context) (context.Context, context.CancelFunc) {
	if !k.shared() {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, sharedTime)
}
