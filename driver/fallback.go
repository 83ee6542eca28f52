package driver

import (
	"context"
	"slices"

	"github.com/weftnet/weft/internal/datapath"
)

// fallback is an endpoint that has only IPv4 and serves the host's IPv6 ports with
// it, through the proxy. When its container gets another way out, for IPv6, that
// endpoint is given the ports. Engine 28 calls for the first one again then, and
// says that it is to leave IPv6 (see optionNoProxy6To4); engine 29 does not.
type fallback struct {
	e *endpoint
	// taker is the endpoint that has the ports instead, "" while none has.
	taker string
}

// isFallback reports whether the port is an IPv6 one that leads to IPv4.
func (p PublishedPort) isFallback() bool {
	return p.Host.IsValid() && p.Host.Addr().Is6() && p.Container.Addr().Is4()
}

// fallbacks is what such ports are in the kernel.
func (e Endpoint) fallbacks() datapath.State {
	return published(filter(e.Ports, PublishedPort.isFallback), nil)
}

// noteFallback enters what the record says into the table, or takes it out. d.mu is
// held.
func (d *Driver) noteFallback(e *endpoint) {
	if e.sandbox == "" {
		return
	}
	has := slices.ContainsFunc(e.rec.Ports, PublishedPort.isFallback)
	switch f := d.fallbacks[e.sandbox]; {
	case has && f == nil:
		d.fallbacks[e.sandbox] = &fallback{e: e}
	case !has && f != nil && f.e == e:
		delete(d.fallbacks, e.sandbox)
		e.yields = false
	}
}

// strikeFallback takes an endpoint out of the table that is deleted. d.mu is held.
func (d *Driver) strikeFallback(e *endpoint) {
	if f := d.fallbacks[e.sandbox]; f != nil && f.e == e {
		delete(d.fallbacks, e.sandbox)
	}
}

// orphans gives back what endpoints have that went another way than by the calls
// for them: with their network, for one.
func (d *Driver) orphans(ctx context.Context) {
	d.mu.Lock()
	left := map[string]string{} // by taker
	for sandbox, f := range d.fallbacks {
		there := f.taker == ""
		for _, n := range d.networks {
			there = there || n.endpoints[f.taker] != nil
		}
		if !there {
			left[f.taker] = sandbox
		}
	}
	d.mu.Unlock()
	for taker, sandbox := range left {
		d.giveBack(ctx, taker, sandbox)
	}
}

// findFallbacks fills the table after a start.
func (d *Driver) findFallbacks() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fallbacks = map[string]*fallback{}
	for _, n := range d.networks {
		for _, e := range n.endpoints {
			d.noteFallback(e)
		}
	}
	for _, n := range d.networks {
		for _, e := range n.endpoints {
			if f := d.fallbacks[e.sandbox]; f != nil && e.rec.Programmed && e.rec.addr(ipv6).IsValid() && f.e != e {
				f.taker, f.e.yields = e.rec.ID, true
			}
		}
	}
}

// takeOver has the IPv6 ports of the endpoint's container let go by another of its
// endpoints, which had them for want of this one, and reports whether it did.
func (d *Driver) takeOver(ctx context.Context, networkID, endpointID string) (took bool, err error) {
	d.mu.Lock()
	var f *fallback
	if n := d.networks[networkID]; n != nil && n.rec.Options.Egress == EgressDriver {
		if e := n.endpoints[endpointID]; e != nil && e.rec.addr(ipv6).IsValid() {
			f = d.fallbacks[e.sandbox]
		}
	}
	if f == nil || f.taker != "" {
		d.mu.Unlock()
		return false, nil
	}
	f.taker = endpointID
	in, other := f.e.rec.Network, f.e.rec.ID
	d.mu.Unlock()
	return true, d.end(in, other, func(_ *network, e *endpoint) error {
		if !d.yield(f, endpointID) {
			return nil
		}
		return d.kernel.Remove(ctx, e.rec.fallbacks())
	})
}

// giveBack is the reverse of takeOver, when the endpoint has no ports any more.
func (d *Driver) giveBack(ctx context.Context, endpointID string, sandbox string) {
	d.mu.Lock()
	f := d.fallbacks[sandbox]
	if f == nil || f.taker != endpointID {
		d.mu.Unlock()
		return
	}
	f.taker = ""
	in, other := f.e.rec.Network, f.e.rec.ID
	d.mu.Unlock()
	err := d.end(in, other, func(_ *network, e *endpoint) error {
		if !d.yield(f, "") || e.rec.Left || e.gone {
			return nil
		}
		_, err := d.kernel.Ensure(ctx, e.rec.fallbacks())
		return err
	})
	if err != nil { // the next pass tries again
		d.log.WithField("network", in).WithField("endpoint", other).WithError(err).Warn("IPv6 ports that lead to IPv4 are not held")
	}
}

// yield has the endpoint of f, which is locked, go by taker. ok is false if there is
// another by now: whoever set that comes after, or came before.
func (d *Driver) yield(f *fallback, taker string) (ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f.taker != taker {
		return false
	}
	f.e.yields = taker != ""
	return true
}

// sandboxOf is the container's, as Join named it.
func (d *Driver) sandboxOf(networkID, endpointID string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := d.networks[networkID]; n != nil {
		if e := n.endpoints[endpointID]; e != nil {
			return e.sandbox
		}
	}
	return ""
}
