package driver

import (
	"context"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/internal/datapath"
)

// A container that is on a LAN and leaves by a bridge would answer clients on that
// LAN by its own link there, past the host that translated their packets to its
// published port. So they come from the host's address on the bridge, and an
// endpoint with published ports has to know the LANs of its container's others. On a
// bridge that exists they always do.

// regroup notes the sandbox that an endpoint is in from now on, "" if in none.
// d.mu is held.
func (d *Driver) regroup(e *endpoint, to string) {
	from := e.sandbox
	if from == to {
		return
	}
	e.sandbox = to
	if from != "" {
		rest := slices.DeleteFunc(slices.Clone(d.mates[from]), func(o *endpoint) bool { return o == e })
		if d.mates[from] = rest; len(rest) == 0 {
			delete(d.mates, from)
		}
	}
	if to != "" {
		d.mates[to] = append(slices.Clone(d.mates[to]), e)
	}
}

// lans are the subnets of the LAN networks that a sandbox is on, and those that it
// has a route to by them, the widest of those that overlap. d.mu is held.
func (d *Driver) lans(sandbox string) []netip.Prefix {
	var all []netip.Prefix
	for _, e := range d.mates[sandbox] {
		n := d.networks[e.rec.Network]
		if n == nil || !n.rec.isLAN() || n.rec.onParent() && !e.rec.Joined || e.doomed {
			continue
		}
		for _, s := range n.rec.Subnets {
			all = append(all, s.Pool.Masked())
		}
		for _, r := range slices.Concat(n.rec.Options.Routes, e.rec.Routes) {
			all = append(all, r.Destination.Masked())
		}
	}
	slices.SortFunc(all, func(a, b netip.Prefix) int {
		if a.Bits() != b.Bits() {
			return a.Bits() - b.Bits()
		}
		return a.Addr().Compare(b.Addr())
	})
	var list []netip.Prefix
	for _, p := range all {
		if !slices.ContainsFunc(list, p.Overlaps) {
			list = append(list, p)
		}
	}
	return list
}

// lansBeside are the elements by which clients on those LANs are answered through
// the host.
func (e Endpoint) lansBeside(lans []netip.Prefix) []datapath.Element {
	var list []datapath.Element
	for _, p := range lans {
		if to := e.addr(familyOf(p.Addr())); to.IsValid() {
			list = append(list, datapath.Element{Set: datapath.SetBeside, Net: p, To: to})
		}
	}
	return list
}

// findMates fills the table after a start.
func (d *Driver) findMates() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mates = map[string][]*endpoint{}
	for _, n := range d.networks {
		for _, e := range n.endpoints {
			e.sandbox = ""
			d.regroup(e, e.rec.Sandbox)
		}
	}
	for _, n := range d.networks {
		for _, e := range n.endpoints {
			if e.sandbox != "" && !n.rec.isLAN() {
				e.beside = d.lans(e.sandbox)
			}
		}
	}
}

// tellMates has the endpoints of a sandbox know its LANs, after it was connected to
// one or disconnected, or published its first port. No lock is held.
func (d *Driver) tellMates(ctx context.Context, sandbox string) {
	type place struct{ network, endpoint string }
	var others []place
	d.mu.Lock()
	lans := d.lans(sandbox)
	for _, e := range d.mates[sandbox] {
		if n := d.networks[e.rec.Network]; n != nil && !n.rec.isLAN() && !slices.Equal(e.beside, lans) {
			others = append(others, place{e.rec.Network, e.rec.ID})
		}
	}
	d.mu.Unlock()
	for _, o := range others {
		err := d.end(o.network, o.endpoint, func(n *network, e *endpoint) error { return d.learnLANs(ctx, n, e) })
		if err != nil { // the next pass tries again
			d.log.WithField("network", o.network).WithField("endpoint", o.endpoint).WithError(err).
				Warn("clients on a LAN of the container do not reach its published ports")
		}
	}
}

// learnLANs takes over what the LANs are now. The endpoint is locked.
func (d *Driver) learnLANs(ctx context.Context, n *network, e *endpoint) error {
	before := d.endpointState(n, e).Elements
	if rec := e.rec; rec.Sandbox != e.sandbox && !rec.Left { // only now is it worth a write
		rec.Sandbox = e.sandbox
		if err := d.save(ctx, e, rec); err != nil {
			return err
		}
	}
	d.mu.Lock()
	e.beside = nil
	if e.sandbox != "" {
		e.beside = d.lans(e.sandbox)
	}
	after := d.endpointState(n, e).Elements
	d.mu.Unlock()
	// A set of intervals takes no two that overlap: first out, then in.
	dropped := without(datapath.State{Elements: before}, datapath.State{Elements: after})
	if !dropped.Empty() {
		if err := d.kernel.Remove(ctx, dropped); err != nil {
			return err
		}
	}
	fresh := without(datapath.State{Elements: after}, datapath.State{Elements: before})
	if fresh.Empty() {
		return nil
	}
	_, err := d.kernel.Ensure(ctx, fresh)
	return err
}

// tellAllMates is tellMates for what went another way than by the calls for it: with
// its network, for one.
func (d *Driver) tellAllMates(ctx context.Context) {
	d.mu.Lock()
	list := make([]string, 0, len(d.mates))
	for sandbox := range d.mates {
		list = append(list, sandbox)
	}
	d.mu.Unlock()
	for _, sandbox := range list {
		d.tellMates(ctx, sandbox)
	}
}
