package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
)

// errFault is what an armed fault returns.
var errFault = errors.New("fault for the test")

// faults counts the calls to the kernel and the stores and lets one of them
// fail.
type faults struct {
	mu    sync.Mutex
	count int
	at    int  // the call that fails, from 1; 0 is none
	late  bool // it fails after its work, or half of it, was done
	fired bool
	dead  bool // and so does everything after it
}

func (f *faults) arm(at int, late bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count, f.at, f.late, f.fired = 0, at, late, false
}

// step says whether this call fails before or after its work.
func (f *faults) step() (early, late bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count++
	if f.dead && f.at > 0 && f.count > f.at {
		return true, false
	}
	if f.count != f.at {
		return false, false
	}
	f.fired = true
	return !f.late, f.late
}

// faultyStore is a real store whose calls may fail.
type faultyStore struct {
	*store.Bolt
	faults *faults
}

func (s faultyStore) Put(ctx context.Context, r store.Record) (store.Record, error) {
	early, late := s.faults.step()
	if early {
		return store.Record{}, errFault
	}
	out, err := s.Bolt.Put(ctx, r)
	if late && err == nil {
		return store.Record{}, fmt.Errorf("%w: %w", errFault, store.ErrUncertain)
	}
	return out, err
}

func (s faultyStore) Delete(ctx context.Context, key string) error {
	early, late := s.faults.step()
	if early {
		return errFault
	}
	err := s.Bolt.Delete(ctx, key)
	if late && err == nil {
		return fmt.Errorf("%w: %w", errFault, store.ErrUncertain)
	}
	return err
}

// fakeKernel holds a State as the kernel would.
type fakeKernel struct {
	faults *faults

	mu         sync.Mutex
	bridges    map[string]datapath.Bridge
	vxlans     map[string]datapath.VXLAN
	forwards   map[datapath.Forward]datapath.Forward
	neighbours map[datapath.Neighbour]datapath.Neighbour
	shortcuts  map[datapath.Shortcut]datapath.Shortcut
	veths      map[string]datapath.Veth
	home       map[string]bool // veths whose peer is in the host's namespace
	parents    map[string]datapath.Parent
	children   map[string]datapath.Child // those on the host
	inside     map[string]datapath.Child // those in containers
	routes     map[datapath.Route]datapath.Route
	elements   map[datapath.Element]datapath.Element
	sockets    map[datapath.Socket]datapath.Socket // by key; the zero To is a reservation
	forward4   bool
	forward6   bool
	guard4     bool // for the containers of which families the last pass had a guard
	guard6     bool
	hook       bool

	foreign map[string]bool         // bridges of others
	taken   map[netip.AddrPort]bool // ports of others
	broken  error                   // what Owned returns
	wait    func()                  // run in every Remove of a veth
	made    map[string]int          // how often each veth was made
	seen    func(s datapath.State)  // told every Ensure
	before  func(s datapath.State)  // told every Remove, before it
}

func newFakeKernel(f *faults) *fakeKernel {
	return &fakeKernel{
		faults: f, bridges: map[string]datapath.Bridge{}, vxlans: map[string]datapath.VXLAN{},
		forwards: map[datapath.Forward]datapath.Forward{}, neighbours: map[datapath.Neighbour]datapath.Neighbour{}, shortcuts: map[datapath.Shortcut]datapath.Shortcut{}, veths: map[string]datapath.Veth{}, home: map[string]bool{},
		parents: map[string]datapath.Parent{}, children: map[string]datapath.Child{}, inside: map[string]datapath.Child{},
		routes: map[datapath.Route]datapath.Route{}, elements: map[datapath.Element]datapath.Element{}, sockets: map[datapath.Socket]datapath.Socket{},
		foreign: map[string]bool{}, taken: map[netip.AddrPort]bool{}, made: map[string]int{},
	}
}

func (k *fakeKernel) Ensure(ctx context.Context, s datapath.State) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	early, late := k.faults.step()
	if early {
		return nil, errFault
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.seen != nil {
		k.seen(s)
	}
	var made datapath.State
	lines, err := k.ensure(s, &made)
	if late && err == nil {
		err = errFault
	}
	if err != nil {
		k.remove(made)
		return nil, err
	}
	return lines, nil
}

func (k *fakeKernel) ensure(s datapath.State, made *datapath.State) (lines []string, err error) {
	say := func(x any) { lines = append(lines, fmt.Sprint(x)) }
	for _, b := range s.Bridges {
		have, ok := k.bridges[b.Name]
		switch {
		case b.Existing && !ok && !k.foreign[b.Name]:
			return nil, fmt.Errorf("bridge %s does not exist", b.Name)
		case b.Existing:
		case k.foreign[b.Name]:
			return nil, fmt.Errorf("bridge %s exists and is not ours", b.Name)
		case !ok:
			k.bridges[b.Name] = b
			made.Bridges = append(made.Bridges, b)
			say(b)
		case !(datapath.State{Bridges: []datapath.Bridge{b}}).Minus(datapath.State{Bridges: []datapath.Bridge{have}}).Empty():
			k.bridges[b.Name] = b
			say(b)
		}
	}
	for _, v := range s.VXLANs {
		if have := k.vxlans[v.Name]; have != v {
			if have.Local != v.Local { // made anew, and its entries went
				maps.DeleteFunc(k.forwards, func(_, f datapath.Forward) bool { return f.Link == v.Name })
			}
			if have.Name == "" {
				made.VXLANs = append(made.VXLANs, v)
			}
			k.vxlans[v.Name] = v
			say(v)
		}
	}
	more, err := k.ensureChildren(s, made)
	lines = append(lines, more...)
	if err != nil {
		return nil, err
	}
	for _, f := range s.Forwards {
		if k.vxlans[f.Link].Name == "" {
			return nil, fmt.Errorf("forward %s: %s does not exist", f, f.Link)
		}
		if k.forwards[f.Key()] != f {
			k.forwards[f.Key()] = f
			say(f)
		}
	}
	for _, n := range s.Neighbours {
		if k.neighbours[n.Key()] != n {
			k.neighbours[n.Key()] = n
			say(n)
		}
	}
	for _, c := range s.Shortcuts {
		if k.shortcuts[c.Key()] != c {
			k.shortcuts[c.Key()] = c
			say(c)
		}
	}
	for _, v := range s.Veths {
		if _, ours := k.bridges[v.Master]; !ours && !k.foreign[v.Master] {
			return nil, fmt.Errorf("create veth %s: bridge %s does not exist", v.Name, v.Master)
		}
		have, ok := k.veths[v.Name]
		if !ok {
			k.home[v.Name] = true
			k.made[v.Name]++
			made.Veths = append(made.Veths, v)
		}
		have.Peer, have.PeerMAC = v.Peer, v.PeerMAC
		if have != v {
			k.veths[v.Name] = v
			say(v)
		}
	}
	for _, x := range s.Sockets {
		have, ok := k.sockets[socketKey(x)]
		if ok && have.To.IsValid() && have.To != x.To {
			return nil, fmt.Errorf("%s is already published for %s", x.Host, have.To)
		}
		if !ok && k.taken[x.Host] {
			return nil, fmt.Errorf("port %s is in use by another program", x.Host)
		}
		if have != x {
			k.sockets[socketKey(x)] = x
			made.Sockets = append(made.Sockets, x)
			say(x)
		}
	}
	for _, e := range s.Elements {
		have, ok := k.elements[e.Key()]
		if ok && have != e {
			return nil, fmt.Errorf("element %s has another value: %s", e, have)
		}
		if !ok {
			k.elements[e.Key()] = e
			made.Elements = append(made.Elements, e)
			say(e)
		}
	}
	if s.Forward4 && !k.forward4 || s.Forward6 && !k.forward6 {
		say("forwarding on")
	}
	k.forward4, k.forward6 = k.forward4 || s.Forward4, k.forward6 || s.Forward6
	if s.Hook && !k.hook {
		k.hook = true
		say("hook put in")
	}
	return lines, nil
}

// ensureChildren is the part about parents; k.mu is held.
func (k *fakeKernel) ensureChildren(s datapath.State, made *datapath.State) (lines []string, err error) {
	say := func(x any) { lines = append(lines, fmt.Sprint(x)) }
	for _, p := range s.Parents {
		_, ok := k.parents[p.Name]
		switch {
		case p.Existing && !ok && !k.foreign[p.Name]:
			return nil, fmt.Errorf("parent %s does not exist", p.Name)
		case p.Existing || ok:
		case p.Lower != "" && !k.there(p.Lower):
			return nil, fmt.Errorf("make %s: %s does not exist", p.Name, p.Lower)
		default:
			k.parents[p.Name] = p
			made.Parents = append(made.Parents, p)
			say(p)
		}
	}
	for _, c := range s.Children {
		if !k.there(c.Parent) {
			return nil, fmt.Errorf("make %s: parent %s does not exist", c.Name, c.Parent)
		}
		have, ok := k.children[c.Name]
		if ok && (!c.Stays || fmt.Sprint(have) == fmt.Sprint(c)) {
			continue
		}
		if !ok {
			made.Children = append(made.Children, c)
		}
		k.children[c.Name] = c
		say(c)
	}
	for _, r := range s.Routes {
		if _, ok := k.children[r.Link]; !ok {
			return nil, fmt.Errorf("route to %s: %s does not exist", r.To, r.Link)
		}
		if have, ok := k.routes[routeKey(r)]; ok && have.MAC == r.MAC {
			continue
		}
		k.routes[routeKey(r)] = r
		made.Routes = append(made.Routes, r)
		say(r)
	}
	return lines, nil
}

// there reports whether a link exists that others can hang on; k.mu is held.
func (k *fakeKernel) there(name string) bool {
	_, ours := k.parents[name]
	return ours || k.foreign[name]
}

func (k *fakeKernel) Remove(ctx context.Context, s datapath.State) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	early, late := k.faults.step()
	if early {
		return errFault
	}
	if k.before != nil {
		k.before(s)
	}
	if k.wait != nil && len(s.Veths) > 0 {
		k.wait()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if late { // it got half-way
		k.remove(datapath.State{Elements: s.Elements, Sockets: s.Sockets})
		return errFault
	}
	for _, b := range s.Bridges {
		if b.Existing {
			return fmt.Errorf("bridge %s is not ours to remove", b.Name)
		}
	}
	k.remove(s)
	return nil
}

func (k *fakeKernel) remove(s datapath.State) {
	for _, x := range s.Sockets {
		if have := k.sockets[socketKey(x)]; !have.To.IsValid() || have.To == x.To {
			delete(k.sockets, socketKey(x))
		}
	}
	for _, e := range s.Elements {
		if k.elements[e.Key()] == e {
			delete(k.elements, e.Key())
		}
	}
	for _, v := range s.Veths {
		k.unlink(v.Name)
	}
	for _, r := range s.Routes {
		delete(k.routes, routeKey(r))
	}
	for _, c := range s.Children {
		k.dropChild(c.Name)
	}
	for _, p := range s.Parents {
		delete(k.parents, p.Name)
	}
	for _, f := range s.Forwards {
		if k.forwards[f.Key()] == f {
			delete(k.forwards, f.Key())
		}
	}
	for _, n := range s.Neighbours {
		delete(k.neighbours, n.Key())
	}
	for _, c := range s.Shortcuts {
		delete(k.shortcuts, c.Key())
	}
	for _, v := range s.VXLANs {
		delete(k.vxlans, v.Name)
		maps.DeleteFunc(k.forwards, func(_, f datapath.Forward) bool { return f.Link == v.Name })
	}
	for _, b := range s.Bridges {
		delete(k.bridges, b.Name)
		maps.DeleteFunc(k.neighbours, func(_, n datapath.Neighbour) bool { return n.Link == b.Name })
	}
	if s.Hook {
		k.hook = false
	}
}

// dropChild deletes a sub-interface on the host, and the routes that lead by it.
func (k *fakeKernel) dropChild(name string) {
	delete(k.children, name)
	maps.DeleteFunc(k.routes, func(r, _ datapath.Route) bool { return r.Link == name })
}

func (k *fakeKernel) unlink(name string) {
	delete(k.veths, name)
	delete(k.home, name)
}

func (k *fakeKernel) Owned(ctx context.Context) (datapath.State, error) {
	if err := ctx.Err(); err != nil {
		return datapath.State{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.broken != nil {
		return datapath.State{}, k.broken
	}
	return k.owned(), nil
}

func (k *fakeKernel) owned() datapath.State {
	s := datapath.State{Forward4: k.forward4, Forward6: k.forward6, Hook: k.hook}
	for _, b := range k.bridges {
		s.Bridges = append(s.Bridges, b)
	}
	for _, v := range k.vxlans {
		s.VXLANs = append(s.VXLANs, v)
	}
	for _, f := range k.forwards {
		s.Forwards = append(s.Forwards, f)
	}
	for _, n := range k.neighbours {
		s.Neighbours = append(s.Neighbours, n)
	}
	for _, c := range k.shortcuts {
		s.Shortcuts = append(s.Shortcuts, c)
	}
	for _, v := range k.veths {
		if !k.home[v.Name] {
			v.Peer = ""
		}
		v.PeerMAC = datapath.MAC{} // not to be seen from here
		s.Veths = append(s.Veths, v)
	}
	for _, p := range k.parents {
		s.Parents = append(s.Parents, p)
	}
	for _, c := range k.children {
		s.Children = append(s.Children, c)
	}
	for _, r := range k.routes {
		s.Routes = append(s.Routes, datapath.Route{Link: r.Link, To: r.To, MAC: r.MAC})
	}
	for _, e := range k.elements {
		s.Elements = append(s.Elements, e)
	}
	for _, x := range k.sockets {
		if x.To.IsValid() {
			s.Sockets = append(s.Sockets, x)
		}
	}
	slices.SortFunc(s.Bridges, func(a, b datapath.Bridge) int { return compareText(a, b) })
	slices.SortFunc(s.VXLANs, func(a, b datapath.VXLAN) int { return compareText(a, b) })
	slices.SortFunc(s.Forwards, func(a, b datapath.Forward) int { return compareText(a, b) })
	slices.SortFunc(s.Neighbours, func(a, b datapath.Neighbour) int { return compareText(a, b) })
	slices.SortFunc(s.Shortcuts, func(a, b datapath.Shortcut) int { return compareText(a, b) })
	slices.SortFunc(s.Parents, func(a, b datapath.Parent) int { return compareText(a, b) })
	slices.SortFunc(s.Children, func(a, b datapath.Child) int { return compareText(a, b) })
	slices.SortFunc(s.Routes, func(a, b datapath.Route) int { return compareText(a, b) })
	slices.SortFunc(s.Veths, func(a, b datapath.Veth) int { return compareText(a, b) })
	slices.SortFunc(s.Sockets, func(a, b datapath.Socket) int { return compareText(a, b) })
	return s
}

func compareText(a, b fmt.Stringer) int {
	return slices.Compare([]string{a.String()}, []string{b.String()})
}

// LiftGuard notes what is needed: the guard itself is tested with the kernel.
func (k *fakeKernel) LiftGuard(_ context.Context, needed func() (v4, v6 bool)) error {
	v4, v6 := needed()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.guard4, k.guard6 = v4, v6
	return nil
}

func (k *fakeKernel) Guarded() (v4, v6 bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.guard4, k.guard6
}

func (k *fakeKernel) Reserve(ctx context.Context, r datapath.PortRequest) (uint16, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	early, late := k.faults.step()
	if early || late {
		return 0, errFault
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	first, last := r.First, r.Last
	if first == 0 {
		first, last = 32768, 60999
	}
	for port := int(first); port <= int(last); port++ {
		free := !slices.ContainsFunc(r.Hosts, func(a netip.Addr) bool {
			at := netip.AddrPortFrom(a, uint16(port))
			x := datapath.Socket{Proto: r.Proto, Host: at, More: r.More}
			for have := range k.sockets {
				if have.Proto == r.Proto && have.Host.Addr() == a && have.Host.Port() <= at.Port()+r.More && at.Port() <= have.Host.Port()+have.More {
					return true
				}
			}
			for i := range uint32(x.More) + 1 {
				if k.taken[netip.AddrPortFrom(a, at.Port()+uint16(i))] {
					return true
				}
			}
			return false
		})
		if !free {
			continue
		}
		for _, a := range r.Hosts {
			x := datapath.Socket{Proto: r.Proto, Host: netip.AddrPortFrom(a, uint16(port)), More: r.More}
			k.sockets[x] = x
		}
		return uint16(port), nil
	}
	return 0, fmt.Errorf("port %d/%s is in use by another program", r.First, r.Proto)
}

// die is the end of our process: what it held open is closed.
func (k *fakeKernel) die() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.sockets)
}

// reboot is the end of everything.
func (k *fakeKernel) reboot() {
	k.die()
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.bridges)
	clear(k.vxlans)
	clear(k.forwards)
	clear(k.neighbours)
	clear(k.shortcuts)
	clear(k.veths)
	clear(k.home)
	clear(k.parents)
	clear(k.children)
	clear(k.inside)
	clear(k.routes)
	clear(k.elements)
	k.forward4, k.forward6, k.hook = false, false, false
}

// moveIn is what the engine does with the container's end after Join.
func (k *fakeKernel) moveIn(host string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.home[host] = false
}

// carry is what the engine does with a sub-interface after Join.
func (k *fakeKernel) carry(t *testing.T) {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	c, ok := k.children[child1]
	if !ok {
		t.Errorf("there is no %s to move", child1)
	}
	delete(k.children, child1)
	k.inside[child1] = c
}

// carryBack is what it does after Leave; a container that died has none left.
func (k *fakeKernel) carryBack(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if c, ok := k.inside[name]; ok {
		delete(k.inside, name)
		k.children[name] = c
	}
}

// fakeHost is the host's network as the driver sees it.
type fakeHost struct {
	kernel *fakeKernel
	mtu    int

	mu      sync.Mutex
	links   map[string]datapath.LinkFacts
	holders map[netip.Addr]datapath.MAC // stations of the LAN
	probes  []string                    // what was asked for

	announced []string
	away      map[string]bool         // links that are in another namespace
	settled   []string                // links that were waited for
	routers   map[string][]netip.Addr // by link
	addressed map[string][]netip.Prefix
}

func (h *fakeHost) PathMTU(context.Context) (int, error) { return h.mtu, nil }

func (h *fakeHost) Link(_ context.Context, name string) (datapath.LinkFacts, bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if f, ok := h.links[name]; ok {
		return f, true, nil
	}
	h.kernel.mu.Lock()
	defer h.kernel.mu.Unlock()
	if _, ok := h.kernel.parents[name]; ok {
		return datapath.LinkFacts{Name: name, Kind: "vlan", Ours: true, Up: true, MTU: 1500}, true, nil
	}
	return datapath.LinkFacts{}, false, nil
}

func (h *fakeHost) Addressed(context.Context) (map[string][]netip.Prefix, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.addressed), nil
}

func (h *fakeHost) Routers(_ context.Context, link string) ([]netip.Addr, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.routers[link]), nil
}

func (h *fakeHost) Probe(_ context.Context, link string, a netip.Addr) (datapath.MAC, bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.probes = append(h.probes, link+" "+a.String())
	m, taken := h.holders[a]
	return m, taken, nil
}

func (h *fakeHost) Announce(link string, a netip.Addr, m datapath.MAC) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.announced = append(h.announced, strings.TrimSpace(fmt.Sprintf("%s %s %s", link, a, m)))
	return nil
}

func (h *fakeHost) Present(link string) (bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return !h.away[link], nil
}

func (h *fakeHost) Settle(_ context.Context, link string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.settled = append(h.settled, link)
	return nil
}

// card adds a network card to the host.
func (h *fakeHost) card(f datapath.LinkFacts) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.links[f.Name] = f
	h.kernel.mu.Lock()
	defer h.kernel.mu.Unlock()
	h.kernel.foreign[f.Name] = true
}

// bridge adds a bridge that somebody made.
func (h *fakeHost) bridge(name string, addrs ...string) {
	f := datapath.LinkFacts{Name: name, Kind: "bridge", Up: true, MTU: 1500}
	for _, a := range addrs {
		f.Addrs = append(f.Addrs, netip.MustParsePrefix(a))
	}
	h.card(f)
}

func newFakeHost(k *fakeKernel, mtu int) *fakeHost {
	return &fakeHost{kernel: k, mtu: mtu, links: map[string]datapath.LinkFacts{}, holders: map[netip.Addr]datapath.MAC{}, routers: map[string][]netip.Addr{}}
}

// cut deletes a link behind our back.
func (k *fakeKernel) cut(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.unlink(name)
}

// text is everything that is there, as an operator would type it, and what is
// reserved for nobody.
func (k *fakeKernel) text() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	t := k.owned().String()
	for _, x := range k.sockets {
		if !x.To.IsValid() {
			t += fmt.Sprintf("leaked reservation %s %s\n", x.Proto, x.Host)
		}
	}
	return t
}

// clock is the time in a test.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}
