package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// leaseTTL is for how long a host that has died seems to live. etcd adds up
	// to a second, and after an election starts anew.
	leaseTTL = 6 * time.Second
	// beat is how often a lease is renewed, and for how long an answer is
	// waited for, so that one member that hangs costs no lease.
	beat = leaseTTL / 4
	// relistTime bounds how long anything that a watch missed can go unnoticed:
	// one that hangs, or one whose cluster was made anew with lower revisions.
	relistTime = 5 * time.Minute

	minPause = 100 * time.Millisecond
	maxPause = 2 * time.Second
)

// Event is one change: a record as it is now, or one that is gone.
type Event struct {
	Record  // without a value if Deleted; Rev is that of the change
	Deleted bool
}

// Follow calls snapshot with all records whose key starts with prefix, then
// event for every change since, in order. When changes may have been missed,
// because etcd was away or has forgotten them, it goes on with another snapshot.
// It returns when ctx ends, or with [ErrClosed]. Both functions are called on
// the caller's goroutine, and hold up what comes next.
func (e *Etcd) Follow(ctx context.Context, prefix string, snapshot func([]Record), event func(Event)) error {
	return e.keepOn(ctx, "follow records "+prefix+"*", nil, func(ctx context.Context, works func()) error {
		list, rev, err := e.list(ctx, prefix)
		if err != nil {
			return err
		}
		works()
		snapshot(list)
		return e.watch(ctx, prefix, rev+1, event)
	})
}

// watch reports changes from a revision on, for relistTime at most.
func (e *Etcd) watch(ctx context.Context, prefix string, rev int64, event func(Event)) error {
	ctx, cancel := context.WithTimeout(ctx, relistTime)
	defer cancel()
	// A member that has lost the others would be followed in silence.
	ctx = clientv3.WithRequireLeader(ctx)
	for resp := range e.client.Watch(ctx, e.prefix+prefix, clientv3.WithPrefix(), clientv3.WithRev(rev)) {
		if err := resp.Err(); err != nil {
			return fmt.Errorf("etcd at %s: %w", e.at, err)
		}
		for _, ev := range resp.Events {
			event(Event{Record: e.record(ev.Kv.Key, ev.Kv.Value, ev.Kv.ModRevision), Deleted: ev.Type == mvccpb.DELETE})
		}
	}
	if ctx.Err() == nil {
		return fmt.Errorf("etcd at %s: the watch has ended", e.at)
	}
	return nil
}

// Alive keeps a record for as long as this process is there: on a lease, which
// runs out some seconds after the last sign of life. It returns when ctx ends,
// or with [ErrClosed], and leaves the record to the lease: a plugin that is
// started again within that time was never away.
//
// heard is called with the error when etcd does not answer any more, within two
// beats, and with nil when it does. It may be nil.
func (e *Etcd) Alive(ctx context.Context, key string, value []byte, heard func(error)) error {
	return e.keepOn(ctx, "keep record "+key+" alive", heard, func(ctx context.Context, works func()) error {
		return e.alive(ctx, e.prefix+key, value, works)
	})
}

// alive does so with one lease. When anything goes wrong the next one takes the
// record over, and the old one runs out without it.
func (e *Etcd) alive(ctx context.Context, key string, value []byte, works func()) error {
	first, stop := context.WithTimeout(ctx, beat)
	defer stop()
	var id clientv3.LeaseID
	if err := e.write(first, func(ctx context.Context) error {
		lease, err := e.client.Grant(ctx, int64(leaseTTL/time.Second))
		if err != nil {
			return err
		}
		id = lease.ID
		_, err = e.client.Put(ctx, key, string(value), clientv3.WithLease(id))
		return err
	}); err != nil {
		return err
	}
	works()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Not the client's KeepAlive: that would stay with a member that hangs for
	// longer than the lease lasts. Nor its KeepAliveOnce, which logs in again
	// each time, and turns in circles while there is no connection.
	hangs := time.AfterFunc(beat, func() { cancel(errSilent) })
	stream, err := etcdserverpb.NewLeaseClient(e.client.ActiveConnection()).LeaseKeepAlive(clientv3.WithRequireLeader(ctx))
	tick := time.NewTicker(beat)
	defer tick.Stop()
	for err == nil {
		hangs.Stop()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		hangs.Reset(beat)
		err = e.renew(ctx, stream, id, key)
	}
	return fmt.Errorf("etcd at %s: renew lease: %w", e.at, cmp.Or(context.Cause(ctx), err))
}

// Why another lease is needed.
var (
	errLease  = errors.New("it has run out, or its record was deleted")
	errSilent = errors.New("no answer")
)

// renew renews a lease, and looks whether its record is still there: somebody
// may have deleted what we have in etcd.
func (e *Etcd) renew(ctx context.Context, stream etcdserverpb.Lease_LeaseKeepAliveClient, id clientv3.LeaseID, key string) error {
	if err := stream.Send(&etcdserverpb.LeaseKeepAliveRequest{ID: int64(id)}); err != nil {
		return err
	}
	lease, err := stream.Recv()
	if err != nil {
		return err
	}
	have, err := e.client.Get(ctx, key, clientv3.WithKeysOnly())
	if err != nil {
		return err
	}
	if lease.TTL <= 0 || len(have.Kvs) == 0 || have.Kvs[0].Lease != int64(id) {
		return errLease
	}
	return nil
}

// keepOn repeats f until ctx ends. It tells once that f fails, and once that it
// works again, which f reports by calling works. heard, if there is one, is told, too.
func (e *Etcd) keepOn(ctx context.Context, what string, heard func(error), f func(ctx context.Context, works func()) error) error {
	failing, pause := false, minPause
	if heard == nil {
		heard = func(error) {}
	}
	works := func() {
		heard(nil)
		if failing {
			e.log.Info(what + ": works again")
		}
		failing, pause = false, minPause
	}
	for {
		err := f(ctx, works)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case e.client.Ctx().Err() != nil:
			return ErrClosed
		case err == nil:
			continue
		case !failing:
			failing = true
			e.log.WithError(err).Warn(what + ": fails, and is tried again")
			heard(err)
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
		pause = min(2*pause, maxPause)
	}
}
