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

	"github.com/weftnet/weft/internal/datapath"
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
	hosts map[string]*host
	dirty map[uint32]bool
	deaf  Deafness
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
	parts  map[uint32]Part
}

// NewTable returns a table that knows only the name of this host. What leads to
// a silent host stays for the grace time.
func NewTable(self string, grace time.Duration) *Table {
	return &Table{
		self: self, grace: grace, now: time.Now,
		mine: make(chan struct{}, 1), changed: make(chan struct{}, 1),
		own: map[uint32]own{}, hosts: map[string]*host{}, dirty: map[uint32]bool{},
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

// touch notes a change; mu is held.
func (t *Table) touch(vni uint32) {
	t.dirty[vni] = true
	wake(t.changed)
}

// tick is the next version or claim: the time, unless something as late has been
// seen. So they grow also when a clock is put back, on every host that hears of
// the others' (a hybrid logical clock). mu is held.
func (t *Table) tick() uint64 {
	t.floor = max(t.floor+1, uint64(max(t.now().UnixNano(), 0)))
	return t.floor
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
	p.Endpoints = slices.SortedFunc(slices.Values(p.Endpoints), func(a, b Endpoint) int { return slices.Compare(a.MAC[:], b.MAC[:]) })
	t.mu.Lock()
	defer t.mu.Unlock()
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

// Merge takes a part over, if it is newer than what is known. silent is for how
// long whoever passed it on has not heard of its host; it counts where this host
// does not hear it either, and the one who heard it last is right. A part of this host itself, from before a restart
// that forgot it, makes the next version later than that. fresh reports whether
// the part was taken over.
func (t *Table) Merge(p Part, silent time.Duration) (fresh bool, err error) {
	if err := p.check(); err != nil {
		return false, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.floor = max(t.floor, p.Version)
	for _, e := range p.Endpoints {
		t.floor = max(t.floor, e.Claim)
	}
	if p.Host == t.self {
		t.outdo(p)
		return false, nil
	}
	if !t.has(p.VNI) {
		return false, nil
	}
	h := t.hosts[p.Host]
	since := t.now().Add(-max(silent, 0))
	if h != nil && !h.silent.IsZero() && since.Sub(h.silent) > onTheWay {
		h.silent = since
	}
	if h == nil {
		h = &host{name: p.Name, silent: since, parts: map[uint32]Part{}}
	}
	if !h.silent.IsZero() && t.now().Sub(h.silent) >= t.grace {
		return false, nil
	}
	if old, ok := h.parts[p.VNI]; ok && old.Version >= p.Version {
		return false, nil
	}
	t.hosts[p.Host] = h
	h.name, h.parts[p.VNI] = p.Name, p
	t.touch(p.VNI)
	return true, nil
}

// onTheWay is for how long a message may have been under way. Without it, hosts
// that tell each other of a dead one would make it a little younger each time.
const onTheWay = 10 * time.Second

// outdo answers a part of this host that others have; mu is held.
func (t *Table) outdo(p Part) {
	o, ok := t.own[p.VNI]
	old := o.part
	switch {
	case ok && old.Version > p.Version, ok && old.Version == p.Version && old.same(p):
	case ok:
		t.put(old)
	case !p.Gone:
		t.put(Part{Host: t.self, Name: p.Name, VNI: p.VNI, Gone: true})
	}
}

// Heard says that a host is there.
func (t *Table) Heard(id, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if id == t.self {
		return
	}
	h := t.hosts[id]
	if h == nil {
		h = &host{parts: map[uint32]Part{}}
		t.hosts[id] = h
	}
	h.name = name
	if !h.silent.IsZero() {
		h.silent = time.Time{}
		t.touchAll(h)
	}
}

// Silent says that a host is not heard any more.
func (t *Table) Silent(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h := t.hosts[id]; h != nil && h.silent.IsZero() {
		h.silent = t.now()
		t.touchAll(h) // who is silent does not contest what it loses
	}
}

func (t *Table) touchAll(h *host) {
	for vni := range h.parts {
		t.touch(vni)
	}
}

// Expire forgets hosts that were silent for the grace time and returns their
// names. It forgets parts of this host that are Gone for as long, too: everyone
// who is there has them, and who comes back later with an older one is outdone
// by Merge.
func (t *Table) Expire() (names []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
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

// Known is a part and for how long its host has been silent.
type Known struct {
	Part   Part          `json:"part"`
	Silent time.Duration `json:"silent,omitempty"`
}

// Known are all parts, this host's own first.
func (t *Table) Known() []Known {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []Known
	for _, vni := range slices.Sorted(maps.Keys(t.own)) {
		list = append(list, Known{Part: t.own[vni].part})
	}
	for _, id := range slices.Sorted(maps.Keys(t.hosts)) {
		h := t.hosts[id]
		for _, p := range byVNI(h.parts) {
			list = append(list, Known{Part: p, Silent: h.quiet(t.now())})
		}
	}
	return list
}

func (h *host) quiet(now time.Time) time.Duration {
	if h.silent.IsZero() {
		return 0
	}
	return max(now.Sub(h.silent), 1)
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

// silentParts are the parts of networks whose hosts are not heard.
func (t *Table) silentParts(vnis []uint32) []Known {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []Known
	for _, h := range t.hosts {
		if h.silent.IsZero() {
			continue
		}
		for _, vni := range vnis {
			if p, ok := h.parts[vni]; ok {
				list = append(list, Known{Part: p, Silent: h.quiet(t.now())})
			}
		}
	}
	return list
}

// View is what the parts of a network mean together for this host.
type View struct {
	// VTEPs are the hosts that have the network: what has no single destination
	// goes to all of them.
	VTEPs []netip.Addr
	// Forwards are the MAC addresses of containers on other hosts.
	Forwards map[datapath.MAC]netip.Addr
	// Neighbours are the addresses of containers on other hosts.
	Neighbours map[netip.Addr]datapath.MAC
	// Conflicts are told to people, one line each.
	Conflicts []string
}

// claimant is an endpoint and whose it is.
type claimant struct {
	part     *Part
	name     string
	endpoint *Endpoint
	silent   bool
}

func (c claimant) beats(o claimant) bool {
	return cmp.Or(cmp.Compare(c.endpoint.Claim, o.endpoint.Claim), cmp.Compare(c.part.Host, o.part.Host)) > 0
}

// View works out what leads to the other hosts' endpoints of a network.
func (t *Table) View(vni uint32) View {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := View{Forwards: map[datapath.MAC]netip.Addr{}, Neighbours: map[netip.Addr]datapath.MAC{}}
	if !t.has(vni) {
		return v
	}
	own := t.own[vni].part
	byMAC, byAddr := map[datapath.MAC]claimant{}, map[netip.Addr]claimant{}
	add := func(p *Part, name string, silent bool) {
		for i := range p.Endpoints {
			c := claimant{part: p, name: name, endpoint: &p.Endpoints[i], silent: silent}
			contend(&v, byMAC, c.endpoint.MAC, c)
			for _, a := range c.endpoint.Addrs {
				contend(&v, byAddr, a, c)
			}
		}
	}
	add(&own, own.Name, false)
	for _, id := range slices.Sorted(maps.Keys(t.hosts)) {
		h := t.hosts[id]
		p, ok := h.parts[vni]
		if !ok || p.Gone {
			continue
		}
		if err := own.fits(p); err != nil {
			v.Conflicts = append(v.Conflicts, fmt.Sprintf("host %s has VNI %d with another %s", h.name, vni, err))
			if p.Port != own.Port || !slices.Equal(p.Subnets, own.Subnets) {
				continue
			}
		}
		if p.VTEP != own.VTEP && !slices.Contains(v.VTEPs, p.VTEP) {
			v.VTEPs = append(v.VTEPs, p.VTEP)
		}
		add(&p, h.name, !h.silent.IsZero())
	}
	for mac, c := range byMAC {
		if c.part.Host != t.self {
			v.Forwards[mac] = c.part.VTEP
		}
	}
	for a, c := range byAddr {
		if c.part.Host != t.self {
			v.Neighbours[a] = c.endpoint.MAC
		}
	}
	slices.SortFunc(v.VTEPs, netip.Addr.Compare)
	slices.Sort(v.Conflicts)
	v.Conflicts = slices.Compact(v.Conflicts)
	return v
}

// contend enters a claim; the later one wins. Between two hosts that are both
// heard that is worth a line: somebody gave one address to two containers.
func contend[K interface {
	comparable
	fmt.Stringer
}](v *View, best map[K]claimant, key K, c claimant) {
	old, ok := best[key]
	if !ok {
		best[key] = c
		return
	}
	win, lose := old, c
	if c.beats(old) {
		win, lose = c, old
	}
	best[key] = win
	if win.part.Host != lose.part.Host && !win.silent && !lose.silent {
		v.Conflicts = append(v.Conflicts, fmt.Sprintf("%s is claimed by host %s and by host %s; the later claim, that of %s, has it", key, old.name, c.name, win.name))
	}
}

// Addresses are all addresses of a network and where they are, those of this
// host among them.
func (t *Table) Addresses(vni uint32) map[netip.Addr]datapath.MAC {
	all := t.View(vni).Neighbours
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.own[vni].part.Endpoints {
		for _, a := range e.Addrs {
			if _, elsewhere := all[a]; !elsewhere {
				all[a] = e.MAC
			}
		}
	}
	return all
}

// Holder is the host, heard, that has an address of a network, if another than
// this one has it.
func (t *Table) Holder(vni uint32, a netip.Addr) (name string, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, h := range t.hosts {
		if !h.silent.IsZero() {
			continue
		}
		for _, e := range h.parts[vni].Endpoints {
			if slices.Contains(e.Addrs, a) {
				return h.name, true
			}
		}
	}
	return "", false
}

// Peer is one other host, for people.
type Peer struct {
	ID       string     `json:"id"`
	Name     string     `json:"name"`
	VTEP     netip.Addr `json:"vtep,omitzero"`
	Silent   time.Time  `json:"silent,omitzero"` // since when; absent while it is heard
	Networks []uint32   `json:"networks"`        // VNIs that both hosts have
}

// Peers are all other hosts that are known, by name.
func (t *Table) Peers() []Peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := []Peer{}
	for id, h := range t.hosts {
		p := Peer{ID: id, Name: h.name, Silent: h.silent, Networks: []uint32{}}
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
