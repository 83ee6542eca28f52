package driver

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/internal/datapath"
)

// openAccess makes the host's own sub-interface for published ports, if the
// network has none yet and one would be of use.
func (d *Driver) openAccess(ctx context.Context, id string) error {
	d.mu.Lock()
	n := d.networks[id]
	need := n != nil && !n.doomed && n.rec.onParent() && !n.rec.Access && n.rec.Options.reachable() && n.rec.Options.Egress == EgressDriver
	d.mu.Unlock()
	if !need {
		return nil
	}
	d.change.Lock()
	defer d.change.Unlock()
	n = d.networks[id] // change is held: the table stands still
	if n == nil || n.doomed || n.rec.Access {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	old, before := n.rec, d.networkState(n)
	rec := old
	rec.Access = true
	err := d.saveNetwork(ctx, n, rec)
	if err == nil {
		_, err = d.kernel.Ensure(ctx, d.networkState(n))
	}
	if err != nil {
		ctx, cancel := cleanup(ctx)
		defer cancel()
		return join(err, d.kernel.Remove(ctx, without(d.networkState(n), before)), d.saveNetwork(ctx, n, old))
	}
	return nil
}

// arrive is what Join does for an endpoint on a parent: from now on its link is
// the container's, and it is given the way back to the host if the host is to
// reach it.
func (d *Driver) arrive(ctx context.Context, n *network, e *endpoint) error {
	if !n.rec.onParent() {
		return nil
	}
	rec := e.rec
	rec.Joined, rec.Reach = true, n.rec.Access
	rec.Host, rec.Near = nil, nil
	if n.rec.Options.HostAccess {
		var err error
		if rec.Host, rec.Near, err = d.surroundings(ctx, n.rec); err != nil {
			return err
		}
	}
	return d.become(ctx, n, e, rec)
}

// surroundings are the host's addresses on the parent, and the subnets of its
// bridges, ours and others', that the network does not have itself.
func (d *Driver) surroundings(ctx context.Context, n Network) (hosts []netip.Addr, near []netip.Prefix, err error) {
	f, _, err := d.host.Link(ctx, n.parent())
	if err != nil {
		return nil, nil, err
	}
	for _, p := range f.Addrs {
		if !slices.Contains(hosts, p.Addr()) {
			hosts = append(hosts, p.Addr())
		}
	}
	if n.Options.layer3() {
		return hosts, nil, nil
	}
	bridged, err := d.host.Bridged(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range bridged {
		if !slices.ContainsFunc(n.Subnets, func(s Subnet) bool { return s.Pool.Overlaps(p) }) {
			near = append(near, p)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, o := range d.networks {
		if o.rec.Mode != modeBridge || o.rec.Options.Bridge != "" || o.rec.Options.Egress != EgressDriver || o.doomed {
			continue
		}
		for _, s := range o.rec.Subnets {
			near = append(near, s.Pool)
		}
	}
	slices.SortFunc(near, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return hosts, near, nil
}

// ensureOn makes what an endpoint wants. What hangs on a parent may find it
// deleted and made again by others since the last pass: then the network is
// mended first, by one call at a time.
func (d *Driver) ensureOn(ctx context.Context, n *network, s datapath.State) error {
	_, err := d.kernel.Ensure(ctx, s)
	if !errors.Is(err, datapath.ErrAbsent) || !n.rec.onParent() {
		return err
	}
	n.mending.Lock()
	defer n.mending.Unlock()
	lines, merr := d.kernel.Ensure(ctx, d.networkState(n))
	if merr != nil {
		return join(err, merr)
	}
	for _, line := range lines {
		d.log.WithField("network", n.rec.ID).Warn("repaired: " + line)
	}
	_, err = d.kernel.Ensure(ctx, s)
	return err
}
