package driver

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft/internal/datapath"
)

// What carries our mark and no record names is left as it is. A record is written
// before what it describes and deleted after it, so nothing of ours is ever
// without one, unless the records were lost: the plugin was removed by force, or
// its disk was. Containers use it then. The engine says when they do not any more,
// and people can.

// names are what records name in the kernel.
type names struct {
	links   map[string]bool
	subnets []netip.Prefix
	nets    []named
	beside  strangers
}

// names are those of all records, also of what is being deleted.
func (d *Driver) names() names {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := names{links: map[string]bool{}}
	for _, n := range d.networks {
		// Of a change that was interrupted; see tryParent and openAccess.
		x.links[peerEnd(n.rec.ID)], x.links[ownLink(n.rec.ID)] = true, true
		s := d.networkState(n)
		s.Add(n.remote)
		x.add(s)
		of := named{vni: n.rec.VNI, links: names{links: map[string]bool{}}}
		of.links.add(s)
		for _, sub := range n.rec.Subnets {
			x.subnets = append(x.subnets, sub.Pool)
			of.subnets = append(of.subnets, sub.Pool)
		}
		for _, e := range n.endpoints {
			for _, a := range e.rec.Addrs {
				of.addrs = append(of.addrs, a.Addr())
			}
			x.links[hostEnd(e.rec.ID)], x.links[peerEnd(e.rec.ID)] = true, true
		}
		x.nets = append(x.nets, of)
	}
	return x
}

// add enters the links of a State.
func (x names) add(s datapath.State) {
	for _, b := range s.Bridges {
		x.links[b.Name] = true
	}
	for _, v := range s.VXLANs {
		x.links[v.Name] = true
	}
	for _, p := range s.Parents {
		x.links[p.Name] = true
	}
	for _, c := range s.Children {
		x.links[c.Name] = true
	}
	for _, v := range s.Veths {
		x.links[v.Name] = true
	}
}

// of reports whether an object belongs to one of the links, or else to one of the
// subnets.
func (x names) of(link string, addrs ...netip.Addr) bool {
	if x.links[link] {
		return true
	}
	return slices.ContainsFunc(addrs, func(a netip.Addr) bool {
		return a.IsValid() && slices.ContainsFunc(x.subnets, func(p netip.Prefix) bool { return p.Contains(a) })
	})
}

// part is what of s is, or is not, that of the names.
func (x names) part(s datapath.State, want bool) datapath.State {
	return datapath.State{
		Bridges:    filter(s.Bridges, func(b datapath.Bridge) bool { return x.links[b.Name] == want }),
		VXLANs:     filter(s.VXLANs, func(v datapath.VXLAN) bool { return (x.links[v.Name] || x.links[v.Master] && want) == want }),
		Parents:    filter(s.Parents, func(p datapath.Parent) bool { return x.links[p.Name] == want }),
		Children:   filter(s.Children, func(c datapath.Child) bool { return (x.links[c.Name] || x.links[c.Parent] && want) == want }),
		Veths:      filter(s.Veths, func(v datapath.Veth) bool { return (x.links[v.Name] || x.links[v.Master] && want) == want }),
		Routes:     filter(s.Routes, func(r datapath.Route) bool { return (x.links[r.Link] && !x.beside.have(r.To)) == want }),
		Forwards:   filter(s.Forwards, func(f datapath.Forward) bool { return x.links[f.Link] == want }),
		Neighbours: filter(s.Neighbours, func(n datapath.Neighbour) bool { return x.links[n.Link] == want }),
		Shortcuts: filter(s.Shortcuts, func(c datapath.Shortcut) bool {
			return ((x.links[c.Tunnel] || x.links[c.Link]) && !x.beside.links[c.Link]) == want
		}),
		Elements: filter(s.Elements, func(e datapath.Element) bool {
			return ((x.of(e.Link, e.To) || x.of(e.Out, e.Net.Addr())) && !x.beside.own(e)) == want
		}),
		Sockets: filter(s.Sockets, func(k datapath.Socket) bool {
			return (x.of("", k.To.Addr()) && !x.beside.have(k.To.Addr())) == want
		}),
		Hook: s.Hook && !want,
	}
}

// unnamed parts what nobody wants into what no record names, and the rest, which
// may be removed. Where every link is named so is all else: it is left of a change
// that was interrupted.
func (d *Driver) unnamed(stray datapath.State) (unclaimed, rest datapath.State) {
	if stray.Empty() {
		return unclaimed, stray
	}
	x := d.names()
	unclaimed = x.part(stray, false)
	if unclaimed.Links() == 0 {
		return datapath.State{}, stray
	}
	if x.beside = x.strangers(unclaimed); len(x.beside.links) > 0 {
		unclaimed = x.part(stray, false)
	}
	if len(unclaimed.Veths)+len(unclaimed.Children) == 0 {
		// There is no container left that ports could lead to.
		unclaimed.Sockets = nil
		unclaimed.Elements = slices.DeleteFunc(unclaimed.Elements, func(e datapath.Element) bool {
			return e.Set == datapath.SetPublished || e.Set == datapath.SetProxied
		})
	}
	rest = without(stray, unclaimed)
	rest.Elements = stray.Minus(unclaimed).Elements // another value of the same key is another element
	return unclaimed, rest
}

// noticed reports whether d knows already what is unclaimed.
func (d *Driver) noticed(unclaimed datapath.State) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.unowned.String() == unclaimed.String()
}

// notice remembers what is unclaimed and tells it once. All locks are held.
func (d *Driver) notice(unclaimed datapath.State) {
	d.mu.Lock()
	before := d.unowned.Links()
	d.unowned = unclaimed
	d.mu.Unlock()
	d.tellStrangers()
	if n := unclaimed.Links(); n > before {
		d.log.Warnf("%d links are ours and in no record of ours: the state was lost or is an old one. They are left as they are, containers may use them; `weft status` lists them, and `weft network forget unclaimed` removes them", n)
	}
}

// holdUnclaimed holds the published ports that lead to containers without records.
func (d *Driver) holdUnclaimed(ctx context.Context) {
	d.mu.Lock()
	list := filter(d.unowned.Elements, func(e datapath.Element) bool { return e.Set == datapath.SetPublished })
	for _, p := range filter(d.unowned.Elements, func(e datapath.Element) bool { return e.Set == datapath.SetProxied }) {
		// The proxy leads to where the same port of IPv4 is translated to.
		if i := slices.IndexFunc(list, func(e datapath.Element) bool {
			return e.Proto == p.Proto && e.Port == p.Port && e.More == p.More && e.Net.Addr().Is4()
		}); i >= 0 {
			p.To, p.ToPort = list[i].To, list[i].ToPort
			list = append(list, p)
		}
	}
	d.mu.Unlock()
	for _, e := range list {
		port := e.ToPort
		if e.More > 0 || port == 0 {
			port = e.Port
		}
		x := datapath.Socket{Proto: e.Proto, Host: netip.AddrPortFrom(e.Net.Addr(), e.Port), To: netip.AddrPortFrom(e.To, port), More: e.More}
		if _, err := d.kernel.Ensure(ctx, datapath.State{Sockets: []datapath.Socket{x}}); err != nil {
			d.log.WithError(err).Warn("a published port is not held")
			continue
		}
		d.mu.Lock()
		d.unowned.Sockets = append(d.unowned.Sockets, x)
		d.mu.Unlock()
	}
}

// dropUnclaimed removes what is unclaimed and belongs to some links. change is held.
func (d *Driver) dropUnclaimed(ctx context.Context, links ...string) error {
	d.mu.Lock()
	all := d.unowned
	d.mu.Unlock()
	x := names{links: map[string]bool{}}
	for _, l := range links {
		x.links[l] = true
	}
	mine := x.part(all, true)
	if mine.Links() == 0 {
		return nil
	}
	x.add(mine)
	for _, b := range mine.Bridges {
		for _, a := range b.Addrs {
			x.subnets = append(x.subnets, a.Masked())
		}
	}
	for _, e := range all.Elements {
		if e.Set == datapath.SetAttached && x.links[e.Link] {
			x.subnets = append(x.subnets, e.Net)
		}
	}
	mine = x.part(all, true)
	if all.Minus(mine).Links() == 0 {
		mine = d.unneeded(all) // with the last link goes what they had in common
	}
	if err := d.kernel.Remove(ctx, mine); err != nil {
		return err
	}
	d.mu.Lock()
	d.unowned = all.Minus(mine)
	d.mu.Unlock()
	d.tellStrangers()
	return nil
}

// unneeded is what of s no record wants.
func (d *Driver) unneeded(s datapath.State) datapath.State {
	var all datapath.State
	for _, w := range d.wanted() {
		all.Add(w.state)
	}
	return without(s, all)
}

// commonLocked is what of s containers without records need as well: what belongs
// to no one network. d.mu is held.
func (d *Driver) commonLocked(s datapath.State) datapath.State {
	return datapath.State{
		Hook: s.Hook && d.unowned.Links() > 0,
		Elements: filter(s.Elements, func(e datapath.Element) bool {
			return (e.Set == datapath.SetTunnels || e.Set == datapath.SetMembers) &&
				slices.ContainsFunc(d.unowned.VXLANs, func(v datapath.VXLAN) bool { return v.Port == e.Port })
		}),
	}
}

// leaveUnclaimed ends what an endpoint without a record has: the engine has stopped
// its container.
func (d *Driver) leaveUnclaimed(ctx context.Context, endpointID string) error {
	x := names{links: map[string]bool{hostEnd(endpointID): true, peerEnd(endpointID): true}}
	d.mu.Lock()
	none := x.part(d.unowned, true).Links() == 0
	d.mu.Unlock()
	if none {
		return nil
	}
	d.change.Lock()
	defer d.change.Unlock()
	return d.dropUnclaimed(ctx, hostEnd(endpointID), peerEnd(endpointID))
}

// deleteUnclaimed ends all of an endpoint without a record. What the engine has
// just moved back to the host no pass has seen.
func (d *Driver) deleteUnclaimed(ctx context.Context, endpointID string) error {
	if err := d.leaveUnclaimed(ctx, endpointID); err != nil {
		return err
	}
	s := datapath.State{Veths: []datapath.Veth{{Name: hostEnd(endpointID)}}}
	for _, kind := range []string{modeMacvlan, modeIPvlan} {
		s.Children = append(s.Children, datapath.Child{Name: peerEnd(endpointID), Kind: kind})
	}
	return d.kernel.Remove(ctx, s)
}

// ForgetUnclaimed removes everything that no record names, and says how much it was.
func (d *Driver) ForgetUnclaimed(ctx context.Context) (string, error) {
	if _, err := d.Reconcile(ctx); err != nil {
		// Other trouble is no reason to keep it; Run and the status tell that.
		if _, err := d.kernel.Owned(ctx); err != nil {
			return "", fmt.Errorf("read the kernel: %w", err)
		}
	}
	d.change.Lock()
	defer d.change.Unlock()
	d.mu.Lock()
	all := d.unowned
	d.mu.Unlock()
	if all.Empty() {
		return "nothing is unclaimed", nil
	}
	if err := d.kernel.Remove(ctx, d.unneeded(all)); err != nil {
		return "", err
	}
	d.mu.Lock()
	d.unowned = datapath.State{}
	d.mu.Unlock()
	d.tellStrangers()
	return fmt.Sprintf("%d links and what belonged to them are removed", all.Links()), nil
}

// Forget deletes a network that the engine does not have any more, known by the
// beginning of its ID, and returns its subnets.
func (d *Driver) Forget(ctx context.Context, id string) (done string, subnets []netip.Prefix, err error) {
	d.change.Lock()
	defer d.change.Unlock()
	var found []*network
	for have, n := range d.networks { // change is held: the table stands still
		if id != "" && strings.HasPrefix(have, id) {
			found = append(found, n)
		}
	}
	switch len(found) {
	case 0:
		return "", nil, fmt.Errorf("there is no network %s: `weft status networks` lists them", id)
	case 1:
	default:
		return "", nil, fmt.Errorf("%d networks begin with %s: give more of the ID", len(found), id)
	}
	n := found[0]
	n.mu.Lock() // before the look: no container comes after it
	defer n.mu.Unlock()
	have, err := d.kernel.Owned(ctx)
	if err != nil {
		return "", nil, err
	}
	d.mu.Lock()
	users := 0
	for _, e := range n.endpoints {
		if e.holds() && n.place(have, e.rec) != nowhere {
			users++
		}
	}
	d.mu.Unlock()
	if users > 0 {
		return "", nil, fmt.Errorf("network %s has %d running containers: stop them, then `docker network rm` it", short(n.rec.ID), users)
	}
	for _, s := range n.rec.Subnets {
		subnets = append(subnets, s.Pool)
	}
	if err := d.removeNetwork(ctx, n); err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("network %s is forgotten; if `docker network ls` still has it, remove it there too", short(n.rec.ID)), subnets, nil
}
