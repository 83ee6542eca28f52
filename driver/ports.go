package driver

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/plugin"
)

// optionNoProxy6To4 is set when another endpoint of the container is its way
// out for IPv6: the host's IPv6 ports are that one's. Engine 28 tells that one too,
// engine 29 does not.
const optionNoProxy6To4 = "com.docker.network.driver.private.no_proxy_6to4"

// published is what chosen ports mean in the kernel. From trusted interfaces
// they are reached at the container's own address too.
func published(ports []PublishedPort, trusted []string) datapath.State {
	var s datapath.State
	for _, p := range ports {
		to := datapath.Element{Net: single(p.Container.Addr()), Proto: p.Proto, Port: p.Container.Port(), More: p.More}
		for _, link := range trusted {
			e := to
			e.Set, e.Link = datapath.SetTrusted, link
			if !slices.Contains(s.Elements, e) {
				s.Elements = append(s.Elements, e)
			}
		}
		if !p.Host.IsValid() {
			to.Set = datapath.SetExposed
			s.Elements = append(s.Elements, to)
			continue
		}
		s.Sockets = append(s.Sockets, datapath.Socket{Proto: p.Proto, Host: p.Host, To: p.Container, More: p.More})
		at := p.Host.Addr()
		switch { // not translatable: the socket's proxy passes it on
		case at == netip.IPv6Loopback():
			continue
		case at.Is4() != p.Container.Addr().Is4():
			s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetProxied, Net: p.at(), Proto: p.Proto, Port: p.Host.Port(), More: p.More})
			continue
		}
		s.Elements = append(s.Elements, p.translation()...)
	}
	return s
}

// at is the host's address as a subnet: one, or all.
func (p PublishedPort) at() netip.Prefix {
	if a := p.Host.Addr(); a.IsUnspecified() {
		return familyOf(a).all()
	}
	return single(p.Host.Addr())
}

// translation leads from the host's ports to the container's. The kernel knows no
// distance between ports: a range that does not keep its numbers is one by one.
func (p PublishedPort) translation() []datapath.Element {
	e := datapath.Element{Set: datapath.SetPublished, Net: p.at(), Proto: p.Proto, Port: p.Host.Port(), To: p.Container.Addr()}
	if p.More > 0 && p.keeps() {
		e.More = p.More
		return []datapath.Element{e}
	}
	list := make([]datapath.Element, 0, int(p.More)+1)
	for i := range uint32(p.More) + 1 {
		e.Port, e.ToPort = p.Host.Port()+uint16(i), p.Container.Port()+uint16(i)
		list = append(list, e)
	}
	return list
}

// translated reports whether a host port leads to one of them. The container can
// use that too, and with br_netfilter the frame then leaves by the port of the
// bridge that it came in on.
func translated(ports []PublishedPort) bool {
	return slices.ContainsFunc(ports, func(p PublishedPort) bool { return p.Host.IsValid() })
}

// wish is one port that should be published: on each of the hosts' addresses,
// under one number. With more it is a range of ports that follow it in step.
type wish struct {
	proto       datapath.Proto
	first, last uint16
	more        uint16
	targets     []target // never empty
}

const (
	// mostPorts is how many ports a container can publish: each has a socket.
	mostPorts = 1 << 15
	// mostEntries bounds what has a record of its own, a hundred bytes each: the
	// ports and ranges of ports, on each host address.
	mostEntries = 1 << 12
)

// checkAmount refuses what would not fit.
func checkAmount(wishes []wish) error {
	ports, entries := 0, 0
	for _, w := range wishes {
		ports += int(w.more) + 1
		entries += len(w.targets)
	}
	switch {
	case ports > mostPorts:
		return fmt.Errorf("publish %d ports: a container can publish at most %d", ports, mostPorts)
	case entries > mostEntries:
		return fmt.Errorf("publish %d ports: more than %d are possible only as a range with host ports, as in -p 10000-20000:10000-20000/udp", ports, mostEntries)
	}
	return nil
}

// target is one host address, and where what arrives there goes. The zero
// host means the container's own address, without translation.
type target struct {
	host netip.Addr
	to   netip.AddrPort
}

// parseWishes reads the port map in the Options of a call. What the network
// or the endpoint has no address for is left out without complaint: the engine
// sends the same map for every network of a container.
func parseWishes(n Network, e Endpoint, options map[string]any) ([]wish, error) {
	bindings, err := plugin.ParsePortMap(options)
	if err != nil {
		return nil, err
	}
	if n.Options.Egress != EgressDriver {
		return nil, nil
	}
	no6to4, _ := options[optionNoProxy6To4].(bool)
	var wishes []wish
	for _, b := range bindings {
		w := wish{proto: datapath.Proto(b.Proto), first: b.HostPort, last: b.HostPortEnd, more: b.More}
		for _, f := range families {
			if t, ok := translate(n, e, b, f, no6to4); ok && !slices.Contains(w.targets, t) {
				w.targets = append(w.targets, t)
			}
		}
		switch i := len(wishes) - 1; {
		case len(w.targets) == 0:
		case i >= 0 && wishes[i].followedBy(w):
			wishes[i].more++
		default:
			wishes = append(wishes, w)
		}
	}
	// A range or a free choice must not take what another binding names.
	slices.SortStableFunc(wishes, func(a, b wish) int { return cmp.Compare(a.freedom(), b.freedom()) })
	return wishes, checkAmount(wishes)
}

// followedBy reports whether o is the next port of the same range, where no host
// port is to be chosen: containers that are reached by their own address.
func (w wish) followedBy(o wish) bool {
	direct := func(t target) bool { return !t.host.IsValid() }
	if w.proto != o.proto || len(w.targets) != len(o.targets) || o.more > 0 || !slices.ContainsFunc(o.targets, direct) {
		return false
	}
	for i, t := range w.targets {
		if u := o.targets[i]; !direct(t) || !direct(u) || t.to.Addr() != u.to.Addr() || int(t.to.Port())+int(w.more)+1 != int(u.to.Port()) {
			return false
		}
	}
	return true
}

// tellRouted says of host ports that nobody will answer at: with gateway mode
// routed there is no translation, and what they were to lead to is open at the
// container's own address.
func (d *Driver) tellRouted(e Endpoint, wishes []wish) {
	for _, w := range wishes {
		if w.first == 0 || slices.ContainsFunc(w.targets, func(t target) bool { return t.host.IsValid() }) {
			continue
		}
		d.log.WithField("endpoint", e.ID).Infof("publish %s: gateway mode routed has no host ports: host port %d leads nowhere, the container is reached at %s", w, w.first, w.targets[0].to)
	}
}

// direct are the ports that are open at the container's own address. They need no
// host port, and so not the engine's choice of one network for the way out either.
func direct(wishes []wish) []PublishedPort {
	var ports []PublishedPort
	for _, w := range wishes {
		for _, p := range w.under(0) {
			if !p.Host.IsValid() {
				ports = append(ports, p)
			}
		}
	}
	return ports
}

// freedom is how many ports would do.
func (w wish) freedom() int {
	if w.first == 0 {
		return 1 << 16
	}
	return int(w.last) - int(w.first) + 1
}

// translate is where host addresses of the family lead for one binding.
func translate(n Network, e Endpoint, b plugin.PortBinding, f family, no6to4 bool) (target, bool) {
	at := b.HostIP
	if !at.IsValid() {
		at = n.Options.HostBinding
	}
	anywhere := !at.IsValid() || !b.HostIP.IsValid() && at.IsUnspecified()
	if !anywhere && !f.of(at) {
		return target{}, false
	}
	if anywhere {
		at = f.unspecified()
	}
	if to := e.addr(f); to.IsValid() {
		switch n.Options.gateway(f) {
		case GatewayRouted:
			return target{to: netip.AddrPortFrom(to, b.Port)}, true
		case GatewayIsolated:
			return target{}, false
		default:
			if f == ipv6 && no6to4 && e.addr(ipv4).IsValid() {
				return target{}, false
			}
			return target{host: at, to: netip.AddrPortFrom(to, b.Port)}, true
		}
	}
	// IPv6 clients of a container that has only IPv4, [::1] above all.
	to := e.addr(ipv4)
	mode := n.Options.gateway(ipv4)
	if f == ipv4 || no6to4 || !to.IsValid() || mode == GatewayRouted || mode == GatewayIsolated {
		return target{}, false
	}
	return target{host: at, to: netip.AddrPortFrom(to, b.Port)}, true
}

// choose turns wishes into ports. What is in have already is kept under its
// number, so that a call that comes again changes nothing; the rest is
// reserved. On error everything that was reserved here is given back.
func (d *Driver) choose(ctx context.Context, have []PublishedPort, wishes []wish) ([]PublishedPort, error) {
	free := slices.Clone(have)
	var ports, reserved []PublishedPort
	for _, w := range wishes {
		if kept := w.find(free); kept != nil {
			free = slices.DeleteFunc(free, func(p PublishedPort) bool { return slices.Contains(kept, p) })
			ports = append(ports, kept...)
			continue
		}
		kept, rest := w.part(free)
		fresh, err := d.reserve(ctx, rest)
		if err != nil && len(kept) > 0 && w.freedom() > 1 {
			kept = nil
			fresh, err = d.reserve(ctx, w)
		}
		if err != nil {
			return nil, d.release(ctx, reserved, err)
		}
		free = slices.DeleteFunc(free, func(p PublishedPort) bool { return slices.Contains(kept, p) })
		ports = append(ports, kept...)
		reserved = append(reserved, fresh...)
		ports = append(ports, fresh...)
	}
	return ports, nil
}

// find is the wish fulfilled by some of have, or nil.
func (w wish) find(have []PublishedPort) []PublishedPort {
	if w.more > 0 {
		return w.findRange(have)
	}
	for _, p := range have {
		port := p.Host.Port()
		if w.first != 0 && p.Host.IsValid() && (port < w.first || port > w.last) {
			continue
		}
		if all := w.under(port); !slices.ContainsFunc(all, func(q PublishedPort) bool { return !slices.Contains(have, q) }) {
			return all
		}
	}
	return nil
}

// part is what have fulfils of the wish, and the rest of it, under the same number:
// the host's ports of one family may have been another endpoint's until now.
func (w wish) part(have []PublishedPort) (kept []PublishedPort, rest wish) {
	for _, p := range have {
		port := p.Host.Port()
		if !p.Host.IsValid() || w.first != 0 && (port < w.first || port > w.last) {
			continue
		}
		rest = wish{proto: w.proto, first: port, last: port, more: w.more}
		for i, q := range w.under(port) {
			if slices.Contains(have, q) {
				kept = append(kept, q)
			} else {
				rest.targets = append(rest.targets, w.targets[i])
			}
		}
		if len(kept) > 0 {
			return kept, rest
		}
	}
	return nil, w
}

// findRange is find for a range. Before there were ranges in records its ports
// were there one by one, and stay so.
func (w wish) findRange(have []PublishedPort) []PublishedPort {
	var found []PublishedPort
	for _, want := range w.under(w.first) {
		lacking := int(want.More) + 1
		for _, p := range have {
			if want.covers(p) {
				lacking -= int(p.More) + 1
				found = append(found, p)
			}
		}
		if lacking != 0 {
			return nil
		}
	}
	return found
}

// covers reports whether q is p or a part of it.
func (p PublishedPort) covers(q PublishedPort) bool {
	at := int(q.Container.Port()) - int(p.Container.Port())
	return p.Proto == q.Proto && p.Container.Addr() == q.Container.Addr() && p.Host.Addr() == q.Host.Addr() &&
		at >= 0 && at+int(q.More) <= int(p.More) && (!p.Host.IsValid() || at == int(q.Host.Port())-int(p.Host.Port()))
}

// String names the container's port or ports.
func (w wish) String() string {
	port := w.targets[0].to.Port()
	if w.more == 0 {
		return fmt.Sprintf("port %d/%s", port, w.proto)
	}
	return fmt.Sprintf("ports %d-%d/%s", port, port+w.more, w.proto)
}

// under is the wish fulfilled with one number.
func (w wish) under(port uint16) []PublishedPort {
	ports := make([]PublishedPort, 0, len(w.targets))
	for _, t := range w.targets {
		p := PublishedPort{Proto: w.proto, Container: t.to, More: w.more}
		if t.host.IsValid() {
			p.Host = netip.AddrPortFrom(t.host, port)
		}
		ports = append(ports, p)
	}
	return ports
}

// reserve takes a number that is free on all host addresses of the wish.
func (d *Driver) reserve(ctx context.Context, w wish) ([]PublishedPort, error) {
	req := datapath.PortRequest{Proto: w.proto, First: w.first, Last: w.last, More: w.more}
	for _, t := range w.targets {
		if t.host.IsValid() {
			req.Hosts = append(req.Hosts, t.host)
		}
	}
	if len(req.Hosts) == 0 {
		return w.under(0), nil
	}
	port, err := d.kernel.Reserve(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("publish %s: %w", w, err)
	}
	return w.under(port), nil
}

// release gives ports back that no record knows of, and returns cause with
// whatever went wrong.
func (d *Driver) release(ctx context.Context, ports []PublishedPort, cause error) error {
	sockets := datapath.State{Sockets: published(ports, nil).Sockets}
	if sockets.Empty() {
		return cause
	}
	ctx, cancel := cleanup(ctx)
	defer cancel()
	return join(cause, d.kernel.Remove(ctx, sockets))
}
