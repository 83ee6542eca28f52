package datapath

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// defaultMTU is Ethernet's, the kernel's for a new link, and the answer of
// PathMTU for a host without a way out.
const defaultMTU = 1500

// InUse lists what the host uses and a new subnet must therefore not overlap:
// destinations of routes in all tables (default routes excepted), its own
// addresses with their subnets' lengths, not masked, and its name servers.
func (k *Kernel) InUse(ctx context.Context) ([]netip.Prefix, error) {
	routes, err := k.links.routes(ctx, unix.RT_TABLE_UNSPEC)
	if err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, r := range routes {
		p, ok := prefixOf(r.Dst)
		if !ok || p.Bits() == 0 || r.Table == unix.RT_TABLE_LOCAL || !occupies(p) {
			continue
		}
		switch r.Type {
		case unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST:
			continue
		}
		out = append(out, p.Masked())
	}
	addrs, err := k.links.addressesOf(ctx)
	if err != nil {
		return nil, err
	}
	for _, list := range addrs {
		out = append(out, list...)
	}
	servers, err := nameServers(k.resolvConf)
	if err != nil {
		return nil, err
	}
	out = sortedPrefixes(append(out, servers...))
	return slices.Compact(out), nil
}

// occupies is false for what is on every interface and in nobody's way.
func occupies(p netip.Prefix) bool {
	a := p.Addr()
	return !a.IsMulticast() && (a.Is4() || !a.IsLinkLocalUnicast())
}

// nameServers reads the resolvers of resolv.conf; without the file there are
// none.
func nameServers(path string) ([]netip.Prefix, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read name servers: %w", err)
	}
	out, err := parseResolvConf(f)
	return out, errors.Join(err, f.Close())
}

func parseResolvConf(r io.Reader) ([]netip.Prefix, error) {
	var out []netip.Prefix
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		// What the resolver library would not understand is in nobody's way.
		if a, err := netip.ParseAddr(words[1]); err == nil {
			a = a.Unmap().WithZone("")
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read name servers: %w", err)
	}
	return out, nil
}

// PathMTU is the MTU, in bytes, of the way out of this host: of the default
// route with the lowest metric, IPv4 before IPv6, its own limit or that of its
// interface; 1500 where there is none.
func (k *Kernel) PathMTU(ctx context.Context) (int, error) {
	routes, err := k.links.routes(ctx, unix.RT_TABLE_MAIN)
	if err != nil {
		return 0, err
	}
	best := wayOut(routes)
	if best == nil {
		return defaultMTU, nil
	}
	all, err := k.links.list(ctx)
	if err != nil {
		return 0, fmt.Errorf("list links: %w", err)
	}
	mtu := best.MTU
	for _, l := range all {
		if slices.Contains(outlets(best), l.index) && (mtu == 0 || l.mtu < mtu) {
			mtu = l.mtu
		}
	}
	if mtu == 0 {
		return defaultMTU, nil
	}
	return mtu, nil
}

// wayOut is the default route with the lowest metric, IPv4 before IPv6; nil if
// there is none.
func wayOut(routes []netlink.Route) *netlink.Route {
	var best *netlink.Route
	for i := range routes {
		r := &routes[i]
		if p, ok := prefixOf(r.Dst); ok && p.Bits() > 0 || r.Type != unix.RTN_UNICAST {
			continue
		}
		if best == nil || r.Family == unix.AF_INET && best.Family != unix.AF_INET ||
			r.Family == best.Family && r.Priority < best.Priority {
			best = r
		}
	}
	return best
}

// outlets are the interfaces of a route.
func outlets(r *netlink.Route) []int {
	out := []int{r.LinkIndex}
	for _, h := range r.MultiPath {
		out = append(out, h.LinkIndex)
	}
	return out
}

// Underlay is what tunnels of this host leave by.
type Underlay struct {
	Addr netip.Addr
	Link string
	MTU  int // bytes, the link's
}

// Underlay finds what want names: an address of this host, or an interface, of
// which it takes the first IPv4 address or else the first IPv6 address; "" is
// the interface that leads to the peers, else that of the default route with the
// lowest metric, IPv4 before IPv6.
func (k *Kernel) Underlay(ctx context.Context, want string, peers ...netip.Addr) (Underlay, error) {
	all, err := k.links.list(ctx)
	if err != nil {
		return Underlay{}, fmt.Errorf("list links: %w", err)
	}
	if want == "" {
		u, ok, err := k.links.toward(ctx, all, peers)
		if ok || err != nil {
			return u, err
		}
		return k.links.defaultUnderlay(ctx, all)
	}
	if a, err := netip.ParseAddr(want); err == nil {
		return k.links.underlayOf(ctx, all, a.Unmap())
	}
	addrs, err := k.links.lasting(ctx)
	if err != nil {
		return Underlay{}, err
	}
	i := slices.IndexFunc(all, func(l link) bool { return l.name == want })
	if i < 0 {
		return Underlay{}, fmt.Errorf("setting UNDERLAY=%s: this host has no such interface or address: set it to one of %s", want, underlays(all, addrs))
	}
	own := all[i]
	switch {
	case own.ours():
		return Underlay{}, fmt.Errorf("setting UNDERLAY: %s is a network of this plugin: set it to one of %s", want, underlays(all, addrs))
	case !own.up:
		return Underlay{}, fmt.Errorf("setting UNDERLAY: interface %s is down: run ip link set %s up", want, want)
	}
	list := slices.Clone(addrs[own.index])
	// Stable: the kernel lists addresses of a family in their order.
	slices.SortStableFunc(list, func(a, b netip.Prefix) int { return a.Addr().BitLen() - b.Addr().BitLen() })
	if len(list) == 0 {
		return Underlay{}, fmt.Errorf("setting UNDERLAY: interface %s has no address that other hosts could use: set it to one of %s", want, underlays(all, addrs))
	}
	return Underlay{Addr: list[0].Addr(), Link: want, MTU: own.mtu}, nil
}

// toward finds what leads to the first of the peers that there is a route to. A list
// that is the same on all hosts has this one in it, too.
func (l *links) toward(ctx context.Context, all []link, peers []netip.Addr) (u Underlay, ok bool, err error) {
	addrs, err := l.lasting(ctx)
	if err != nil {
		return u, false, err
	}
	for _, p := range peers {
		routes, err := l.lib.RouteGet(p.AsSlice())
		if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST {
			continue // none, or this host itself
		}
		i := slices.IndexFunc(all, func(o link) bool { return o.index == routes[0].LinkIndex })
		if i < 0 || all[i].ours() {
			continue
		}
		src, _ := netip.AddrFromSlice(routes[0].Src)
		src = src.Unmap()
		own := addrs[all[i].index]
		same := slices.IndexFunc(own, func(o netip.Prefix) bool { return o.Addr().Is4() == p.Is4() })
		switch {
		case slices.ContainsFunc(own, func(o netip.Prefix) bool { return o.Addr() == src }), p.Is4() && src.IsGlobalUnicast():
		case same >= 0: // the kernel prefers a temporary address (RFC 8981)
			src = own[same].Addr()
		default:
			continue
		}
		return Underlay{Addr: src, Link: all[i].name, MTU: all[i].mtu}, true, nil
	}
	return u, false, nil
}

func (l *links) defaultUnderlay(ctx context.Context, all []link) (Underlay, error) {
	routes, err := l.routes(ctx, unix.RT_TABLE_MAIN)
	if err != nil {
		return Underlay{}, err
	}
	addrs, err := l.lasting(ctx)
	if err != nil {
		return Underlay{}, err
	}
	best := wayOut(routes)
	if best == nil {
		return Underlay{}, fmt.Errorf("underlay: this host has no default route, and none to PEERS: set UNDERLAY to an interface or an address of it, one of %s", underlays(all, addrs))
	}
	src, _ := netip.AddrFromSlice(best.Src)
	src = src.Unmap()
	for _, own := range all {
		if !slices.Contains(outlets(best), own.index) {
			continue
		}
		if src.IsValid() {
			return Underlay{Addr: src, Link: own.name, MTU: own.mtu}, nil
		}
		for _, p := range addrs[own.index] {
			if p.Addr().Is4() == (best.Family == unix.AF_INET) {
				return Underlay{Addr: p.Addr(), Link: own.name, MTU: own.mtu}, nil
			}
		}
	}
	return Underlay{}, fmt.Errorf("underlay: the default route's interface has no address that other hosts could use: set UNDERLAY to one of %s", underlays(all, addrs))
}

// underlayOf finds the interface that has an address.
func (l *links) underlayOf(ctx context.Context, all []link, a netip.Addr) (Underlay, error) {
	if !a.IsGlobalUnicast() || a.Zone() != "" { // also false for the loopback's
		return Underlay{}, fmt.Errorf("setting UNDERLAY: %s is not an address by which other hosts reach this one: set it to an interface, or an address of one", a)
	}
	addrs, err := l.addressesWith(ctx, func(x netlink.Addr) bool { return x.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 })
	if err != nil {
		return Underlay{}, err
	}
	for _, own := range all {
		if !slices.ContainsFunc(addrs[own.index], func(p netip.Prefix) bool { return p.Addr() == a }) {
			continue
		}
		if !own.up {
			return Underlay{}, fmt.Errorf("setting UNDERLAY: interface %s of %s is down: run ip link set %s up", own.name, a, own.name)
		}
		return Underlay{Addr: a, Link: own.name, MTU: own.mtu}, nil
	}
	usable, err := l.lasting(ctx)
	return Underlay{}, errors.Join(err, fmt.Errorf("setting UNDERLAY: this host does not have the address %s: set it to one of %s", a, underlays(all, usable)))
}

// lasting returns the addresses that others can know a host by: global, and
// neither temporary (of privacy extensions) nor secondary, which is one flag.
func (l *links) lasting(ctx context.Context) (map[int][]netip.Prefix, error) {
	const not = unix.IFA_F_SECONDARY | unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED
	return l.addressesWith(ctx, func(a netlink.Addr) bool { return a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&not == 0 })
}

// underlays names what could be the underlay.
func underlays(all []link, addrs map[int][]netip.Prefix) string {
	const most = 8 // a line is to be read
	var list []string
	for _, l := range all {
		if l.ours() || !l.up || len(addrs[l.index]) == 0 || len(list) == most {
			continue
		}
		list = append(list, fmt.Sprintf("%s (%s)", l.name, addrs[l.index][0].Addr()))
	}
	if len(list) == 0 {
		return "none with an address"
	}
	return strings.Join(list, ", ")
}

// list returns all links.
func (l *links) list(ctx context.Context) ([]link, error) { return l.dumps.list(ctx) }

// routes returns the routes of a table of both families; RT_TABLE_UNSPEC means
// all tables.
func (l *links) routes(ctx context.Context, table int) ([]netlink.Route, error) {
	routes, err := dump(ctx, func() ([]netlink.Route, error) {
		return l.lib.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return routes, nil
}

// Addressed lists the subnets that the host has addresses of, by interface: not
// those of our own links.
func (k *Kernel) Addressed(ctx context.Context) (map[string][]netip.Prefix, error) {
	all, err := k.links.list(ctx)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	addrs, err := k.links.addressesOf(ctx)
	if err != nil {
		return nil, err
	}
	out := make(map[string][]netip.Prefix)
	for _, l := range all {
		for _, p := range addrs[l.index] {
			if !l.ours() && occupies(p) {
				out[l.name] = append(out[l.name], p)
			}
		}
	}
	return out, nil
}

// uplinks names the bridges, not ours, that lead to the LAN: those with a port
// that is a real interface (a container's or virtual machine's is a veth or a
// tap), and those that a route with a gateway leaves by.
func (l *links) uplinks(ctx context.Context, all []link) ([]string, error) {
	foreign := make(map[int]string)
	for _, x := range all {
		if x.kind == "bridge" && !x.ours() && !x.another() {
			foreign[x.index] = x.name
		}
	}
	if len(foreign) == 0 {
		return nil, nil
	}
	leads := make(map[int]bool)
	for _, x := range all {
		if foreign[x.master] != "" && x.kind != "veth" && x.kind != "tun" {
			leads[x.master] = true
		}
	}
	routes, err := l.routes(ctx, unix.RT_TABLE_UNSPEC)
	if err != nil {
		return nil, err
	}
	for _, r := range routes {
		if r.Gw != nil || r.Via != nil {
			leads[r.LinkIndex] = true
		}
		for _, h := range r.MultiPath {
			if h.Gw != nil || h.Via != nil {
				leads[h.LinkIndex] = true
			}
		}
	}
	var names []string
	for index, name := range foreign {
		if leads[index] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}
