package overlay

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/datapath"
)

// That a host is heard says nothing about the tunnels' port, which a firewall may
// close. So hosts say something through the tunnels too, and which others they hear
// there. Through one tunnel to each host: the others take the same way.

const (
	// beatTime is between two heartbeats.
	beatTime = 10 * time.Second
	// beatLimit is for how many of them none may arrive until that is told.
	beatLimit = 3
	// beatVersion is the first byte of a heartbeat.
	beatVersion = 1
	// mostBeatHosts is how many hosts are named in one heartbeat. With more, by turns.
	mostBeatHosts = 256
)

// Tunnel is what gets through the tunnels to and from another host.
type Tunnel struct {
	Sent     uint64 `json:"sent"`     // heartbeats
	Received uint64 `json:"received"` // its heartbeats
	Answered uint64 `json:"answered"` // of them those that say that ours arrive there
}

// tunnels knows what gets through. Its methods may be called concurrently; it calls
// nothing with mu held.
type tunnels struct {
	self  string // this host's ID
	every time.Duration

	mu    sync.Mutex
	round int // how often look was called
	hosts map[string]*tunnelled
	links map[string]uint32 // VNIs that something is said through, by tunnel
}

// tunnelled is another host.
type tunnelled struct {
	Tunnel
	name     string
	vni      uint32 // the lowest that both have
	port     uint16
	vtep     netip.Addr
	began    time.Time
	heard    time.Time // the last of its heartbeats
	answered time.Time // the last one that says that ours arrive
}

func newTunnels(self string, every time.Duration) *tunnels {
	return &tunnels{self: self, every: every, hosts: map[string]*tunnelled{}, links: map[string]uint32{}}
}

// look takes in which hosts there are and what this one has, and returns the tunnels
// that something is said through. A host that is silent, or has no network in common,
// is begun anew when it is back.
func (x *tunnels) look(peers []Peer, nets map[uint32]driver.Network, now time.Time) (links []string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.round++
	there := map[string]bool{}
	for _, p := range peers {
		if !p.Silent.IsZero() || p.Unheard || len(p.Networks) == 0 {
			continue
		}
		vni := slices.Min(p.Networks)
		n, ok := nets[vni]
		if !ok {
			continue
		}
		there[p.ID] = true
		t := x.hosts[p.ID]
		if t == nil || t.vtep != p.VTEP || t.port != n.Port {
			t = &tunnelled{began: now, vtep: p.VTEP, port: n.Port}
			x.hosts[p.ID] = t
		}
		t.name, t.vni = p.Name, vni
	}
	maps.DeleteFunc(x.hosts, func(id string, _ *tunnelled) bool { return !there[id] })
	clear(x.links)
	var b Backend
	for _, t := range x.hosts {
		link := b.Network(nets[t.vni]).VXLANs[0].Name
		if _, ok := x.links[link]; !ok {
			x.links[link] = t.vni
			links = append(links, link)
		}
	}
	slices.Sort(links)
	return links
}

// say is a heartbeat for a tunnel, or nil if all hosts are spoken to by others.
func (x *tunnels) say(link string) []byte {
	x.mu.Lock()
	defer x.mu.Unlock()
	vni, now := x.links[link], time.Now()
	var hear []uint32
	any := false
	for id, t := range x.hosts {
		if t.vni != vni {
			continue
		}
		any = true
		t.Sent++
		if now.Sub(t.heard) <= beatLimit*x.every {
			hear = append(hear, beatID(id))
		}
	}
	if !any {
		return nil
	}
	slices.Sort(hear)
	if n := len(hear); n > mostBeatHosts {
		first := x.round * mostBeatHosts % n
		hear = slices.Concat(hear[first:], hear[:first])[:mostBeatHosts]
	}
	b := appendText([]byte{beatVersion}, x.self)
	b = binary.BigEndian.AppendUint16(b, uint16(len(hear)))
	for _, h := range hear {
		b = binary.BigEndian.AppendUint32(b, h)
	}
	return b
}

// hear takes in a heartbeat.
func (x *tunnels) hear(link string, said []byte) {
	if len(said) == 0 || said[0] != beatVersion {
		return
	}
	r := &reader{rest: said[1:]}
	id, ours := r.text(), false
	for n := r.uint16(); n > 0 && !r.short; n-- {
		ours = ours || binary.BigEndian.Uint32(r.take(4)) == beatID(x.self)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	t := x.hosts[id]
	if r.short || t == nil || x.links[link] != t.vni {
		return
	}
	t.Received++
	t.heard = time.Now()
	if ours {
		t.Answered++
		t.answered = t.heard
	}
}

// beatID is a host's ID, shorter.
func beatID(id string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(id)) // documented never to fail
	return h.Sum32()
}

// of is what gets through to a host, if that is looked at.
func (x *tunnels) of(id string) *Tunnel {
	x.mu.Lock()
	defer x.mu.Unlock()
	if t := x.hosts[id]; t != nil {
		n := t.Tunnel
		return &n
	}
	return nil
}

// troubles are the hosts that nothing gets through to, or from.
func (x *tunnels) troubles(now time.Time) (list []Trouble) {
	x.mu.Lock()
	defer x.mu.Unlock()
	const per = mostBeatHosts
	limit, turns := beatLimit*x.every, max(1, (len(x.hosts)+per-1)/per)
	for _, t := range x.hosts {
		heard, answered := latestOf(t.began, t.heard), latestOf(t.began, t.answered)
		deaf, mute := now.Sub(heard) > limit, now.Sub(answered) > limit*time.Duration(turns)
		if !deaf && !mute {
			continue
		}
		what, since := "our packets do not arrive there", answered
		if deaf {
			what, since = "its packets do not arrive here", heard
		}
		why := fmt.Sprintf("containers' traffic: %s (sent %d, received %d, answered %d): is UDP %d open on both hosts, there at %s?",
			what, t.Sent, t.Received, t.Answered, t.port, t.vtep)
		if t.Received == 0 {
			why += " An older release of weft there says nothing that could arrive"
		}
		list = append(list, Trouble{Peer: t.name, Since: since.UTC(), Reason: why})
	}
	slices.SortFunc(list, func(a, b Trouble) int { return cmp.Compare(a.Peer, b.Peer) })
	return list
}

func latestOf(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// watchTunnels says and hears heartbeats until ctx ends.
func (c *Cluster) watchTunnels(ctx context.Context) error {
	told := map[string]bool{}
	beat := datapath.Heartbeat{
		Every: c.tunnels.every, Say: c.tunnels.say, Hear: c.tunnels.hear,
		Tunnels: func() []string {
			c.tellTunnels(told)
			nets := map[uint32]driver.Network{}
			c.mu.Lock()
			for vni, n := range c.networks {
				nets[vni] = n.rec
			}
			c.mu.Unlock()
			return c.tunnels.look(c.table.Peers(), nets, time.Now())
		},
	}
	for said := false; ; said = true {
		err := c.c.Network.Heartbeat(ctx, beat)
		if err != nil && ctx.Err() == nil && !said {
			c.c.Log.WithError(err).Warn("overlay networks: whether traffic gets through the tunnels is not known")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(c.tunnels.every):
		}
	}
}

// tellTunnels logs what has begun.
func (c *Cluster) tellTunnels(told map[string]bool) {
	now := map[string]bool{}
	for _, t := range c.tunnels.troubles(time.Now()) {
		now[t.Peer] = true
		if !told[t.Peer] && c.chatter.allows(c.c.Log) {
			c.c.Log.Warnf("host %s: %s", t.Peer, t.Reason)
		}
	}
	clear(told)
	maps.Copy(told, now)
}
