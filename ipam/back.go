package ipam

import (
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft/internal/store"
)

// A container that is restarted gives its address back and asks for one, and
// before Docker 29 the engine does not say that it is the same one. What was
// given back only just now therefore goes before the lowest free address, which
// may be that of a container that was stopped some time ago.

// back is an address that was given back, with the station of its lease.
type back struct {
	addr netip.Addr
	key  string
	at   time.Time
	// start: given back for the engine's own start or stop, after which all its
	// containers come back.
	start bool
}

const (
	// backTime is how long a container's restart takes at most, mostly.
	backTime = 3 * time.Second
	// stopTime is how long before our end the engine began to stop containers
	// (its shutdown-timeout is 15 s), startTime how long it takes to see which
	// are gone that it has not stopped, and startedTime when all those that come
	// back by themselves have.
	stopTime    = 20 * time.Second
	startTime   = time.Minute
	startedTime = 2 * time.Minute
	// mostBack bounds how many are remembered in each pool.
	mostBack = 256
)

// nextFit reports whether addresses of a pool are handed out in turn: in a swarm
// others that hold one may not have heard yet that it is free, and hosts that
// share a space would all try the lowest at once.
func (k poolKey) nextFit() bool { return k.space == GlobalSpace || k.shared() }

// gaveBack notes that an address is free from now on; p.mu is held.
func (p *pool) gaveBack(b back) {
	if p.space == GlobalSpace {
		return
	}
	b.start = b.start || p.before.remove(b.addr) && b.at.Sub(p.started) < startTime
	p.backs = slices.DeleteFunc(p.backs, func(o back) bool {
		return o.addr == b.addr || !p.shared() && b.at.Sub(o.at) > startedTime
	})
	p.backs = append(p.backs[max(0, len(p.backs)+1-mostBack):], b)
}

// isBack reports whether an address was given back only just now, or for the
// engine's start. What this host had in a space that it shares it takes first in
// any case.
func (p *pool) isBack(b back, now time.Time) bool {
	return p.shared() || b.start && now.Sub(p.started) < startedTime || now.Sub(b.at) < backTime
}

// nextBack is the lowest address that was given back only just now and that no
// other host has; p.mu is held.
func (p *pool) nextBack(r addressRequest, first, last netip.Addr, now time.Time) (a netip.Addr, ok bool) {
	for _, b := range p.backs {
		if b.addr.Less(first) || last.Less(b.addr) || p.taken.either.has(b.addr) || !p.isBack(b, now) {
			continue
		}
		if (!ok || b.addr.Less(a)) && !r.elsewhere(b.addr) {
			a, ok = b.addr, true
		}
	}
	return a, ok
}

// keyBack is the station whose lease was given back only just now, the lowest of
// several; p.mu is held.
func (p *pool) keyBack(now time.Time) (key string, ok bool) {
	for _, b := range p.backs {
		if b.key == "" || p.keys[b.key] || !p.isBack(b, now) {
			continue
		}
		if !ok || len(b.key) < len(key) || len(b.key) == len(key) && b.key < key {
			key, ok = b.key, true
		}
	}
	return key, ok
}

// backRecord is what was given back for the engine's stop, over the restart of
// this process: addresses with the stations of their leases, by pool.
type backRecord struct {
	Version int
	Pools   map[string]map[netip.Addr]string
}

const backKey = "ipam/back"

// saveBack writes down what was given back just before the end of this process, if
// that is the engine's, too: that gives back all.
func (i *IPAM) saveBack(ctx context.Context) error {
	rec := backRecord{Version: recordVersion, Pools: map[string]map[netip.Addr]string{}}
	i.mu.RLock()
	for k, p := range i.pools {
		p.mu.Lock()
		for _, b := range p.backs {
			if p.chosen.len() > 0 || len(p.leased) > 0 || p.taken.has(b.addr) || i.now().Sub(b.at) > stopTime {
				continue
			}
			id := poolID{poolKey: k}.String()
			if rec.Pools[id] == nil {
				rec.Pools[id] = map[netip.Addr]string{}
			}
			rec.Pools[id][b.addr] = b.key
		}
		p.mu.Unlock()
	}
	i.mu.RUnlock()
	if len(rec.Pools) == 0 {
		return nil
	}
	v, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	rev, err := i.revision(ctx, backKey)
	if err != nil {
		return err
	}
	_, err = i.store.Put(ctx, store.Record{Key: backKey, Value: v, Rev: rev})
	return err
}

// loadBack reads that again, once.
func (i *IPAM) loadBack(ctx context.Context) error {
	list, err := i.store.List(ctx, backKey)
	if err != nil || len(list) == 0 {
		return err
	}
	var rec backRecord
	if err := decode(backKey, list[0].Value, &rec, &rec.Version); err != nil {
		i.log.WithError(err).Warn("which addresses were given back last is not known: containers that start may have others than before")
	} else {
		i.left = rec.Pools
	}
	return i.store.Delete(ctx, backKey)
}

// recall has a pool that was read know what was given back before; nobody else
// knows p.
func (i *IPAM) recall(p *pool) {
	p.started = i.started
	for a, key := range i.left[poolID{poolKey: p.poolKey}.String()] {
		if p.prefix.Contains(a) {
			p.gaveBack(back{addr: a, key: key, at: i.started.Add(-backTime), start: true})
		}
	}
}
