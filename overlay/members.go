package overlay

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"
)

// meta is what memberlist carries for us with each member.
type meta struct {
	Host string `json:"host"`
	Name string `json:"name"`
	// Passes says that it passes on what is for others. A host of an older release takes
	// that for its own.
	Passes bool `json:"passes,omitempty"`
}

// delegate is what memberlist calls.
type delegate struct{ *Gossip }

// NodeMeta is part of memberlist.Delegate.
func (g delegate) NodeMeta(int) []byte {
	b, _ := json.Marshal(meta{Host: g.id, Name: g.name, Passes: true}) // it cannot fail
	return b
}

// NotifyMsg is part of memberlist.Delegate.
func (g delegate) NotifyMsg(b []byte) {
	m, err := decode(b)
	switch {
	case errors.Is(err, errWire) && g.once("wire"):
		g.log.Warnf("another host has another release of weft and is not understood: %v", err)
		g.trouble("another release", "another host has a release of weft that is not understood here: "+err.Error())
	case err != nil:
		g.log.Debugf("gossip: %v", err)
	case m.To != "" && m.To != g.id:
		g.mu.Lock()
		defer g.mu.Unlock()
		g.passOn(m, b)
	default:
		g.receive(m)
	}
}

// GetBroadcasts is part of memberlist.Delegate.
func (g delegate) GetBroadcasts(_, _ int) [][]byte { return nil }

// LocalState is part of memberlist.Delegate.
func (g delegate) LocalState(bool) []byte {
	m := message{From: g.id, At: g.bind, Parts: g.table.Known()}
	b := m.encode()
	if len(b) > mostState {
		own := func(k Known) bool { return k.Part.Host != g.id }
		m.Parts = slices.DeleteFunc(m.Parts, own) // the others say theirs themselves
		b = m.encode()
	}
	return b
}

// MergeRemoteState is part of memberlist.Delegate.
func (g delegate) MergeRemoteState(b []byte, _ bool) { g.NotifyMsg(b) }

// mostNodes is how many members one host has: one for each address that it had
// not long ago.
const mostNodes = 8

// NotifyAlive is part of memberlist.AliveDelegate. memberlist keeps whoever it is
// told of, and forgets them only after a while.
func (g delegate) NotifyAlive(n *memberlist.Node) error {
	m, ok := who(n)
	if !ok {
		return errors.New("not a host's name")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	members := len(g.twins)
	for _, p := range g.peers {
		members += len(p.nodes)
	}
	p := g.peers[m.Host]
	known := p != nil && slices.ContainsFunc(p.nodes, func(o memberlist.Node) bool { return o.Name == n.Name })
	if !known && n.Name != memberName(g.id, g.bind.Addr()) && (members >= mostHosts || p != nil && len(p.nodes) >= mostNodes) {
		return fmt.Errorf("there are %d members already", members)
	}
	return nil
}

// NotifyJoin is part of memberlist.EventDelegate.
func (g delegate) NotifyJoin(n *memberlist.Node) {
	m, ok := who(n)
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case !ok || g.ended || n.Name == memberName(g.id, g.bind.Addr()):
		return
	case m.Host == g.id:
		g.twins[n.Name] = twin{addr: n.Addr.String(), name: m.Name, since: time.Now()}
		return
	}
	p := g.peers[m.Host]
	if p == nil {
		p = &peer{parts: map[uint32]*delivery{}, came: map[string]time.Time{}, direct: time.Now()}
		g.peers[m.Host] = p
	}
	if len(p.nodes) == 0 {
		p.direct = time.Now()
		p.greeted, p.query, p.asked = false, 0, map[uint32]uint64{}
		for _, d := range p.parts {
			d.tries, d.next = 0, time.Time{}
		}
		g.news = append(g.news, fmt.Sprintf("host %s, %s, is heard", m.Name, n.Addr))
	}
	p.nodes = append(p.nodes, *n)
	p.came[n.Name] = time.Now()
	p.name, p.passes, p.dirty = m.Name, m.Passes, true
	g.table.Heard(m.Host, m.Name)
	wake(g.wake)
}

// NotifyUpdate is part of memberlist.EventDelegate.
func (g delegate) NotifyUpdate(n *memberlist.Node) {
	m, ok := who(n)
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.peers[m.Host]; ok && p != nil && !g.ended {
		p.name, p.passes = m.Name, m.Passes
		g.table.Heard(m.Host, m.Name)
	}
}

// NotifyLeave is part of memberlist.EventDelegate. The host is silent when none
// of its members is there.
func (g delegate) NotifyLeave(n *memberlist.Node) {
	m, ok := who(n)
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.twins, n.Name)
	p := g.peers[m.Host]
	if !ok || p == nil || g.ended {
		return
	}
	delete(p.came, n.Name)
	p.nodes = slices.DeleteFunc(p.nodes, func(o memberlist.Node) bool { return o.Name == n.Name })
	if len(p.nodes) > 0 {
		p.dirty = true
		return
	}
	p.acks, p.answer, p.want, p.echo, p.loud, p.via = nil, 0, nil, nil, false, ""
	g.news = append(g.news, fmt.Sprintf("host %s, %s, is silent; its containers may go on", m.Name, n.Addr))
	g.table.Silent(m.Host)
	wake(g.wake)
	for q := range g.questions {
		q.leave(m.Host)
	}
}

// who reads what a member says of itself.
func who(n *memberlist.Node) (meta, bool) {
	var m meta
	if json.Unmarshal(n.Meta, &m) != nil || !isID(m.Host) || len(m.Name) > mostName || len(n.Name) > len(m.Host)+64 {
		return meta{}, false
	}
	m.Name = Plain(m.Name)
	return m, strings.HasPrefix(n.Name, m.Host+"@")
}
