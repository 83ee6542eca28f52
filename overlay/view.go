package overlay

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/internal/datapath"
)

// mostConflicts is how many lines people get of one network.
const mostConflicts = 32

// View is what the parts of a network mean together for this host.
type View struct {
	// VTEPs are the hosts that have the network: what has no single destination
	// goes to all of them.
	VTEPs []netip.Addr
	// Forwards are the MAC addresses of containers on other hosts.
	Forwards map[datapath.MAC]netip.Addr
	// Neighbours are the addresses of containers on other hosts.
	Neighbours map[netip.Addr]datapath.MAC
	// Conflicts are told to people, one line each.
	Conflicts []string
}

// claimant is an endpoint and whose it is.
type claimant struct {
	part     *Part
	name     string
	endpoint *Endpoint
	silent   bool
	unheard  bool
}

// beats compares claims. One that only others tell of does not take anything
// away from a host that is, or was, heard here.
func (c claimant) beats(o claimant) bool {
	if c.unheard != o.unheard {
		return o.unheard
	}
	return cmp.Or(cmp.Compare(c.endpoint.Claim, o.endpoint.Claim), cmp.Compare(c.part.Host, o.part.Host)) > 0
}

// View works out what leads to the other hosts' endpoints of a network.
func (t *Table) View(vni uint32) View {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := View{Forwards: map[datapath.MAC]netip.Addr{}, Neighbours: map[netip.Addr]datapath.MAC{}}
	if !t.has(vni) {
		return v
	}
	own := t.own[vni].part
	byMAC, byAddr := map[datapath.MAC]claimant{}, map[netip.Addr]claimant{}
	add := func(p *Part, name string, silent, unheard bool) {
		for i := range p.Endpoints {
			c := claimant{part: p, name: name, endpoint: &p.Endpoints[i], silent: silent, unheard: unheard}
			contend(&v, byMAC, c.endpoint.MAC, c)
			for _, a := range c.endpoint.Addrs {
				contend(&v, byAddr, a, c)
			}
		}
	}
	add(&own, own.Name, false, false)
	for _, id := range slices.Sorted(maps.Keys(t.hosts)) {
		h := t.hosts[id]
		p, ok := h.parts[vni]
		if !ok || p.Gone || p.VTEP == own.VTEP { // the last is this host, under the ID that it had before
			continue
		}
		if err := own.fits(p); err != nil {
			v.Conflicts = append(v.Conflicts, fmt.Sprintf("host %s has VNI %d with another %s", h.name, vni, err))
			if p.Port != own.Port || !slices.Equal(p.Subnets, own.Subnets) {
				continue
			}
		}
		if mine, theirs, ok := own.overlap(p); ok && h.silent.IsZero() {
			v.Conflicts = append(v.Conflicts, fmt.Sprintf("host %s chooses addresses of VNI %d from %s, as this host does from %s: what one has given out is skipped by the other; make the network with an --ip-range of its own on each host", h.name, vni, theirs, mine))
		}
		if !slices.Contains(v.VTEPs, p.VTEP) {
			v.VTEPs = append(v.VTEPs, p.VTEP)
		}
		add(&p, h.name, !h.silent.IsZero(), !h.heard)
	}
	for mac, c := range byMAC {
		if c.part.Host != t.self {
			v.Forwards[mac] = c.part.VTEP
		}
	}
	for a, c := range byAddr {
		if c.part.Host != t.self {
			v.Neighbours[a] = c.endpoint.MAC
		}
	}
	slices.SortFunc(v.VTEPs, netip.Addr.Compare)
	slices.Sort(v.Conflicts)
	v.Conflicts = slices.Compact(v.Conflicts)
	if n := len(v.Conflicts) - mostConflicts; n > 0 {
		v.Conflicts = append(v.Conflicts[:mostConflicts], fmt.Sprintf("and %d more of VNI %d", n, vni))
	}
	return v
}

// contend enters a claim; the later one wins. Between two hosts that are both
// heard that is worth a line: somebody gave one address to two containers.
func contend[K interface {
	comparable
	fmt.Stringer
}](v *View, best map[K]claimant, key K, c claimant) {
	old, ok := best[key]
	if !ok {
		best[key] = c
		return
	}
	win, lose := old, c
	if c.beats(old) {
		win, lose = c, old
	}
	best[key] = win
	if win.part.Host != lose.part.Host && win.part.VTEP != lose.part.VTEP && !win.silent && !lose.silent {
		v.Conflicts = append(v.Conflicts, fmt.Sprintf("%s is claimed by host %s and by host %s; the later claim, that of %s, has it", key, old.name, c.name, win.name))
	}
}

// Addresses are all addresses of a network and where they are, those of this
// host among them.
func (t *Table) Addresses(vni uint32) map[netip.Addr]datapath.MAC {
	all := t.View(vni).Neighbours
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.own[vni].part.Endpoints {
		for _, a := range e.Addrs {
			if _, elsewhere := all[a]; !elsewhere {
				all[a] = e.MAC
			}
		}
	}
	return all
}

// Holder is the host, heard, that has an address of a network, if another than
// this one has it.
func (t *Table) Holder(vni uint32, a netip.Addr) (name string, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.holders[vni] == nil {
		t.holders[vni] = t.index(vni)
	}
	name, ok = t.holders[vni][a]
	return name, ok
}

// index is by address which host, heard, has it; mu is held.
func (t *Table) index(vni uint32) map[netip.Addr]string {
	by := map[netip.Addr]string{}
	for _, h := range t.hosts {
		if !h.silent.IsZero() {
			continue
		}
		for _, e := range h.parts[vni].Endpoints {
			for _, a := range e.Addrs {
				by[a] = h.name
			}
		}
	}
	if f := t.former[vni]; f != nil {
		for _, a := range f.addrs() {
			if _, ok := by[a]; !ok && !slices.ContainsFunc(f.recorded, func(e Endpoint) bool { return slices.Contains(e.Addrs, a) }) {
				by[a] = t.own[vni].part.Name
			}
		}
	}
	return by
}

// touchOther is touch for what another host has; mu is held.
func (t *Table) touchOther(vni uint32) {
	delete(t.holders, vni)
	t.touch(vni)
}
