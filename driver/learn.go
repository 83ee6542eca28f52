package driver

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Learnt is what a DHCP server has said with an address: anybody on the LAN may be
// that server.
type Learnt struct {
	MTU    int     // bytes; 0 if not said
	Routes []Route // with a zero NextHop: on the LAN itself
	More   int     // routes that were not even kept
}

// mostLearnt bounds the routes of a server that a container gets.
const mostLearnt = 32

// never are destinations that no container reaches by a router of a LAN: the host's
// and the link's own, multicast, and what is reserved.
var never = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"),
}

// learnFor is what an endpoint with these addresses, which is about to be made, has
// from the DHCP server that leased one: its MTU and its routes. What is left out of
// that, and why, is kept for status. It may ask the host: no lock is held.
func (d *Driver) learnFor(ctx context.Context, networkID string, addrs []netip.Prefix) (e Endpoint, err error) {
	d.mu.Lock()
	known := d.networks[networkID]
	if known == nil {
		d.mu.Unlock()
		return e, nil
	}
	n := known.rec
	d.mu.Unlock()
	for _, a := range addrs {
		s, _ := n.subnet(a.Addr())
		l, ok := d.learnt(s.Pool, a.Addr())
		if !ok {
			continue
		}
		var left []string
		if n.onParent() && n.Options.MTU == 0 && l.MTU != 0 { // the parent's, as it is now
			f, _, err := d.host.Link(ctx, n.parent())
			if err != nil {
				return e, err
			}
			n.MTU = f.MTU
		}
		if note := n.fitMTU(&e, l.MTU); note != "" {
			left = append(left, note)
		}
		if len(l.Routes) > 0 && n.Options.Egress != EgressNone && !n.Options.layer3() {
			others, err := d.otherSubnets(ctx, n)
			if err != nil {
				return e, err
			}
			left = append(left, n.fitRoutes(&e, a.Addr(), l, others)...)
		}
		e.LeftOut = append(e.LeftOut, left...)
	}
	return e, nil
}

// fitMTU takes the server's MTU where the user gave none and the parent carries it,
// and otherwise says why not, if that is worth saying. A bridge has the least MTU of
// its ports': what the server says would be that of the host, and of a LAN that is not
// ours to change.
func (n Network) fitMTU(e *Endpoint, mtu int) (note string) {
	least, _ := n.leastMTU()
	switch {
	case mtu == 0 || n.Options.MTU != 0 || mtu >= n.MTU:
		return ""
	case mtu < least:
		return fmt.Sprintf("MTU %d is less than the %d that every station takes", mtu, least)
	case !n.onParent():
		return fmt.Sprintf("MTU %d would be the bridge's, too, and so the host's: make the network with -o mtu=%d to have it", mtu, mtu)
	}
	e.MTU = mtu
	return ""
}

// fitRoutes takes the routes of a server for an address that do no harm. The engine
// refuses to connect a container to a network whose subnet one of its routes leads
// into, and the kernel the same destination twice.
func (n Network) fitRoutes(e *Endpoint, a netip.Addr, l Learnt, others map[netip.Prefix]string) (left []string) {
	taken := map[netip.Prefix]bool{}
	for _, r := range slices.Concat(n.Options.Routes, e.Routes) {
		taken[r.Destination] = true
	}
	own, _ := n.subnet(a)
	for _, r := range l.Routes {
		to, why := r.Destination, ""
		switch {
		case taken[to] || own.Pool.Contains(to.Addr()) && own.Pool.Bits() <= to.Bits():
			continue // the user's, or needed by nobody
		case !to.Addr().Is4() || slices.ContainsFunc(never, to.Overlaps):
			why = "covers addresses that no router leads to"
		case to.Overlaps(own.Pool):
			why = "covers the network's own subnet"
		case r.NextHop.IsValid() && (!own.Pool.Contains(r.NextHop) || r.NextHop == a):
			why = "is by a router that is not in " + own.Pool.String()
		case len(e.Routes) == mostLearnt:
			l.More++
			continue
		default:
			for _, p := range slices.SortedFunc(maps.Keys(others), netip.Prefix.Compare) {
				if to.Overlaps(p) {
					why = fmt.Sprintf("covers %s, which is %s", p, others[p])
					break
				}
			}
		}
		if why == "" {
			taken[to] = true
			e.Routes = append(e.Routes, r)
		} else if len(left) < mostLeft {
			left = append(left, fmt.Sprintf("route %s %s", to, why))
		} else {
			l.More++
		}
	}
	if l.More > 0 {
		left = append(left, fmt.Sprintf("%d more routes, of which %d are taken at most", l.More, mostLearnt))
	}
	return left
}

// mostLeft bounds what is told of the routes that are left out.
const mostLeft = 4

// otherSubnets are those that containers may be connected to, and the host is in, by
// what they are.
func (d *Driver) otherSubnets(ctx context.Context, n Network) (map[netip.Prefix]string, error) {
	links, err := d.addressedLately(ctx)
	if err != nil {
		return nil, err
	}
	out := map[netip.Prefix]string{}
	for name, list := range links {
		for _, p := range list {
			if p = p.Masked(); p.Addr().Is4() {
				out[p] = "that of " + name + " on the host"
			}
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, o := range d.networks {
		for _, s := range o.rec.Subnets {
			if s.Pool.Addr().Is4() && !o.doomed && id != n.ID {
				out[s.Pool] = "that of network " + short(id)
			}
		}
	}
	for _, s := range n.Subnets {
		delete(out, s.Pool)
	}
	return out, nil
}

// addressedLately are the host's addresses as they were some seconds ago at most: a
// hundred containers that start are told the same routes.
func (d *Driver) addressedLately(ctx context.Context) (map[string][]netip.Prefix, error) {
	d.mu.Lock()
	links, at := d.addressed, d.addressedAt
	d.mu.Unlock()
	now := d.now()
	if age := now.Sub(at); links != nil && age >= 0 && age < lately {
		return links, nil
	}
	links, err := d.host.Addressed(ctx)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.addressed, d.addressedAt = links, now
	return links, nil
}

const lately = 10 * time.Second

// learntRoutes are the routes of a server that a container gets with an endpoint:
// but for those that its other endpoints on LANs have given it already.
func (d *Driver) learntRoutes(e *endpoint) []Route {
	d.mu.Lock()
	defer d.mu.Unlock()
	have := map[netip.Prefix]bool{}
	for _, o := range d.mates[e.sandbox] {
		n := d.networks[o.rec.Network]
		if n == nil || o == e || o.doomed || o.rec.Left {
			continue
		}
		for _, r := range slices.Concat(n.rec.Options.Routes, o.rec.Routes) {
			have[r.Destination] = true
		}
	}
	return filter(e.rec.Routes, func(r Route) bool { return !have[r.Destination] })
}

// assign tells whose the addresses of an endpoint are.
func (d *Driver) assign(n Network, e Endpoint) {
	for _, a := range e.Addrs {
		if s, ok := n.subnet(a.Addr()); ok {
			d.assigned(s.Pool, a.Addr(), e.ID, e.MAC)
		}
	}
}

// AssignAll tells it of all endpoints, as after a start.
func (d *Driver) AssignAll() {
	type pair struct {
		n Network
		e Endpoint
	}
	var all []pair
	d.mu.Lock()
	for _, n := range d.networks {
		for _, e := range n.endpoints {
			if e.holds() {
				all = append(all, pair{n.rec, e.rec})
			}
		}
	}
	d.mu.Unlock()
	for _, p := range all {
		d.assign(p.n, p.e)
	}
}
