package overlay

import (
	"maps"
	"slices"
	"time"
)

// Known is a part and for how long its host has been silent.
type Known struct {
	Part   Part          `json:"part"`
	Silent time.Duration `json:"silent,omitempty"`
	// Guessed says that Silent is only for how long a process has run that did not
	// hear the host: others may know better.
	Guessed bool `json:"guessed,omitempty"`
	// Unheard is not passed on: it is about who tells this one.
	Unheard bool `json:"unheard,omitempty"`
	// Saved is when this was written to disk. It is not passed on.
	Saved time.Time `json:"saved,omitzero"`
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
			list = append(list, Known{Part: p, Silent: h.quiet(t.now()), Guessed: h.guessed, Unheard: !h.heard})
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
				list = append(list, Known{Part: p, Silent: h.quiet(t.now()), Guessed: h.guessed})
			}
		}
	}
	return list
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
		if len(t.hosts) >= mostHosts {
			return
		}
		h = &host{parts: map[uint32]Part{}}
		t.hosts[id] = h
	}
	if !h.heard {
		h.heard = true
		t.touchAll(h) // its claims count from now on
	}
	if name = Plain(name); h.name != name {
		h.name = name
		t.touchAll(h)
	}
	if !h.silent.IsZero() {
		h.silent, h.guessed = time.Time{}, false
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

// Merge takes a part over, if it is newer than what is known. silent is for how
// long whoever passed it on has not heard of its host; it counts where this host
// does not hear it either, and the one who heard it last is right. A part of this host itself, from before a restart
// that forgot it, makes the next version later than that. fresh reports whether
// the part was taken over.
func (t *Table) Merge(p Part, silent time.Duration) (fresh bool, err error) {
	return t.merge(Known{Part: p, Silent: silent}, false)
}

// Restore merges what this host kept itself. It is checked as what others say:
// a file may hold what an older release believed. A host that was silent when this
// was saved has been ever since, or nobody here can know better; one that was heard
// may have fallen silent at any time.
func (t *Table) Restore(k Known) error {
	switch {
	case k.Silent == 0:
		k.Guessed = true
	case !k.Saved.IsZero():
		k.Silent += max(t.now().Sub(k.Saved), 0)
	}
	_, err := t.merge(k, !k.Unheard)
	return err
}

func (t *Table) merge(k Known, heard bool) (fresh bool, err error) {
	p, silent := k.Part, k.Silent
	p.Name = Plain(p.Name)
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	until := latest(now)
	if p.Host == t.self {
		until = max(until, t.issued) // nobody made that up
	}
	if err := p.check(until); err != nil {
		return false, err
	}
	if p.Host == t.self {
		t.outdo(p)
		return false, nil
	}
	if !t.has(p.VNI) {
		return false, nil
	}
	h := t.hosts[p.Host]
	since := now.Add(-max(silent, 0))
	if h == nil {
		h = &host{name: p.Name, silent: since, guessed: k.Guessed, heard: heard, parts: map[uint32]Part{}}
	}
	h.age(since, k.Guessed)
	if !h.silent.IsZero() && now.Sub(h.silent) >= t.grace {
		return false, nil
	}
	// What is too far ahead was believed by another clock, and is no newer. What a host
	// of an older release passed on lacks the ranges.
	if old, ok := h.parts[p.VNI]; ok && old.Version >= p.Version && old.Version <= until &&
		(old.Version > p.Version || len(old.Ranges) >= len(p.Ranges)) {
		return false, nil
	}
	if err := t.room(h, p); err != nil {
		return false, err
	}
	t.raise(Part{Endpoints: p.Endpoints})
	t.hosts[p.Host] = h
	if h.name != p.Name {
		h.name = p.Name
		t.touchAll(h)
	}
	h.parts[p.VNI] = p
	t.touchOther(p.VNI)
	return true, nil
}

// onTheWay is for how long a message may have been under way. Without it, hosts
// that tell each other of a dead one would make it a little younger each time.
const onTheWay = 10 * time.Second

// age takes in since when another has not heard a host, where this one does not
// hear it either. Who heard it last is right; who only began then, as a plugin
// that was restarted, knows nothing of the time before.
func (h *host) age(since time.Time, guessed bool) {
	switch {
	case h.silent.IsZero() || guessed:
	case h.guessed || since.Sub(h.silent) > onTheWay:
		h.silent, h.guessed = since, false
	}
}
