package driver

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/datapath"
)

// wanted is what one network, or one endpoint if e is set, wants of the
// kernel.
type wanted struct {
	n     *network
	e     *endpoint
	state datapath.State
}

func (w wanted) String() string {
	if w.e == nil {
		return "network " + short(w.n.rec.ID)
	}
	return fmt.Sprintf("endpoint %s of network %s", short(w.e.rec.ID), short(w.n.rec.ID))
}

func (w wanted) log(d *Driver) logrus.FieldLogger {
	log := d.log.WithField("network", w.n.rec.ID)
	if w.e != nil {
		log = log.WithField("endpoint", w.e.rec.ID)
	}
	return log
}

// wanted is everything that should be, networks before endpoints.
func (d *Driver) wanted() []wanted {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []wanted
	for _, n := range d.networks {
		if n.doomed {
			continue
		}
		w := wanted{n: n, state: d.networkState(n)}
		w.state.Add(n.remote)
		list = append(list, w)
		for _, e := range n.endpoints {
			if !e.doomed {
				list = append(list, wanted{n: n, e: e, state: d.endpointState(n, e)})
			}
		}
	}
	slices.SortFunc(list, func(a, b wanted) int {
		return cmp.Or(a.rank()-b.rank(), cmp.Compare(a.n.rec.ID, b.n.rec.ID), cmp.Compare(a.id(), b.id()))
	})
	return list
}

// forwards reports for which families a container needs forwarding.
func (d *Driver) forwards() (v4, v6 bool) {
	for _, w := range d.wanted() {
		v4, v6 = v4 || w.state.Forward4, v6 || w.state.Forward6
	}
	return v4, v6
}

func (w wanted) rank() int {
	if w.e == nil {
		return 0
	}
	return 1
}

func (w wanted) id() string {
	if w.e == nil {
		return ""
	}
	return w.e.rec.ID
}

// difference is what the kernel has to be changed by.
type difference struct {
	missing []wanted       // with only what is missing, or differs
	lost    []wanted       // endpoints whose link is gone
	stale   datapath.State // is there with another value than the one missing
	stray   datapath.State // is there and wanted by nobody
}

func (x difference) empty() bool {
	return len(x.missing) == 0 && len(x.lost) == 0 && x.stale.Empty() && x.stray.Empty()
}

// compare sets what is against what is wanted.
func (p *pass) compare(have datapath.State, want []wanted) difference {
	var all datapath.State
	for _, w := range want {
		all.Add(w.state)
	}
	if p.starting {
		all.Forward4, all.Forward6 = false, false
	}
	lack := all.Minus(have)
	lack.Bridges = slices.DeleteFunc(lack.Bridges, func(b datapath.Bridge) bool { return b.Existing })
	lack.Parents = slices.DeleteFunc(lack.Parents, func(x datapath.Parent) bool { return x.Existing })
	// One that is not on the host is in its container.
	lack.Children = slices.DeleteFunc(lack.Children, func(c datapath.Child) bool { return !c.Stays })
	// A device that is made again comes without its entries, and has another
	// number, which shortcuts lead to.
	for _, v := range lack.VXLANs {
		if !have.NoShortcuts {
			lack.Shortcuts = append(lack.Shortcuts, filter(all.Shortcuts, func(s datapath.Shortcut) bool { return s.Tunnel == v.Name })...)
		}
		lack.Forwards = append(lack.Forwards, filter(all.Forwards, func(f datapath.Forward) bool { return f.Link == v.Name })...)
	}
	var x difference
	if !lack.Empty() {
		is, lacks := indexOf(have), indexOf(lack)
		for _, w := range want {
			if w.e != nil && is.lacks(w.state.Veths) {
				x.lost = append(x.lost, w)
				continue
			}
			w.state = lacks.within(w.state)
			if !w.state.Empty() {
				x.missing = append(x.missing, w)
			}
		}
		s := lacks.within(have)
		x.stale = datapath.State{Elements: s.Elements, Sockets: s.Sockets}
	}
	x.stray = without(have, all)
	return x
}

// index tells what is in a State by what identifies it in the kernel: the
// name of a link, the key of an element, the host's side of a socket.
type index struct {
	// Links have one space of names.
	bridges, vxlans, parents, children, veths map[string]bool
	routes                                    map[datapath.Route]bool
	forwards                                  map[datapath.Forward]bool
	neighbours                                map[datapath.Neighbour]bool
	shortcuts                                 map[datapath.Shortcut]bool
	elements                                  map[datapath.Element]bool
	sockets                                   map[datapath.Socket]bool
	forward4, forward6, hook                  bool
}

func indexOf(s datapath.State) index {
	x := index{
		bridges: make(map[string]bool, len(s.Bridges)), vxlans: map[string]bool{}, parents: map[string]bool{}, children: map[string]bool{}, routes: map[datapath.Route]bool{}, veths: make(map[string]bool, len(s.Veths)),
		forwards: make(map[datapath.Forward]bool, len(s.Forwards)), neighbours: make(map[datapath.Neighbour]bool, len(s.Neighbours)),
		shortcuts: make(map[datapath.Shortcut]bool, len(s.Shortcuts)),
		elements:  make(map[datapath.Element]bool, len(s.Elements)), sockets: make(map[datapath.Socket]bool, len(s.Sockets)),
		forward4: s.Forward4, forward6: s.Forward6, hook: s.Hook,
	}
	for _, b := range s.Bridges {
		x.bridges[b.Name] = true
	}
	for _, v := range s.VXLANs {
		x.vxlans[v.Name] = true
	}
	for _, p := range s.Parents {
		x.parents[p.Name] = true
	}
	for _, c := range s.Children {
		x.children[c.Name] = true
	}
	for _, r := range s.Routes {
		x.routes[routeKey(r)] = true
	}
	for _, v := range s.Veths {
		x.veths[v.Name] = true
	}
	for _, f := range s.Forwards {
		x.forwards[f.Key()] = true
	}
	for _, n := range s.Neighbours {
		x.neighbours[n.Key()] = true
	}
	for _, c := range s.Shortcuts {
		x.shortcuts[c.Key()] = true
	}
	for _, e := range s.Elements {
		x.elements[e.Key()] = true
	}
	for _, k := range s.Sockets {
		x.sockets[socketKey(k)] = true
	}
	return x
}

// lacks reports whether one of the pairs is not there.
func (x index) lacks(list []datapath.Veth) bool {
	return slices.ContainsFunc(list, func(v datapath.Veth) bool { return !x.veths[v.Name] })
}

func routeKey(r datapath.Route) datapath.Route { return datapath.Route{Link: r.Link, To: r.To} }

func socketKey(s datapath.Socket) datapath.Socket {
	s.To = datapath.Socket{}.To
	return s
}

// within is what of s the index has.
func (x index) within(s datapath.State) datapath.State {
	return datapath.State{
		Bridges:    filter(s.Bridges, func(b datapath.Bridge) bool { return x.bridges[b.Name] && !b.Existing }),
		VXLANs:     filter(s.VXLANs, func(v datapath.VXLAN) bool { return x.vxlans[v.Name] }),
		Parents:    filter(s.Parents, func(p datapath.Parent) bool { return x.parents[p.Name] && !p.Existing }),
		Children:   filter(s.Children, func(c datapath.Child) bool { return x.children[c.Name] }),
		Routes:     filter(s.Routes, func(r datapath.Route) bool { return x.routes[routeKey(r)] }),
		Veths:      filter(s.Veths, func(v datapath.Veth) bool { return x.veths[v.Name] }),
		Forwards:   filter(s.Forwards, func(f datapath.Forward) bool { return x.forwards[f.Key()] }),
		Neighbours: filter(s.Neighbours, func(n datapath.Neighbour) bool { return x.neighbours[n.Key()] }),
		Shortcuts:  filter(s.Shortcuts, func(c datapath.Shortcut) bool { return x.shortcuts[c.Key()] }),
		Elements:   filter(s.Elements, func(e datapath.Element) bool { return x.elements[e.Key()] }),
		Sockets:    filter(s.Sockets, func(k datapath.Socket) bool { return x.sockets[socketKey(k)] }),
		Forward4:   s.Forward4 && x.forward4,
		Forward6:   s.Forward6 && x.forward6,
		Hook:       s.Hook && x.hook,
	}
}

// without is what of s can be removed while other stays: nothing that other
// has under the same name or key, whatever its value; no bridge of somebody
// else; and not forwarding, which we never switch off.
func without(s, other datapath.State) datapath.State {
	x := indexOf(other)
	return datapath.State{
		Bridges:    filter(s.Bridges, func(b datapath.Bridge) bool { return !x.bridges[b.Name] && !b.Existing }),
		VXLANs:     filter(s.VXLANs, func(v datapath.VXLAN) bool { return !x.vxlans[v.Name] }),
		Parents:    filter(s.Parents, func(p datapath.Parent) bool { return !x.parents[p.Name] && !p.Existing }),
		Children:   filter(s.Children, func(c datapath.Child) bool { return !x.children[c.Name] }),
		Routes:     filter(s.Routes, func(r datapath.Route) bool { return !x.routes[routeKey(r)] }),
		Veths:      filter(s.Veths, func(v datapath.Veth) bool { return !x.veths[v.Name] }),
		Forwards:   filter(s.Forwards, func(f datapath.Forward) bool { return !x.forwards[f.Key()] }),
		Neighbours: filter(s.Neighbours, func(n datapath.Neighbour) bool { return !x.neighbours[n.Key()] }),
		Shortcuts:  filter(s.Shortcuts, func(c datapath.Shortcut) bool { return !x.shortcuts[c.Key()] }),
		Elements:   filter(s.Elements, func(e datapath.Element) bool { return !x.elements[e.Key()] }),
		Sockets:    filter(s.Sockets, func(k datapath.Socket) bool { return !x.sockets[socketKey(k)] }),
		Hook:       s.Hook && !x.hook,
	}
}

func filter[T any](list []T, keep func(T) bool) []T {
	var out []T
	for _, v := range list {
		if keep(v) {
			out = append(out, v)
		}
	}
	return out
}
