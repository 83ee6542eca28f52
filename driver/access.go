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
// reach it. On a bridge of the host's only the sandbox is noted; see beside.go.
func (d *Driver) arrive(ctx context.Context, n *network, e *endpoint, sandbox string) error {
	rec := e.rec
	if !n.rec.onParent() {
		if rec.Sandbox == sandbox || !n.rec.isLAN() {
			return nil
		}
		rec.Sandbox = sandbox
		return d.save(ctx, e, rec)
	}
	rec.Joined, rec.Sandbox, rec.Reach, rec.Host = true, sandbox, n.rec.Access, nil
	if n.rec.Options.HostAccess {
		var err error
		if rec.Host, err = d.hostAddrs(ctx, n.rec); err != nil {
			return err
		}
	}
	return d.become(ctx, n, e, rec)
}

// hostAddrs are the host's addresses on the parent that containers of the network
// are given a route to (in l3 the parent's namespace routes): those in its own
// subnets, which a container looks for on its own link, where the parent is deaf
// to it. And those of IPv6 outside of them, for a container may make itself an
// address of what the LAN's router advertises; but not where another network
// hangs on the parent. A container may be on both: the kernel refuses the same
// route twice, and the engine an interface whose subnet a route leads into.
func (d *Driver) hostAddrs(ctx context.Context, n Network) ([]netip.Addr, error) {
	f, _, err := d.host.Link(ctx, n.parent())
	if err != nil {
		return nil, err
	}
	alone := d.alone(n)
	var list []netip.Addr
	for _, p := range f.Addrs {
		a := p.Addr()
		_, own := n.subnet(a)
		if (own || n.Options.layer3() || a.Is6() && alone) && !slices.Contains(list, a) {
			list = append(list, a)
		}
	}
	return list, nil
}

// alone reports whether no other network of ours hangs on the network's parent.
func (d *Driver) alone(n Network) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, o := range d.networks {
		if id != n.ID && o.rec.onParent() && o.rec.parent() == n.parent() {
			return false
		}
	}
	return true
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
