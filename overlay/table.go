package overlay

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Engine carries parts between hosts.
type Engine interface {
	// Run keeps the parts of this host known to the others, and merges theirs
	// into the Table, until ctx ends. What it cannot do now, because nobody is
	// reachable, it does later.
	Run(ctx context.Context) error
	// Ask returns what others have of a network that this host may not have yet.
	// It returns early when all who are there have answered.
	Ask(ctx context.Context, vni uint32) ([]Part, error)
}

// Table is what all hosts have of the networks that this one has. Its methods
// may be called concurrently; mu is held for none of the channels' readers.
type Table struct {
	self  string // this host's ID
	grace time.Duration
	now   func() time.Time

	mine    chan struct{} // capacity 1: this host's parts changed
	changed chan struct{} // capacity 1: networks are in dirty

	mu    sync.Mutex // over what follows
	own   map[uint32]own
	floor uint64 // no version or claim of ours may be as low
	// issued is the last version or claim of ours, whatever the clock said then.
	issued uint64
	last   int64 // the clock, when it was last looked at
	// restarted is when versions began anew, last.
	restarted time.Time
	hosts     map[string]*host
	dirty     map[uint32]bool
	// holders is by VNI what index returns, made when it is first asked for after a
	// change of another host.
	holders map[uint32]map[netip.Addr]string
	deaf    Deafness
	former  map[uint32]*former // by VNI, where Keep was called
}

// Deafness is why it is not known which other hosts are there, and since when.
type Deafness struct {
	Since time.Time `json:"since,omitzero"` // zero: it is known
	Error string    `json:"error,omitempty"`
}

// own is this host's part of a network.
type own struct {
	part Part
	turn uint64    // the version with which the network came or went
	at   time.Time // when that was
}

type host struct {
	name   string
	silent time.Time // since when; zero while it is heard
	// guessed says that silent is when this process began: it has not heard the host
	// since, and does not know when it was heard last.
	guessed bool
	heard   bool // it was, or is: not all that is known of it came by others
	parts   map[uint32]Part
}

// What others say is bounded. Whoever is let in may say anything, and without a
// password everybody is.
const (
	mostHosts     = 4096
	mostUnheard   = 256     // of them those that others only tell of
	mostRemote    = 1 << 16 // endpoints of one network, those of hosts that were heard
	mostHearsay   = 1 << 12 // those of hosts that never were
	mostWithdrawn = 256     // networks of this host that only others know of
)

// NewTable returns a table that knows only the name of this host. What leads to
// a silent host stays for the grace time.
func NewTable(self string, grace time.Duration) *Table {
	return &Table{
		self: self, grace: grace, now: time.Now,
		mine: make(chan struct{}, 1), changed: make(chan struct{}, 1),
		own: map[uint32]own{}, hosts: map[string]*host{}, dirty: map[uint32]bool{}, holders: map[uint32]map[netip.Addr]string{}, former: map[uint32]*former{}, last: time.Now().UnixNano(),
	}
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Mine wakes one reader, the Engine, after parts of this host have changed.
func (t *Table) Mine() <-chan struct{} { return t.mine }

// Changed wakes one reader after something about other hosts has changed; Dirty
// then says in which networks.
func (t *Table) Changed() <-chan struct{} { return t.changed }

// Dirty returns the networks that have changed since it was last called.
func (t *Table) Dirty() []uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := slices.Sorted(maps.Keys(t.dirty))
	clear(t.dirty)
	return list
}

// touch notes a change, also of this host itself; mu is held.
func (t *Table) touch(vni uint32) {
	t.dirty[vni] = true
	wake(t.changed)
}

// tick is the next version or claim: the time, unless something as late has been
// seen. So they grow also when a clock is put back, on every host that hears of
// the others' (a hybrid logical clock). mu is held.
func (t *Table) tick() uint64 {
	now := t.now().UnixNano()
	t.last = max(t.last, now)
	t.floor = max(t.floor+1, uint64(max(now, 0)))
	t.issued = max(t.issued, t.floor)
	return t.floor
}

// raise makes the next version or claim later than those of a part that was
// checked; mu is held.
func (t *Table) raise(p Part) {
	t.floor = max(t.floor, p.Version)
	for _, e := range p.Endpoints {
		t.floor = max(t.floor, e.Claim)
	}
}

// restartPause is between two attempts to be believed again.
const restartPause = time.Minute

// restart begins anew with versions when the clock was put back so far that
// others, whose clock was right before, refuse those that go on; mu is held. If it
// is wrong only now, they say which version they have, and [Table.outdo] goes on
// after that. Others who say so may be wrong themselves, and be mended later: it
// begins anew from time to time, until all believe what it says.
func (t *Table) restart() {
	now := t.now()
	back := now.UnixNano() < t.last
	t.last = now.UnixNano()
	if t.floor <= latest(now) || !back && now.Sub(t.restarted) < restartPause {
		return
	}
	t.floor, t.restarted = 0, now
	for _, o := range t.own {
		t.put(believable(o.part, latest(now)))
	}
}

// believable makes claims the oldest of all that other hosts would refuse: the
// clock was wrong when they were made.
func believable(p Part, until uint64) Part {
	p.Endpoints = slices.Clone(p.Endpoints)
	for i := range p.Endpoints {
		if p.Endpoints[i].Claim > until {
			p.Endpoints[i].Claim = 1
		}
	}
	return p
}

// Claim is later than every claim that this host has seen.
func (t *Table) Claim() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tick()
}

// Set says what this host has of a network. Host and Version are filled in.
func (t *Table) Set(p Part) {
	p.Host = t.self
	p.Endpoints = sorted(p.Endpoints)
	t.mu.Lock()
	defer t.mu.Unlock()
	if f := t.former[p.VNI]; f != nil {
		p = f.join(p)
	}
	p = believable(p, latest(t.now()))
	if old, ok := t.own[p.VNI]; ok && old.part.same(p) {
		return
	}
	t.put(p)
}

// put is Set with mu held.
func (t *Table) put(p Part) {
	p.Version = t.tick()
	o, ok := t.own[p.VNI]
	if !ok || o.part.Gone != p.Gone {
		o.turn, o.at = p.Version, t.now()
	}
	o.part = p
	t.own[p.VNI] = o
	if p.Gone { // the others' parts are no longer kept
		for _, h := range t.hosts {
			delete(h.parts, p.VNI)
		}
		delete(t.holders, p.VNI)
		delete(t.former, p.VNI)
	}
	t.touch(p.VNI)
	wake(t.mine)
}

// Own are the parts of this host, also those that are Gone since less than the
// grace time.
func (t *Table) Own() []Part {
	var list []Part
	for _, o := range t.owned() {
		list = append(list, o.part)
	}
	return list
}

// owned are the parts of this host and since which version they are there or
// gone.
func (t *Table) owned() []own {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.SortedFunc(maps.Values(t.own), func(a, b own) int { return cmp.Compare(a.part.VNI, b.part.VNI) })
}

func byVNI(m map[uint32]Part) []Part {
	return slices.SortedFunc(maps.Values(m), func(a, b Part) int { return cmp.Compare(a.VNI, b.VNI) })
}

// has reports whether this host has the network; mu is held.
func (t *Table) has(vni uint32) bool {
	o, ok := t.own[vni]
	return ok && !o.part.Gone
}

// room refuses what is more than a network or a cluster can have; mu is held.
func (t *Table) room(h *host, p Part) error {
	if t.hosts[p.Host] == nil {
		unheard := 0
		for _, o := range t.hosts {
			if !o.heard {
				unheard++
			}
		}
		if len(t.hosts) >= mostHosts || !h.heard && unheard >= mostUnheard {
			return fmt.Errorf("part of %s: there are %d other hosts already, %d of which this one has never heard", p.Host, len(t.hosts), unheard)
		}
	}
	if len(p.Endpoints) <= len(h.parts[p.VNI].Endpoints) {
		return nil
	}
	most, n := mostRemote, len(p.Endpoints)
	if !h.heard {
		most = mostHearsay
	}
	for _, o := range t.hosts {
		if o != h && o.heard == h.heard {
			n += len(o.parts[p.VNI].Endpoints)
		}
	}
	if n > most {
		return fmt.Errorf("part of %s: network %d would have %d endpoints on other hosts, of %d at most", p.Host, p.VNI, n, most)
	}
	return nil
}

// outdo answers a part of this host that others have; mu is held.
func (t *Table) outdo(p Part) {
	o, ok := t.own[p.VNI]
	old := o.part
	if len(p.Ranges) == 0 { // as a host of an older release gives it back, every 15 s
		p.Ranges = old.Ranges
	}
	switch {
	case ok && old.Version > p.Version && t.recall(o, p):
	case ok && old.Version > p.Version, ok && old.Version == p.Version && old.same(p):
	case ok:
		t.raise(p)
		t.put(old)
	case !p.Gone && t.withdrawn() < mostWithdrawn:
		t.raise(p)
		t.put(Part{Host: t.self, Name: p.Name, VNI: p.VNI, Gone: true})
	}
}

// withdrawn is how many networks this host says it does not have; mu is held.
func (t *Table) withdrawn() (n int) {
	for _, o := range t.own {
		if o.part.Gone {
			n++
		}
	}
	return n
}

func (t *Table) touchAll(h *host) {
	for vni := range h.parts {
		t.touchOther(vni)
	}
}

// Expire forgets hosts that were silent for the grace time and returns their
// names. It forgets parts of this host that are Gone for as long, too: everyone
// who is there has them, and who comes back later with an older one is outdone
// by Merge.
func (t *Table) Expire() (names []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.restart()
	for vni, o := range t.own {
		if o.part.Gone && t.now().Sub(o.at) >= t.grace {
			delete(t.own, vni)
		}
	}
	for id, h := range t.hosts {
		if h.silent.IsZero() || t.now().Sub(h.silent) < t.grace {
			continue
		}
		t.touchAll(h)
		delete(t.hosts, id)
		names = append(names, cmp.Or(h.name, id))
	}
	slices.Sort(names)
	return names
}

// Holders are the hosts that have a network, this one not among them.
func (t *Table) Holders(vni uint32) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var ids []string
	for id, h := range t.hosts {
		if p, ok := h.parts[vni]; ok && !p.Gone {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// part is what a host has of a network, as far as is known here.
func (t *Table) part(id string, vni uint32) (Part, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if id == t.self {
		o, ok := t.own[vni]
		return o.part, ok
	}
	h := t.hosts[id]
	if h == nil {
		return Part{}, false
	}
	p, ok := h.parts[vni]
	return p, ok
}

// partsOf are the parts of one host.
func (t *Table) partsOf(id string) []Part {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h := t.hosts[id]; h != nil {
		return byVNI(h.parts)
	}
	return nil
}

// networks are those that a host has, of those that this one has.
func (t *Table) networks(id string) map[uint32]bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := map[uint32]bool{}
	if h := t.hosts[id]; h != nil {
		for vni, p := range h.parts {
			if !p.Gone {
				list[vni] = true
			}
		}
	}
	return list
}

// knows reports whether anything is known of a host.
func (t *Table) knows(id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.hosts[id] != nil
}

// Peer is one other host, for people.
type Peer struct {
	ID      string     `json:"id"`
	Name    string     `json:"name"`
	VTEP    netip.Addr `json:"vtep,omitzero"`
	Unheard bool       `json:"unheard,omitempty"` // others told of it, and this host never heard it
	Silent  time.Time  `json:"silent,omitzero"`   // since when; absent while it is heard
	// Indirect is since when no packet of it answers one of this host, while others, or
	// streams, show that it is there.
	Indirect time.Time `json:"indirect,omitzero"`
	Tunnel   *Tunnel   `json:"tunnel,omitempty"` // absent while it is silent or no network is common
	Networks []uint32  `json:"networks"`         // VNIs that both hosts have
}

// Peers are all other hosts that are known, by name.
func (t *Table) Peers() []Peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := []Peer{}
	for id, h := range t.hosts {
		p := Peer{ID: id, Name: h.name, Silent: h.silent, Unheard: !h.heard, Networks: []uint32{}}
		for _, part := range byVNI(h.parts) {
			if !part.Gone {
				p.VTEP, p.Networks = part.VTEP, append(p.Networks, part.VNI)
			}
		}
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b Peer) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return list
}

// Hears is told by the Engine when it can hear of other hosts, with nil, or of
// none any more, and why.
func (t *Table) Hears(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case err == nil:
		t.deaf = Deafness{}
	case t.deaf.Since.IsZero():
		t.deaf = Deafness{t.now().UTC(), err.Error()}
	}
}

func (t *Table) deafness() Deafness {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.deaf
}
