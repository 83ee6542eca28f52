package datapath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Kinds of links, by the kernel's names.
const (
	kindMacvlan = "macvlan"
	kindIPvlan  = "ipvlan"
	kindVLAN    = "vlan"
	kindDummy   = "dummy"
)

// StaysPrefix begins the name of every Child that stays, and of no other, so
// that one read back from the kernel is known as what it is.
const StaysPrefix = "wfs"

// modes are the kernel's numbers for what users type: enum macvlan_mode, and
// IPVLAN_MODE_* of linux/if_link.h.
var modes = map[string]map[string]int{
	kindMacvlan: {"private": 1, "vepa": 2, "bridge": 4, "passthru": 8},
	kindIPvlan:  {"l2": 0, "l3": 1, "l3s": 2},
}

// ipvlanFlags are IPVLAN_F_* of linux/if_link.h.
var ipvlanFlags = map[string]int{"bridge": 0, "private": 1, "vepa": 2}

// nameOf is the way back from the kernel's number.
func nameOf(table map[string]int, value int) string {
	for name, v := range table {
		if v == value {
			return name
		}
	}
	return fmt.Sprint(value)
}

// kind is that of the link that has to be made.
func (p Parent) kind() string {
	if p.Lower == "" {
		return kindDummy
	}
	return kindVLAN
}

// parent makes or mends a link that sub-interfaces hang on.
func (l *links) parent(p Parent, d *done) error {
	have, err := l.change.get(p.Name)
	if errors.Is(err, ErrAbsent) && p.Existing {
		return fmt.Errorf("parent %s does not exist", p.Name)
	}
	if errors.Is(err, ErrAbsent) {
		return l.newParent(p, d)
	}
	if err != nil || p.Existing {
		return err
	}
	if err := have.own(p.kind()); err != nil {
		return fmt.Errorf("parent %w", err)
	}
	if p.VLAN != have.vlan {
		return fmt.Errorf("parent %s has VLAN ID %d, not %d", p.Name, have.vlan, p.VLAN)
	}
	want := link{up: true}
	if lower, err := l.change.get(p.Lower); p.Lower != "" && err == nil {
		want.mtu = lower.vlanMTU()
	}
	return l.mend(have, want, d)
}

// vlanMTU is what a VLAN sub-interface on top has: MACsec leaves no room for the tag.
func (l link) vlanMTU() int {
	if l.kind == "macsec" {
		return l.mtu - 4
	}
	return l.mtu
}

func (l *links) newParent(p Parent, d *done) error {
	want := link{name: p.Name, kind: p.kind(), up: true}
	var data []*nl.RtAttr
	if p.Lower != "" {
		lower, err := l.index(p.Lower)
		if err != nil {
			return fmt.Errorf("make VLAN sub-interface %s: %s %w", p.Name, p.Lower, err)
		}
		want.peer = lower
		data = append(data, nl.NewRtAttr(nl.IFLA_VLAN_ID, nl.Uint16Attr(uint16(p.VLAN))))
	}
	switch err := l.change.create(want, data...); {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("make %s: this kernel has no links of kind %s", p.Name, want.kind)
	case errors.Is(err, unix.EEXIST) && p.Lower != "":
		return fmt.Errorf("make VLAN sub-interface %s: %s has another one with VLAN ID %d: name that as the parent", p.Name, p.Lower, p.VLAN)
	case errors.Is(err, unix.ENETDOWN):
		return fmt.Errorf("make %s: %s is down: ip link set %s up", p.Name, p.Lower, p.Lower)
	case err != nil:
		return fmt.Errorf("make %s: %w", p.Name, err)
	}
	d.made.Parents = append(d.made.Parents, p)
	d.say("%s %s: made", want.kind, p.Name)
	return nil
}

// child makes a sub-interface. One that is there already under its name is
// only looked at if it stays.
func (l *links) child(ctx context.Context, c Child, d *done) error {
	lower, err := l.index(c.Parent)
	if err != nil {
		return fmt.Errorf("make %s: parent %s %w", c.Name, c.Parent, err)
	}
	want := link{name: c.Name, kind: c.Kind, peer: lower, mtu: c.MTU, mac: c.MAC, up: c.Stays,
		mode: modes[c.Kind][c.Mode], flags: ipvlanFlags[c.Flag]}
	err = l.change.create(want, want.childData()...)
	if errors.Is(err, unix.EEXIST) {
		return l.oldChild(ctx, c, want, d)
	}
	if err != nil {
		return refusedChild(c, err)
	}
	d.made.Children = append(d.made.Children, c)
	d.say("%s %s: made on %s", c.Kind, c.Name, c.Parent)
	return nil
}

func (l link) childData() []*nl.RtAttr {
	if l.kind == kindMacvlan {
		return []*nl.RtAttr{nl.NewRtAttr(nl.IFLA_MACVLAN_MODE, nl.Uint32Attr(uint32(l.mode)))}
	}
	return []*nl.RtAttr{
		nl.NewRtAttr(nl.IFLA_IPVLAN_MODE, nl.Uint16Attr(uint16(l.mode))),
		nl.NewRtAttr(nl.IFLA_IPVLAN_FLAG, nl.Uint16Attr(uint16(l.flags))),
	}
}

// refusedChild says what the kernel's refusal means.
func refusedChild(c Child, err error) error {
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("parent %s: this kernel has no %s", c.Parent, c.Kind)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("parent %s is in use in another way: by a bridge, a bond, or sub-interfaces of a kind other than %s", c.Parent, c.Kind)
	case errors.Is(err, unix.EINVAL) && c.Kind == kindMacvlan:
		return fmt.Errorf("parent %s takes no macvlan of mode %s and MTU %d: one of mode passthru is alone on its parent, and none has a larger MTU", c.Parent, c.Mode, c.MTU)
	}
	return fmt.Errorf("make %s of mode %s on parent %s: %w", c.Kind, c.Mode, c.Parent, err)
}

// oldChild looks at a sub-interface that exists already.
func (l *links) oldChild(ctx context.Context, c Child, want link, d *done) error {
	have, err := l.change.get(c.Name)
	if err != nil {
		return fmt.Errorf("%s %s: %w", c.Kind, c.Name, err)
	}
	if err := have.own(c.Kind); err != nil {
		return fmt.Errorf("%s %w", c.Kind, err)
	}
	if !c.Stays {
		return nil
	}
	if want.mtu == 0 {
		lower, err := l.change.get(c.Parent)
		if err != nil {
			return fmt.Errorf("%s %s: %s %w", c.Kind, c.Name, c.Parent, err)
		}
		want.mtu = lower.mtu
	}
	if have.peer == want.peer && have.mode == want.mode && have.flags == want.flags {
		return l.mend(have, want, d)
	}
	// Its parent was replaced, or somebody changed what cannot be changed back
	// while others are there.
	if err := l.removeOne(ctx, doomed{c.Name, c.Kind}); err != nil {
		return err
	}
	if err := l.change.create(want, want.childData()...); err != nil {
		return refusedChild(c, err)
	}
	d.made.Children = append(d.made.Children, c)
	d.say("%s %s: made again on %s", c.Kind, c.Name, c.Parent)
	return nil
}

// routeProtocol marks the routes that we make, as ip route shows it: "w".
const routeProtocol = netlink.RouteProtocol('w')

// hostRoute is r as the library wants it.
func hostRoute(r Route, index int, src netip.Addr) *netlink.Route {
	out := &netlink.Route{LinkIndex: index, Protocol: routeProtocol, Table: unix.RT_TABLE_MAIN,
		Dst: &net.IPNet{IP: r.To.AsSlice(), Mask: net.CIDRMask(r.To.BitLen(), r.To.BitLen())}}
	if r.To.Is4() {
		out.Scope = netlink.SCOPE_LINK
	}
	if src.IsValid() {
		out.Src = src.AsSlice()
	}
	return out
}

// ensureRoutes makes or mends routes to containers with their neighbour entries.
func (l *links) ensureRoutes(ctx context.Context, list []Route, d *done) error {
	addrs, err := l.sources(ctx)
	if err != nil {
		return err
	}
	for _, r := range list {
		own, err := l.change.get(r.Link)
		if err != nil {
			return fmt.Errorf("route to %s: %s %w", r.To, r.Link, err)
		}
		src := r.Src
		if !src.IsValid() {
			if from, err := l.index(r.From); err == nil {
				src = sourceFor(addrs[from], r.To)
			}
		}
		changed, err := l.route(ctx, r, own, src)
		if err != nil {
			return fmt.Errorf("route to %s by %s: %w", r.To, r.Link, err)
		}
		if changed {
			d.made.Routes = append(d.made.Routes, r)
			d.say("%s: route to %s", r.Link, r.To)
		}
	}
	return nil
}

// route makes one route and its neighbour entry. Where both are new, as for
// every container that starts, no table is read.
func (l *links) route(ctx context.Context, r Route, own link, src netip.Addr) (changed bool, err error) {
	mac := r.MAC
	if mac == (MAC{}) {
		mac = own.mac
	}
	noRoute := l.lib.RouteAdd(hostRoute(r, own.index, src))
	if noRoute != nil && !errors.Is(noRoute, unix.EEXIST) {
		return false, noRoute
	}
	noEntry := l.lib.NeighAdd(neighEntry(r.To, mac, own.index))
	switch {
	case noRoute == nil && noEntry == nil:
		return true, nil
	case noEntry != nil && !errors.Is(noEntry, unix.EEXIST):
		if noRoute == nil {
			_ = l.lib.RouteDel(hostRoute(r, own.index, netip.Addr{})) // or it goes with its link
		}
		return false, noEntry
	case noRoute != nil && noEntry != nil: // both were there
		have, err := l.ownedRoutes(ctx, nil)
		if err != nil || slices.ContainsFunc(have, func(x Route) bool { return routeKey(x) == routeKey(r) }) {
			return false, err
		}
	}
	if err = l.lib.RouteReplace(hostRoute(r, own.index, src)); err == nil {
		err = l.lib.NeighSet(neighEntry(r.To, mac, own.index))
	}
	return err == nil, err
}

// sources returns the addresses of every link that the kernel would choose for
// new connections (RFC 6724 section 5, rule 3).
func (l *links) sources(ctx context.Context) (map[int][]netip.Prefix, error) {
	return l.addressesWith(ctx, func(a netlink.Addr) bool {
		return a.Flags&(unix.IFA_F_DEPRECATED|unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0
	})
}

// sourceFor is the address of list that shares the smallest subnet with a, or
// the first of its family; the zero Addr if there is none.
func sourceFor(list []netip.Prefix, a netip.Addr) netip.Addr {
	var best netip.Prefix
	for _, p := range list {
		if p.Addr().Is4() != a.Is4() {
			continue
		}
		if !best.IsValid() || p.Contains(a) && (!best.Contains(a) || p.Bits() > best.Bits()) {
			best = p
		}
	}
	return best.Addr()
}

func neighEntry(a netip.Addr, mac MAC, index int) *netlink.Neigh {
	family := netlink.FAMILY_V6
	if a.Is4() {
		family = netlink.FAMILY_V4
	}
	return &netlink.Neigh{LinkIndex: index, Family: family, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac[:]}
}

// removeRoute removes a route and its neighbour entry; absent is success, and so
// is a link that took them with it.
func (l *links) removeRoute(r Route) error {
	index, err := l.index(r.Link)
	if errors.Is(err, ErrAbsent) {
		return nil
	}
	if err != nil {
		return err
	}
	err = l.lib.RouteDel(hostRoute(r, index, netip.Addr{}))
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove route to %s by %s: %w", r.To, r.Link, err)
	}
	if err := l.lib.NeighDel(neighEntry(r.To, r.MAC, index)); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove neighbour %s on %s: %w", r.To, r.Link, err)
	}
	return nil
}

// ownedRoutes lists our routes; all is every link, nil to have them read.
func (l *links) ownedRoutes(ctx context.Context, all []link) ([]Route, error) {
	list, err := dump(ctx, func() ([]netlink.Route, error) {
		return l.lib.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_MAIN, Protocol: routeProtocol},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	if len(list) == 0 {
		return nil, nil
	}
	if all == nil {
		if all, err = l.list(ctx); err != nil {
			return nil, fmt.Errorf("list links: %w", err)
		}
	}
	ours := make(map[int]link, len(all))
	for _, x := range all {
		if x.ours() {
			ours[x.index] = x
		}
	}
	macs, err := l.neighbours(ctx)
	if err != nil {
		return nil, err
	}
	var out []Route
	for _, r := range list {
		p, ok := prefixOf(r.Dst)
		own, known := ours[r.LinkIndex]
		if !ok || !known || !p.IsSingleIP() {
			continue
		}
		// One without its neighbour entry is as good as none.
		mac, ok := macs[station{r.LinkIndex, p.Addr()}]
		if !ok {
			continue
		}
		if mac == own.mac {
			mac = MAC{}
		}
		out = append(out, Route{Link: own.name, To: p.Addr(), MAC: mac})
	}
	return out, nil
}

type station struct {
	link int
	addr netip.Addr
}

// neighbours lists the permanent neighbour entries.
func (l *links) neighbours(ctx context.Context) (map[station]MAC, error) {
	out := make(map[station]MAC)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump(ctx, func() ([]netlink.Neigh, error) { return l.lib.NeighList(0, family) })
		if err != nil {
			return nil, fmt.Errorf("list neighbours: %w", err)
		}
		for _, n := range list {
			a, ok := netip.AddrFromSlice(n.IP)
			if ok && n.State&netlink.NUD_PERMANENT != 0 && len(n.HardwareAddr) == 6 {
				out[station{n.LinkIndex, a.Unmap()}] = MAC(n.HardwareAddr)
			}
		}
	}
	return out, nil
}

// LinkFacts is what networks need to know about a link of the host.
type LinkFacts struct {
	Name, Kind string // Kind is "" for a network card
	Ours, Up   bool
	MTU        int // bytes
	MAC        MAC
	Master     string // the bridge or bond that it is a port of
	Addrs      []netip.Prefix
	// Strict is set where the kernel drops IPv4 packets that come in by another
	// link than the way back to their source (rp_filter=1, RFC 3704).
	Strict bool
}

// Link describes a link of the host; ok is false where there is none of that
// name.
func (k *Kernel) Link(ctx context.Context, name string) (f LinkFacts, ok bool, err error) {
	x, err := k.links.change.get(name)
	if errors.Is(err, ErrAbsent) {
		return f, false, nil
	}
	if err != nil {
		return f, false, err
	}
	addrs, err := k.links.addressesOf(ctx)
	if err != nil {
		return f, false, err
	}
	f = LinkFacts{Name: x.name, Kind: x.kind, Ours: x.ours(), Up: x.up, MTU: x.mtu, MAC: x.mac, Addrs: addrs[x.index]}
	if f.Strict, err = k.sysctl.strict(name); err != nil {
		return f, false, err
	}
	if x.master == 0 {
		return f, true, nil
	}
	all, err := k.links.list(ctx)
	if err != nil {
		return f, false, fmt.Errorf("list links: %w", err)
	}
	for _, m := range all {
		if m.index == x.master {
			f.Master = m.name
		}
	}
	return f, true, nil
}

// Routers lists the routers of the default routes by one link, in the main table,
// that of the lowest metric first. A link that does not exist has none.
func (k *Kernel) Routers(ctx context.Context, link string) ([]netip.Addr, error) {
	x, err := k.links.change.get(link)
	if errors.Is(err, ErrAbsent) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	routes, err := k.links.routes(ctx, unix.RT_TABLE_MAIN)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(routes, func(a, b netlink.Route) int { return a.Priority - b.Priority })
	var out []netip.Addr
	add := func(index int, gw net.IP) {
		if a, ok := netip.AddrFromSlice(gw); ok && x.index == index && !slices.Contains(out, a.Unmap()) {
			out = append(out, a.Unmap())
		}
	}
	for _, r := range routes {
		if p, ok := prefixOf(r.Dst); ok && p.Bits() > 0 || r.Type != unix.RTN_UNICAST {
			continue
		}
		add(r.LinkIndex, r.Gw)
		for _, h := range r.MultiPath {
			add(h.LinkIndex, h.Gw)
		}
	}
	return out, nil
}
