package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/sirupsen/logrus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// flows forgets connections that the kernel tracks for published UDP ports. A
// UDP client that never stops sending keeps its entry alive for ever, and with
// it the container that had the port first, or the host itself. TCP needs no
// help: its connections end.
type flows struct {
	lib *netlink.Handle // nil where the kernel has no connection tracking to talk to
}

func newFlows(log logrus.FieldLogger) *flows {
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err == nil {
		if err = h.SetSocketTimeout(answerTimeout); err == nil {
			return &flows{lib: h}
		}
		h.Close()
	}
	log.WithError(err).Warn("no connection tracking: UDP clients of a port published again may reach its former container")
	return &flows{}
}

func (f *flows) close() {
	if f.lib != nil {
		f.lib.Close()
	}
}

// published forgets flows to ports that were just translated, which go to
// where the port led before.
func (f *flows) published(ctx context.Context, list []Element, l *links) error {
	udp := udpPorts(list)
	if udp.empty() {
		return nil
	}
	addrs, err := l.addressesOf(ctx)
	if err != nil {
		return err
	}
	// Only what was sent to this host: the port number alone would catch
	// the host's and the containers' own conversations with others.
	local := make(map[netip.Addr]bool)
	for _, ps := range addrs {
		for _, p := range ps {
			local[p.Addr()] = true
		}
	}
	return f.forget(ctx, func(w flow) bool {
		if !local[w.to.Addr()] && !w.to.Addr().IsLoopback() {
			return false
		}
		return udp.any(w.to.Port(), func(e Element, to netip.AddrPort) bool {
			return e.Net.Contains(w.to.Addr()) && w.from != to
		})
	})
}

// withdrawn forgets flows to ports that were just given up.
func (f *flows) withdrawn(ctx context.Context, list []Element) error {
	udp := udpPorts(list)
	if udp.empty() {
		return nil
	}
	return f.forget(ctx, func(w flow) bool {
		return udp.any(w.to.Port(), func(_ Element, to netip.AddrPort) bool { return w.from == to })
	})
}

// udp are translated UDP ports.
type udp struct {
	single map[uint16][]Element // by number: one may lead to different containers on different addresses
	ranges []Element
}

// udpPorts are the translated UDP ports among list.
func udpPorts(list []Element) udp {
	u := udp{single: make(map[uint16][]Element)}
	for _, e := range list {
		switch {
		case e.Set != SetPublished || e.Proto != UDP:
		case e.More > 0:
			u.ranges = append(u.ranges, e)
		default:
			u.single[e.Port] = append(u.single[e.Port], e)
		}
	}
	return u
}

func (u udp) empty() bool { return len(u.single) == 0 && len(u.ranges) == 0 }

// any reports whether f accepts one of the elements that translate the port, and
// where to.
func (u udp) any(port uint16, f func(e Element, to netip.AddrPort) bool) bool {
	return slices.ContainsFunc(u.single[port], func(e Element) bool { return f(e, netip.AddrPortFrom(e.To, e.ToPort)) }) ||
		slices.ContainsFunc(u.ranges, func(e Element) bool {
			return e.Port <= port && port <= e.Port+e.More && f(e, netip.AddrPortFrom(e.To, port))
		})
}

// flow is a tracked connection: where its first packet was sent, and who
// answers.
type flow struct{ to, from netip.AddrPort }

// forget deletes the UDP flows that stale accepts.
func (f *flows) forget(ctx context.Context, stale func(flow) bool) error {
	if f.lib == nil {
		return nil
	}
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		_, err := dump(ctx, func() (uint, error) {
			return f.lib.ConntrackDeleteFilters(netlink.ConntrackTable, family, flowFilter(stale))
		})
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("forget UDP flows: %w", err)
		}
	}
	return nil
}

// flowFilter is the library's interface for choosing flows.
type flowFilter func(flow) bool

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f flowFilter) MatchConntrackFlow(c *netlink.ConntrackFlow) bool {
	if c.Forward.Protocol != unix.IPPROTO_UDP {
		return false
	}
	to, ok1 := netip.AddrFromSlice(c.Forward.DstIP)
	from, ok2 := netip.AddrFromSlice(c.Reverse.SrcIP)
	return ok1 && ok2 && f(flow{
		netip.AddrPortFrom(to.Unmap(), c.Forward.DstPort),
		netip.AddrPortFrom(from.Unmap(), c.Reverse.SrcPort),
	})
}
