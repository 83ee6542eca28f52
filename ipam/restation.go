package ipam

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/weftnet/weft/internal/dhcp"
)

// Restation has the lease of an address be that of a container whose MAC address
// the user has chosen (--mac-address), which the engine says only after it has the
// address. The station is the same for the server by its client identifier (RFC 4361),
// so that it keeps the address, unless something is reserved for the MAC address:
// then that is what the container is to have, and the error says how. Addresses
// that are not leased are left alone.
func (i *IPAM) Restation(ctx context.Context, prefix netip.Prefix, a netip.Addr, mac MAC) error {
	ctx, cancel := context.WithTimeout(ctx, restationTime)
	defer cancel()
	p, l := i.leaseOf(prefix, a)
	if l == nil {
		return nil
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
	p.mu.Unlock()
	if old.MAC == mac {
		return nil
	}
	s := old
	s.MAC = mac
	got := lease
	if a.Is4() { // DHCPv6 knows no MAC addresses
		var err error
		if got, err = i.retake(ctx, p, old, s, lease); err != nil {
			return err
		}
	}
	p.mu.Lock()
	l.Station, l.Lease, l.next = s, got, got.Granted.Add(got.Renew)
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

// retake leases an address again for the same station with another MAC address.
func (i *IPAM) retake(ctx context.Context, p *pool, old, s dhcp.Station, lease dhcp.Lease) (dhcp.Lease, error) {
	link, a := p.dhcp(), lease.Address.Addr()
	got, err := i.dhcp.Acquire(ctx, link, s, a, p.prefix)
	if errors.Is(err, dhcp.ErrRefused) {
		// A server that goes by MAC addresses alone takes it for another's.
		if rerr := i.dhcp.Release(ctx, link, old, lease); rerr == nil {
			got, err = i.dhcp.Acquire(ctx, link, s, a, p.prefix)
		}
	}
	if !errors.Is(err, dhcp.ErrRefused) {
		return got, err
	}
	mac := net.HardwareAddr(s.MAC[:])
	offer, oerr := i.dhcp.Offer(ctx, link, s)
	if oerr != nil {
		return got, fmt.Errorf("MAC address %s: %w", mac, err)
	}
	b := offer.Address.Addr()
	return got, fmt.Errorf("MAC address %s: the DHCP server on %s has %s for it, and the engine said the MAC address only after %s was leased: `weft address reserve CONTAINER %s %s`, and before Docker 29 --ip %s",
		mac, link, b, a, b, mac, b)
}

// restationTime bounds it: the call that it is part of is given up after 10 s.
const restationTime = 8 * time.Second
