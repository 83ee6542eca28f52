package ipam

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"go4.org/netipx"

	"github.com/weftnet/weft/internal/store"
)

// part is what one network has of a pool: the range that its addresses are chosen
// from. There are several where networks of one LAN share the subnet, each with a
// range of its own. Whatever the range, an address of the pool is handed out once;
// only the gateway, which nobody is given, may be that of all.
type part struct {
	sub netip.Prefix // --ip-range; zero: the whole pool, and there is no other part
	// adoptable: read from disk and not used since, so perhaps its network was
	// never made.
	adoptable bool
	releasing bool // ReleasePool came
	gave      bool // its network gave the pool's options, perhaps as others did
	// gateways are those of the pool that its network asked for, in the local space
	// alone. Another network may have asked for the same.
	gateways []netip.Addr
}

// meets reports whether two ranges of one pool have an address in common.
func (o part) meets(sub netip.Prefix) bool {
	return !o.sub.IsValid() || !sub.IsValid() || o.sub.Overlaps(sub)
}

// use notes that a network uses a part; p.mu is held.
func (p *pool) use(sub netip.Prefix) {
	for n, o := range p.parts {
		if o.sub == sub || len(p.parts) == 1 {
			p.parts[n].adoptable = false
		}
	}
}

// idleParts notes that perhaps no network has any of the parts; p.mu is held, or
// nobody else knows p.
func (p *pool) idleParts() {
	for n := range p.parts {
		p.parts[n].adoptable = true
	}
}

// router reports whether an address is the gateway of a pool that networks share:
// each may ask for it, and it goes with the last that did; p.mu is held.
func (p *pool) router(a netip.Addr) bool {
	_, ok := p.gateways[a]
	return ok && len(p.parts) > 1
}

// apart reports whether an address is to be chosen for another part alone; p.mu is
// held.
func (p *pool) apart(id poolID, a netip.Addr) bool {
	return len(p.parts) > 1 && slices.ContainsFunc(p.parts, func(o part) bool { return o.sub != id.sub && o.sub.Contains(a) })
}

// lacks reports whether an ID is that of a part which the pool could have and has
// not.
func (p *pool) lacks(id poolID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.space == LocalSpace && !slices.ContainsFunc(p.parts, func(o part) bool { return o.meets(id.sub) })
}

// draft is a pool as it is to be written, with other parts; p.mu is held.
func (p *pool) draft(parts []part) *pool {
	next := &pool{poolKey: p.poolKey, parts: slices.Clone(parts), opts: p.opts, added: p.added, rev: p.rev}
	for n, o := range next.parts {
		next.parts[n].gateways = append([]netip.Addr{}, o.gateways...)
	}
	return next
}

// room returns the parts of the pool with a further one, or which is in its way.
// networks is how many there are with the subnet: what was read from disk makes room
// where there are parts for all of them without it. p.mu is held.
func (p *pool) room(sub netip.Prefix, networks int) (parts []part, way *part) {
	idle := networks == 0 && !slices.ContainsFunc(p.parts, func(o part) bool { return !o.adoptable })
	for _, o := range p.parts {
		switch {
		case !idle && p.space == LocalSpace && !o.meets(sub):
			parts = append(parts, o)
		case !o.adoptable:
			return nil, &o
		default:
			way = &o
		}
	}
	if way != nil && len(parts) < networks {
		return nil, way
	}
	return append(parts, part{sub: sub}), nil
}

// put writes a draft of the pool and takes its parts over: fresh is the new one, and
// the others are as they are by now. Gateways that no network has any more go in the
// same write. The caller holds changes.
func (i *IPAM) put(ctx context.Context, p, draft *pool, fresh netip.Prefix) error {
	var beside, past store.Batch
	var spare []netip.Addr
	if p.space == LocalSpace {
		p.mu.Lock()
		spare = p.spare(draft.parts)
		p.mu.Unlock()
	}
	for _, a := range spare {
		b := i.history.end(p.poolKey, a, i.now())
		past.Delete, past.Set = append(past.Delete, b.Delete...), append(past.Set, b.Set...)
		beside.Delete = append(beside.Delete, p.address(a))
	}
	beside.Delete, beside.Set = append(beside.Delete, past.Delete...), past.Set
	err := i.home(p.poolKey).putPool(ctx, draft, beside)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		p.rev = 0
		return err
	}
	for n, o := range draft.parts {
		at := slices.IndexFunc(p.parts, func(have part) bool { return have.sub == o.sub && o.sub != fresh })
		if at >= 0 {
			draft.parts[n] = p.parts[at]
		}
	}
	for _, a := range spare {
		i.history.ended(p.poolKey, a)
		if b := p.busy[a]; b == nil || b.queued { // else it is being freed just now
			p.unmark(a)
			delete(p.busy, a)
		}
	}
	p.parts, p.rev = draft.parts, draft.rev
	return nil
}

// again decides on a request for a pool that exists. The caller holds changes.
func (i *IPAM) again(ctx context.Context, p *pool, r poolRequest) error {
	id, held := i.holder(p.prefix)
	networks := i.count(p.prefix)
	by, gone := i.by(p)
	p.mu.Lock()
	swarms := p.space == GlobalSpace || held && swarm(id)
	parts := []part{{sub: r.sub}}
	if !swarms {
		var way *part
		if parts, way = p.room(r.sub, networks); way != nil {
			if len(p.parts) > 1 { // whose each is nobody knows
				by, gone = "", ""
			}
			p.mu.Unlock()
			host, _ := i.host(ctx) // for what is suggested alone
			p.mu.Lock()
			defer p.mu.Unlock()
			return p.inTheWay(r.sub, *way, by, gone, host)
		}
	}
	next, joins := p.draft(parts), len(parts) > 1
	next.parts[len(parts)-1].gave = len(r.opts.raw) > 0
	if !joins {
		next.parts[0].gateways = slices.Collect(maps.Keys(p.gateways))
	}
	spare := p.spare(next.parts)
	switch {
	case !joins:
		next.opts = r.opts
		if !swarms {
			next.added = nil
		}
	case len(p.opts.raw) == 0:
		for name, o := range r.opts.reserved {
			if _, gateway := p.gateways[o.addr]; gateway && !slices.Contains(spare, o.addr) {
				defer p.mu.Unlock()
				return fmt.Errorf("ipam option %s%s=%s: it is the gateway of a network that shares subnet %s: choose another", reserveOption, name, o, p.prefix)
			}
		}
		next.opts = r.opts
	case len(r.opts.raw) > 0 && !maps.Equal(r.opts.raw, p.opts.raw):
		defer p.mu.Unlock()
		return fmt.Errorf("subnet %s is shared with a network that has %s, and here it is to have %s: give the same --ipam-opt, or none", p.prefix, optionsText(p.opts.raw), optionsText(r.opts.raw))
	}
	same := slices.EqualFunc(p.parts, next.parts, func(a, b part) bool { return a.sub == b.sub && a.gave == b.gave }) &&
		len(spare) == 0 && maps.Equal(p.opts.raw, next.opts.raw) && len(p.added) == len(next.added) && p.rev != 0
	p.mu.Unlock()
	if !same {
		if err := i.put(ctx, p, next, r.sub); err != nil {
			return err
		}
	}
	p.mu.Lock()
	p.use(r.sub)
	p.opts, p.added = next.opts, maps.Clone(next.added)
	lost := p.reserve()
	defer func() { i.forgetNames(ctx, p, lost) }()
	defer p.mu.Unlock()
	if !swarms && !joins {
		p.stale, p.adopted = p.taken.clone(), true
		for a := range p.others {
			p.stale.remove(a)
		}
	}
	return nil
}

// join takes up again what a network has of a pool, whose record was lost with
// that of the pool. The caller holds changes.
func (i *IPAM) join(ctx context.Context, p *pool, id poolID) error {
	if !p.lacks(id) {
		return nil
	}
	p.mu.Lock()
	next := p.draft(append(slices.Clone(p.parts), part{sub: id.sub}))
	p.mu.Unlock()
	if err := i.put(ctx, p, next, id.sub); err != nil {
		return err
	}
	i.log.WithField("pool", id.String()).Warn("unknown range of a pool taken up again; addresses that its containers had before are not known")
	return nil
}

// releasePool is ReleasePool. Unknown pools are success, and so is an ID whose
// sub-pool is not that of a network: the pool belongs to those.
func (i *IPAM) releasePool(ctx context.Context, id poolID) error {
	ctx, cancel := id.within(ctx)
	defer cancel()
	if id.shared() {
		if err := i.loadShared(ctx); err != nil {
			if err = i.shared.owe(ctx, id.owed(), err); !i.shared.known() {
				return err
			}
		}
	}
	p := i.pool(id.poolKey)
	if p == nil {
		return nil
	}
	p.mu.Lock()
	at := slices.IndexFunc(p.parts, func(o part) bool { return o.sub == id.sub })
	mine := at >= 0 && !p.closed
	if mine {
		p.parts[at].releasing = true
	}
	p.mu.Unlock()
	if !mine {
		return nil
	}
	release, err := i.change(ctx)
	if err == nil {
		defer release()
		err = i.leave(ctx, p)
	}
	if err != nil {
		// The engine ignores the error and never asks again.
		i.later(cleanup{pool: p})
		return err
	}
	return nil
}

// leave takes from a pool what was released of it, and drops it with the last part.
// Options go with the last network that gave them. Names lose what they keep in the
// range, which another network would give them.
// Addresses that a network leaves in a pool that it shared are stranded: whose they
// were nobody says. The caller holds changes. It may be repeated.
func (i *IPAM) leave(ctx context.Context, p *pool) error {
	p.mu.Lock()
	stay := slices.DeleteFunc(slices.Clone(p.parts), func(o part) bool { return o.releasing })
	went := slices.DeleteFunc(slices.Clone(p.parts), func(o part) bool { return !o.releasing })
	all, none := p.releasing || p.closed || len(stay) == 0, len(stay) == len(p.parts)
	if all || none {
		p.mu.Unlock()
		if none && !all {
			return nil
		}
		return i.drop(ctx, p)
	}
	next := p.draft(stay)
	if !slices.ContainsFunc(stay, func(o part) bool { return o.gave }) {
		next.opts = defaultOptions()
	}
	p.mu.Unlock()
	if err := i.put(ctx, p, next, netip.Prefix{}); err != nil {
		return err
	}
	p.mu.Lock()
	p.opts = next.opts
	lost := p.reserve()
	for a, b := range p.byAddr {
		if slices.ContainsFunc(went, func(o part) bool { return o.sub.Contains(a) }) && !p.taken.has(a) && !p.asked(a) {
			lost = append(lost, p.unbind(b))
			p.woken(a)
		}
	}
	p.mu.Unlock()
	i.forgetNames(ctx, p, lost)
	return nil
}

// inUse says which pool is in the way of a wanted one.
func (i *IPAM) inUse(want netip.Prefix, p *pool) error {
	by, gone := i.by(p)
	if want == p.prefix {
		return fmt.Errorf("subnet %s is in use%s: choose another subnet, or remove the network that has it%s", want, by, gone)
	}
	return fmt.Errorf("subnet %s overlaps %s, which is in use%s: choose another subnet%s", want, p.prefix, by, gone)
}

// by says whose a pool is, as far as that is known, and what to do where its
// network is gone.
func (i *IPAM) by(p *pool) (by, gone string) {
	if id, ok := i.holder(p.prefix); ok && p.space == LocalSpace {
		by = " by network " + short(id)
		gone = fmt.Sprintf(" (if `docker network ls` does not show it: `weft network forget %s`)", short(id))
	}
	return by, gone
}

// inTheWay says which part of a pool is in the way of a wanted range of it; p.mu is
// held. by and gone are what [IPAM.by] says, host what Config.Host does.
func (p *pool) inTheWay(sub netip.Prefix, way part, by, gone string, host []netip.Prefix) error {
	const remove = "choose another subnet, or remove the network that has it"
	switch {
	case p.shared() && sub.IsValid():
		return fmt.Errorf("subnet %s is in use, and a host can have one network with it in space %s, whatever the ranges: %s", p.prefix, p.spaceName(), remove)
	case p.shared() || p.dhcp() != "":
		return fmt.Errorf("subnet %s is in use%s: %s%s", p.prefix, by, remove, gone)
	case !way.sub.IsValid() && !sub.IsValid():
		return fmt.Errorf("subnet %s is in use%s: %s%s; on one parent, networks can share it where each has its own --ip-range", p.prefix, by, remove, gone)
	case !way.sub.IsValid():
		return fmt.Errorf("subnet %s is in use%s, without an --ip-range: %s%s; to share it on one parent, make that network again with an --ip-range beside %s", p.prefix, by, remove, gone, sub)
	}
	beside := "one beside it"
	if b := p.beside(way.sub, host); b.IsValid() {
		beside = "such as " + b.String()
	}
	if !sub.IsValid() {
		return fmt.Errorf("subnet %s is in use%s, with --ip-range %s: choose another subnet%s, or, to share it on the same parent, add an --ip-range, %s", p.prefix, by, way.sub, gone, beside)
	}
	return fmt.Errorf("ip-range %s of subnet %s overlaps %s, which is in use%s: choose another --ip-range, %s%s", sub, p.prefix, way.sub, by, beside, gone)
}

// beside is a range that no network has: the other half of what a range is a half of,
// or of what that is one of, if possible without a gateway or an address of the host;
// p.mu is held.
func (p *pool) beside(sub netip.Prefix, host []netip.Prefix) (found netip.Prefix) {
	for ; sub.Bits() > p.prefix.Bits(); sub = netip.PrefixFrom(sub.Addr(), sub.Bits()-1).Masked() {
		b := sibling(sub)
		used := func(a netip.Addr) bool { return b.Contains(a) }
		switch {
		case slices.ContainsFunc(p.parts, func(o part) bool { return o.meets(b) }):
		case !slices.ContainsFunc(slices.Collect(maps.Keys(p.gateways)), used) &&
			!slices.ContainsFunc(host, func(h netip.Prefix) bool { return (h.IsSingleIP() || h != h.Masked()) && used(h.Addr()) }):
			return b
		case !found.IsValid():
			found = b
		}
	}
	return found
}

// sibling is the other half of the range that p is a half of; of the zero range the
// zero one.
func sibling(p netip.Prefix) netip.Prefix {
	up, err := p.Addr().Prefix(p.Bits() - 1)
	if err != nil {
		return netip.Prefix{}
	}
	if up.Addr() != p.Addr() {
		return netip.PrefixFrom(up.Addr(), p.Bits())
	}
	return netip.PrefixFrom(netipx.PrefixLastIP(p).Next(), p.Bits())
}
