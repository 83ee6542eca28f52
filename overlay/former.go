package overlay

import (
	"net/netip"
	"slices"
)

// former is what others know of this host from before its state was replaced by an
// older copy: containers run here that no record names, and that nobody but the others
// knows the addresses of.
type former struct {
	recorded  []Endpoint // of the part that was last Set
	endpoints []Endpoint // of the latest part from before this process
	version   uint64     // of that
}

// Keep says whether containers run here, on a network that this host has, that no
// record names. While they do, what others know of them stays true: their endpoints
// are said beside those that are Set, with the claims that they had.
func (t *Table) Keep(vni uint32, there bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.former[vni]
	if !t.has(vni) || there == (f != nil) {
		return
	}
	p := t.own[vni].part
	if there {
		t.former[vni] = &former{recorded: p.Endpoints}
		return
	}
	delete(t.former, vni)
	delete(t.holders, vni)
	if p.Endpoints = f.recorded; !p.same(t.own[vni].part) {
		t.put(p)
	}
}

// recall takes in a part of this host that another has, from before this process, and
// reports whether something of it is said again; mu is held.
func (t *Table) recall(o own, p Part) bool {
	f := t.former[p.VNI]
	if f == nil || p.Gone || p.Version >= o.turn || p.Version <= f.version {
		return false
	}
	f.endpoints, f.version = slices.Clone(p.Endpoints), p.Version
	next := o.part
	next.Endpoints = f.recorded
	if next = f.join(next); next.same(o.part) {
		return false
	}
	delete(t.holders, p.VNI)
	t.put(next)
	return true
}

// join adds to what is recorded what others know, but for what is in its way.
func (f *former) join(p Part) Part {
	f.recorded = p.Endpoints
	for _, e := range f.endpoints {
		taken := func(o Endpoint) bool {
			return o.MAC == e.MAC || slices.ContainsFunc(o.Addrs, func(a netip.Addr) bool { return slices.Contains(e.Addrs, a) })
		}
		if len(p.Endpoints) < mostEndpoints && !slices.ContainsFunc(f.recorded, taken) {
			p.Endpoints = append(slices.Clip(p.Endpoints), e)
		}
	}
	p.Endpoints = sorted(p.Endpoints)
	return p
}

func sorted(list []Endpoint) []Endpoint {
	return slices.SortedFunc(slices.Values(list), func(a, b Endpoint) int { return slices.Compare(a.MAC[:], b.MAC[:]) })
}

// addrs are those that are said again.
func (f *former) addrs() (list []netip.Addr) {
	for _, e := range f.endpoints {
		list = append(list, e.Addrs...)
	}
	return list
}

// Strangers implements the driver's cluster.
func (c *Cluster) Strangers(vni uint32, there bool) { c.table.Keep(vni, there) }
