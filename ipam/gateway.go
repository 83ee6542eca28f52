package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
)

// route hands out the gateway of a network, and reports whether it was handed out
// before.
func (i *IPAM) route(ctx context.Context, p *pool, r addressRequest) (a netip.Addr, again bool, err error) {
	if p.space == LocalSpace { // of several networks none comes or goes meanwhile
		release, err := i.change(ctx)
		if err != nil {
			return netip.Addr{}, false, err
		}
		defer release()
	}
	if r.want.IsValid() {
		if err := p.reservedGateway(r); err != nil {
			return netip.Addr{}, false, err
		}
		if again, err = i.explicit(ctx, p, r); err == nil {
			p.typed(r.want)
			err = i.claim(ctx, p, r.id, r.want)
		}
		return r.want, again, err
	}
	if a, err = i.choose(ctx, p, r); err != nil {
		return a, false, err
	}
	p.mu.Lock()
	p.guess = a
	first, _ := r.id.auto()
	name := p.reservedFor[first]
	p.mu.Unlock()
	if name != "" {
		i.log.WithField("pool", r.id.String()).Infof("gateway %s: %s is reserved for %s", a, first, name)
	}
	return a, false, i.claim(ctx, p, r.id, a)
}

// claim notes which network of a pool asked for a gateway, which was written before:
// one that the process dies without a claim of is dropped by Load. The caller holds
// changes.
func (i *IPAM) claim(ctx context.Context, p *pool, id poolID, a netip.Addr) error {
	if p.space != LocalSpace {
		return nil
	}
	p.mu.Lock()
	at := slices.IndexFunc(p.parts, func(o part) bool { return o.meets(id.sub) })
	if at < 0 {
		p.mu.Unlock()
		return errPoolGone
	}
	_, gateway := p.gateways[a] // else it was something else's before the network took the pool over
	if !gateway || slices.Contains(p.parts[at].gateways, a) {
		p.mu.Unlock()
		return nil
	}
	next := p.draft(p.parts)
	claims := append(next.parts[at].gateways, a)
	next.parts[at].gateways = claims
	p.mu.Unlock()
	if len(next.parts) > 1 {
		if err := i.put(ctx, p, next, netip.Prefix{}); err != nil {
			i.unclaimed(ctx, p, a)
			return err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.parts[at].gateways = claims
	return nil
}

// unclaimed frees a gateway that no network has.
func (i *IPAM) unclaimed(ctx context.Context, p *pool, a netip.Addr) {
	p.mu.Lock()
	b := &busy{done: make(chan struct{})}
	if slices.ContainsFunc(p.parts, func(o part) bool { return slices.Contains(o.gateways, a) }) || p.busy[a] != nil {
		p.mu.Unlock()
		return
	}
	p.busy[a] = b
	p.mu.Unlock()
	_ = i.free(context.WithoutCancel(ctx), p, a, b) // else Run does
}

// reservedGateway refuses a gateway whose address a container is to have. One that
// is there already stays.
func (p *pool) reservedGateway(r addressRequest) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	name := p.reservedFor[r.want]
	if r.kind != kindGateway || name == "" || p.taken.has(r.want) {
		return nil
	}
	return fmt.Errorf("gateway %s of pool %s is reserved for %s: give another --gateway, or another address with --ipam-opt reserve.%s=",
		r.want, p.prefix, name, name)
}

// typed notes that somebody asked for a gateway that, perhaps, nobody typed for
// another network with the subnet.
func (p *pool) typed(gateway netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.guess == gateway {
		p.guess = netip.Addr{}
	}
}

// agreed returns the gateway that the hosts of a space have given a pool, if
// they have, and refuses another one.
func (i *IPAM) agreed(ctx context.Context, p *pool, want netip.Addr) (netip.Addr, error) {
	t, _, err := i.shared.readTable(ctx, p.poolKey)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("gateway of pool %s in space %s: %w", p.prefix, p.spaceName(), err)
	}
	tp := t.at(p.prefix)
	if want.IsValid() && tp.Gateway.IsValid() && want != tp.Gateway {
		return netip.Addr{}, fmt.Errorf("gateway %s of pool %s in space %s: host %s has given it %s: give the same on every host, or none",
			want, p.prefix, p.spaceName(), tp.By, tp.Gateway)
	}
	if tp.Gateway.IsValid() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if !p.taken.has(tp.Gateway) {
			p.take(tp.Gateway, heldClaim{claim: claim{Kind: kindGateway}})
		}
	}
	return tp.Gateway, nil
}

// gateway returns the newest gateway, if any; p.mu is held. Where networks share the
// pool it is that of the one with this range or, if that has none, of the first one
// that has: on a LAN it is the router. What another one typed is nobody else's.
func (p *pool) gateway(sub netip.Prefix) netip.Addr {
	var out netip.Addr
	for a, rev := range p.gateways {
		if (!out.IsValid() || rev > p.gateways[out]) && (len(p.parts) == 1 || slices.Contains(p.gatewaysOf(sub), a)) {
			out = a
		}
	}
	return out
}

// gatewaysOf is what [pool.gateway] chooses from; p.mu is held.
func (p *pool) gatewaysOf(sub netip.Prefix) []netip.Addr {
	var first []netip.Addr
	for _, o := range p.parts {
		if len(o.gateways) > 0 && o.sub == sub {
			return o.gateways
		}
		if len(first) == 0 {
			first = o.gateways
		}
	}
	return first
}

// claimed reports whether a network has a gateway, as far as the records say; p is
// being loaded.
func (p *pool) claimed(a netip.Addr) bool {
	return slices.ContainsFunc(p.parts, func(o part) bool { return o.gateways == nil || slices.Contains(o.gateways, a) })
}

// spare are the gateways that none of these parts has; p.mu is held.
func (p *pool) spare(parts []part) (list []netip.Addr) {
	for a := range p.gateways {
		if !slices.ContainsFunc(parts, func(o part) bool { return slices.Contains(o.gateways, a) }) {
			list = append(list, a)
		}
	}
	return list
}
