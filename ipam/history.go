package ipam

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weftnet/weft/internal/store"
)

// Tenure is that somebody had an address for a time. Its JSON form is stable.
type Tenure struct {
	Version int          `json:"version"`
	Address netip.Addr   `json:"address"`
	Pool    netip.Prefix `json:"pool"`
	Space   string       `json:"space"`
	// As is gateway, auto, explicit (asked for by number) or named.
	As string `json:"as"`
	// Name is the container's, Endpoint the engine's ID; each where it is known.
	Name     string    `json:"name,omitempty"`
	Endpoint string    `json:"endpoint,omitempty"`
	MAC      string    `json:"mac,omitempty"`
	From     time.Time `json:"from"`
	To       time.Time `json:"to,omitzero"` // zero while it goes on

	void bool // nobody had it: the request failed
}

// Query is what is asked of the past. Zero fields ask for all.
type Query struct {
	Address netip.Addr `json:",omitzero"`
	Who     string     `json:",omitempty"` // a container's name, a MAC address, or the beginning of an endpoint's ID
	// Since and Until: who had it at any time in between.
	Since time.Time `json:",omitzero"`
	Until time.Time `json:",omitzero"`
}

const (
	historyPrefix = "history/"
	// mostHistory bounds how many tenures are kept, whatever their age: some 6 MB.
	mostHistory  = 20000
	historyBatch = 500 // in one transaction, so that nobody waits long for it
	historyPause = time.Hour
	historyLag   = time.Second // what is told of a tenure later is written so late; a restart tells it again
	shortID      = 12          // digits of an ID from which on it is one
)

func (t *Tenure) key() string {
	return fmt.Sprintf("%s%s/%019d", historyPrefix, t.Address, t.From.UnixNano())
}

func (t *Tenure) record() store.Record {
	v, err := json.Marshal(t)
	if err != nil {
		panic(err) // there is nothing in it that could not be encoded
	}
	return store.Record{Key: t.key(), Value: v}
}

// holding is an address of a pool.
type holding struct {
	poolKey
	addr netip.Addr
}

// history is who had which address. What has begun is open, in memory and on disk.
// The beginning and the end of a tenure are written with the address' own record;
// the rest is handed to the writer, for whom nobody waits.
type history struct {
	keep time.Duration // how long after its end a tenure is known; 0: nothing is kept
	wake chan struct{} // holds a token when there is something to write

	mu      sync.Mutex
	open    map[holding]*Tenure
	pending map[string][]byte // by key, what the writer has to write; nil: delete
	writing map[string]bool   // keys that the writer is writing
	count   int               // on disk, about
}

func newHistory(keep time.Duration) *history {
	return &history{keep: max(keep, 0), wake: make(chan struct{}, 1), open: map[holding]*Tenure{}, pending: map[string][]byte{}, writing: map[string]bool{}}
}

// keeps reports whether the history of a pool is kept: the leader of a swarm hands
// out addresses for hosts that keep their own.
func (h *history) keeps(k poolKey) bool { return h.keep > 0 && k.named() }

// begin opens a tenure and returns what is to be written with the record of the
// address.
func (h *history) begin(k poolKey, a netip.Addr, r addressRequest, now time.Time) (b store.Batch) {
	if !h.keeps(k) {
		return b
	}
	t := &Tenure{Version: recordVersion, Address: a, Pool: k.prefix, Space: k.space, As: string(r.kind), Name: r.who, From: now.UTC()}
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.open[holding{k, a}]; old != nil && old.key() != t.key() {
		if old.void { // it was not certain to have begun
			b.Delete = append(b.Delete, old.key())
		} else { // it could not be released, and somebody else has it now
			closed := *old
			closed.To = now.UTC()
			b.Set = append(b.Set, closed.record())
		}
		delete(h.pending, old.key())
	}
	h.open[holding{k, a}] = t
	h.count++
	b.Set = append(b.Set, t.record())
	return b
}

// refused ends a tenure whose beginning was not written, or perhaps not.
func (h *history) refused(k poolKey, a netip.Addr, unsure bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.open[holding{k, a}]
	switch {
	case t == nil:
	case unsure:
		t.void = true // until the record of the address is certainly gone
	default:
		delete(h.open, holding{k, a})
	}
}

// void has a tenure be none: a station of the LAN has the address.
func (h *history) void(k poolKey, a netip.Addr) { h.refused(k, a, true) }

// end returns what is to be written when the record of an address is deleted.
func (h *history) end(k poolKey, a netip.Addr, now time.Time) (b store.Batch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.open[holding{k, a}]
	if t == nil {
		return b
	}
	closed := *t
	closed.To = now.UTC()
	key := t.key()
	if t.void {
		b.Delete = append(b.Delete, key)
	} else {
		b.Set = append(b.Set, closed.record())
	}
	delete(h.pending, key)
	if h.writing[key] { // it may come after what is returned here
		h.note(b)
	}
	return b
}

// ended forgets a tenure whose end is written.
func (h *history) ended(k poolKey, a netip.Addr) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.open, holding{k, a})
}

// endPool ends all that is open in a pool that goes.
func (h *history) endPool(k poolKey, now time.Time) {
	h.mu.Lock()
	var open []netip.Addr
	for at := range h.open {
		if at.poolKey == k {
			open = append(open, at.addr)
		}
	}
	h.mu.Unlock()
	for _, a := range open {
		h.later(h.end(k, a, now))
		h.ended(k, a)
	}
}

// later has a batch be written without anybody waiting for it.
func (h *history) later(b store.Batch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.note(b)
}

// note hands a batch to the writer; h.mu is held.
func (h *history) note(b store.Batch) {
	for _, key := range b.Delete {
		h.pending[key] = nil
	}
	for _, r := range b.Set {
		h.pending[r.Key] = r.Value
	}
	if len(h.pending) > 0 {
		select {
		case h.wake <- struct{}{}:
		default:
		}
	}
}

// Assigned notes which endpoint, with which MAC address unless it is zero, has an
// address that was handed out.
func (i *IPAM) Assigned(prefix netip.Prefix, a netip.Addr, endpoint string, mac MAC) {
	h := i.history
	if h.keep == 0 {
		return
	}
	i.mu.RLock()
	var spaces []poolKey
	for k := range i.pools {
		if k.prefix == prefix && k.named() {
			spaces = append(spaces, k)
		}
	}
	i.mu.RUnlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	var t *Tenure
	for _, k := range spaces { // of several that have it, the one handed out last
		if o := h.open[holding{k, a}]; o != nil && (t == nil || t.From.Before(o.From)) {
			t = o
		}
	}
	text := ""
	if mac != (MAC{}) {
		text = net.HardwareAddr(mac[:]).String()
	}
	if t == nil || t.Endpoint == endpoint && t.MAC == text {
		return
	}
	t.Endpoint, t.MAC = endpoint, text
	h.note(store.Batch{Set: []store.Record{t.record()}})
}

// loadHistory reads what has not ended. What cannot be read is of no use to anybody,
// and no reason to hand out nothing.
func (i *IPAM) loadHistory(ctx context.Context) error {
	if i.history.keep == 0 {
		return nil
	}
	list, err := i.store.List(ctx, historyPrefix)
	if err != nil {
		return err
	}
	h := i.history
	h.mu.Lock()
	defer h.mu.Unlock()
	h.open, h.count = map[holding]*Tenure{}, len(list)
	for _, r := range list {
		if t := readTenure(r); t != nil && t.To.IsZero() {
			h.open[t.holding()] = t
		}
	}
	return nil
}

func (t *Tenure) holding() holding { return holding{poolKey{t.Space, t.Pool}, t.Address} }

// readTenure returns nil for what is none.
func readTenure(r store.Record) *Tenure {
	var t Tenure
	if json.Unmarshal(r.Value, &t) != nil || t.Version != recordVersion || t.key() != r.Key {
		return nil
	}
	return &t
}

// adopt opens the tenure of an address that was handed out when no history was kept.
func (h *history) adopt(k poolKey, a netip.Addr, rec addressRecord) {
	if !h.keeps(k) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.open[holding{k, a}] != nil {
		return
	}
	name := rec.Name
	if strings.HasPrefix(name, fixedPrefix) {
		name = ""
	}
	t := &Tenure{Version: recordVersion, Address: a, Pool: k.prefix, Space: k.space, As: string(rec.Kind), Name: name, From: rec.Created.UTC()}
	h.open[holding{k, a}] = t
	h.note(store.Batch{Set: []store.Record{t.record()}})
}

// writeHistory is the writer, and sweeps, until ctx ends.
func (i *IPAM) writeHistory(ctx context.Context) error {
	h := i.history
	every := time.NewTicker(historyPause)
	defer every.Stop()
	sweep := true
	for {
		if sweep {
			if err := i.sweepHistory(ctx); err != nil && ctx.Err() == nil {
				i.log.WithError(err).Debug("the history of addresses was not swept")
			}
			sweep = false
		}
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			return ignore(h.flush(last, i.store))
		case <-every.C:
			sweep = true
		case <-h.wake:
			select { // for more: requests wait for each commit
			case <-time.After(historyLag):
			case <-ctx.Done():
				continue
			}
			if h.flush(ctx, i.store) != nil {
				select { // the disk is full, or hangs
				case <-time.After(retryEvery):
				case <-ctx.Done():
				}
				h.later(store.Batch{}) // once more
			}
			h.mu.Lock()
			sweep = h.count > mostHistory+mostHistory/10
			h.mu.Unlock()
		}
	}
}

// ignore is for what fails at the very end.
func ignore(error) error { return nil }

// flush writes what is pending.
func (h *history) flush(ctx context.Context, s records) error {
	for {
		var b store.Batch
		h.mu.Lock()
		for key, v := range h.pending {
			if len(b.Set)+len(b.Delete) == historyBatch {
				break
			}
			if v == nil {
				b.Delete = append(b.Delete, key)
			} else {
				b.Set = append(b.Set, store.Record{Key: key, Value: v})
			}
			h.writing[key] = true
			delete(h.pending, key)
		}
		h.mu.Unlock()
		if len(b.Set)+len(b.Delete) == 0 {
			return nil
		}
		ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
		_, err := s.Write(ctx, b)
		cancel()
		h.mu.Lock()
		clear(h.writing)
		if err != nil {
			h.restore(b)
		}
		h.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// restore has a batch be pending again, but for what is newer; h.mu is held.
func (h *history) restore(b store.Batch) {
	for _, key := range b.Delete {
		if _, newer := h.pending[key]; !newer {
			h.pending[key] = nil
		}
	}
	for _, r := range b.Set {
		t := readTenure(r)
		_, newer := h.pending[r.Key]
		if open := h.open[t.holding()]; t.To.IsZero() && (open == nil || open.key() != r.Key) || newer {
			continue // it has ended meanwhile
		}
		h.pending[r.Key] = r.Value
	}
}

// sweepHistory deletes what is too old or too much, and ends what has no address any
// more: its pool went, or the process died over its release.
func (i *IPAM) sweepHistory(ctx context.Context) error {
	h, now := i.history, i.now()
	if h.keep == 0 {
		return i.store.DeletePrefix(ctx, historyPrefix)
	}
	i.endGone(now)
	list, err := i.store.List(ctx, historyPrefix)
	if err != nil {
		return err
	}
	var past []*Tenure
	var gone []string
	left := 0
	h.mu.Lock()
	for _, r := range list {
		t := readTenure(r)
		switch {
		case t == nil || !t.To.IsZero() && now.Sub(t.To) > h.keep:
			gone = append(gone, r.Key)
			continue
		case t.To.IsZero() && h.stale(t):
			t.To = now.UTC() // of a process that died
			h.note(store.Batch{Set: []store.Record{t.record()}})
			past = append(past, t)
		case !t.To.IsZero():
			past = append(past, t)
		}
		left++
	}
	h.mu.Unlock()
	slices.SortFunc(past, func(a, b *Tenure) int { return a.To.Compare(b.To) })
	for _, t := range past[:max(0, min(left-mostHistory, len(past)))] {
		gone = append(gone, t.key())
		left--
	}
	for batch := range slices.Chunk(gone, historyBatch) {
		if _, err := i.store.Write(ctx, store.Batch{Delete: batch}); err != nil {
			return err
		}
	}
	h.mu.Lock()
	h.count = left
	h.mu.Unlock()
	return h.flush(ctx, i.store)
}

// stale reports whether a tenure that is open on disk is not the one that goes on;
// h.mu is held.
func (h *history) stale(t *Tenure) bool {
	open, pending := h.open[t.holding()], h.pending[t.key()]
	return pending == nil && (open == nil || open.key() != t.key())
}

// endGone ends what is open of addresses that nobody has.
func (i *IPAM) endGone(now time.Time) {
	h := i.history
	h.mu.Lock()
	open := slices.Collect(maps.Keys(h.open))
	h.mu.Unlock()
	for _, at := range open {
		if at.shared() && !i.sharedLoaded() {
			continue
		}
		p := i.pool(at.poolKey)
		if p != nil {
			p.mu.Lock()
			has := p.taken.has(at.addr) && !p.foreign(at.addr) || p.busy[at.addr] != nil
			p.mu.Unlock()
			if has {
				continue
			}
		}
		h.later(h.end(at.poolKey, at.addr, now))
		h.ended(at.poolKey, at.addr)
	}
}

// sharedLoaded reports whether it is known which addresses of shared spaces this host
// has.
func (i *IPAM) sharedLoaded() bool {
	i.shared.mu.Lock()
	defer i.shared.mu.Unlock()
	return i.shared.loaded
}

var errNoHistory = errors.New("no history of addresses is kept: give the plugin the setting HISTORY=720h")

// History returns who had which addresses, the earliest first.
func (i *IPAM) History(ctx context.Context, q Query) ([]Tenure, error) {
	if err := i.ready(); err != nil {
		return nil, err
	}
	h := i.history
	if h.keep == 0 {
		return nil, errNoHistory
	}
	prefix := historyPrefix
	if q.Address.IsValid() {
		prefix += q.Address.String() + "/"
	}
	list, err := i.store.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	all := map[string]Tenure{}
	for _, r := range list {
		if t := readTenure(r); t != nil {
			all[r.Key] = *t
		}
	}
	h.mu.Lock()
	for key, v := range h.pending { // newer than the disk
		delete(all, key)
		if t := readTenure(store.Record{Key: key, Value: v}); v != nil && t != nil && strings.HasPrefix(key, prefix) {
			all[key] = *t
		}
	}
	h.mu.Unlock()
	out := []Tenure{}
	for _, t := range all {
		if t.is(q.Who) && (q.Until.IsZero() || !t.From.After(q.Until)) && (t.To.IsZero() || t.To.After(q.Since)) {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b Tenure) int { return cmp.Or(a.From.Compare(b.From), a.Address.Compare(b.Address)) })
	return out, nil
}

// is reports whether a tenure was that of a container, an endpoint or a MAC address.
func (t *Tenure) is(who string) bool {
	return who == "" || t.Name == who || strings.EqualFold(t.MAC, who) || len(who) >= shortID && strings.HasPrefix(t.Endpoint, who)
}
