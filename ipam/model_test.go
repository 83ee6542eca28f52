package ipam

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// modelPool is a pool as a person would keep it on paper.
type modelPool struct {
	key      poolKey
	parts    []netip.Prefix                       // the ranges of its networks, in the order of their requests
	idle     map[netip.Prefix]bool                // of those: not used since the restart
	gave     map[netip.Prefix]bool                // of those: with options
	taken    map[netip.Addr]int                   // the number of the grant; negative when not chosen by us
	last     netip.Addr                           // chosen last
	gateways []netip.Addr                         // newest last
	asked    map[netip.Prefix]map[netip.Addr]bool // which gateways each range's network asked for
	stale    map[netip.Addr]bool
	adopted  bool
	// unconfirmed by the swarm's allocator that is in office
	unconfirmed bool

	opts  poolOptions
	since map[netip.Addr]time.Time // released and left alone
	// backs were released, whether left alone or not; after a restart true: taken
	// before it.
	backs  map[netip.Addr]modelBack
	before map[netip.Addr]bool
	names  map[string]netip.Addr
}

type modelBack struct {
	at    time.Time
	start bool
}

func newModelPool(id poolID, o poolOptions) *modelPool {
	return &modelPool{key: id.poolKey, parts: []netip.Prefix{id.sub}, idle: map[netip.Prefix]bool{}, gave: map[netip.Prefix]bool{id.sub: len(o.raw) > 0}, asked: map[netip.Prefix]map[netip.Addr]bool{id.sub: {}}, opts: o, taken: map[netip.Addr]int{}, since: map[netip.Addr]time.Time{}, backs: map[netip.Addr]modelBack{}, before: map[netip.Addr]bool{}, names: map[string]netip.Addr{}}
}

// keeper is the name that an address is kept for, and whether it is reserved.
func (p *modelPool) keeper(a netip.Addr) (name string, reserved bool) {
	for name, r := range p.opts.reserved {
		if r.addr == a {
			return name, true
		}
	}
	for name, b := range p.names {
		if b == a {
			return name, false
		}
	}
	return "", false
}

// model is the plain twin of IPAM: maps and loops.
type model struct {
	pools map[poolKey]*modelPool
	held  map[netip.Prefix]string
	n     int
	// elected: an allocator has begun and made no request yet
	elected bool
	now     time.Time
	started time.Time
}

// expire lets go of what has rested long enough.
func (m *model) expire(p *modelPool) {
	for a, at := range p.since {
		name, _ := p.keeper(a)
		if name == "" && m.now.Sub(at) >= p.opts.rest() || name != "" && p.opts.keep >= 0 && m.now.Sub(at) >= p.opts.keep {
			delete(p.since, a)
			delete(p.names, name)
		}
	}
}

func (m *model) restart() {
	m.elected, m.started = false, m.now
	for _, p := range m.pools {
		clear(p.backs)
		clear(p.before)
		for a := range p.taken {
			p.before[a] = true
		}
		p.adopted, p.unconfirmed, p.stale, p.last = false, false, nil, netip.Addr{}
		for _, sub := range p.parts {
			p.idle[sub] = true
		}
		for a := range p.since {
			if name, _ := p.keeper(a); name == "" {
				delete(p.since, a)
			}
		}
		for a, n := range p.taken {
			if n > 0 && (!p.last.IsValid() || n > p.taken[p.last]) {
				p.last = a
			}
		}
	}
}

func (m *model) overlap(k poolKey) bool {
	for o := range m.pools {
		if o.space == k.space && o != k && o.prefix.Overlaps(k.prefix) {
			return true
		}
	}
	return false
}

// overlapping is what a pool would have to displace, and whether it may.
func (m *model) overlapping(k poolKey) (list []poolKey, ok bool) {
	ok = true
	for o, p := range m.pools {
		if o.space == k.space && o != k && o.prefix.Overlaps(k.prefix) {
			list, ok = append(list, o), ok && p.unconfirmed
		}
	}
	return list, ok
}

// confirm is what the request of a pool tells about the allocator.
func (m *model) confirm(id poolID) {
	if id.space != GlobalSpace {
		return
	}
	for k, p := range m.pools {
		if n := len(m.held[k.prefix]); m.elected && k.space == GlobalSpace && (n == 0 || n == 25) {
			p.unconfirmed, p.stale = true, map[netip.Addr]bool{}
			for a := range p.taken {
				p.stale[a] = true
			}
		}
	}
	m.elected = false
	if p := m.pools[id.poolKey]; p != nil {
		p.unconfirmed = false
	}
}

// requestPool returns whether it is granted.
func (m *model) requestPool(id poolID, o poolOptions) bool {
	m.confirm(id)
	p := m.pools[id.poolKey]
	if p == nil {
		list, ok := m.overlapping(id.poolKey)
		for _, o := range list {
			if ok {
				delete(m.pools, o)
			}
		}
		if m.overlap(id.poolKey) {
			return false
		}
		m.pools[id.poolKey] = newModelPool(id, o)
		return true
	}
	net := m.held[id.prefix]
	if id.space == GlobalSpace || len(net) == 25 {
		p.parts = []netip.Prefix{id.sub}
		p.asked[id.sub] = map[netip.Addr]bool{}
		for _, a := range p.gateways {
			p.asked[id.sub][a] = true
		}
		p.part()
	} else {
		// Whoever is in the way goes if nobody needs it.
		var stay []netip.Prefix
		unused := true
		for _, sub := range p.parts {
			if unused = unused && p.idle[sub]; !overlap(sub, id.sub) {
				stay = append(stay, sub)
			} else if !p.idle[sub] {
				return false
			}
		}
		if unused && net == "" {
			stay = nil
		}
		if net != "" && len(stay) == 0 {
			return false
		}
		if len(stay) == 0 {
			p.adopted, p.stale = true, map[netip.Addr]bool{}
			for a := range p.taken {
				p.stale[a] = true
			}
		}
		p.parts = append(stay, id.sub)
		p.asked[id.sub] = map[netip.Addr]bool{}
		for _, a := range p.gateways {
			if len(stay) == 0 {
				p.asked[id.sub][a] = true
			}
		}
		p.part()
	}
	delete(p.idle, id.sub)
	p.opts, p.gave[id.sub] = o, len(o.raw) > 0
	for name, r := range o.reserved {
		delete(p.since, r.addr)
		for other, a := range p.names {
			if a == r.addr || other == name {
				delete(p.names, other)
				delete(p.since, a)
			}
		}
	}
	return true
}

// requestAddress returns what is granted, or nothing.
func (m *model) requestAddress(r addressRequest) (netip.Addr, bool) {
	first, last := r.id.usable()
	if r.want.IsValid() && (r.want.Less(first) || last.Less(r.want)) {
		return netip.Addr{}, false
	}
	p := m.pools[r.id.poolKey]
	if p == nil {
		if m.overlap(r.id.poolKey) {
			return netip.Addr{}, false
		}
		p = newModelPool(r.id, plain)
		m.pools[r.id.poolKey] = p
	}
	if k := p.key; k.space == LocalSpace && !slices.ContainsFunc(p.parts, func(sub netip.Prefix) bool { return overlap(sub, r.id.sub) }) {
		p.parts = append(p.parts, r.id.sub) // lost, and taken up again
		p.gave[r.id.sub], p.asked[r.id.sub] = false, map[netip.Addr]bool{}
	}
	if _, taken := p.taken[r.want]; r.kind == kindGateway && !taken {
		if _, reserved := p.keeper(r.want); reserved {
			return netip.Addr{}, false
		}
	}
	if _, reserved := p.keeper(r.want); r.kind == kindGateway && r.want.IsValid() && reserved {
		if _, taken := p.taken[r.want]; !taken {
			return netip.Addr{}, false // a container is to have it
		}
	}
	if r.kind != kindGateway {
		m.expire(p)
		a := p.names[r.name]
		if r.name != "" {
			if res, ok := p.opts.reserved[r.name]; ok {
				a = res.addr
			}
		}
		_, taken := p.taken[a]
		owner, reserved := p.keeper(r.want)
		switch {
		case r.want.IsValid() && reserved && r.name != "" && r.name != owner:
			return netip.Addr{}, false
		case r.name == "":
		case r.want.IsValid():
			if b, ok := p.names[r.name]; ok && b != r.want {
				if _, taken := p.taken[b]; taken {
					r.name = ""
				}
			}
		case a.IsValid() && taken && !p.stale[a]:
			r.name = ""
		case a.IsValid() && p.others(r.id.sub, a) && p.opts.reserved[r.name].addr != a:
			r.name = ""
		case a.IsValid():
			r.want, r.kind = a, kindNamed
		case p.opts.keep == 0:
			r.name = ""
		}
		if r.kind == kindExplicit && r.name == "" && r.id.named() && len(m.held[r.id.prefix]) != 25 && p.opts.keep != 0 && !reserved {
			r.name = fixedName(r.want)
		}
	}
	n := m.n
	got, ok := m.grant(p, r)
	if ok && r.kind == kindGateway && slices.Contains(p.gateways, got) {
		at := slices.IndexFunc(p.parts, func(sub netip.Prefix) bool { return overlap(sub, r.id.sub) })
		p.asked[p.parts[max(at, 0)]][got] = true
	}
	if !ok || m.n == n { // not handed out, or once more
		return got, ok
	}
	// Whoever has it now, it does not rest, and is nobody else's.
	delete(p.since, got)
	for name, b := range p.names {
		if b == got && name != r.name {
			delete(p.names, name)
		}
	}
	if _, reserved := p.opts.reserved[r.name]; r.name != "" && !reserved && p.opts.keep != 0 {
		delete(p.since, p.names[r.name])
		p.names[r.name] = got
	}
	return got, true
}

func (m *model) grant(p *modelPool, r addressRequest) (netip.Addr, bool) {
	if delete(p.idle, r.id.sub); len(p.parts) == 1 {
		delete(p.idle, p.parts[0])
	}
	a := r.want
	if !a.IsValid() {
		if gw := p.gateway(r.id.sub); r.kind == kindGateway && gw.IsValid() && (p.adopted || r.id.space == GlobalSpace || len(p.parts) > 1) {
			delete(p.stale, gw)
			return gw, true
		}
		first, last := r.id.auto()
		var order []netip.Addr
		for a := first; !last.Less(a); a = a.Next() {
			order = append(order, a)
		}
		if r.kind == kindAuto && r.id.space == GlobalSpace && p.last.IsValid() { // turn to the one after the last
			if n := slices.Index(order, p.last.Next()); n > 0 {
				order = append(order[n:], order[:n]...)
			}
		}
		free := slices.DeleteFunc(order, func(a netip.Addr) bool {
			_, taken := p.taken[a]
			_, reserved := p.keeper(a)
			return taken || reserved
		})
		for a := first; len(free) == 0 && r.id.space == GlobalSpace && !p.unconfirmed && !last.Less(a); a = a.Next() {
			if !p.stale[a] || slices.Contains(p.gateways, a) {
				continue
			}
			m.releaseAddress(r.id, a)
			if _, reserved := p.keeper(a); !reserved {
				free = []netip.Addr{a}
			}
		}
		if len(free) == 0 {
			return netip.Addr{}, false
		}
		rests := func(a netip.Addr) bool { _, rests := p.since[a]; return rests }
		fresh := slices.IndexFunc(free, func(a netip.Addr) bool { return !rests(a) })
		justNow := slices.IndexFunc(free, func(a netip.Addr) bool {
			b, ok := p.backs[a]
			return ok && !rests(a) && (m.now.Sub(b.at) < backTime || b.start && m.now.Sub(m.started) < startedTime)
		})
		if justNow >= 0 && r.kind == kindAuto && r.name == "" && r.id.space != GlobalSpace {
			fresh = justNow
		}
		if a = free[max(fresh, 0)]; fresh < 0 {
			asked := func(a netip.Addr) int {
				if name, _ := p.keeper(a); strings.HasPrefix(name, fixedPrefix) {
					return 1
				}
				return 0
			}
			a = slices.MinFunc(free, func(a, b netip.Addr) int {
				return cmp.Or(asked(a)-asked(b), p.since[a].Compare(p.since[b]), a.Compare(b))
			})
			if name, _ := p.keeper(a); name != "" {
				delete(p.names, name)
			}
			delete(p.since, a)
		}
	} else if _, ok := p.taken[a]; ok {
		router := r.kind == kindGateway && len(p.parts) > 1 && slices.Contains(p.gateways, a)
		if !p.stale[a] && !router && r.id.space != GlobalSpace && len(m.held[r.id.prefix]) != 25 {
			return netip.Addr{}, false
		}
		delete(p.stale, a)
		return a, true
	}
	m.n++
	p.taken[a] = -m.n
	if r.kind == kindAuto {
		p.taken[a], p.last = m.n, a
	}
	if r.kind == kindGateway {
		p.gateways = append(p.gateways, a)
	}
	return a, true
}

func (m *model) releaseAddress(id poolID, a netip.Addr) {
	if p := m.pools[id.poolKey]; p != nil {
		if len(p.parts) > 1 && slices.Contains(p.gateways, a) {
			return // the others' as well
		}
		name, reserved := p.keeper(a)
		if _, ok := p.taken[a]; ok && !slices.Contains(p.gateways, a) {
			p.backs[a] = modelBack{m.now, p.before[a] && m.now.Sub(m.started) < startTime}
			delete(p.before, a)
		}
		if _, ok := p.taken[a]; ok && !reserved && (name != "" || p.opts.quarantine > 0) && !slices.Contains(p.gateways, a) {
			p.since[a] = m.now
		}
		delete(p.taken, a)
		delete(p.stale, a)
		p.gateways = slices.DeleteFunc(p.gateways, func(g netip.Addr) bool { return g == a })
		for _, asked := range p.asked {
			delete(asked, a)
		}
	}
}

func (m *model) releasePool(id poolID) {
	p := m.pools[id.poolKey]
	if p == nil {
		return
	}
	n := len(p.parts)
	p.parts = slices.DeleteFunc(p.parts, func(sub netip.Prefix) bool { return sub == id.sub })
	switch len(p.parts) {
	case n:
		return
	case 0:
		delete(m.pools, id.poolKey)
	default:
		p.part()
	}
	for name, a := range p.names {
		if _, taken := p.taken[a]; id.sub.Contains(a) && !taken && !strings.HasPrefix(name, fixedPrefix) {
			delete(p.names, name)
			delete(p.since, a)
		}
	}
	if !slices.ContainsFunc(p.parts, func(sub netip.Prefix) bool { return p.gave[sub] }) {
		p.opts = plain
	}
}

// gateway is what a network has that types none.
func (p *modelPool) gateway(sub netip.Prefix) (gw netip.Addr) {
	for _, sub := range append([]netip.Prefix{sub}, p.parts...) {
		for _, a := range p.gateways {
			if p.asked[sub][a] || len(p.parts) == 1 {
				gw = a
			}
		}
		if gw.IsValid() {
			break
		}
	}
	return gw
}

// part takes away the gateways that none of the networks asked for.
func (p *modelPool) part() {
	maps.DeleteFunc(p.asked, func(sub netip.Prefix, _ map[netip.Addr]bool) bool { return !slices.Contains(p.parts, sub) })
	gone := slices.DeleteFunc(slices.Clone(p.gateways), func(a netip.Addr) bool {
		return slices.ContainsFunc(p.parts, func(sub netip.Prefix) bool { return p.asked[sub][a] })
	})
	for _, a := range gone {
		delete(p.taken, a)
		delete(p.stale, a)
		p.gateways = slices.DeleteFunc(p.gateways, func(g netip.Addr) bool { return g == a })
	}
}

func overlap(a, b netip.Prefix) bool { return !a.IsValid() || !b.IsValid() || a.Overlaps(b) }

// others reports whether an address is in the range of another network.
func (p *modelPool) others(sub netip.Prefix, a netip.Addr) bool {
	return len(p.parts) > 1 && slices.ContainsFunc(p.parts, func(o netip.Prefix) bool { return o != sub && o.Contains(a) })
}

// status is what Status prints of it.
func (m *model) status() string {
	var lines []string
	for _, p := range m.pools {
		m.expire(p) // as Status does
		lines = append(lines, fmt.Sprintf("%s %v %d", poolID{p.key, p.parts[0]}, p.parts[1:], len(p.taken)))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// plain is what a pool has that was taken up again.
var plain = poolOptions{quarantine: restsFar, keep: -1}

// TestModel makes random calls, restarts and changes of who holds what, on the
// real thing over a real file and on the model, and compares every answer.
func TestModel(t *testing.T) {
	options := map[string]map[string]string{
		"10.0.0.0/30": {"quarantine": "0"},
		"10.0.0.0/29": {"quarantine": "60s"},
		"10.0.0.0/28": {"reserve.r": "10.0.0.5,02:00:00:00:00:05", "keep": "3m"},
		"10.0.0.8/31": {"keep": "0"},
		"fd00::/125":  {"reserve.r": "fd00::3", "reserve.s": "10.0.0.1,fd00::4"},
	}
	var ids []poolID
	for _, s := range []string{
		"10.0.0.0/29", "10.0.0.0/29,10.0.0.4/30", "10.0.0.0/29,10.0.0.2/31", "10.0.0.0/29,10.0.0.0/31", "10.0.0.0/30", "10.0.0.8/31", "10.0.0.0/28", "fd00::/125", "fd00::/125,fd00::4/127", "10.0.0.12/32",
	} {
		for _, space := range []string{LocalSpace, GlobalSpace} {
			id, err := parsePoolID(space + "," + s)
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, id)
		}
	}
	rapid.Check(t, func(r *rapid.T) {
		h := newHouse(t)
		h.clock = time.Unix(1_800_000_000, 0)
		h.now = func() time.Time { return h.clock }
		m := &model{pools: map[poolKey]*modelPool{}, held: map[netip.Prefix]string{}, now: h.clock, started: h.clock}
		aName := rapid.SampledFrom([]string{"", "a", "b", "c", "r", "s"})
		anID := rapid.SampledFrom(ids)
		anAddress := func(r *rapid.T, id poolID) netip.Addr {
			a := id.prefix.Addr()
			for range rapid.IntRange(0, 8).Draw(r, "offset") {
				a = a.Next()
			}
			return a
		}
		address := func(r *rapid.T, req addressRequest) {
			got, err := h.requestAddress(t.Context(), req)
			want, ok := m.requestAddress(req)
			if ok != (err == nil) || ok && got != req.id.with(want) {
				r.Fatalf("%s %s in %s: %s, %v; want %s %v", req.kind, req.want, req.id, got, err, want, ok)
			}
		}
		r.Repeat(map[string]func(*rapid.T){
			"pool": func(r *rapid.T) {
				id := anID.Draw(r, "pool")
				o, err := parseOptions(options[id.prefix.String()], id.prefix)
				if err != nil {
					r.Fatal(err)
				}
				_, err = h.requestPool(t.Context(), poolRequest{poolID: id, opts: o})
				if want := m.requestPool(id, o); want != (err == nil) {
					r.Fatalf("pool %s: %v, want %v", id, err, want)
				}
			},
			"next": func(r *rapid.T) {
				req := addressRequest{id: anID.Draw(r, "pool"), kind: kindAuto}
				if req.id.named() {
					req.name = aName.Draw(r, "name")
				}
				address(r, req)
			},
			"wait": func(r *rapid.T) {
				h.clock = h.clock.Add(rapid.SampledFrom([]time.Duration{1, 2, 50, 100}).Draw(r, "seconds") * time.Second)
				m.now = h.clock
			},
			"gateway": func(r *rapid.T) {
				address(r, addressRequest{id: anID.Draw(r, "pool"), kind: kindGateway})
			},
			"address": func(r *rapid.T) {
				id := anID.Draw(r, "pool")
				req := addressRequest{id: id, want: anAddress(r, id), kind: rapid.SampledFrom([]kind{kindExplicit, kindGateway}).Draw(r, "kind")}
				if id.named() && req.kind == kindExplicit {
					req.name = aName.Draw(r, "name")
				}
				address(r, req)
			},
			"release address": func(r *rapid.T) {
				id := anID.Draw(r, "pool")
				a := anAddress(r, id)
				if err := h.releaseAddress(t.Context(), id, a); err != nil {
					r.Fatal(err)
				}
				m.releaseAddress(id, a)
			},
			"release pool": func(r *rapid.T) {
				id := anID.Draw(r, "pool")
				if err := h.releasePool(t.Context(), id); err != nil {
					r.Fatal(err)
				}
				m.releasePool(id)
			},
			"hold": func(r *rapid.T) {
				id := rapid.SampledFrom([]string{"", localID, swarmID}).Draw(r, "network")
				p := anID.Draw(r, "pool").prefix
				m.held[p] = id
				h.hold(p.String(), id)
			},
			"elected": func(*rapid.T) {
				h.Elected()
				m.elected = true
			},
			"restart": func(*rapid.T) {
				h.restart()
				m.restart()
			},
			"": func(r *rapid.T) {
				var lines []string
				for _, p := range h.Status(t.Context()).Pools {
					lines = append(lines, fmt.Sprintf("%s %v %d", p.ID, p.MoreSubPools, p.Used))
				}
				slices.Sort(lines)
				if got, want := strings.Join(lines, "\n"), m.status(); got != want {
					r.Fatalf("status\n%s\nwant\n%s", got, want)
				}
				for k, mp := range m.pools {
					p := h.pool(k)
					var bound []string
					for name, b := range p.byName {
						bound = append(bound, name+" "+b.Address.String())
					}
					var want []string
					for name, a := range mp.names {
						want = append(want, name+" "+a.String())
					}
					slices.Sort(bound)
					slices.Sort(want)
					if !slices.Equal(bound, want) {
						r.Fatalf("pool %s: names %v, want %v", k.prefix, bound, want)
					}
					for a := range maps.Keys(mp.taken) {
						if !p.taken.has(a) {
							r.Fatalf("%s is not taken", a)
						}
					}
				}
			},
		})
		if err := h.bolt.Close(); err != nil {
			r.Fatal(err)
		}
	})
}
