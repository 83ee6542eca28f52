package ipam

import (
	"context"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"
)

// cleanup is something that has to go and could not be deleted for certain.
type cleanup struct {
	pool *pool
	addr netip.Addr // zero: the whole pool
	busy *busy      // of the address
	// restore: the other way round, it has to be there and was deleted.
	restore bool
	names   []binding // instead: they have lost their address
}

const (
	retryEvery     = time.Second
	cleanupTimeout = 10 * time.Second
)

// later puts something on the list of Run. It may be called with a pool's
// lock held.
func (i *IPAM) later(c cleanup) {
	i.queueMu.Lock()
	i.queue = append(i.queue, c)
	i.queueMu.Unlock()
	select {
	case i.wake <- struct{}{}:
	default: // it is awake already
	}
}

// Run frees addresses and pools that could not be freed when they should have
// been, because the disk hung, failed or was full or the cluster was away,
// extends leases, and follows what other hosts do. It ends with ctx and returns nil. Without it
// nothing breaks, but those addresses stay taken.
func (i *IPAM) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	if i.feed != nil {
		g.Go(func() error { return i.follow(ctx) })
	}
	g.Go(func() error { return i.clean(ctx) })
	g.Go(func() error { return i.extend(ctx) })
	g.Go(func() error { return i.forsake(ctx) })
	g.Go(func() error { return i.writeHistory(ctx) })
	err := g.Wait()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if serr := i.saveBack(ctx); serr != nil {
		i.log.WithError(serr).Debug("which addresses were given back last was not written down")
	}
	return err
}

// clean works off the list.
func (i *IPAM) clean(ctx context.Context) error {
	for {
		select {
		case <-i.wake:
		case <-ctx.Done():
			return nil
		}
		for i.settle(ctx) > 0 {
			t := time.NewTimer(retryEvery)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return nil
			}
		}
	}
}

// settle tries everything on the list once and returns how much is left.
func (i *IPAM) settle(ctx context.Context) int {
	i.queueMu.Lock()
	todo := i.queue
	i.queue = nil
	i.queueMu.Unlock()
	for _, c := range todo {
		ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
		if err := i.settleOne(ctx, c); err != nil {
			i.log.WithField("pool", c.pool.prefix.String()).WithError(err).Debug("still cannot be freed, will try again")
		}
		cancel()
	}
	i.queueMu.Lock()
	defer i.queueMu.Unlock()
	return len(i.queue)
}

func (i *IPAM) settleOne(ctx context.Context, c cleanup) error {
	if c.names != nil {
		i.forgetNames(ctx, c.pool, c.names)
		return nil
	}
	if c.restore {
		err := i.restore(ctx, c)
		if err != nil {
			i.later(c)
		}
		return err
	}
	if !c.addr.IsValid() {
		release, err := i.change(ctx)
		if err == nil {
			defer release()
			err = i.leave(ctx, c.pool)
		}
		if err != nil {
			i.later(c)
		}
		return err
	}
	p := c.pool
	p.mu.Lock()
	if p.closed || p.busy[c.addr] != c.busy {
		p.mu.Unlock()
		return nil // gone with its pool, or somebody has taken the address over
	}
	b := &busy{done: make(chan struct{}), news: c.busy.news}
	p.busy[c.addr] = b
	p.mu.Unlock()
	return i.free(ctx, p, c.addr, b)
}
