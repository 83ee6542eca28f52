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
// addresses with their subnets, and its name servers.
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
		for _, p := range list {
			out = append(out, p.Masked())
		}
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

// outlets are the interfaces of a route.
func outlets(r *netlink.Route) []int {
	out := []int{r.LinkIndex}
	for _, h := range r.MultiPath {
		out = append(out, h.LinkIndex)
	}
	return out
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

// uplinks names the bridges, not ours, that lead to the LAN: those with a port
// that is a real interface (a container's or virtual machine's is a veth or a
// tap), and those that a route with a gateway leaves by.
func (l *links) uplinks(ctx context.Context, all []link) ([]string, error) {
	foreign := make(map[int]string)
	for _, x := range all {
		if x.kind == "bridge" && !x.ours() {
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
