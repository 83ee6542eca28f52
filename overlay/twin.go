package overlay

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"
)

// twinPause is for how long two members may have one ID. They may be one host, at the
// address that it had before and at the one that it has.
const twinPause = 15 * time.Second

// twin is a member with this host's ID.
type twin struct {
	addr  string
	name  string
	since time.Time
}

// twinTrouble tells of hosts with one ID. Each undoes what the others say.
func twinTrouble(id string, since time.Time, places []string) Trouble {
	slices.Sort(places)
	return Trouble{
		Peer: "hosts " + strings.Join(places, " and "), Since: since.UTC(), Twin: true,
		Reason: fmt.Sprintf("they have one ID, %s, as one was copied from the other: `weft cluster new-id` on one of them, and start its plugin again", id),
	}
}

// twinsLocked are all hosts with one ID, this one among them; mu is held.
func (g *Gossip) twinsLocked() (list []Trouble) {
	for _, name := range slices.Sorted(maps.Keys(g.twins)) {
		if t := g.twins[name]; time.Since(t.since) > twinPause {
			list = append(list, twinTrouble(g.id, t.since, []string{place(g.name, g.bind.Addr().String()), place(t.name, t.addr)}))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(g.peers)) {
		p := g.peers[id]
		var places []string
		var since time.Time // since there were two
		for _, n := range p.nodes {
			if came := p.came[n.Name]; time.Since(came) > twinPause {
				places = append(places, place(nameOf(n, p.name), addrOf(n).Addr().String()))
				if came.After(since) {
					since = came
				}
			}
		}
		if len(places) > 1 {
			list = append(list, twinTrouble(id, since, places))
		}
	}
	return list
}

func place(name, addr string) string { return name + " at " + addr }

const (
	// mostTurns is how often a host's part may come to be of another address and back
	// within turnTime. A host that moves does so once.
	mostTurns = 3
	turnTime  = 2 * time.Minute
)

// turns counts how often a host's address changes, where parts come from a store and
// members are not seen.
type turns struct {
	addrs []netip.Addr // the last two
	times []time.Time  // of the last mostTurns changes
}

// note takes in the address of a part that came.
func (t *turns) note(a netip.Addr, now time.Time) {
	if n := len(t.addrs); n > 0 && t.addrs[n-1] == a {
		return
	} else if n > 0 {
		t.times = append(t.times, now)
	}
	t.addrs = append(t.addrs, a)
	t.addrs = t.addrs[max(0, len(t.addrs)-2):]
	t.times = t.times[max(0, len(t.times)-mostTurns):]
}

// twin reports whether these are two hosts, and since when.
func (t *turns) twin(now time.Time) (since time.Time, ok bool) {
	if len(t.times) < mostTurns || now.Sub(t.times[0]) > turnTime {
		return time.Time{}, false
	}
	return t.times[0], true
}

// nameOf is the host name that a member says.
func nameOf(n memberlist.Node, otherwise string) string {
	if m, ok := who(&n); ok {
		return m.Name
	}
	return otherwise
}

// noteMove looks for two hosts that write one record; mu is held.
func (e *Etcd) noteMove(key string, p Part) {
	t := e.moves[key]
	if t == nil {
		t = &turns{}
		e.moves[key] = t
	}
	now := e.Table.now()
	if own, ok := e.Table.part(e.Table.self, p.VNI); ok && p.Host == e.Table.self && !own.Gone {
		t.note(own.VTEP, now) // what this host wrote last does not come back to it
	}
	if !p.Gone {
		t.note(p.VTEP, now)
	}
}

// hasTwin reports whether another host writes what this one does.
func (e *Etcd) hasTwin() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for key, t := range e.moves {
		if _, ok := t.twin(e.Table.now()); ok && strings.HasSuffix(key, "/"+e.Table.self) {
			return true
		}
	}
	return false
}

// Troubles are hosts that write one record.
func (e *Etcd) Troubles() []Trouble {
	e.mu.Lock()
	defer e.mu.Unlock()
	found := map[string]Trouble{}
	for key, t := range e.moves {
		since, ok := t.twin(e.Table.now())
		id := key[strings.LastIndexByte(key, '/')+1:]
		if _, had := found[id]; !ok || had {
			continue
		}
		var places []string
		for _, a := range t.addrs {
			places = append(places, a.String())
		}
		found[id] = twinTrouble(id, since, places)
	}
	return slices.SortedFunc(maps.Values(found), func(a, b Trouble) int { return strings.Compare(a.Peer, b.Peer) })
}
