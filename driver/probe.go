package driver

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// vetTime is how long an address counts as free after the LAN was asked: the
// IPAM half asks before it hands one out, and the endpoint follows at once.
const vetTime = 15 * time.Second

// lan is the link by which the network's addresses are asked for before they are
// handed out; "" where nobody else can have them.
func (n Network) lan() string {
	if n.Options.NoProbe {
		return ""
	}
	return n.onLAN()
}

// onLAN is the link by which the network is part of a LAN that it shares with
// others, "" where it is not.
func (n Network) onLAN() string {
	switch o := n.Options; {
	case n.Mode == modeBridge:
		return o.Bridge
	case o.Parent == "", o.layer3():
		return ""
	}
	return n.parent()
}

// Vet asks the LAN of the network that has exactly this subnet whether somebody
// there holds an address, for up to half a second and with no lock held; of a
// network that spans hosts, what is known of the others. The error says who. Where there is no such network, or its addresses are nobody else's
// business, there is none.
func (d *Driver) Vet(ctx context.Context, pool netip.Prefix, a netip.Addr) error {
	d.mu.Lock()
	var n *network
	var span *Network
	gateway := false
	for _, x := range d.networks {
		s, ok := x.rec.subnet(a)
		if !ok || s.Pool != pool || x.doomed {
			continue
		}
		gateway = gateway || a == s.Gateway.Addr() && x.rec.shares() != ""
		if x.rec.lan() != "" {
			n = x
		}
		if x.rec.VNI != 0 && !isSwarm(x.rec.ID) {
			rec := x.rec
			span = &rec
		}
	}
	d.mu.Unlock()
	if span != nil {
		if host, ok := d.cluster.Holder(*span, a); ok {
			d.log.WithField("network", span.ID).Warnf("address %s is in use on host %s and not given out here: give each host an --ip-range of its own", a, host)
			return heldOn(host, a)
		}
	}
	if gateway {
		return gatewayTaken(a)
	}
	if n == nil {
		return nil
	}
	return d.vet(ctx, n, a)
}

// gatewayTaken is said where an IPAM would hand out the LAN's router's address: it
// does not know it where the driver found it.
func gatewayTaken(a netip.Addr) error {
	return fmt.Errorf("address %s is the gateway's: choose another; an IPAM that hands it out needs --gateway %s or an --ip-range without it", a, a)
}

// vet asks the LAN of n for one address, unless it was asked just now or the
// address is that of an endpoint of ours, which would answer.
func (d *Driver) vet(ctx context.Context, n *network, a netip.Addr) error {
	d.mu.Lock()
	link, now := n.rec.lan(), d.now()
	holder := n.holders[a.String()]
	asked, known := n.vetted[a]
	ours := holder != nil && holder.holds()
	d.mu.Unlock()
	if link == "" || ours || known && now.Sub(asked) < vetTime {
		return nil
	}
	mac, taken, err := d.lan.Probe(ctx, link, a)
	if ctx.Err() != nil {
		return fmt.Errorf("ask the LAN for %s: %w", a, ctx.Err())
	}
	if err != nil {
		// The parent may be away; an endpoint cannot be made then anyway.
		d.log.WithField("network", n.rec.ID).WithError(err).Debug("the LAN could not be asked")
		return nil
	}
	if taken {
		if name := d.ownAddress(ctx, a); name != "" {
			return fmt.Errorf("address %s is this host's own, on %s: take another", a, name)
		}
		return fmt.Errorf("address %s is in use on the LAN: %s answers for it on %s; take another, or make the network with -o probe=false", a, mac, link)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for old, at := range n.vetted {
		if now.Sub(at) >= vetTime {
			delete(n.vetted, old)
		}
	}
	n.vetted[a] = now
	return nil
}

// ownAddress is the interface on which the host has the address, "" if there is none.
func (d *Driver) ownAddress(ctx context.Context, a netip.Addr) string {
	links, err := d.host.Addressed(ctx)
	if err != nil {
		return "" // it only makes the refusal say more
	}
	for name, list := range links {
		if slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Addr() == a }) {
			return name
		}
	}
	return ""
}

// vetEndpoint asks for the addresses of an endpoint that is about to be made;
// those that another IPAM handed out have not been asked for yet.
func (d *Driver) vetEndpoint(ctx context.Context, networkID, endpointID string, addrs []netip.Prefix) error {
	d.mu.Lock()
	n := d.networks[networkID]
	skip := n == nil || n.doomed || n.endpoints[endpointID] != nil
	d.mu.Unlock()
	if skip {
		return nil
	}
	for _, a := range addrs {
		if err := d.vet(ctx, n, a.Addr()); err != nil {
			return err
		}
	}
	return nil
}

// vetHost asks the LAN for the addresses that the host is to use on a new
// network.
func (d *Driver) vetHost(ctx context.Context, n Network) error {
	d.mu.Lock()
	known := d.networks[n.ID] != nil
	d.mu.Unlock()
	if known || n.Options.NoProbe {
		return nil
	}
	for _, a := range n.Options.HostAddrs {
		// A parent that is not there yet leads nowhere, or will be refused.
		if mac, taken, err := d.lan.Probe(ctx, n.Options.Parent, a); err == nil && taken {
			return fmt.Errorf("option host_address: %s is in use on the LAN: %s answers for it on %s; choose another", a, mac, n.Options.Parent)
		}
	}
	return nil
}
