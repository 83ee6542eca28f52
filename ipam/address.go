package ipam

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft/internal/store"
)

// errPoolGone: the pool was released between being found and being used.
var errPoolGone = errors.New("the pool is being released")

// addressRequest is RequestAddress in parsed form.
type addressRequest struct {
	id   poolID
	want netip.Addr // zero: choose one
	kind kind
	name string     // what the address is to be kept for; "" for nothing
	had  netip.Addr // what was kept for the name until now
	// avoid is an address that a station of the LAN was found to have.
	avoid netip.Addr
	who   string // the container's whole name, for the history; "" if it is not known
	// far says which other host has an address; nil: none.
	far func(netip.Addr) (host string, ok bool)
}

// holder is the other host that has an address.
func (r addressRequest) holder(a netip.Addr) (host string, ok bool) {
	if r.far == nil {
		return "", false
	}
	return r.far(a)
}

// elsewhere reports whether another host has an address.
func (r addressRequest) elsewhere(a netip.Addr) bool { _, ok := r.holder(a); return ok }

func (i *IPAM) requestAddress(ctx context.Context, r addressRequest) (netip.Prefix, error) {
	if first, last := r.id.usable(); r.want.IsValid() && (!r.id.prefix.Contains(r.want) || r.want.Less(first) || last.Less(r.want)) {
		return netip.Prefix{}, fmt.Errorf("address %s is not a usable one of pool %s: %s to %s are", r.want, r.id.prefix, first, last)
	}
	ctx, cancel := r.id.within(ctx)
	defer cancel()
	var err error
	for range mostSquatters {
		var a netip.Prefix
		var reserved bool
		if a, reserved, err = i.grant(ctx, r); err != nil || r.kind == kindGateway || r.id.space == GlobalSpace {
			return a, err
		}
		if err = i.held(ctx, r.id, a.Addr()); err == nil {
			return a, nil
		}
		// Whoever has it was not asked by us: back with it, and on to the next.
		// A name keeps what it is bound to for the next time.
		if ctx.Err() == nil { // else it is not known that somebody has it
			i.squat(r.id, a.Addr())
		}
		if rerr := i.takeBack(ctx, r.id, a.Addr()); rerr != nil {
			return netip.Prefix{}, fmt.Errorf("%w (and giving it back: %w)", err, rerr)
		}
		if r.want.IsValid() || reserved || ctx.Err() != nil {
			return netip.Prefix{}, err
		}
		r.avoid = a.Addr()
		if r.id.dhcp() == "" { // else the server has been told
			r.name = ""
		}
	}
	return netip.Prefix{}, fmt.Errorf("%d addresses in a row are held by others, the last one: %w", mostSquatters, err)
}

// held says who else has an address, on a LAN or another host; nil: nobody.
func (i *IPAM) held(ctx context.Context, id poolID, a netip.Addr) error {
	if i.vet != nil {
		if err := i.vet(ctx, id.prefix, a); err != nil {
			return err
		}
	}
	link := id.dhcp()
	if _, ours := i.holder(id.prefix); ours || link == "" || i.probe == nil {
		return nil
	}
	station, taken, err := i.probe(ctx, link, a)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("ask the LAN for %s: %w", a, ctx.Err())
	case err != nil:
		i.log.WithField("pool", id.prefix.String()).WithError(err).Debug("the LAN could not be asked")
	case taken:
		return fmt.Errorf("address %s is in use on the LAN: %s answers for it on %s; take another", a, station, link)
	}
	return nil
}

// mostSquatters bounds how many addresses one request finds in the hands of
// stations of the LAN, or of other hosts. Each answers at once, so that this takes no time; a free
// one takes some 300 ms to tell.
const mostSquatters = 128

// grant hands out an address of the pool, and reports whether it is reserved for
// the name.
func (i *IPAM) grant(ctx context.Context, r addressRequest) (_ netip.Prefix, reserved bool, err error) {
	if r.id.shared() {
		if err := i.loadShared(ctx); err != nil {
			return netip.Prefix{}, false, fmt.Errorf("address in pool %s of space %s: %w", r.id.prefix, r.id.spaceName(), err)
		}
	}
	if r.kind != kindGateway && r.id.named() {
		r.far = i.far(r.id.prefix)
	}
	for range 3 {
		p, err := i.find(ctx, r.id)
		if err != nil {
			return netip.Prefix{}, false, err
		}
		var a netip.Addr
		r, again := r, false
		if p.dhcp() != "" && (r.kind != kindGateway || !r.want.IsValid()) {
			leased, err := i.leaseOr(ctx, p, r)
			if errors.Is(err, errPoolGone) {
				continue
			}
			return leased, r.want.IsValid(), err
		}
		if r.kind != kindGateway {
			if err := i.look(ctx, p, r.name); err != nil {
				return netip.Prefix{}, false, err
			}
			if reserved, err = i.call(ctx, p, &r); err != nil {
				return netip.Prefix{}, false, err
			}
		}
		if r.kind == kindGateway && p.shared() {
			r.id.sub = netip.Prefix{} // the range is this host's, the gateway is everybody's
			if a, err = i.agreed(ctx, p, r.want); err != nil || a.IsValid() {
				return p.with(a), false, err
			}
		}
		switch a = r.want; {
		case r.kind == kindGateway:
			a, again, err = i.route(ctx, p, r)
		case a.IsValid():
			again, err = i.explicit(ctx, p, r)
		default:
			a, err = i.choose(ctx, p, r)
		}
		if err == nil {
			if !again {
				i.bind(ctx, p, a, r)
			}
			return p.with(a), reserved, nil
		}
		taken := r.kind == kindNamed && errors.As(err, new(takenError)) // somebody was quicker: look again
		if !errors.Is(err, errPoolGone) && !errors.Is(err, errOtherGateway) && !taken {
			return netip.Prefix{}, false, err
		}
	}
	return netip.Prefix{}, false, fmt.Errorf("address in pool %s: %w", r.id.prefix, errPoolGone)
}

// choose hands out the next free address.
func (i *IPAM) choose(ctx context.Context, p *pool, r addressRequest) (netip.Addr, error) {
	relisted, searched := !p.shared(), false
	for {
		p.mu.Lock()
		p.use(r.id.sub)
		if p.closed {
			p.mu.Unlock()
			return netip.Addr{}, errPoolGone
		}
		if gw := p.gateway(r.id.sub); r.kind == kindGateway && gw.IsValid() && (p.space == GlobalSpace || p.adopted && !p.shared() || len(p.parts) > 1) && p.busy[gw] == nil {
			defer p.mu.Unlock()
			p.stale.remove(gw)
			return gw, nil // the network has its gateway already
		}
		a, ok := p.next(r, i.now())
		if gw := p.gateway(r.id.sub); r.kind == kindGateway && p.shared() && gw.IsValid() && p.busy[gw] == nil {
			a, ok = gw, true // of a host that died before all had agreed on it
		}
		if !ok && !relisted {
			p.mu.Unlock()
			relisted = true
			if err := i.relist(ctx, p); err != nil { // what others released may not be known yet
				return netip.Addr{}, fmt.Errorf("look for a free address in pool %s: %w", p.prefix, err)
			}
			continue
		}
		var lost []binding
		if !ok {
			a, lost, ok = p.oldest(r)
		}
		if !ok {
			if old, b := p.reclaim(r.id); b != nil {
				p.mu.Unlock()
				if err := i.free(ctx, p, old, b); err != nil {
					return netip.Addr{}, err
				}
				continue
			}
			if !searched {
				p.mu.Unlock()
				freed, err := i.freeStranded(ctx, p, &r) // else there is none left
				searched = err != nil || len(freed) == 0 // somebody may be quicker
				continue
			}
			defer p.mu.Unlock()
			return netip.Addr{}, p.exhausted(r)
		}
		before := p.cursor
		if r.kind == kindAuto && p.nextFit() {
			p.cursor = a.Next()
		}
		p.taken.add(a)
		b := &busy{done: make(chan struct{})}
		p.busy[a] = b
		p.mu.Unlock()
		i.forgetNames(ctx, p, lost)

		err := i.write(ctx, p, a, r, b, false)
		if errors.Is(err, store.ErrExists) {
			continue // another host was quicker; the address stays marked
		}
		if err != nil && !errors.Is(err, store.ErrUncertain) {
			p.mu.Lock()
			if p.cursor == a.Next() && r.kind == kindAuto && p.nextFit() {
				p.cursor = before
			}
			p.mu.Unlock()
		}
		return a, err
	}
}

// next picks a free address; p.mu is held: the lowest one, but for a container
// without a name what one gave back only just now.
func (p *pool) next(r addressRequest, now time.Time) (netip.Addr, bool) {
	first, last := r.id.auto()
	if r.kind == kindAuto && r.name == "" {
		if a, ok := p.nextBack(r, first, last, now); ok {
			return a, true
		}
	}
	from := p.cursor
	if r.kind == kindGateway || !from.IsValid() || from.Less(first) || last.Less(from) {
		from = first
	}
	if a, ok := p.free(from, last, r); ok || from == first {
		return a, ok
	}
	return p.free(first, from.Prev(), r)
}

// free is the first free address that no other host has; p.mu is held.
func (p *pool) free(first, last netip.Addr, r addressRequest) (netip.Addr, bool) {
	for {
		a, ok := p.taken.next(first, last)
		if !ok || !r.elsewhere(a) {
			return a, ok
		}
		if first = a.Next(); last.Less(first) || !first.IsValid() {
			return netip.Addr{}, false
		}
	}
}

// explicit hands out a given address, and reports whether it was handed out
// before.
func (i *IPAM) explicit(ctx context.Context, p *pool, r addressRequest) (again bool, err error) {
	shared, asked := p.space == GlobalSpace, false
	for {
		p.mu.Lock()
		p.use(r.id.sub)
		b := p.busy[r.want]
		switch {
		case p.closed:
			p.mu.Unlock()
			return false, errPoolGone
		case b != nil && !b.queued:
			p.mu.Unlock()
			select {
			case <-b.done:
				continue
			case <-ctx.Done():
				return false, fmt.Errorf("address %s of pool %s is still being written: %w", r.want, p.prefix, ctx.Err())
			}
		case b == nil && p.taken.has(r.want) && !p.foreign(r.want):
			if p.stale.remove(r.want) || shared || r.kind == kindGateway && p.router(r.want) {
				p.granted[r.want] = time.Now()
				p.mu.Unlock()
				return true, nil
			}
			if !asked {
				p.mu.Unlock()
				id, held := i.holder(p.prefix) // not under the lock: it is the driver's business
				shared, asked = held && swarm(id), true
				continue
			}
			defer p.mu.Unlock()
			return false, p.refuse(r)
		}
		// Free, or about to be freed by Run, which lets go of it here, or
		// another host's as far as this one knows.
		p.taken.add(r.want)
		own := &busy{done: make(chan struct{})}
		p.busy[r.want] = own
		p.mu.Unlock()
		err := i.write(ctx, p, r.want, r, own, b != nil)
		if errors.Is(err, store.ErrExists) && b != nil && !p.shared() {
			return false, nil // the write before, whose outcome nobody knew
		}
		if errors.Is(err, store.ErrExists) {
			p.mu.Lock()
			defer p.mu.Unlock()
			return false, p.refuse(r)
		}
		return false, err
	}
}

// foreign reports whether an address is taken by another host; p.mu is held.
func (p *pool) foreign(a netip.Addr) bool { _, ok := p.others[a]; return ok }

// refuse says that an address is taken, and what is not; p.mu is held.
func (p *pool) refuse(r addressRequest) error {
	free := "none is free"
	if n := len(p.since); n > 0 {
		free = fmt.Sprintf("%d were released only just now or are kept for a name", n)
	}
	if a, ok := p.next(addressRequest{id: r.id}, time.Time{}); ok {
		free = "next free is " + a.String()
	}
	why := "is in use"
	if _, ok := p.gateways[r.want]; ok {
		why = "is in use by the gateway"
	}
	if h, ok := p.others[r.want]; ok {
		why = (&heldError{h}).Error()
	}
	return takenError{fmt.Errorf("address %s of pool %s %s: %s; %d of %s used", r.want, p.prefix, why, free, p.taken.len(), p.size())}
}

// takenError is the refusal of an address that somebody has.
type takenError struct{ error }

// write writes the record of an address that is marked as taken and, with b, busy,
// and ends its being busy. doubtful: there may be a record from a write before.
func (i *IPAM) write(ctx context.Context, p *pool, a netip.Addr, r addressRequest, b *busy, doubtful bool) error {
	k, name, kept := r.kind, r.name, uint64(0)
	if p.shared() {
		p.mu.Lock()
		if b := p.byAddr[a]; b != nil && b.name == name && !b.Released.IsZero() {
			kept = b.rev
		}
		if !p.binds(name, a) {
			name = ""
		}
		p.mu.Unlock()
	}
	past := i.history.begin(p.poolKey, a, r, i.now())
	rev, err := i.home(p.poolKey).putAddress(ctx, p.poolKey, a, grant{k, name, kept}, past)
	switch {
	case err == nil && p.shared(), doubtful && errors.Is(err, store.ErrExists) && !p.shared():
		i.history.later(past)
	case err != nil:
		i.history.refused(p.poolKey, a, doubtful || errors.Is(err, store.ErrUncertain) || p.dhcp() != "")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	close(b.done)
	switch {
	case err != nil && p.leased[a] != nil: // back with it
		b.queued = true
		i.later(cleanup{pool: p, addr: a, busy: b})
	case err == nil, errors.Is(err, store.ErrExists):
		if k == kindAuto && err == nil {
			p.chosen.add(a)
		}
		if k != kindGateway && !p.shared() {
			p.granted[a] = time.Now()
		}
		if k == kindGateway && err == nil {
			p.gateways[a] = rev
		} else if k == kindGateway && doubtful {
			p.gateways[a] = math.MaxUint64 // written just before; what revision, nobody knows
		}
		if p.shared() {
			p.settled(a, k, rev, err)
		}
		p.idle(a, b)
	case errors.Is(err, store.ErrUncertain), doubtful:
		b.queued = true
		i.later(cleanup{pool: p, addr: a, busy: b})
	default:
		if !p.foreign(a) {
			p.taken.remove(a)
		}
		p.idle(a, b)
	}
	if err != nil && p.shared() && !errors.Is(err, store.ErrExists) {
		err = fmt.Errorf("address in pool %s of space %s: %w", p.prefix, p.spaceName(), err)
	}
	return err
}

// settled marks whose an address is after its write; p.mu is held.
func (p *pool) settled(a netip.Addr, k kind, rev uint64, err error) {
	var held *heldError
	switch {
	case errors.As(err, &held):
		p.mark(a, held.heldClaim)
	case err != nil:
		p.take(a, heldClaim{}) // whose, Follow will tell
	case k == kindGateway:
		p.take(a, heldClaim{claim{Kind: k}, rev})
	default:
		delete(p.others, a)
		p.mine[a] = ownClaim{rev, time.Now()}
	}
}

// releaseAddress is ReleaseAddress. Unknown addresses and pools are success.
func (i *IPAM) releaseAddress(ctx context.Context, id poolID, a netip.Addr) error {
	ctx, cancel := id.within(ctx)
	defer cancel()
	if id.shared() {
		if err := i.loadShared(ctx); err != nil {
			if err = i.shared.owe(ctx, id.claim(a), err); !i.shared.known() {
				return err
			}
		}
	}
	p := i.pool(id.poolKey)
	if p == nil || !p.prefix.Contains(a) {
		return nil
	}
	for {
		p.mu.Lock()
		b := p.busy[a]
		if p.closed || !p.taken.has(a) || p.foreign(a) || p.router(a) || b != nil && b.queued {
			p.mu.Unlock()
			return nil
		}
		if b == nil {
			b = &busy{done: make(chan struct{})}
			p.busy[a] = b
			p.mu.Unlock()
			return i.free(ctx, p, a, b)
		}
		p.mu.Unlock()
		select {
		case <-b.done:
		case <-ctx.Done():
			return fmt.Errorf("address %s of pool %s is still being written: %w", a, p.prefix, ctx.Err())
		}
	}
}

// takeBack releases what a request, whose time may be over, does not hand out after all.
func (i *IPAM) takeBack(ctx context.Context, id poolID, a netip.Addr) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	return i.releaseAddress(ctx, id, a)
}

// free deletes the record of an address that is busy and then its mark. If
// that fails Run goes on: the engine ignores the error and never asks again.
func (i *IPAM) free(ctx context.Context, p *pool, a netip.Addr, b *busy) error {
	past := i.history.end(p.poolKey, a, i.now())
	err := i.home(p.poolKey).dropAddress(ctx, p.poolKey, a, past)
	if err == nil {
		if p.shared() {
			i.history.later(past)
		}
		i.history.ended(p.poolKey, a)
	}
	key := ""
	if err == nil && p.dhcp() != "" {
		key = i.unlease(ctx, p, a)
	}
	now := i.now()
	p.mu.Lock()
	close(b.done)
	if err != nil {
		defer p.mu.Unlock()
		b.queued = true
		i.later(cleanup{pool: p, addr: a, busy: b})
		return err
	}
	if _, gateway := p.gateways[a]; !gateway {
		p.rested(a, now, false)
		p.gaveBack(back{addr: a, key: key, at: now})
	}
	defer i.released(ctx, p, a)
	defer p.mu.Unlock()
	p.unmark(a)
	p.idle(a, b)
	return nil
}

// unmark has an address be free; p.mu is held.
func (p *pool) unmark(a netip.Addr) {
	p.taken.remove(a)
	p.chosen.remove(a)
	p.stale.remove(a)
	if _, ok := p.gateways[a]; ok {
		delete(p.gateways, a)
		for n, o := range p.parts {
			p.parts[n].gateways = slices.DeleteFunc(o.gateways, func(gw netip.Addr) bool { return gw == a })
		}
	}
	delete(p.granted, a)
	delete(p.awaited, a)
	delete(p.mine, a)
}
