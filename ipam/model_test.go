package ipam

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// modelPool is a pool as a person would keep it on paper.
type modelPool struct {
	id        poolID
	taken     map[netip.Addr]int // the number of the grant; negative when not chosen by us
	last      netip.Addr         // chosen last
	gateways  []netip.Addr       // newest last
	stale     map[netip.Addr]bool
	adoptable bool
	adopted   bool
}

// model is the plain twin of IPAM: maps and loops.
type model struct {
	pools map[poolKey]*modelPool
	held  map[netip.Prefix]string
	n     int
}

func (m *model) restart() {
	for _, p := range m.pools {
		p.adoptable, p.adopted, p.stale, p.last = true, false, nil, netip.Addr{}
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

// requestPool returns whether it is granted.
func (m *model) requestPool(id poolID) bool {
	p := m.pools[id.poolKey]
	if p == nil {
		if m.overlap(id.poolKey) {
			return false
		}
		m.pools[id.poolKey] = &modelPool{id: id, taken: map[netip.Addr]int{}}
		return true
	}
	net := m.held[id.prefix]
	switch {
	case id.space == GlobalSpace, len(net) == 25:
	case net != "" || !p.adoptable:
		return false
	default:
		p.adopted, p.stale = true, map[netip.Addr]bool{}
		for a := range p.taken {
			p.stale[a] = true
		}
	}
	p.adoptable, p.id = false, id
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
		p = &modelPool{id: r.id, taken: map[netip.Addr]int{}}
		m.pools[r.id.poolKey] = p
	}
	p.adoptable = false
	a := r.want
	if !a.IsValid() {
		if n := len(p.gateways); r.kind == kindGateway && n > 0 && (p.adopted || r.id.space == GlobalSpace) {
			delete(p.stale, p.gateways[n-1])
			return p.gateways[n-1], true
		}
		first, last := r.id.auto()
		var order []netip.Addr
		for a := first; !last.Less(a); a = a.Next() {
			order = append(order, a)
		}
		if r.kind == kindAuto && p.last.IsValid() { // turn to the one after the last
			if n := slices.Index(order, p.last.Next()); n > 0 {
				order = append(order[n:], order[:n]...)
			}
		}
		n := slices.IndexFunc(order, func(a netip.Addr) bool { _, ok := p.taken[a]; return !ok })
		if n < 0 {
			return netip.Addr{}, false
		}
		a = order[n]
	} else if _, ok := p.taken[a]; ok {
		if !p.stale[a] && r.id.space != GlobalSpace && len(m.held[r.id.prefix]) != 25 {
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
		delete(p.taken, a)
		delete(p.stale, a)
		p.gateways = slices.DeleteFunc(p.gateways, func(g netip.Addr) bool { return g == a })
	}
}

func (m *model) releasePool(id poolID) {
	if p := m.pools[id.poolKey]; p != nil && p.id == id {
		delete(m.pools, id.poolKey)
	}
}

// status is what Status prints of it.
func (m *model) status() string {
	var lines []string
	for _, p := range m.pools {
		lines = append(lines, fmt.Sprint(p.id, " ", len(p.taken)))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// TestModel makes random calls, restarts and changes of who holds what, on the
// real thing over a real file and on the model, and compares every answer.
func TestModel(t *testing.T) {
	var ids []poolID
	for _, s := range []string{
		"10.0.0.0/29", "10.0.0.0/29,10.0.0.4/30", "10.0.0.0/30", "10.0.0.8/31", "10.0.0.0/28", "fd00::/125", "fd00::/125,fd00::4/127", "10.0.0.12/32",
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
		m := &model{pools: map[poolKey]*modelPool{}, held: map[netip.Prefix]string{}}
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
				_, err := h.requestPool(t.Context(), poolRequest{poolID: id})
				if want := m.requestPool(id); want != (err == nil) {
					r.Fatalf("pool %s: %v, want %v", id, err, want)
				}
			},
			"next": func(r *rapid.T) { address(r, addressRequest{id: anID.Draw(r, "pool"), kind: kindAuto}) },
			"gateway": func(r *rapid.T) {
				address(r, addressRequest{id: anID.Draw(r, "pool"), kind: kindGateway})
			},
			"address": func(r *rapid.T) {
				id := anID.Draw(r, "pool")
				address(r, addressRequest{id: id, want: anAddress(r, id), kind: rapid.SampledFrom([]kind{kindExplicit, kindGateway}).Draw(r, "kind")})
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
			"restart": func(*rapid.T) {
				h.restart()
				m.restart()
			},
			"": func(r *rapid.T) {
				var lines []string
				for _, p := range h.Status(t.Context()).Pools {
					lines = append(lines, fmt.Sprint(p.ID, " ", p.Used))
				}
				slices.Sort(lines)
				if got, want := strings.Join(lines, "\n"), m.status(); got != want {
					r.Fatalf("status\n%s\nwant\n%s", got, want)
				}
				for k, mp := range m.pools {
					p := h.pool(k)
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
