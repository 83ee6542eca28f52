package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/weftnet/weft/internal/dhcp"
)

// A server offers what it takes for free. One that was set up anew, as home routers
// are by a restart, has forgotten what its stations have, and one that stations of
// the LAN ask for nothing does not know of them. What is known here to be taken is
// no offer.

const (
	// relearnTime bounds asking for a lease that the server has forgotten: a call waits.
	relearnTime = 3 * time.Second
	// declinedTime is how long an offer of an address is none that a station of the
	// LAN was found to have.
	declinedTime = time.Minute
)

// answerTime is kept of a call for its answer.
const answerTime = time.Second

// beforeAnswer ends what asks a server before its call does: what the server did, or
// did not, is said then, and not that there is no result.
func beforeAnswer(ctx context.Context) (context.Context, context.CancelFunc) {
	if end, ok := ctx.Deadline(); ok {
		return context.WithDeadline(ctx, end.Add(-answerTime))
	}
	return context.WithCancel(ctx)
}

// noOffer says what is wrong with an offer. One that another container has is leased
// for that again, at once, so that the server knows.
func (i *IPAM) noOffer(ctx context.Context, p *pool, offer dhcp.Lease) error {
	a := offer.Address.Addr()
	p.mu.Lock()
	l, holder := p.leased[a], "which this host keeps for its network"
	if l != nil {
		holder = "which " + l.who() + " has"
	}
	p.mu.Unlock()
	if l != nil {
		i.relearn(ctx, p, a, l)
	}
	return fmt.Errorf("%w: %s offers %s, %s: it has lost its leases, or another server on %s does not know of them; start the container again", dhcp.ErrNoOffer, offer.Server, a, holder, p.dhcp())
}

// ownReason says why a server refuses an address that is asked for by number, where that
// is known here: it would only say that it offers another.
func (i *IPAM) ownReason(ctx context.Context, p *pool, r addressRequest, refusal error) error {
	p.mu.Lock()
	l := p.leased[r.want]
	p.mu.Unlock()
	if l != nil {
		return fmt.Errorf("address %s of pool %s is that of %s: choose another, or remove that container first", r.want, p.prefix, l.who())
	}
	if err := i.held(ctx, r.id, r.want); err != nil && ctx.Err() == nil {
		return err
	}
	return refusal
}

// who is the container that has a lease.
func (l *leased) who() string {
	if l.Station.Name == "" {
		return "another container of this host"
	}
	return "container " + l.Station.Name + " of this host"
}

// relearn asks for a lease as for a new one, as its server has forgotten it.
func (i *IPAM) relearn(ctx context.Context, p *pool, a netip.Addr, l *leased) {
	ctx, cancel := context.WithTimeout(ctx, relearnTime)
	defer cancel()
	p.mu.Lock()
	if p.leased[a] != l || p.busy[a] != nil || p.closed {
		p.mu.Unlock()
		return
	}
	if done := l.extending; done != nil {
		p.mu.Unlock()
		select {
		case <-done:
		case <-ctx.Done():
		}
		return
	}
	l.forgotten = true
	ask := i.extending(ctx, p, l)
	p.mu.Unlock()
	ask()
}

// isDeclined reports whether a station of the LAN was found to have an address just
// now; p.mu is held.
func (p *pool) isDeclined(a netip.Addr, now time.Time) bool {
	at, ok := p.declined[a]
	if ok && now.Sub(at) >= declinedTime {
		delete(p.declined, a)
		return false
	}
	return ok
}

// offeredAgain is the error of an address that the server was told not to offer.
func (p *pool) offeredAgain(offer dhcp.Lease) error {
	return fmt.Errorf("%w: %s offers %s, which another station of the LAN has, and was told so: leave that address out of what the server hands out, or give that station another one (arping -I %s %s finds it)",
		dhcp.ErrNoOffer, offer.Server, offer.Address.Addr(), p.dhcp(), offer.Address.Addr())
}
