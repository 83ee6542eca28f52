package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/weftnet/weft/internal/dhcp"
)

// fallbackKey is the option that says what containers get while no DHCP server
// answers: none (refuse), or an address of a range that the server leaves alone.
const fallbackKey = "dhcp_fallback"

const refuseFallback = "refuse"

// silentTime is how long a server that did not answer is not asked again by requests
// that may do without: the engine makes the endpoints of a network one after the
// other, and each would wait as long as the first.
const silentTime = 30 * time.Second

// setFallback takes a range for each family, as the engine sends the same options with
// both pools of a network; of other families than the pool's it is left out.
func (o *poolOptions) setFallback(value string) error {
	if value == refuseFallback {
		return nil
	}
	for part := range strings.SplitSeq(value, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(part))
		if err != nil || p != p.Masked() || p.Addr().Is4In6() || p.Bits() == 0 {
			return errors.New("choose refuse, or a range that the server leaves alone, as 192.168.1.240/28; one for each IP family, with a comma between")
		}
		for _, have := range o.fallback {
			if have.Addr().Is4() == p.Addr().Is4() {
				return fmt.Errorf("%s and %s are of one IP family: give one", have, p)
			}
		}
		o.fallback = append(o.fallback, p)
	}
	return nil
}

// fallbackIn is the part of a subnet that is fallen back on, the zero Prefix if there
// is none.
func (o *poolOptions) fallbackIn(subnet netip.Prefix) netip.Prefix {
	for _, p := range o.fallback {
		if subnet.Addr().Is4() == p.Addr().Is4() {
			return p
		}
	}
	return netip.Prefix{}
}

// checkFallback refuses a range that is not in the subnet.
func (o *poolOptions) checkFallback(k poolKey) error {
	sub := o.fallbackIn(k.prefix)
	if !sub.IsValid() || sub == k.prefix {
		return nil
	}
	if err := (poolID{k, sub}).validate(); err != nil {
		return fmt.Errorf("ipam option %s=%s: %s is not a range of subnet %s that has a usable address: choose one that is", fallbackKey, sub, sub, k.prefix)
	}
	return nil
}

// leaseOr is lease, or an address of the range to fall back on while no server
// answers. A container that has one keeps it until it is made again.
func (i *IPAM) leaseOr(ctx context.Context, p *pool, r addressRequest) (netip.Prefix, error) {
	p.mu.Lock()
	sub, silent := p.opts.fallbackIn(p.prefix), p.silent
	lately := i.now().Sub(p.silentAt) < silentTime
	p.mu.Unlock()
	if !sub.IsValid() || r.want.IsValid() && !sub.Contains(r.want) {
		return i.lease(ctx, p, r)
	}
	if silent == nil || !lately {
		a, err := i.lease(ctx, p, r)
		if !errors.Is(err, dhcp.ErrSilent) {
			return a, err
		}
		silent = err
		p.mu.Lock()
		p.silent, p.silentAt = err, i.now()
		p.mu.Unlock()
	}
	a, err := i.fallBack(ctx, p, r, sub)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%w; and of %s=%s: %w", silent, fallbackKey, sub, err)
	}
	i.log.WithField("pool", p.prefix.String()).WithError(silent).Warnf("a container has %s of %s until it is made again", a, fallbackKey)
	return p.with(a), nil
}

// fallBack hands out an address as of a pool without a server: what is reserved for
// the name, what it had the last time, or the next one that is free.
func (i *IPAM) fallBack(ctx context.Context, p *pool, r addressRequest, sub netip.Prefix) (a netip.Addr, err error) {
	r.id.sub = sub
	if sub == p.prefix {
		r.id.sub = netip.Prefix{}
	}
	if r.want.IsValid() {
		_, err := i.explicit(ctx, p, r)
		if err == nil {
			i.bind(ctx, p, r.want, r)
		}
		return r.want, err
	}
	p.mu.Lock()
	res, reserved := p.reservation(r.name)
	had := res.addr
	if b := p.byName[r.name]; b != nil && !reserved && sub.Contains(b.Address) {
		had = b.Address
	}
	second := had.IsValid() && p.taken.has(had)
	p.mu.Unlock()
	if r.avoid.IsValid() { // its name keeps that for the next time
		had, second, r.name = netip.Addr{}, false, ""
	}
	if second {
		r.name = "" // another container of that name runs
	} else if had.IsValid() && r.name != "" {
		r.want, r.kind = had, kindNamed
		if _, err = i.explicit(ctx, p, r); err == nil {
			i.bind(ctx, p, had, r)
			return had, nil
		}
		if !errors.As(err, new(takenError)) {
			return a, err
		}
		r.want, r.kind, r.name = netip.Addr{}, kindAuto, ""
	}
	if a, err = i.choose(ctx, p, r); err == nil {
		i.bind(ctx, p, a, r)
	}
	return a, err
}

// unleased counts the containers whose address is one to fall back on; p.mu is held.
func (p *pool) unleased() int {
	if p.dhcp() == "" || !p.opts.fallbackIn(p.prefix).IsValid() {
		return 0
	}
	return max(0, int(p.taken.len())-len(p.leased)-len(p.gateways))
}
