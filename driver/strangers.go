package driver

import (
	"net/netip"
	"slices"

	"github.com/weftnet/weft/internal/datapath"
)

// named is one network that has a record.
type named struct {
	vni     uint32
	links   names // its links, not those of endpoints
	subnets []netip.Prefix
	addrs   []netip.Addr // of its endpoints that have records
}

// strangers are containers on networks that have records, while they have none: the
// state is an older copy. Their links say that they are there, and not which
// addresses they have: any of those networks' that no record names.
type strangers struct {
	links map[string]bool // the host's ends of veth pairs, and sub-interfaces
	nets  []named
}

// strangers finds those among what no record names.
func (x names) strangers(unclaimed datapath.State) strangers {
	s := strangers{links: map[string]bool{}}
	for _, n := range x.nets {
		before := len(s.links)
		for _, v := range unclaimed.Veths {
			if n.links.links[v.Master] {
				s.links[v.Name] = true
			}
		}
		for _, c := range unclaimed.Children {
			if n.links.links[c.Parent] {
				s.links[c.Name] = true
			}
		}
		if len(s.links) > before {
			s.nets = append(s.nets, n)
		}
	}
	return s
}

// have reports whether an address may be one of theirs.
func (s strangers) have(a netip.Addr) bool {
	return a.IsValid() && slices.ContainsFunc(s.nets, func(n named) bool {
		return !slices.Contains(n.addrs, a) && slices.ContainsFunc(n.subnets, func(p netip.Prefix) bool { return p.Contains(a) })
	})
}

// own reports whether an element may be about one of them.
func (s strangers) own(e datapath.Element) bool {
	if e.To.IsValid() {
		return s.have(e.To)
	}
	return e.Net.IsValid() && e.Net.IsSingleIP() && s.have(e.Net.Addr())
}

// tellStrangers has the cluster know on which networks they are.
func (d *Driver) tellStrangers() {
	x := d.names()
	d.mu.Lock()
	s := x.strangers(d.unowned)
	d.mu.Unlock()
	for _, n := range x.nets {
		if n.vni != 0 {
			d.cluster.Strangers(n.vni, slices.ContainsFunc(s.nets, func(o named) bool { return o.vni == n.vni }))
		}
	}
}
