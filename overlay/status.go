package overlay

import (
	"slices"
	"strings"
	"time"
)

// Status is what is known of the other hosts.
type Status struct {
	Peers     []Peer   `json:"peers"`
	Conflicts []string `json:"conflicts"`
	// Troubles are hosts that are no part of the cluster, or not all of it.
	Troubles []Trouble `json:"troubles"`
	// Deaf is there while it is not known which peers are: they are shown as
	// they were last.
	Deaf Deafness `json:"deaf,omitzero"`
}

// Status reports it.
func (c *Cluster) Status() Status {
	s := Status{Peers: c.table.Peers(), Conflicts: []string{}, Troubles: []Trouble{}, Deaf: c.table.deafness()}
	for i, p := range s.Peers {
		s.Peers[i].Tunnel = c.tunnels.of(p.ID)
	}
	s.Troubles = append(s.Troubles, c.tunnels.troubles(time.Now())...)
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.engine.(interface{ Indirect() map[string]time.Time }); ok {
		indirect := e.Indirect()
		for i, p := range s.Peers {
			s.Peers[i].Indirect = indirect[p.ID]
		}
	}
	if c.blocked.Reason != "" {
		s.Troubles = append(s.Troubles, c.blocked)
	}
	if e, ok := c.engine.(interface{ Troubles() []Trouble }); ok {
		for _, t := range e.Troubles() {
			// What a swarm named may be gone for good.
			if !t.seed || slices.Contains(c.c.Join.Peers, t.Peer) {
				s.Troubles = append(s.Troubles, t)
			}
		}
	}
	s.Troubles = append(s.Troubles, c.tight...)
	for _, n := range c.networks {
		s.Conflicts = append(s.Conflicts, n.conflicts...)
	}
	slices.SortFunc(s.Conflicts, strings.Compare)
	return s
}
