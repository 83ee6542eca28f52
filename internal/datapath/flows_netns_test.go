package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// track enters UDP flows into the kernel's table: each is sent from the client's
// port to a port of the host, and answered by from.
func track(tb testing.TB, client, to, from netip.AddrPort, n int) {
	tb.Helper()
	family := netlink.InetFamily(unix.AF_INET)
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		tb.Fatal(err)
	}
	defer h.Close()
	for i := range n {
		c := netip.AddrPortFrom(client.Addr(), client.Port()+uint16(i%50000))
		if i >= 50000 {
			a := client.Addr().As4()
			a[2] += byte(i / 50000)
			c = netip.AddrPortFrom(netip.AddrFrom4(a), c.Port())
		}
		err := h.ConntrackCreate(netlink.ConntrackTable, family, &netlink.ConntrackFlow{
			FamilyType: uint8(family), TimeOut: 600,
			Forward: tuple(c, to), Reverse: tuple(from, c), ProtoInfo: nil,
		})
		if err != nil {
			tb.Fatal(err)
		}
	}
}

func tuple(src, dst netip.AddrPort) netlink.IPTuple {
	return netlink.IPTuple{
		Protocol: unix.IPPROTO_UDP, SrcIP: net.IP(src.Addr().AsSlice()), SrcPort: src.Port(), DstIP: net.IP(dst.Addr().AsSlice()), DstPort: dst.Port(),
	}
}

// tracked lists where the flows go that are left.
func tracked(tb testing.TB) []string {
	tb.Helper()
	var out []string
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		list, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
		if err != nil {
			tb.Fatal(err)
		}
		for _, f := range list {
			out = append(out, fmt.Sprintf("%s:%d=%s:%d", f.Forward.DstIP, f.Forward.DstPort, f.Reverse.SrcIP, f.Reverse.SrcPort))
		}
	}
	slices.Sort(out)
	return out
}

// One walk finds what is stale of many ports, ranges and both families, and
// leaves all else.
func TestFlowsOfRanges(t *testing.T) {
	k, host := newKernel(t)
	host.Exec("sh", "-ec", "ip link add lan type veth peer name lan2; ip link set lan2 up; ip addr add 192.0.2.1/24 dev lan; ip addr add fd99::1/64 dev lan nodad; ip link set lan up")
	v4, v6 := addrPort("192.0.2.9:5000"), addrPort("[fd99::9]:5000")
	n := netip.MustParseAddr
	is := State{Elements: []Element{
		{Set: SetPublished, Net: prefix("0.0.0.0/0"), Proto: UDP, Port: 10000, More: 10000, To: n("10.7.0.2")},
		{Set: SetPublished, Net: prefix("::/0"), Proto: UDP, Port: 10000, More: 10000, To: n("fd07::2")},
		{Set: SetPublished, Net: prefix("192.0.2.1/32"), Proto: UDP, Port: 53, To: n("10.7.0.2"), ToPort: 5353},
	}}
	for _, f := range []struct {
		client   netip.AddrPort
		to, from string
	}{
		{v4, "192.0.2.1:10000", "192.0.2.1:10000"}, {v4, "192.0.2.1:20000", "10.7.0.9:20000"}, {v4, "192.0.2.1:15000", "10.7.0.2:15000"},
		{v4, "192.0.2.1:9999", "10.7.0.9:9999"}, {v4, "192.0.2.1:20001", "10.7.0.9:20001"}, {v4, "198.51.100.1:15000", "198.51.100.1:15000"},
		{v4, "192.0.2.1:53", "10.7.0.9:5353"}, {v4, "192.0.2.1:53", "10.7.0.2:5353"},
		{v6, "[fd99::1]:15000", "[fd07::9]:15000"}, {v6, "[fd99::1]:15001", "[fd07::2]:15001"}, {v6, "[fd99::1]:53", "[fd07::9]:53"},
	} {
		c := netip.AddrPortFrom(f.client.Addr(), f.client.Port()+uint16(len(tracked(t))))
		track(t, c, addrPort(f.to), addrPort(f.from), 1)
	}
	ensure(t, k, is)
	k.flows.walks.Wait()
	left := []string{
		"192.0.2.1:15000=10.7.0.2:15000", "192.0.2.1:20001=10.7.0.9:20001", "192.0.2.1:53=10.7.0.2:5353", "192.0.2.1:9999=10.7.0.9:9999",
		"198.51.100.1:15000=198.51.100.1:15000", "fd99::1:15001=fd07::2:15001", "fd99::1:53=fd07::9:53",
	}
	if got := tracked(t); !slices.Equal(got, left) {
		t.Errorf("after publishing there are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(left, "\n"))
	}
	remove(t, k, is)
	k.flows.walks.Wait()
	left = []string{"192.0.2.1:20001=10.7.0.9:20001", "192.0.2.1:9999=10.7.0.9:9999", "198.51.100.1:15000=198.51.100.1:15000", "fd99::1:53=fd07::9:53"}
	if got := tracked(t); !slices.Equal(got, left) {
		t.Errorf("after withdrawing there are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(left, "\n"))
	}
}

// BenchmarkForgetFlows is what publishing a UDP port costs on a host that tracks
// many flows: what the caller waits for, and the walk that goes on after it. Both
// are compared with the library's walk of both families.
func BenchmarkForgetFlows(b *testing.B) {
	for _, n := range []int{0, 1000, 200000} {
		b.Run(fmt.Sprintf("flows=%d", n), func(b *testing.B) {
			k, _ := newKernel(b)
			track(b, addrPort("192.0.2.9:5000"), addrPort("192.0.2.1:4000"), addrPort("192.0.2.1:4000"), n)
			e := []Element{{Set: SetPublished, Net: prefix("0.0.0.0/0"), Proto: UDP, Port: 53, To: netip.MustParseAddr("10.7.0.2"), ToPort: 53}}
			var waited, walked, library time.Duration
			for b.Loop() {
				start := time.Now()
				k.flows.forget(b.Context(), e, nil)
				waited += time.Since(start)
				k.flows.walks.Wait()
				walked += time.Since(start)
				start = time.Now()
				for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
					if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, none{}); err != nil {
						b.Fatal(err)
					}
				}
				library += time.Since(start)
			}
			b.ReportMetric(float64(waited.Microseconds())/float64(b.N), "waited-µs")
			b.ReportMetric(float64(walked.Microseconds())/float64(b.N), "walked-µs")
			b.ReportMetric(float64(library.Microseconds())/float64(b.N), "library-µs")
		})
	}
}

type none struct{}

func (none) MatchConntrackFlow(*netlink.ConntrackFlow) bool { return false }
