package overlay

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/internal/store"
)

// What is in the store. One host writes the first two, its own; any host writes
// the third about another one, which deletes it.
//
//	overlay/part/VNI/HOST   a Part; deleted when the host leaves the network
//	overlay/alive/HOST      the host's name, on a lease
//	overlay/silent/HOST     since when a host that has parts is not alive
const (
	keys       = "overlay/"
	partKeys   = keys + "part/"
	aliveKeys  = keys + "alive/"
	silentKeys = keys + "silent/"
)

// records is what hosts write.
type records interface {
	List(ctx context.Context, prefix string) ([]store.Record, error)
	Put(ctx context.Context, r store.Record) (store.Record, error)
	Delete(ctx context.Context, key string) error
}

// feed is how they learn what others wrote, and who is there. Both go on until
// the context ends.
type feed interface {
	Follow(ctx context.Context, prefix string, snapshot func([]store.Record), event func(store.Event)) error
	Alive(ctx context.Context, key string, value []byte, heard func(error)) error
}

// EtcdConfig is what NewEtcd needs.
type EtcdConfig struct {
	Store interface {
		records
		feed
	}
	Table *Table
	Name  string // this host's name, for people
	Log   logrus.FieldLogger
}

// Etcd carries parts through a store that all hosts share.
//
// A part in the store has one writer and hangs on no lease: a host whose plugin
// is away goes on working. When it is gone for ever its parts stay, and nobody
// but an operator deletes them. So that a plugin that starts later does not
// wait a grace time for it again, hosts write down since when it is silent, once
// each time; the first to do so is right. (The host itself could write when it
// was last alive, but that is a write a minute for ever, into a store that keeps
// every old value until somebody compacts it.)
//
// While the store is away nothing changes: that is no sign about any host, and the
// Table says that it does not know.
type Etcd struct {
	EtcdConfig
	wake chan struct{} // capacity 1: there may be something to write

	chatter chatter // over lines that others can cause

	mu    sync.Mutex // over what follows; held while the Table is called, not during I/O
	ready bool       // there was a snapshot
	// known is what the store has, as far as this host has heard.
	known map[string]store.Record
	// parts are those of other hosts, by key, also the ones that were deleted,
	// with the versions that they were merged by.
	parts map[string]Part
	// refused has, by key, why parts of other hosts are not taken over that may be
	// later: the store says each only once.
	refused map[string]error
	// since is when hosts fell silent: those with parts that are not alive.
	since map[string]time.Time
	taken map[uint32]bool // networks of this host that parts were merged for
	// moves has, by key, how often the address of a part has changed.
	moves map[string]*turns
}

// NewEtcd returns an Engine for the Table.
func NewEtcd(c EtcdConfig) *Etcd {
	return &Etcd{
		EtcdConfig: c, wake: make(chan struct{}, 1), known: map[string]store.Record{},
		parts: map[string]Part{}, refused: map[string]error{}, since: map[string]time.Time{}, taken: map[uint32]bool{}, moves: map[string]*turns{},
	}
}

// Run implements Engine. What this host has of networks must have been Set
// before: what the store has beyond that is from a host that lost its state, and
// is deleted.
func (e *Etcd) Run(ctx context.Context) error {
	g, ctx2 := errgroup.WithContext(ctx)
	g.Go(func() error { return e.Store.Follow(ctx2, keys, e.snapshot, e.event) })
	g.Go(func() error { return e.Store.Alive(ctx2, aliveKeys+e.Table.self, []byte(e.Name), e.Table.Hears) })
	g.Go(func() error { return e.watchTable(ctx2) })
	g.Go(func() error { return e.write(ctx2) })
	if err := g.Wait(); ctx.Err() == nil {
		return err
	}
	return nil
}

// Ask implements Engine.
func (e *Etcd) Ask(ctx context.Context, vni uint32) ([]Part, error) {
	list, err := e.Store.List(ctx, fmt.Sprintf("%s%d/", partKeys, vni))
	if err != nil {
		return nil, fmt.Errorf("ask for network %d: %w", vni, err)
	}
	var parts []Part
	for _, r := range list {
		p, err := parsePart(r, latest(e.Table.now()))
		if err != nil {
			continue // it is told where it is followed
		}
		e.mu.Lock()
		dead := e.silence(p.Host) >= e.Table.grace
		e.mu.Unlock()
		if p.Host != e.Table.self && !dead {
			parts = append(parts, p)
		}
	}
	return parts, nil
}

func partKey(p Part) string { return fmt.Sprintf("%s%d/%s", partKeys, p.VNI, p.Host) }

// parsePart refuses a part that another host than its own has written.
func parsePart(r store.Record, until uint64) (p Part, err error) {
	if err = json.Unmarshal(r.Value, &p); err == nil && partKey(p) != r.Key {
		err = fmt.Errorf("it is about host %q and network %d", p.Host, p.VNI)
	}
	if err == nil {
		err = p.check(until)
	}
	if err != nil {
		return Part{}, fmt.Errorf("record %q: %w", r.Key, err)
	}
	p.Name = Plain(p.Name)
	return p, nil
}

// snapshot takes over all that is in the store, as changes to what was known.
func (e *Etcd) snapshot(list []store.Record) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ready = true
	left := maps.Clone(e.known)
	for _, r := range list {
		delete(left, r.Key)
	}
	for key := range left {
		e.apply(store.Event{Record: store.Record{Key: key}, Deleted: true})
	}
	// Who is there, and since when not, comes before what they have.
	for _, kind := range []string{silentKeys, aliveKeys, partKeys} {
		for _, r := range list {
			if strings.HasPrefix(r.Key, kind) {
				e.apply(store.Event{Record: r})
			}
		}
	}
	wake(e.wake)
}

func (e *Etcd) event(ev store.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if ev.Rev < e.known[ev.Key].Rev {
		return // this host has written since
	}
	e.apply(ev)
	wake(e.wake)
}

// apply takes over one change; mu is held.
func (e *Etcd) apply(ev store.Event) {
	old, had := e.known[ev.Key]
	e.known[ev.Key] = ev.Record
	if ev.Deleted {
		delete(e.known, ev.Key)
	} else if had && string(old.Value) == string(ev.Value) {
		return
	}
	if strings.HasPrefix(ev.Key, partKeys) {
		e.part(ev)
	} else if id, ok := strings.CutPrefix(ev.Key, aliveKeys); ok && id != e.Table.self && isID(id) {
		e.heard(id, string(ev.Value), !ev.Deleted)
	} else if id, ok := strings.CutPrefix(ev.Key, silentKeys); ok && id != e.Table.self && isID(id) && !ev.Deleted {
		e.silent(id, ev.Value)
	}
}

// heard takes over that a host is there, or is not any more; mu is held.
func (e *Etcd) heard(id, name string, there bool) {
	if !there {
		e.since[id] = e.Table.now()
		e.Table.Silent(id)
		return
	}
	delete(e.since, id)
	e.Table.Heard(id, name)
	e.mergeIf(func(p Part) bool { return p.Host == id }) // the Table may have forgotten them
}

// silent takes over since when a host is silent, if it is; mu is held.
func (e *Etcd) silent(id string, value []byte) {
	t, err := time.Parse(time.RFC3339, string(value))
	if err != nil {
		e.complain(fmt.Errorf("record %q is not a time: %w", silentKeys+id, err))
		return
	}
	if old, ok := e.since[id]; e.isAlive(id) || ok && old.Before(t) {
		return
	}
	e.since[id] = t
	e.mergeIf(func(p Part) bool { return p.Host == id })
}

// part takes over what a host has of a network; mu is held.
func (e *Etcd) part(ev store.Event) {
	old, had := e.parts[ev.Key]
	var p Part
	if ev.Deleted {
		delete(e.refused, ev.Key)
		delete(e.moves, ev.Key)
		if !had {
			return // our own, or broken
		}
		p = Part{Host: old.Host, Name: old.Name, VNI: old.VNI, Gone: true}
	} else {
		var err error
		if p, err = parsePart(ev.Record, latest(e.Table.now())); err != nil {
			if errors.Is(err, errAhead) {
				e.refuse(ev.Key, err)
				return
			}
			delete(e.refused, ev.Key) // it stays so until it is written anew
			e.complain(err)
			return
		}
	}
	e.noteMove(ev.Key, p)
	if p.Host == e.Table.self {
		delete(e.refused, ev.Key)
		_, _ = e.Table.Merge(p, 0) // it was checked
		return
	}
	// The store knows better than their versions which came later: a host that
	// left takes its last version with it, and its clock may be put back. What is
	// too far ahead was believed by another clock of ours.
	if had && old.Version <= latest(e.Table.now()) {
		p.Version = max(p.Version, old.Version+1)
	}
	if _, ok := e.since[p.Host]; !ok && !e.isAlive(p.Host) {
		e.since[p.Host] = e.Table.now()
	}
	e.parts[ev.Key] = p
	e.merge(p)
}

func (e *Etcd) isAlive(id string) bool {
	_, ok := e.known[aliveKeys+id]
	return ok
}

// silence is for how long a host has been silent; mu is held.
func (e *Etcd) silence(id string) time.Duration {
	if t, ok := e.since[id]; ok {
		return e.Table.now().Sub(t)
	}
	return 0
}

// merge tells the Table; mu is held.
func (e *Etcd) merge(p Part) {
	key := partKey(p)
	if _, err := e.Table.Merge(p, e.silence(p.Host)); err != nil {
		e.refuse(key, err)
		return
	}
	delete(e.refused, key)
}

// refuse notes that a part is not taken over, and tells it once; mu is held.
func (e *Etcd) refuse(key string, err error) {
	if _, told := e.refused[key]; !told {
		e.complain(err)
	}
	e.refused[key] = err
}

// again looks at what was refused: a clock may have been set, or others have left.
func (e *Etcd) again() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for key, err := range maps.Clone(e.refused) {
		switch r, ok := e.known[key]; {
		case !ok:
			delete(e.refused, key)
		case errors.Is(err, errAhead):
			e.part(store.Event{Record: r})
		default:
			e.merge(e.parts[key])
		}
	}
}

func (e *Etcd) complain(err error) {
	if !e.chatter.allows(e.Log) {
		return
	}
	hint := ""
	if errors.Is(err, errAhead) {
		hint = "; set the clocks of both, it is taken over then"
	}
	e.Log.WithError(err).Warn("what another host says is not taken over" + hint)
}

func (e *Etcd) mergeIf(f func(Part) bool) {
	for _, p := range e.parts {
		if f(p) {
			e.merge(p)
		}
	}
}

// watchTable follows what changes on this host, and the time.
func (e *Etcd) watchTable(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-e.Table.Mine():
			e.take()
			wake(e.wake)
		case <-tick.C:
			for _, name := range e.Table.Expire() {
				e.Log.WithField("host", name).Warnf("silent for %v, what leads to its containers is removed", e.Table.grace)
			}
			e.again()
		}
	}
}

// take merges what other hosts have of networks that are new here.
func (e *Etcd) take() {
	e.mu.Lock()
	defer e.mu.Unlock()
	had := e.taken
	e.taken = map[uint32]bool{}
	for _, p := range e.Table.Own() {
		if p.Gone {
			continue
		}
		e.taken[p.VNI] = true
	}
	e.mergeIf(func(p Part) bool { return e.taken[p.VNI] && !had[p.VNI] })
}

// write makes the store say what is so, as often as it takes.
func (e *Etcd) write(ctx context.Context) error {
	again := time.NewTicker(time.Second)
	defer again.Stop()
	last := ""
	for {
		soon := e.wake
		if e.hasTwin() { // or the two answer each other as fast as the store can write
			soon = nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-soon:
		case <-again.C:
		}
		text := ""
		if err := e.writeAll(ctx); err != nil && ctx.Err() == nil {
			if text = err.Error(); last == "" { // trouble is told once
				e.Log.WithError(err).Warn("other hosts do not learn of changes here, it is tried again")
			}
		}
		last = text
	}
}

func (e *Etcd) writeAll(ctx context.Context) error {
	puts, deletes := e.pending()
	for _, key := range deletes {
		if err := e.Store.Delete(ctx, key); err != nil {
			return err
		}
		e.mu.Lock()
		delete(e.known, key)
		e.mu.Unlock()
	}
	for _, r := range puts {
		r, err := e.Store.Put(ctx, r)
		if errors.Is(err, store.ErrExists) || errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNotFound) {
			continue // it is not as it was known, and what it is comes
		}
		if err != nil {
			return err
		}
		e.mu.Lock()
		if e.known[r.Key].Rev < r.Rev {
			e.known[r.Key] = r
		}
		e.mu.Unlock()
	}
	return nil
}

// pending is in what the store differs from what is so.
func (e *Etcd) pending() (puts []store.Record, deletes []string) {
	own := e.Table.Own()
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.ready {
		return nil, nil
	}
	want := func(key string, value []byte) {
		if have, ok := e.known[key]; !ok || string(have.Value) != string(value) {
			puts = append(puts, store.Record{Key: key, Value: value, Rev: have.Rev})
		}
	}
	gone := func(key string) {
		if _, ok := e.known[key]; ok {
			deletes = append(deletes, key)
		}
	}
	for _, p := range own {
		if p.Gone {
			gone(partKey(p))
		} else if value, err := json.Marshal(p); err == nil { // a Part has nothing that fails
			want(partKey(p), value)
		}
	}
	if e.isAlive(e.Table.self) {
		gone(silentKeys + e.Table.self)
	}
	for id, t := range e.since {
		// Not at once: a host that starts may be heard after its parts are.
		if _, ok := e.known[silentKeys+id]; !ok && e.hasParts(id) && e.silence(id) > time.Second {
			want(silentKeys+id, []byte(t.UTC().Format(time.RFC3339)))
		}
	}
	return puts, deletes
}

func (e *Etcd) hasParts(id string) bool {
	for _, p := range e.parts {
		if p.Host == id && !p.Gone {
			return true
		}
	}
	return false
}
