package ipam

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/internal/dhcp"
)

// Restation has the lease of an address be that of a container whose user has chosen
// what the engine says only after it has the address: a MAC address (--mac-address)
// unless mac is zero, and what the server is told (see [TellingKeys]). A server that
// knows the station by what stays the same (the client identifier, RFC 4361) keeps the
// address; where it has another one for what was chosen, that is what the container is
// to have, and the error says how. Addresses that are not leased are left alone; there,
// told has to be empty.
func (i *IPAM) Restation(ctx context.Context, prefix netip.Prefix, a netip.Addr, mac MAC, told map[string]string) error {
	ctx, cancel := context.WithTimeout(ctx, restationTime)
	defer cancel()
	t, err := parseTelling(told)
	if err != nil {
		return err
	}
	p, l := i.leaseOf(prefix, a)
	if l == nil {
		if len(told) == 0 {
			return nil
		}
		return fmt.Errorf("endpoint option %s: there is no DHCP server to tell, as none has leased %s: make the network with --ipam-opt dhcp=INTERFACE, or leave it out",
			strings.Join(slices.Sorted(maps.Keys(told)), ", "), a)
	}
	b, err := p.hold(ctx, a, l)
	if b == nil {
		return err
	}
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		close(b.done)
		p.idle(a, b)
		i.wakeLeases()
	}()
	p.endExtension(l) // another one does not begin
	p.mu.Lock()
	old, lease := l.Station, l.Lease
	t = t.over(p.opts.tellingOf(named(l.Key)))
	p.mu.Unlock()
	s := old
	if mac != (MAC{}) {
		s.MAC = mac
	}
	if len(told) > 0 {
		t.apply(&s, named(l.Key))
	}
	if reflect.DeepEqual(s, old) {
		return nil
	}
	got, next := lease, i.now()
	if a.Is4() {
		if got, err = i.retake(ctx, p, old, s, lease); err != nil {
			return err
		}
		next = got.Granted.Add(got.Renew)
	} // else it is told with the next question: DHCPv6 knows neither MAC nor client identifiers of ours
	p.mu.Lock()
	l.Station, l.Lease, l.next = s, got, next
	p.mu.Unlock()
	return i.putLease(ctx, p, l)
}

// hold marks a leased address as busy: it is neither given back nor asked for
// meanwhile. nil: the lease is gone.
func (p *pool) hold(ctx context.Context, a netip.Addr, l *leased) (*busy, error) {
	for {
		p.mu.Lock()
		b := p.busy[a]
		if p.closed || p.leased[a] != l || b != nil && b.queued {
			p.mu.Unlock()
			return nil, nil
		}
		if b == nil {
			b = &busy{done: make(chan struct{})}
			p.busy[a] = b
			p.mu.Unlock()
			return b, nil
		}
		p.mu.Unlock()
		select {
		case <-b.done:
		case <-ctx.Done():
			return nil, fmt.Errorf("address %s of pool %s is still being written: %w", a, p.prefix, ctx.Err())
		}
	}
}

// leaseOf finds the lease of an address.
func (i *IPAM) leaseOf(prefix netip.Prefix, a netip.Addr) (*pool, *leased) {
	for _, p := range i.leasedPools() {
		if p.prefix != prefix {
			continue
		}
		p.mu.Lock()
		l := p.leased[a]
		p.mu.Unlock()
		if l != nil {
			return p, l
		}
	}
	return nil, nil
}

// Lease is the lease of an address; false if it is not leased.
func (i *IPAM) Lease(prefix netip.Prefix, a netip.Addr) (dhcp.Lease, bool) {
	p, l := i.leaseOf(prefix, a)
	if l == nil {
		return dhcp.Lease{}, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return l.Lease, true
}

// retake leases an address again for the same station, as which it is now seen.
func (i *IPAM) retake(ctx context.Context, p *pool, old, s dhcp.Station, lease dhcp.Lease) (dhcp.Lease, error) {
	link, a := p.dhcp(), lease.Address.Addr()
	got, err := i.dhcp.Acquire(ctx, link, s, a, p.prefix)
	if errors.Is(err, dhcp.ErrRefused) {
		// A server that goes by what has changed takes it for another's.
		if rerr := i.dhcp.Release(ctx, link, old, lease); rerr == nil {
			got, err = i.dhcp.Acquire(ctx, link, s, a, p.prefix)
		}
	}
	if !errors.Is(err, dhcp.ErrRefused) {
		return got, err
	}
	what := "MAC address " + net.HardwareAddr(s.MAC[:]).String()
	if s.MAC == old.MAC {
		what = "what the endpoint's options say of it"
	}
	offer, oerr := i.dhcp.Offer(ctx, link, s, false)
	if oerr != nil {
		return got, fmt.Errorf("%s: %w", what, err)
	}
	b := offer.Address.Addr()
	if s.MAC == old.MAC {
		return got, fmt.Errorf("%s: the DHCP server on %s has %s for it, and the engine said it only after %s was leased: make the network with --ipam-opt OPTION.CONTAINER=VALUE instead (such as client_id.web=…), and before Docker 29 with --ipam-opt reserve.CONTAINER=%s and the container with --ip %s, too",
			what, link, b, a, b, b)
	}
	return got, fmt.Errorf("%s: the DHCP server on %s has %s for it, and the engine said the MAC address only after %s was leased: `weft address reserve CONTAINER %s %s`, and before Docker 29 --ip %s",
		what, link, b, a, b, net.HardwareAddr(s.MAC[:]), b)
}

// restationTime bounds it: the call that it is part of is given up after 10 s.
const restationTime = 8 * time.Second
