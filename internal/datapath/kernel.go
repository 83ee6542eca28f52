package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// undoTimeout bounds the cleaning up after an Ensure that failed, which runs
// even if the caller has given up.
const undoTimeout = 10 * time.Second

// Config is what a Kernel needs.
type Config struct {
	Instance string // empty means DefaultInstance
	// Unguarded: where we switch forwarding on, the host forwards for others too.
	Unguarded bool
	Log       logrus.FieldLogger
}

// Kernel is the door to the kernel. Its methods may be called concurrently;
// see the package comment for what must not overlap.
type Kernel struct {
	log       logrus.FieldLogger
	links     *links
	sysctl    *sysctl
	sockets   *sockets
	flows     *flows
	firewall  *firewall
	shortcuts *shortcuts
	hook      *hook
	localnet  localnet

	resolvConf string // path; tests have their own

	damaged chan struct{} // capacity 1; see Watch

	unguarded bool

	mu      sync.Mutex // held while forwarding is switched on, or its guard or uplinks change
	uplinks []string   // as the firewall knows them
}

// New opens what is needed to talk to the kernel, in the calling thread's
// network namespace. It changes nothing.
func New(c Config) (_ *Kernel, err error) {
	if c.Log == nil {
		return nil, errors.New("datapath needs a logger")
	}
	in, err := instanceOf(c.Instance)
	if err != nil {
		return nil, err
	}
	k := &Kernel{
		unguarded:  c.Unguarded,
		log:        c.Log,
		sysctl:     newSysctl(pluginSysctls),
		sockets:    newSockets(c.Log),
		hook:       newHook(c.Log, in.table),
		damaged:    make(chan struct{}, 1),
		resolvConf: "/etc/resolv.conf",
	}
	if k.links, err = newLinks(in); err != nil {
		return nil, err
	}
	if k.firewall, err = newFirewall(c.Log, in.table); err != nil {
		k.links.close()
		return nil, err
	}
	k.shortcuts = newShortcuts(c.Log, in.table, k.firewall.ns)
	k.flows = newFlows(c.Log, k.links)
	// What came while there was no table went to the held sockets.
	k.firewall.restored = k.forgetRestored
	return k, nil
}

// Close ends the proxies, lets go of the held ports and closes all sockets.
// What is in the kernel stays: containers go on working without us.
func (k *Kernel) Close() {
	k.sockets.close()
	k.flows.close()
	k.shortcuts.close()
	k.firewall.close()
	k.links.close()
}

// done is what one Ensure has done so far.
type done struct {
	made  State      // did not exist before
	addrs []linkAddr // added to a link that did
	lines []string
	// guard4 and guard6 are set while the guard of a family is there and
	// its forwarding is not yet on.
	guard4, guard6 bool
}

type linkAddr struct {
	link string
	addr netip.Prefix
}

func (d *done) say(format string, args ...any) {
	d.lines = append(d.lines, fmt.Sprintf(format, args...))
}

// Ensure makes everything in s exist as described and returns a line for each
// thing that it had to change. On error it removes exactly what this call made
// and returns the error; what it mended of older objects stays mended, and so
// does a forwarding or neighbour entry with another value that it replaced.
//
// The order leaves no moment in which something is reachable that should not
// be: rules that keep networks apart come before their bridges, bridges before
// the containers' links, a host port is held before it is translated; and
// forwarding (behind its guard) and the hook come last, because they are the
// switches that let packets through. They serve everybody, and are not undone.
func (k *Kernel) Ensure(ctx context.Context, s State) ([]string, error) {
	var d done
	err := k.ensure(ctx, s, &d)
	if err == nil {
		return d.lines, nil
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if e := k.undo(undo, d); e != nil {
		err = fmt.Errorf("%w (and cleaning up after it: %w)", err, e)
	}
	return nil, err
}

func (k *Kernel) ensure(ctx context.Context, s State, d *done) error {
	ports, rules := split(s.Elements)
	if err := k.ensureElements(ctx, rules, d); err != nil {
		return err
	}
	if err := k.ensureBridges(ctx, s.Bridges, d); err != nil {
		return err
	}
	for _, v := range s.VXLANs {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("create vxlan %s: %w", v.Name, err)
		}
		if err := k.links.vxlan(ctx, v, d); err != nil {
			return err
		}
		if err := k.sysctl.vxlan(v, d); err != nil {
			return err
		}
	}
	if err := k.ensureChildren(ctx, s, d); err != nil {
		return err
	}
	for _, v := range s.Veths {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("create veth %s: %w", v.Name, err)
		}
		if err := k.links.veth(v, d); err != nil {
			return err
		}
	}
	if err := k.links.ensureForwards(ctx, s.Forwards, d); err != nil {
		return err
	}
	if err := k.links.ensureNeighbours(ctx, s.Neighbours, d); err != nil {
		return err
	}
	if err := k.shortcuts.ensure(ctx, s.Shortcuts, k.links.index, d); err != nil {
		return err
	}
	for _, x := range s.Sockets {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%s: %w", x, err)
		}
		made, err := k.sockets.ensure(ctx, x, x.pairedIn(s.Sockets))
		if err != nil {
			return err
		}
		if made {
			d.made.Sockets = append(d.made.Sockets, x)
			d.say("%s", x)
		}
	}
	if err := k.ensureElements(ctx, ports, d); err != nil {
		return err
	}
	if err := k.ensureForwarding(ctx, s.Forward4, s.Forward6, d); err != nil {
		return err
	}
	if !s.Hook {
		return nil
	}
	lines, err := k.hook.ensure(ctx)
	d.lines = append(d.lines, lines...)
	return err
}

// undo removes what d made. It is the only place that undoes anything.
func (k *Kernel) undo(ctx context.Context, d done) error {
	err := k.Remove(ctx, d.made)
	for _, a := range slices.Backward(d.addrs) {
		err = errors.Join(err, k.links.dropAddress(a))
	}
	if d.guard4 || d.guard6 {
		k.mu.Lock()
		defer k.mu.Unlock()
		on4, on6 := k.firewall.families(setGuard)
		err = errors.Join(err, k.firewall.setFamilies(ctx, setGuard, on4 && !d.guard4, on6 && !d.guard6))
	}
	return err
}

// split parts the elements that open a host port from those that describe and
// protect networks.
func split(all []Element) (ports, rules []Element) {
	for _, e := range all {
		if e.Set == SetPublished || e.Set == SetExposed || e.Set == SetTrusted {
			ports = append(ports, e)
		} else {
			rules = append(rules, e)
		}
	}
	return ports, rules
}

func (k *Kernel) ensureElements(ctx context.Context, list []Element, d *done) error {
	if len(list) == 0 {
		return nil
	}
	lines, err := k.firewall.add(ctx, list)
	if err != nil {
		return err
	}
	d.lines = append(d.lines, lines...)
	if len(lines) == 0 {
		return nil
	}
	added := make(map[string]bool, len(lines))
	for _, l := range lines {
		added[l] = true
	}
	var made []Element
	for _, e := range list {
		if added[e.String()] {
			made = append(made, e)
		}
	}
	d.made.Elements = append(d.made.Elements, made...)
	k.flows.forget(ctx, made, nil)
	return nil
}

func (k *Kernel) ensureBridges(ctx context.Context, list []Bridge, d *done) error {
	for _, b := range list {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("create bridge %s: %w", b.Name, err)
		}
		if b.Existing {
			if err := k.links.existing(b.Name); err != nil {
				return err
			}
			continue
		}
		if err := k.links.bridge(b, d); err != nil {
			return err
		}
		if err := k.setBridge(b, d); err != nil {
			return err
		}
		if err := k.links.addresses(ctx, "bridge", b.Name, b.Addrs, d); err != nil {
			return err
		}
	}
	if len(list) == 0 {
		return nil
	}
	return k.refreshUplinks(ctx)
}

// ensureChildren makes sub-interfaces, what they hang on before, and the host's
// routes to them after.
func (k *Kernel) ensureChildren(ctx context.Context, s State, d *done) error {
	for _, p := range s.Parents {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("make %s: %w", p.Name, err)
		}
		if err := k.links.parent(p, d); err != nil {
			return err
		}
	}
	for _, c := range s.Children {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("make %s: %w", c.Name, err)
		}
		if err := k.links.child(ctx, c, d); err != nil {
			return err
		}
		if !c.Stays {
			continue
		}
		if err := k.setChild(c, d); err != nil {
			return err
		}
		if err := k.links.addresses(ctx, c.Kind, c.Name, c.Addrs, d); err != nil {
			return err
		}
	}
	if len(s.Routes) == 0 {
		return nil
	}
	return k.links.ensureRoutes(ctx, s.Routes, d)
}

// refreshUplinks tells the firewall which bridges of others lead to the LAN.
func (k *Kernel) refreshUplinks(ctx context.Context) error {
	all, err := k.links.list(ctx)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	return k.setUplinks(ctx, all)
}

func (k *Kernel) setUplinks(ctx context.Context, all []link) error {
	names, err := k.links.uplinks(ctx, all)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.uplinks != nil && slices.Equal(k.uplinks, names) {
		return nil
	}
	if err := k.firewall.setUplinks(ctx, names); err != nil {
		return err
	}
	k.uplinks = append([]string{}, names...) // not nil: known to be none
	return nil
}

// Remove deletes everything in s, in the reverse order of Ensure. What is
// absent is success; it goes on after an error and returns all of them. Links
// without our group and Existing bridges are left alone, forwarding stays on.
func (k *Kernel) Remove(ctx context.Context, s State) error {
	ports, rules := split(s.Elements)
	var errs []error
	if len(ports) > 0 {
		errs = append(errs, k.firewall.remove(ctx, ports))
		k.flows.forget(ctx, nil, ports)
	}
	for _, x := range s.Sockets {
		errs = append(errs, k.sockets.release(ctx, x))
	}
	links := k.removeLinks(ctx, s)
	errs = append(errs, links)
	// While one of the links is still there so is what protects it; the next
	// Remove finishes both.
	if len(rules) > 0 && links == nil {
		errs = append(errs, k.firewall.remove(ctx, rules))
	}
	if s.Hook {
		_, err := k.hook.remove(ctx)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// forgetRestored has flows forgotten that came while there was no table.
func (k *Kernel) forgetRestored(els []Element) {
	k.flows.forget(context.Background(), els, nil) //nolint:forbidigo // it outlives every call that may build the table
}

func (k *Kernel) removeLinks(ctx context.Context, s State) error {
	var veths, vxlans, bridges, children []doomed
	errs := []error{k.shortcuts.remove(ctx, s.Shortcuts), k.links.removeNeighbours(ctx, s), k.links.removeForwards(ctx, s)}
	for _, r := range s.Routes {
		errs = append(errs, k.links.removeRoute(r))
	}
	for _, c := range s.Children {
		children = append(children, doomed{c.Name, c.Kind})
	}
	for _, v := range s.Veths {
		veths = append(veths, doomed{v.Name, "veth"})
	}
	for _, v := range s.VXLANs {
		vxlans = append(vxlans, doomed{v.Name, kindVXLAN})
	}
	for _, b := range s.Bridges {
		if !b.Existing {
			bridges = append(bridges, doomed{b.Name, "bridge"})
		}
	}
	errs = append(errs, k.links.remove(ctx, veths), k.links.remove(ctx, children))
	// A VLAN sub-interface may hang on one that is listed before it.
	for _, p := range slices.Backward(s.Parents) {
		switch {
		case p.Existing:
		case p.Lower == "":
			errs = append(errs, k.links.remove(ctx, []doomed{{p.Name, kindDummy}}))
		default:
			kept, err := k.links.removeVLAN(ctx, p.Name)
			errs = append(errs, err)
			if kept {
				k.log.Warnf("%s stays, others have sub-interfaces on it: it is the host's own from now on, and ip link del %s removes it", p.Name, p.Name)
			}
		}
	}
	return errors.Join(append(errs, k.links.remove(ctx, vxlans), k.links.remove(ctx, bridges))...)
}

// Owned reads back everything that carries our mark, and which of the switches
// are on. It shows held ports once Ensure has adopted them, so that nobody
// takes a reservation in flight for a leak.
func (k *Kernel) Owned(ctx context.Context) (State, error) {
	var s State
	all, err := k.links.list(ctx)
	if err != nil {
		return State{}, fmt.Errorf("list links: %w", err)
	}
	if s, err = k.ownedLinks(ctx, all); err != nil {
		return State{}, err
	}
	if s.Elements, err = k.firewall.owned(ctx); err != nil {
		return State{}, err
	}
	names := make(map[int]string, len(all))
	for _, l := range all {
		names[l.index] = l.name
	}
	list, can, err := k.shortcuts.owned(ctx, names)
	if err != nil {
		return State{}, err
	}
	s.Shortcuts, s.NoShortcuts = list, !can
	// Only now: setting them mends a damaged table, which the caller is to
	// see and to say.
	if err := k.setUplinks(ctx, all); err != nil {
		return State{}, err
	}
	s.Sockets = k.sockets.owned()
	if s.Forward4, err = k.sysctl.on(forward4); err != nil {
		return State{}, err
	}
	if s.Forward6, err = k.sysctl.on(forward6); err != nil {
		return State{}, err
	}
	if s.Hook, err = k.hook.present(ctx); err != nil {
		return State{}, err
	}
	return s, nil
}

// Reserve takes a host port, the same on every address of the request, holds
// it and returns it: the first free one of the range, or one of the kernel's
// choice. Ensure with the Sockets adopts what is held; Remove lets go of it,
// adopted or not. A request for exactly one port that is already held for
// nobody is success. On error nothing that this call bound stays bound.
func (k *Kernel) Reserve(ctx context.Context, r PortRequest) (uint16, error) {
	return k.sockets.reserve(ctx, r)
}
