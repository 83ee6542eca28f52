package driver

import (
	"context"

	"golang.org/x/sync/errgroup"
)

const (
	// sweepers is how many deletions run side by side: each waits some 17 ms
	// for the kernel's grace periods and works for a fraction of one.
	sweepers = 16
	// mostWaste is how many may wait; one more is deleted by its own call.
	mostWaste = 1024
)

// waste is an endpoint that the engine has done with.
type waste struct{ network, endpoint string }

// later leaves an endpoint that has left to Sweep, where one runs: its
// sub-interface is back on the host, down, and nobody needs to wait until it is
// gone. One of mode passthru is alone on its parent and has to make room.
func (d *Driver) later(n *network, id string) bool {
	if !n.rec.onParent() || n.rec.Options.SubMode == "passthru" || !d.sweeping.Load() {
		return false
	}
	e := d.lock(n, id)
	if e == nil {
		return false
	}
	defer e.mu.Unlock()
	if !e.rec.Left {
		return false
	}
	select {
	case d.waste <- waste{n.rec.ID, id}:
	default:
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	e.doomed = true
	return true
}

// Sweep deletes what was left to it, until ctx ends and that is done. What it
// cannot delete the next pass does.
func (d *Driver) Sweep(ctx context.Context) error {
	d.sweeping.Store(true)
	var g errgroup.Group
	g.SetLimit(sweepers)
	begin := func(w waste) {
		g.Go(func() error {
			d.discard(ctx, w)
			return nil
		})
	}
	for {
		select {
		case w := <-d.waste:
			begin(w)
			continue
		case <-ctx.Done():
		}
		d.sweeping.Store(false)
		for len(d.waste) > 0 {
			begin(<-d.waste)
		}
		return g.Wait()
	}
}

func (d *Driver) discard(ctx context.Context, w waste) {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	n, unlock := d.find(w.network)
	defer unlock()
	if n == nil {
		return
	}
	d.mu.Lock()
	e := n.endpoints[w.endpoint]
	d.mu.Unlock()
	if e == nil {
		return
	}
	if err := d.finish(ctx, n, e); err != nil {
		d.log.WithField("network", w.network).WithField("endpoint", w.endpoint).WithError(err).Warn("not deleted yet")
	}
}
