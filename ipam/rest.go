package ipam

import (
	"net/netip"
	"slices"
	"time"
)

// occupancy is which addresses of a pool are taken, and which of the others are
// left alone as long as there is any else: they rest after their release, or a
// name keeps them.
type occupancy struct {
	addrSet         // taken
	resting, either addrSet
}

func (o *occupancy) add(a netip.Addr) {
	o.either.add(a)
	o.addrSet.add(a)
}

func (o *occupancy) remove(a netip.Addr) {
	if !o.resting.has(a) {
		o.either.remove(a)
	}
	o.addrSet.remove(a)
}

func (o *occupancy) rest(a netip.Addr) {
	o.resting.add(a)
	o.either.add(a)
}

func (o *occupancy) wake(a netip.Addr) {
	o.resting.remove(a)
	if !o.has(a) {
		o.either.remove(a)
	}
}

// next returns the first address that is neither taken nor rests.
func (o *occupancy) next(first, last netip.Addr) (netip.Addr, bool) {
	return o.either.next(first, last)
}

// queue has released addresses, the one that was released first at its front.
// One that left it in the middle is still there with a time that is not its own.
type queue []release

type release struct {
	addr netip.Addr
	at   time.Time
}

// rest is how long an address rests that does.
func (o poolOptions) rest() time.Duration {
	if o.quarantine > 0 {
		return o.quarantine
	}
	return restTime
}

// rested marks an address as released just now, by another host if far; p.mu is
// held.
func (p *pool) rested(a netip.Addr, now time.Time, far bool) {
	if p.reserved(a) {
		p.taken.rest(a)
		return
	}
	b := p.byAddr[a]
	q := &p.quarantined
	switch {
	case b != nil:
		b.Released, q = now, &p.kept
	case p.dhcp() != "", p.opts.quarantine == 0, p.opts.quarantine == restsFar && !far:
		return
	}
	p.restIn(q, release{a, now})
}

// restIn has an address rest, as one of a queue; p.mu is held.
func (p *pool) restIn(q *queue, r release) {
	p.taken.rest(r.addr)
	p.since[r.addr] = r.at
	// At the end, but for what is heard late of another host.
	at, _ := slices.BinarySearchFunc(*q, r.at.Add(1), func(r release, at time.Time) int { return r.at.Compare(at) })
	*q = slices.Insert(*q, at, r)
	if len(*q) > 2*len(p.since)+minQueue {
		*q = p.current(*q)
	}
}

// minQueue is how many entries of the past a queue may have in any case.
const minQueue = 64

// current returns the entries of q that still count; p.mu is held.
func (p *pool) current(q queue) queue {
	var out queue
	for _, r := range q {
		if at, ok := p.since[r.addr]; ok && at.Equal(r.at) {
			out = append(out, r)
		}
	}
	return out
}

// front returns the first entry of q that still counts; p.mu is held.
func (p *pool) front(q *queue) (release, bool) {
	for len(*q) > 0 {
		r := (*q)[0]
		if at, ok := p.since[r.addr]; ok && at.Equal(r.at) {
			return r, true
		}
		*q = (*q)[1:]
	}
	return release{}, false
}

// woken takes an address out of its rest, if it is in one; p.mu is held.
func (p *pool) woken(a netip.Addr) {
	if !p.reserved(a) {
		delete(p.since, a)
		p.taken.wake(a)
	}
}

// mostExpired bounds how many names one call forgets: in a shared space each
// takes two requests to the cluster.
const mostExpired = 16

// expire lets go of what has rested long enough and returns the names that
// have lost their address by it; p.mu is held.
func (p *pool) expire(now time.Time) (lost []binding) {
	for {
		r, ok := p.front(&p.quarantined)
		if !ok || now.Sub(r.at) < p.opts.rest() {
			break
		}
		p.woken(r.addr)
	}
	for p.opts.keep >= 0 && len(lost) < mostExpired {
		r, ok := p.front(&p.kept)
		if !ok || now.Sub(r.at) < p.opts.keep {
			break
		}
		lost = append(lost, p.unbind(p.byAddr[r.addr]))
		p.woken(r.addr)
	}
	return lost
}

// oldest takes the address out of its rest that was released first, of those
// that may be chosen, when there is no other; p.mu is held. The name that it
// was kept for is returned, if there is one. What a container asks for by number
// goes last: it would not start without it.
func (p *pool) oldest(r addressRequest) (a netip.Addr, lost []binding, ok bool) {
	first, last := r.id.auto()
	var at time.Time
	asked := false
	for addr, t := range p.since {
		// One that is being written for its name is taken already.
		if addr.Less(first) || last.Less(addr) || p.taken.has(addr) || r.elsewhere(addr) {
			continue
		}
		by := p.asked(addr)
		if !ok || asked && !by || asked == by && (t.Before(at) || t.Equal(at) && addr.Less(a)) {
			a, at, asked, ok = addr, t, by, true
		}
	}
	if !ok {
		return a, nil, false
	}
	if b := p.byAddr[a]; b != nil {
		lost = append(lost, p.unbind(b))
	}
	p.woken(a)
	return a, lost, true
}
