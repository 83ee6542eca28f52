package overlay

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Trouble is why another host is no part of the cluster, or not all of it.
type Trouble struct {
	Peer   string    `json:"peer"` // as the settings name it, or its address or ID
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
	// Twin says that it is about two hosts with one ID.
	Twin bool `json:"twin,omitempty"`

	last time.Time
	seed bool // it is about a peer that was named
}

const (
	mostTroubles = 64
	// troubleAge is for how long one is shown that does not show again. Hosts
	// repeat what is not confirmed every few seconds; with several hundred of
	// them, each tries those that are missing once in a minute.
	troubleAge = 2 * time.Minute
)

// trouble notes one. mu is not held.
func (g *Gossip) trouble(peer, reason string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.noteTrouble(peer, reason).seed = false
}

// noteTrouble is trouble with mu held.
func (g *Gossip) noteTrouble(peer, reason string) *Trouble {
	now := time.Now()
	t := g.troubles[peer]
	if t == nil || t.Reason != reason {
		if t == nil && len(g.troubles) >= mostTroubles {
			g.pruneTroubles()
		}
		if t == nil && len(g.troubles) >= mostTroubles {
			return &Trouble{} // there is enough to do
		}
		t = &Trouble{Peer: peer, Reason: reason, Since: now.UTC()}
		g.troubles[peer] = t
	}
	t.last = now
	return t
}

// missing notes which of the peers that were named are no members, and why.
func (g *Gossip) missing(there map[netip.AddrPort]bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for text, s := range g.seeds {
		reason := "its name cannot be looked up"
		if s.failed != "" {
			reason += ": " + s.failed
		} else if !s.at.IsZero() {
			reason = "its name has no address of the family that this host's has, " + g.bind.Addr().String()
		}
		for _, a := range s.addrs {
			if there[a] {
				reason = ""
				break
			}
			reason = fmt.Sprintf("it does not answer at %s, tcp and udp: does weft run there, and is the port open?", a)
			if t := g.troubles[a.Addr().String()]; t != nil && t.Reason == otherPassword && time.Since(t.last) < troubleAge {
				reason = otherPassword
				break
			}
		}
		if reason == "" {
			delete(g.troubles, text)
			continue
		}
		g.noteTrouble(text, reason).seed = true
	}
}

// refuse tells that something of a message was not taken over.
func (g *Gossip) refuse(m message, err error) {
	about := "host " + m.From
	g.mu.Lock()
	if p := g.peers[m.From]; p != nil && p.name != "" {
		about = "host " + p.name
	}
	g.mu.Unlock()
	g.trouble(about, err.Error())
	if g.once("part " + m.From) {
		hint := ""
		if errors.Is(err, errAhead) {
			hint = "; set the clocks of both, it is taken over then"
		}
		g.log.Warnf("%s says what is not taken over: %v%s", about, err, hint)
	}
}

// pruneTroubles forgets those that do not show any more; mu is held.
func (g *Gossip) pruneTroubles() {
	maps.DeleteFunc(g.troubles, func(_ string, t *Trouble) bool { return time.Since(t.last) > troubleAge })
}

// Troubles are those that there are now.
func (g *Gossip) Troubles() []Trouble {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pruneTroubles()
	var list []Trouble
	for _, t := range g.troubles {
		list = append(list, *t)
	}
	list = append(list, g.twinsLocked()...)
	slices.SortFunc(list, func(a, b Trouble) int { return cmp.Compare(a.Peer, b.Peer) })
	return list
}
