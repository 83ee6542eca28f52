package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/weftnet/weft/internal/datapath"
)

// createEndpoint makes the links of an endpoint. The call may come again.
func (d *Driver) createEndpoint(ctx context.Context, n *network, rec Endpoint) error {
	rec.Created = d.now().UTC()
	if n.rec.VNI != 0 {
		rec.Claim, rec.MTU = d.cluster.Claim(), n.rec.MTU
	}
	e, fresh, err := d.claim(ctx, n, rec)
	if err != nil {
		return err
	}
	defer e.mu.Unlock()
	if !fresh {
		return d.recreate(ctx, n, e, rec)
	}
	if err = d.save(ctx, e, rec); err == nil {
		err = d.firstEndpoint(ctx, n, d.endpointState(n, e))
	}
	if err == nil {
		err = d.await(ctx, n, e.rec)
	}
	if err == nil {
		err = ctx.Err() // the engine was told that it failed, and never deletes it
	}
	if err != nil {
		ctx, cancel := cleanup(ctx)
		defer cancel()
		return join(err, d.removeEndpoint(ctx, n, e))
	}
	d.share(n)
	d.assign(n.rec, e.rec)
	return nil
}

// firstEndpoint makes s and, with the first endpoint of this process, sees to the
// hook again: at boot we start before the engine has set FORWARD to DROP, when
// none seemed to be needed. It has by the time it starts containers, and they
// should not wait for the next pass. Later ones pay for no look at others' rules.
func (d *Driver) firstEndpoint(ctx context.Context, n *network, s datapath.State) error {
	s.Hook = !d.hooked.Load() && d.networkState(n).Hook
	if err := d.ensureOn(ctx, n, s); err != nil {
		return err
	}
	if s.Hook {
		d.hooked.Store(true)
	}
	return nil
}

// recreate answers a call that came again.
func (d *Driver) recreate(ctx context.Context, n *network, e *endpoint, rec Endpoint) error {
	if !slices.Equal(e.rec.Addrs, rec.Addrs) || e.rec.MAC != rec.MAC {
		return fmt.Errorf("endpoint %s exists already with other addresses", short(rec.ID))
	}
	return d.revive(ctx, n, e)
}

// revive makes the links of an endpoint again that may have lost them.
func (d *Driver) revive(ctx context.Context, n *network, e *endpoint) error {
	rec, wasGone := e.rec, e.gone
	rec.Left = false
	d.mu.Lock()
	if other := n.holder(rec); other != nil {
		d.mu.Unlock()
		return held(other)
	}
	e.gone = false
	n.enter(e)
	d.mu.Unlock()
	if err := d.become(ctx, n, e, rec); err != nil {
		d.mu.Lock()
		e.gone = wasGone
		d.mu.Unlock()
		return err
	}
	d.share(n)
	return nil
}

// held is the refusal of an address that another endpoint has.
func held(e *endpoint) error {
	return fmt.Errorf("address %s is in use: endpoint %s of this network has it", e.rec.addresses(), short(e.rec.ID))
}

// claim enters an endpoint into the table, locked, before anything is written;
// or it returns the one that is there under the ID, locked too.
func (d *Driver) claim(ctx context.Context, n *network, rec Endpoint) (e *endpoint, fresh bool, err error) {
	for range 8 { // each round ends one endpoint that was in the way
		d.mu.Lock()
		old := n.endpoints[rec.ID]
		holder := n.holder(rec)
		if old == nil && holder == nil {
			e := &endpoint{rec: rec}
			e.mu.Lock()
			n.enter(e)
			d.mu.Unlock()
			return e, true, nil
		}
		d.mu.Unlock()
		if old != nil {
			if e := d.lock(n, rec.ID); e != nil {
				return e, false, nil
			}
			err = d.finish(ctx, n, old)
		} else {
			err = d.evict(ctx, n, holder)
		}
		if err != nil {
			return nil, false, err
		}
	}
	return nil, false, fmt.Errorf("endpoint %s: its address is claimed over and over", short(rec.ID))
}

// claims are what only one endpoint of a network can have.
func (e Endpoint) claims() []string {
	list := []string{hostEnd(e.ID)}
	for _, a := range e.Addrs {
		list = append(list, a.Addr().String())
	}
	return list
}

// enter puts an endpoint into the table. d.mu is held.
func (n *network) enter(e *endpoint) {
	n.endpoints[e.rec.ID] = e
	for _, c := range e.rec.claims() {
		if old := n.holders[c]; old == nil || !old.holds() || e.holds() {
			n.holders[c] = e
		}
	}
}

// strike takes an endpoint out of the table. d.mu is held.
func (n *network) strike(e *endpoint) {
	delete(n.endpoints, e.rec.ID)
	for _, c := range e.rec.claims() {
		if n.holders[c] == e {
			delete(n.holders, c)
		}
	}
}

// holds reports whether nobody else can have what the endpoint claims. What has
// left holds nothing: the engine may hand its address on before it deletes the
// endpoint.
func (e *endpoint) holds() bool { return !e.doomed && !e.gone && !e.rec.Left }

// holder is another endpoint that holds what rec claims, or nil. d.mu is held.
func (n *network) holder(rec Endpoint) *endpoint {
	for _, c := range rec.claims() {
		if e := n.holders[c]; e != nil && e.rec.ID != rec.ID && e.holds() {
			return e
		}
	}
	return nil
}

// evict ends an endpoint that the engine has evidently forgotten: its link is gone;
// or it is of before our restart and was never joined, which is what a
// CreateEndpoint leaves that was interrupted by our death. It refuses to end
// another.
func (d *Driver) evict(ctx context.Context, n *network, e *endpoint) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	d.mu.Lock()
	there := n.endpoints[e.rec.ID] == e
	d.mu.Unlock()
	if !there || e.rec.Left {
		return nil // settled while we waited
	}
	have, err := d.kernel.Owned(ctx)
	if err != nil {
		return err
	}
	switch n.place(have, e.rec) {
	case inContainer:
		return held(e)
	case onHost:
		if e.joined || !e.loaded {
			return held(e)
		}
	case nowhere:
	}
	d.log.WithField("network", n.rec.ID).WithField("endpoint", e.rec.ID).
		Warnf("forgotten: nobody uses its link any more, and its address %s is given out again", e.rec.addresses())
	return d.removeEndpoint(ctx, n, e)
}

func (e Endpoint) addresses() string {
	list := make([]string, len(e.Addrs))
	for i, a := range e.Addrs {
		list[i] = a.Addr().String()
	}
	return strings.Join(list, ", ")
}

// veth is the pair in s whose host end has the name.
func veth(s datapath.State, name string) (datapath.Veth, bool) {
	i := slices.IndexFunc(s.Veths, func(v datapath.Veth) bool { return v.Name == name })
	if i < 0 {
		return datapath.Veth{}, false
	}
	return s.Veths[i], true
}

// finish removes an endpoint, also one whose removal failed before.
func (d *Driver) finish(ctx context.Context, n *network, e *endpoint) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	d.mu.Lock()
	there := n.endpoints[e.rec.ID] == e
	d.mu.Unlock()
	if !there {
		return nil
	}
	return d.removeEndpoint(ctx, n, e)
}

// removeEndpoint takes an endpoint out of the kernel and then out of the
// store. Its lock is held, or the network's for writing.
func (d *Driver) removeEndpoint(ctx context.Context, n *network, e *endpoint) error {
	d.mu.Lock()
	e.doomed = true
	d.mu.Unlock()
	if s := d.endpointState(n, e); !s.Empty() {
		if err := d.kernel.Remove(ctx, without(s, datapath.State{})); err != nil {
			return err
		}
	}
	return d.forget(ctx, n, e)
}

// save writes the record and takes it over; if it cannot be written, the old one
// stays, and the next pass writes it again, since the outcome may be unknown.
func (d *Driver) save(ctx context.Context, e *endpoint, rec Endpoint) error {
	rev, err := put(ctx, d.eps, endpointKey(rec.Network, rec.ID), rec, e.rev)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		e.unsaved = true
		return err
	}
	e.rec, e.rev, e.unsaved = rec, rev, false
	d.noteFallback(e)
	return nil
}

// settle takes over what is true of the kernel already and then writes it. If
// that fails, the next pass writes it.
func (d *Driver) settle(ctx context.Context, e *endpoint, rec Endpoint) error {
	d.mu.Lock()
	e.rec = rec
	d.noteFallback(e)
	d.mu.Unlock()
	return d.save(ctx, e, rec)
}

// become changes an endpoint to rec: record, kernel, and back to what it was
// if the kernel refuses. What rec has no longer goes last.
func (d *Driver) become(ctx context.Context, n *network, e *endpoint, rec Endpoint) error {
	old, before := e.rec, d.endpointState(n, e)
	if !equal(rec, old) {
		if err := d.save(ctx, e, rec); err != nil {
			return d.release(ctx, extra(rec.Ports, old.Ports), err)
		}
	}
	after := d.endpointState(n, e)
	if old.Joined && rec.Joined {
		after.Children, before.Children = nil, nil // the container's, and out of sight
	}
	if err := d.ensureOn(ctx, n, after); err != nil {
		ctx, cancel := cleanup(ctx)
		defer cancel()
		// Ensure undid what it made, not what it mended; ports that were
		// reserved before are ours to give back.
		undo := d.kernel.Remove(ctx, without(after, before))
		_, mend := d.kernel.Ensure(ctx, datapath.State{Veths: before.Veths})
		return join(err, undo, mend, d.settle(ctx, e, old))
	}
	if dropped := without(before, after); !dropped.Empty() {
		return d.kernel.Remove(ctx, dropped)
	}
	return nil
}

// extra is what is in a and not in b.
func extra(a, b []PublishedPort) []PublishedPort {
	return slices.DeleteFunc(slices.Clone(a), func(p PublishedPort) bool { return slices.Contains(b, p) })
}

// program publishes the container's ports: the endpoint is its way out now.
func (d *Driver) program(ctx context.Context, n *network, e *endpoint, options map[string]any) error {
	wishes, err := parseWishes(n.rec, e.rec, options)
	if err != nil {
		return err
	}
	if n.rec.Options.Egress != EgressDriver {
		return nil // engines before 29 call for internal networks too
	}
	if e.rec.Left {
		return errors.New("the endpoint has left the network")
	}
	if e.gone {
		return errors.New("the endpoint's link is gone: disconnect and connect the container again")
	}
	if len(wishes) > 0 && n.rec.onParent() && !n.rec.Options.reachable() {
		return fmt.Errorf("publish %s: %s keeps the host from the container: use %s, or publish no ports",
			wishes[0], n.rec.Options.keepsOut(n.rec.Mode), n.rec.Options.letsIn(n.rec.Mode))
	}
	ports, err := d.choose(ctx, e.rec.Ports, wishes)
	if err != nil {
		return err
	}
	if !e.rec.Programmed {
		d.tellRouted(e.rec, wishes)
	}
	rec := e.rec
	rec.Programmed, rec.Ports = true, ports
	rec.Hairpin = rec.Hairpin || translated(ports)
	if len(ports) > 0 {
		rec.Sandbox = e.sandbox
	}
	return d.become(ctx, n, e, rec)
}

// expose opens the published ports that need no host port, in gateway mode routed,
// whether or not the endpoint is the container's way out.
func (d *Driver) expose(ctx context.Context, n *network, e *endpoint, options map[string]any) error {
	if n.rec.Options.Egress != EgressDriver || n.rec.onParent() || e.rec.Programmed {
		return nil
	}
	wishes, err := parseWishes(n.rec, e.rec, options)
	if err != nil {
		return err
	}
	fresh := extra(direct(wishes), e.rec.Ports)
	if len(fresh) == 0 {
		return nil
	}
	rec := e.rec
	rec.Ports = slices.Concat(e.rec.Ports, fresh)
	return d.become(ctx, n, e, rec)
}

// revoke takes the host ports back. What is open at the container's own address
// stays so.
func (d *Driver) revoke(ctx context.Context, n *network, e *endpoint) error {
	stay := filter(e.rec.Ports, func(p PublishedPort) bool { return !p.Host.IsValid() })
	gone := extra(e.rec.Ports, stay)
	if !e.rec.Programmed && len(gone) == 0 {
		return nil
	}
	have, want := published(e.rec.Ports, n.rec.Options.Trusted), published(stay, n.rec.Options.Trusted)
	if s := without(have, want); !s.Empty() && !e.gone {
		if err := d.kernel.Remove(ctx, s); err != nil {
			return err
		}
	}
	rec := e.rec
	rec.Programmed, rec.Ports = false, stay
	return d.settle(ctx, e, rec)
}

// leave deletes the links. The container's end is still inside: it goes with
// the host's, which spares the engine moving it back, 18 ms of waiting.
func (d *Driver) leave(ctx context.Context, n *network, e *endpoint) error {
	if e.rec.Left {
		return nil
	}
	if s := d.endpointState(n, e); !s.Empty() {
		if err := d.kernel.Remove(ctx, without(s, datapath.State{})); err != nil {
			return err
		}
	}
	rec := e.rec
	rec.Left, rec.Programmed, rec.Hairpin, rec.Ports = true, false, false, nil
	rec.Joined, rec.Reach, rec.Host, rec.Sandbox = false, false, nil, ""
	d.mu.Lock()
	e.joined, e.gone, e.beside = false, false, nil
	d.mu.Unlock()
	err := d.settle(ctx, e, rec)
	d.mu.Lock()
	d.regroup(e, "")
	d.mu.Unlock()
	d.share(n)
	return err
}
