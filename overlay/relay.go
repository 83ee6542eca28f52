package overlay

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/hashicorp/memberlist"
)

// Two members may not reach each other: a firewall between them drops packets, or a
// route is missing. memberlist holds each for alive, as a third says so. What one says
// to the other is then passed on by a third too, after a few attempts that were not
// confirmed.

const (
	// probeInterval is between two looks at members. Each is looked at once in a round
	// of all members.
	probeInterval = 600 * time.Millisecond
	// directRounds is for how many rounds no answer may come until that is told. With
	// 30 % of all packets lost half of the answers are missing.
	directRounds = 6
	directLeast  = 8 * time.Second

	// detours is how many others pass a message on.
	detours = 2
	// mostPassing is how many messages wait to be passed on. Who sent them sends them
	// again.
	mostPassing = 256
)

// letter is what goes to a member.
type letter struct {
	id   string
	to   memberlist.Node
	body []byte
	both bool // by packet and by stream
}

// NotifyPingComplete is part of memberlist.PingDelegate: a packet of ours was answered
// without anybody's help.
func (g delegate) NotifyPingComplete(n *memberlist.Node, _ time.Duration, _ []byte) {
	m, ok := who(n)
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.peers[m.Host]; ok && p != nil {
		p.direct = time.Now()
	}
}

// AckPayload is part of memberlist.PingDelegate.
func (g delegate) AckPayload() []byte { return nil }

// directLimit is how old the last direct answer of a member may be; mu is held.
func (g *Gossip) directLimit() time.Duration {
	n := 0
	for _, p := range g.peers {
		n += len(p.nodes)
	}
	return directLeast + time.Duration(n)*directRounds*probeInterval
}

// Indirect are the hosts that are there and do not answer packets of this host, or
// whose answers do not arrive, and since when.
func (g *Gossip) Indirect() map[string]time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	list, limit := map[string]time.Time{}, g.directLimit()
	for id, p := range g.peers {
		if len(p.nodes) > 0 && time.Since(p.direct) > limit {
			list[id] = p.direct.UTC()
		}
	}
	return list
}

// detours are copies of a message for others to pass on: where it is stuck, and where
// it answers what came that way; mu is held.
func (g *Gossip) detours(m message, to, via string, stuck bool) (list []letter) {
	ways := []string{via}
	if stuck {
		ways = append(ways, g.between(to)...)
	}
	slices.Sort(ways)
	for _, id := range slices.Compact(ways) {
		if p := g.peers[id]; p != nil && len(p.nodes) > 0 && id != to {
			m.To, m.Via = to, id
			list = append(list, letter{id, p.nodes[len(p.nodes)-1], m.encode(), false})
		}
	}
	return list
}

// between chooses members that may reach another one; mu is held.
func (g *Gossip) between(to string) (ids []string) {
	limit := g.directLimit()
	for id, p := range g.peers {
		if id != to && len(p.nodes) > 0 && p.passes && time.Since(p.direct) <= limit {
			ids = append(ids, id)
		}
	}
	rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
	return ids[:min(len(ids), detours)]
}

// passOn hands a message to the member that it is for, as it is; mu is held. It comes
// from a member, and goes no further.
func (g *Gossip) passOn(m message, b []byte) {
	from, to := g.peers[m.From], g.peers[m.To]
	if g.ended || m.Via != g.id || m.From == m.To || from == nil || len(from.nodes) == 0 || to == nil || len(to.nodes) == 0 || len(g.passing) >= mostPassing {
		return
	}
	g.passing = append(g.passing, letter{m.To, to.nodes[len(to.nodes)-1], bytes.Clone(b), false})
	wake(g.wake)
}
