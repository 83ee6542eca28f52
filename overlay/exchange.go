package overlay

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/sync/errgroup"
)

// peer is another host.
type peer struct {
	nodes []memberlist.Node    // its members that are there, the newest last
	came  map[string]time.Time // since when, by their names
	name  string
	// passes says that it passes on what is for others.
	passes bool
	dirty  bool      // something changed since it was last looked at
	next   time.Time // when to look at it if nothing changes

	// What is said until it is answered: first a query.
	greeted bool              // one was answered since the host is there
	asked   map[uint32]uint64 // networks, and the turn of ours, that it has answered about
	query   uint64            // the query it has not answered; 0 for none
	vnis    map[uint32]uint64 // what is asked by it, and the turn
	ask     delivery
	// Then parts of this host: all that it has, was sent or should know gone.
	parts map[uint32]*delivery

	// What is said once; who misses it asks again.
	acks   map[uint32]uint64
	answer uint64   // the other's query
	want   []uint32 // what was asked by it
	echo   []Known  // parts of its own that it does not know of

	// loud and via say how else what is said next gets to it: by a stream, by another
	// host.
	loud bool
	via  string

	busy bool // a stream to it is open

	direct time.Time // when a packet of it last answered one of ours
}

// delivery is something that is said until the other confirms it.
type delivery struct {
	done  uint64 // the version that the other has
	tries int
	next  time.Time
}

func (d *delivery) due(now time.Time) bool { return !now.Before(d.next) }

// try notes an attempt. Meanwhile a change waits for the answer, and then only
// the latest is sent. Pauses grow slowly at first: of 100 parts sent over a
// network that loses 30 % of all packets, one takes longer than 700 ms.
func (d *delivery) try(now time.Time) {
	d.next = now.Add(min(firstPause<<min(d.tries/2, 10), lastPause))
	d.tries++
}

// stuck says that it is time to try TCP: packets of this size may never get
// through, on a tunnel for instance.
func (d *delivery) stuck() bool { return d.tries%4 == 0 }

// exchange sends what there is to say, and lets go of hosts that were silent for
// long.
func (g *Gossip) exchange(ctx context.Context, list *memberlist.Memberlist) error {
	var streams errgroup.Group
	streams.SetLimit(16)
	defer func() { _ = streams.Wait() }()
	second := time.NewTicker(time.Second)
	defer second.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-g.wake:
			timer.Reset(max(0, batchPause-time.Since(last)))
		case <-g.table.Mine():
			g.mu.Lock()
			g.touchAll()
			g.mu.Unlock()
			timer.Reset(max(0, batchPause-time.Since(last)))
		case <-second.C:
			g.clean()
		case <-timer.C:
			last = time.Now()
			timer.Reset(time.Until(g.send(list, &streams)))
			g.tell()
		}
	}
}

// touchAll has every peer looked at; mu is held.
func (g *Gossip) touchAll() {
	for _, p := range g.peers {
		p.dirty = true
	}
}

// tell logs what memberlist's calls have brought.
func (g *Gossip) tell() {
	g.mu.Lock()
	news := g.news
	g.news = nil
	g.mu.Unlock()
	for _, line := range news {
		if g.may() {
			g.log.Info(line)
		}
	}
}

// clean is called once a second.
func (g *Gossip) clean() {
	for _, name := range g.table.Expire() {
		g.log.Infof("host %s was silent for the grace time: nothing leads to it any more", name)
	}
	own := map[uint32]bool{}
	for _, o := range g.table.owned() {
		own[o.part.VNI] = true
	}
	g.mu.Lock()
	for id, p := range g.peers {
		if len(p.nodes) == 0 && !g.table.knows(id) {
			delete(g.peers, id)
		}
		maps.DeleteFunc(p.parts, func(vni uint32, _ *delivery) bool { return !own[vni] })
		maps.DeleteFunc(p.asked, func(vni uint32, _ uint64) bool { return !own[vni] })
	}
	twins := g.twinsLocked()
	g.mu.Unlock()
	for _, t := range twins {
		if g.once("twin " + t.Peer) {
			g.log.Errorf("%s: %s", t.Peer, t.Reason)
		}
	}
}

// send says to each peer what there is to say, and returns when to look again.
func (g *Gossip) send(list *memberlist.Memberlist, streams *errgroup.Group) time.Time {
	now := time.Now()
	next := now.Add(time.Minute)
	g.mu.Lock()
	letters := g.passing
	g.passing = nil
	own := g.table.owned()
	for id, p := range g.peers {
		if len(p.nodes) > 0 && (p.dirty || !now.Before(p.next)) {
			loud, via := p.loud, p.via
			m, stuck := g.compose(id, p, own, now)
			if m.Query != 0 || m.Answer != 0 || len(m.Acks)+len(m.Parts) > 0 {
				m.Loud = stuck
				letters = append(letters, letter{id, p.nodes[len(p.nodes)-1], m.encode(), stuck || loud})
				letters = append(letters, g.detours(m, id, via, stuck)...)
			}
		}
		if len(p.nodes) > 0 && p.next.Before(next) {
			next = p.next
		}
	}
	g.mu.Unlock()
	for _, l := range letters {
		fits := len(l.body) <= packetSpace
		if fits {
			_ = list.SendBestEffort(&l.to, l.body) // it is repeated until it is confirmed
		}
		if (!fits || l.both) && g.occupy(l.id) {
			if !streams.TryGo(func() error {
				defer g.release(l.id)
				_ = list.SendReliable(&l.to, l.body) // the same
				return nil
			}) {
				g.release(l.id)
			}
		}
	}
	return next
}

// occupy allows one stream to each peer at a time: one that hangs must not take
// those of all the others.
func (g *Gossip) occupy(id string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := g.peers[id]
	if p == nil || p.busy {
		return false
	}
	p.busy = true
	return true
}

func (g *Gossip) release(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.peers[id]; p != nil {
		p.busy = false
	}
}

// compose is what there is to say to a peer now. stuck reports that packets do
// not seem to reach it; mu is held.
func (g *Gossip) compose(id string, p *peer, own []own, now time.Time) (m message, stuck bool) {
	p.dirty, p.next = false, now.Add(time.Minute)
	m.From, m.At = g.id, g.bind
	try := func(d *delivery) {
		d.try(now)
		stuck = stuck || d.stuck()
	}

	for vni, version := range p.acks {
		m.Acks = append(m.Acks, ack{vni, version})
	}
	m.Answer, m.Parts = p.answer, p.echo
	for _, vni := range p.want {
		if mine, ok := g.table.part(g.id, vni); ok {
			m.Parts = append(m.Parts, Known{Part: mine})
			try(p.part(vni))
		}
	}
	// Those who are silent cannot answer themselves.
	if len(p.want) > 0 {
		m.Parts = append(m.Parts, g.table.silentParts(p.want)...)
	}
	p.acks, p.answer, p.want, p.echo, p.loud, p.via = nil, 0, nil, nil, false, ""

	if vnis := g.unasked(id, p, own); len(vnis) > 0 || !p.greeted {
		if p.query == 0 || !maps.Equal(vnis, p.vnis) {
			p.query, p.vnis, p.ask = rand.Uint64()|1, vnis, delivery{}
		}
		if p.ask.due(now) {
			m.Query, m.Hello, m.VNIs = p.query, !p.greeted, slices.Collect(maps.Keys(vnis))
			try(&p.ask)
		}
		p.next = earlier(p.next, p.ask.next)
	} else {
		p.query = 0
	}

	has := g.table.networks(id)
	for _, o := range own {
		vni, d := o.part.VNI, p.parts[o.part.VNI]
		switch {
		case o.part.Gone && d == nil, !o.part.Gone && !has[vni], d != nil && d.done == o.part.Version:
			continue
		case d == nil:
			d = &delivery{}
			p.parts[vni] = d
		}
		if d.due(now) {
			m.Parts = append(m.Parts, Known{Part: o.part})
			try(d)
		}
		p.next = earlier(p.next, d.next)
	}
	return m, stuck
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// unasked are the networks that a peer has not answered about; mu is held.
func (g *Gossip) unasked(id string, p *peer, own []own) map[uint32]uint64 {
	vnis := map[uint32]uint64{}
	for _, o := range own {
		if !o.part.Gone && p.asked[o.part.VNI] != o.turn {
			vnis[o.part.VNI] = o.turn
		}
	}
	for q := range g.questions {
		if q.waiting[id] && vnis[q.vni] == 0 {
			vnis[q.vni] = 0 // there is no turn, the network may not be ours
		}
	}
	return vnis
}

// receive takes in what another host says.
func (g *Gossip) receive(m message) {
	if m.From == g.id {
		return
	}
	refused := map[partID]bool{} // they are not confirmed: what is wrong, a clock, may be mended
	for _, k := range m.Parts {
		if _, err := g.table.merge(k, false); err != nil {
			refused[partID{k.Part.Host, k.Part.VNI}] = true
			g.refuse(m, err)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, k := range m.Parts {
		if p := g.peers[k.Part.Host]; p != nil {
			p.dirty = true // it may have a network now that it had not
		}
	}
	p := g.peers[m.From]
	if p == nil || len(p.nodes) == 0 {
		// It takes this host for a member, and is none itself: news of it was
		// lost, which happens to one in some hundred pairs when all start at
		// once, or it stood still for a while. It says it again.
		g.meet(m.At)
		return
	}
	p.dirty = true
	p.loud = p.loud || m.Loud
	if m.Via != "" {
		p.via = m.Via
	}
	for _, k := range m.Parts {
		vni := k.Part.VNI
		switch {
		case refused[partID{k.Part.Host, vni}]:
		case k.Part.Host == m.From:
			if held, ok := g.table.part(m.From, vni); ok {
				p.ack(vni, held.Version)
			} else {
				p.ack(vni, k.Part.Version) // it is of no use here
			}
		case k.Part.Host == g.id:
			g.confirm(p, ack{vni, k.Part.Version})
		}
	}
	for _, a := range m.Acks {
		g.confirm(p, a)
	}
	if m.Query != 0 {
		p.answer, p.want = m.Query, m.VNIs
	}
	if m.Hello {
		for _, part := range g.table.partsOf(m.From) {
			if !part.Gone && !slices.Contains(m.VNIs, part.VNI) {
				p.echo = append(p.echo, Known{Part: part})
			}
		}
	}
	if m.Answer != 0 && m.Answer == p.query {
		g.answered(m, p)
	}
	wake(g.wake)
}

// partID is what a part is about.
type partID struct {
	host string
	vni  uint32
}

// mostAcks is how many go into one message; what is not confirmed comes again.
const mostAcks = 4096

func (p *peer) ack(vni uint32, version uint64) {
	if p.acks == nil {
		p.acks = map[uint32]uint64{}
	}
	if len(p.acks) < mostAcks {
		p.acks[vni] = version
	}
}

func (p *peer) part(vni uint32) *delivery {
	if p.parts[vni] == nil {
		p.parts[vni] = &delivery{}
	}
	return p.parts[vni]
}

// confirm notes what a peer has of ours; mu is held.
func (g *Gossip) confirm(p *peer, a ack) {
	mine, ok := g.table.part(g.id, a.VNI)
	if !ok || mine.Gone && a.Version == mine.Version {
		delete(p.parts, a.VNI)
		return
	}
	if a.Version > mine.Version {
		// It has one from before this host forgot it. Whatever that says, ours
		// must become later.
		_, _ = g.table.Merge(Part{Host: g.id, Name: g.name, VNI: a.VNI, Version: a.Version, Gone: true}, 0)
		return // it has not got what comes after
	}
	d := p.part(a.VNI)
	d.done, d.tries, d.next = a.Version, 0, time.Time{}
}

// answered takes a peer off what it was asked; mu is held.
func (g *Gossip) answered(m message, p *peer) {
	for vni, turn := range p.vnis {
		if turn != 0 {
			p.asked[vni] = turn
		}
		for q := range g.questions {
			if q.vni == vni && q.waiting[m.From] {
				q.take(m)
			}
		}
	}
	p.query, p.greeted = 0, true
}
