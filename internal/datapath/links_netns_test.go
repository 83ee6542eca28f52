package datapath

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func pairs(n int) State {
	s := State{Bridges: []Bridge{{Name: "wfnet", MAC: mac(1), MTU: 1500}}}
	for i := range n {
		s.Veths = append(s.Veths, Veth{Name: fmt.Sprintf("wf%d", i), Peer: fmt.Sprintf("wp%d", i), Master: "wfnet", MTU: 1500, PeerMAC: mac(byte(i))})
	}
	return s
}

// removeSerially returns how long one removal after the other takes.
func removeSerially(tb testing.TB, k *Kernel, veths []Veth) time.Duration {
	tb.Helper()
	start := time.Now()
	for _, v := range veths {
		remove(tb, k, State{Veths: []Veth{v}})
	}
	return time.Since(start)
}

// removeConcurrently does it with one caller for each.
func removeConcurrently(tb testing.TB, k *Kernel, veths []Veth) time.Duration {
	tb.Helper()
	start := time.Now()
	var wg sync.WaitGroup
	for _, v := range veths {
		wg.Go(func() {
			if err := k.Remove(tb.Context(), State{Veths: []Veth{v}}); err != nil {
				tb.Error(err)
			}
		})
	}
	wg.Wait()
	return time.Since(start)
}

func removeTogether(tb testing.TB, k *Kernel, veths []Veth) time.Duration {
	tb.Helper()
	start := time.Now()
	remove(tb, k, State{Veths: veths})
	return time.Since(start)
}

// Not a timing test: that 200 deletions from 200 callers, and from one, leave
// nothing and lose no error.
func TestParallelRemove(t *testing.T) {
	k, _ := newKernel(t)
	s := pairs(200)
	for _, f := range []func(testing.TB, *Kernel, []Veth) time.Duration{removeConcurrently, removeTogether} {
		ensure(t, k, s)
		same(t, k, s)
		f(t, k, s.Veths)
		same(t, k, State{Bridges: s.Bridges})
	}
	if len(k.links.deletes) != deleters {
		t.Errorf("%d sockets came back to the pool of %d", len(k.links.deletes), deleters)
	}
}

func TestRemoveGivesUpWithItsContext(t *testing.T) {
	k, _ := newKernel(t)
	s := pairs(1)
	ensure(t, k, s)
	for range deleters {
		c := <-k.links.deletes
		defer func() { k.links.deletes <- c }()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	wantError(t, k.Remove(ctx, State{Veths: s.Veths}), "wf0", "deadline")
	same(t, k, s)
}

// The ratio of the requirement: 100 endpoints at once against one by one.
func BenchmarkRemove100(b *testing.B) {
	k, _ := newKernel(b)
	s := pairs(100)
	var serial, concurrent, together time.Duration
	for b.Loop() {
		ensure(b, k, s)
		serial += removeSerially(b, k, s.Veths)
		ensure(b, k, s)
		concurrent += removeConcurrently(b, k, s.Veths)
		ensure(b, k, s)
		together += removeTogether(b, k, s.Veths)
	}
	n := float64(b.N) * 100
	b.ReportMetric(float64(serial.Microseconds())/n, "serial-us")
	b.ReportMetric(float64(concurrent.Microseconds())/n, "concurrent-us")
	b.ReportMetric(float64(concurrent)/float64(serial), "concurrent/serial")
	b.ReportMetric(float64(together)/float64(serial), "together/serial")
}

// Ensure of one veth against the same message sent bare.
func BenchmarkEnsureVeth(b *testing.B) {
	for _, present := range []int{0, 900} {
		b.Run(fmt.Sprintf("present=%d", present), func(b *testing.B) { benchmarkEnsureVeth(b, present) })
	}
}

func benchmarkEnsureVeth(b *testing.B, present int) {
	b.Helper()
	k, _ := newKernel(b)
	s := pairs(present)
	ensure(b, k, s)
	master, err := k.links.change.get("wfnet")
	if err != nil {
		b.Fatal(err)
	}
	const batch = 50
	var ours, bare []time.Duration
	for b.Loop() {
		var made []Veth
		for i := range 2 * batch {
			v := Veth{Name: fmt.Sprintf("v%d", i), Peer: fmt.Sprintf("p%d", i), Master: "wfnet", MTU: 1500, PeerMAC: mac(byte(i))}
			made = append(made, v)
			start := time.Now()
			if i%2 == 0 {
				ensure(b, k, State{Veths: []Veth{v}})
				ours = append(ours, time.Since(start))
			} else {
				bareVeth(b, k.links.change, v, master.index)
				bare = append(bare, time.Since(start))
			}
		}
		b.StopTimer()
		remove(b, k, State{Veths: made})
		b.StartTimer()
	}
	slices.Sort(ours)
	slices.Sort(bare)
	o, r := ours[len(ours)/2], bare[len(bare)/2]
	b.ReportMetric(float64(o.Microseconds()), "ensure-us")
	b.ReportMetric(float64(r.Microseconds()), "bare-us")
	b.ReportMetric(float64(o)/float64(r), "ensure/bare")
}

// bareVeth is the smallest program that makes the same pair.
func bareVeth(b *testing.B, c *rtnl, v Veth, master int) {
	b.Helper()
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	req.Sockets = c.sockets
	info := nl.NewIfInfomsg(unix.AF_UNSPEC)
	info.Flags, info.Change = unix.IFF_UP, unix.IFF_UP
	req.AddData(info)
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.Name)))
	req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(master))))
	req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(v.MTU))))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(Group)))
	kind := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	kind.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	kind.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddChild(vethPeer(v))
	req.AddData(kind)
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkOwned1000(b *testing.B) {
	k, _ := newKernel(b)
	ensure(b, k, pairs(1000))
	b.ResetTimer()
	for b.Loop() {
		if s := owned(b, k); len(s.Veths) != 1000 {
			b.Fatalf("%d veths", len(s.Veths))
		}
	}
}
