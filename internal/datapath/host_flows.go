package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/sirupsen/logrus"
)

// flows forgets connections that the kernel tracks for published ports. A UDP
// client that never stops sending keeps its entry alive for ever, and with it the
// container that had the port first, or the host itself; or that has joined the
// client's own LAN since, and answers past the host. A TCP client speaks to a
// container that is gone until it gives up by itself, a quarter of an hour later;
// once its connection is forgotten, whoever has the port now resets it.
//
// The kernel finds them only by walking its whole table. Nobody waits for that:
// a port that was just published serves every client whose flow is new. One walk
// serves all ports that came together or while the last one was under way.
type flows struct {
	log   logrus.FieldLogger
	track *conntrack // nil where the kernel has no connection tracking to talk to
	links *links

	mu      sync.Mutex
	waiting stale
	closed  bool
	walking bool
	told    bool           // since the last walk that went well
	walks   sync.WaitGroup // the goroutine, while there is one
}

// stale is what is to be forgotten.
type stale struct {
	// published ports were just translated: flows that go elsewhere, which is
	// where the port led before. withdrawn ones were given up: flows that go
	// where they led.
	published, withdrawn []Element
	// beside are of that set: flows that began before, in which the container sees
	// a client that it now answers past the host. Where the element goes, they
	// stay: what the container sees leads back to the host as before.
	beside []Element
}

func (s stale) empty() bool { return len(s.published)+len(s.withdrawn)+len(s.beside) == 0 }

func newFlows(log logrus.FieldLogger, l *links) *flows {
	track, err := newConntrack()
	if err != nil {
		log.WithError(err).Warn("no connection tracking: clients of a port published again may reach its former container")
	}
	return &flows{log: log, track: track, links: l}
}

// close waits for the walk that is under way.
func (f *flows) close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.walks.Wait()
	if f.track != nil {
		f.track.close()
	}
}

// forget has the flows forgotten that the change of the elements leaves.
func (f *flows) forget(ctx context.Context, made, gone []Element) {
	of := func(set Set, list []Element) []Element {
		return filter(list, func(e Element) bool { return e.Set == set })
	}
	s := stale{of(SetPublished, made), of(SetPublished, gone), of(SetBeside, made)}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.track == nil || f.closed || s.empty() {
		return
	}
	f.waiting.published = append(f.waiting.published, s.published...)
	f.waiting.withdrawn = append(f.waiting.withdrawn, s.withdrawn...)
	f.waiting.beside = append(f.waiting.beside, s.beside...)
	if !f.walking {
		f.walking = true
		ctx = context.WithoutCancel(ctx)
		f.walks.Go(func() { f.run(ctx) })
	}
}

// run walks until nothing is left to be forgotten.
func (f *flows) run(ctx context.Context) {
	for {
		f.mu.Lock()
		s := f.waiting
		f.waiting = stale{}
		f.walking = !s.empty() && !f.closed
		on := f.walking
		f.mu.Unlock()
		if !on {
			return
		}
		err := f.walk(ctx, s)
		if err != nil && !f.told {
			f.log.WithError(err).Warn("clients of a port published again may reach its former container, and some on a container's LAN no published port")
		}
		f.told = err != nil // nobody else touches it: one goroutine runs
	}
}

// walk forgets what is stale, each family's and protocol's in one go.
func (f *flows) walk(ctx context.Context, s stale) error {
	if n, err := f.track.count(); err == nil && n == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	local := make(map[netip.Addr]bool)
	if len(s.published) > 0 {
		// Only what was sent to this host: the port number alone would catch
		// the host's and the containers' own conversations with others.
		addrs, err := f.links.addressesOf(ctx)
		if err != nil {
			return fmt.Errorf("forget flows: %w", err)
		}
		for _, ps := range addrs {
			for _, p := range ps {
				local[p.Addr()] = true
			}
		}
	}
	own := func(a netip.Addr) bool { return local[a] || a.IsLoopback() }
	var errs []error
	for _, v6 := range families {
		beside := make(map[netip.Addr][]netip.Prefix) // by the container
		for _, e := range s.beside {
			if e.To.Is6() == v6 {
				beside[e.To] = append(beside[e.To], e.Net)
			}
		}
		past := func(w flow) bool {
			return w.to != w.from && w.client == w.back && slices.ContainsFunc(beside[w.from.Addr()], func(lan netip.Prefix) bool { return lan.Contains(w.client) })
		}
		for _, p := range []Proto{TCP, UDP, SCTP} {
			mine := func(e Element) bool { return e.To.Is6() == v6 && e.Proto == p }
			published, withdrawn := filter(s.published, mine), filter(s.withdrawn, mine)
			all := slices.Concat(published, withdrawn)
			if len(all)+len(beside) == 0 {
				continue
			}
			port := onePort(all)
			if len(beside) > 0 { // all ports
				port = 0
			}
			is, was := portsOf(published), portsOf(withdrawn)
			errs = append(errs, f.track.forget(v6, p, port, func(w flow) bool {
				// A connection that the held socket accepted goes on by the proxy.
				return own(w.to.Addr()) && (p == UDP || !own(w.from.Addr())) && is.any(w.to.Port(), func(e Element, to netip.AddrPort) bool {
					return e.Net.Contains(w.to.Addr()) && w.from != to
				}) || was.any(w.to.Port(), func(_ Element, to netip.AddrPort) bool { return w.from == to }) || past(w)
			}))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("forget flows: %w", err)
	}
	return nil
}

// onePort is the only port that the elements translate, or 0.
func onePort(list []Element) uint16 {
	if len(list) == 0 {
		return 0
	}
	port := list[0].Port
	if slices.ContainsFunc(list, func(e Element) bool { return e.Port != port || e.More > 0 }) {
		return 0
	}
	return port
}

// ports are translated ports of one protocol.
type ports struct {
	single map[uint16][]Element // by number: one may lead to different containers on different addresses
	ranges []Element
}

// portsOf sorts translated ports.
func portsOf(list []Element) ports {
	u := ports{single: make(map[uint16][]Element)}
	for _, e := range list {
		if e.More > 0 {
			u.ranges = append(u.ranges, e)
		} else {
			u.single[e.Port] = append(u.single[e.Port], e)
		}
	}
	return u
}

// any reports whether f accepts one of the elements that translate the port, and
// where to.
func (u ports) any(port uint16, f func(e Element, to netip.AddrPort) bool) bool {
	return slices.ContainsFunc(u.single[port], func(e Element) bool { return f(e, netip.AddrPortFrom(e.To, e.ToPort)) }) ||
		slices.ContainsFunc(u.ranges, func(e Element) bool {
			return e.Port <= port && port <= e.Port+e.More && f(e, netip.AddrPortFrom(e.To, port))
		})
}
