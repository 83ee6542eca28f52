package dhcp

import (
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/dhcp/dhcptest"
)

// BenchmarkAcquire leases from a local dnsmasq, turn and turn about with
// udhcpc on the same link. The ratio is to what udhcpc takes beyond the start
// of its process, which we do not have; 1.2 is what it may be.
func BenchmarkAcquire(b *testing.B) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		b.Fatalf("%v: hack/deps.sh installs it", err)
	}
	host, router := newLAN(b)
	dhcptest.Start(b, dhcptest.Dnsmasq, router, config4)
	var ours, theirs, start time.Duration
	run := func(arg ...string) time.Duration {
		began := time.Now()
		host.Exec(busybox, arg...)
		return time.Since(began)
	}
	for b.Loop() {
		began := time.Now()
		if _, err := new(Client).Acquire(b.Context(), "lan0", station(1), netip.Addr{}, lan4); err != nil {
			b.Fatal(err)
		}
		ours += time.Since(began)
		b.StopTimer()
		theirs += run("udhcpc", "-i", "lan0", "-f", "-n", "-q", "-s", "/bin/true")
		start += run("true")
		b.StartTimer()
	}
	b.ReportMetric(float64(theirs-start)/float64(b.N), "udhcpc-ns/op")
	b.ReportMetric(float64(ours)/float64(theirs-start), "ratio")
}

// BenchmarkExtend extends one lease of a local dnsmasq.
func BenchmarkExtend(b *testing.B) {
	_, router := newLAN(b)
	dhcptest.Start(b, dhcptest.Dnsmasq, router, config4)
	l, err := new(Client).Acquire(b.Context(), "lan0", station(1), netip.Addr{}, lan4)
	for b.Loop() {
		if err == nil {
			l, err = new(Client).Extend(b.Context(), "lan0", station(1), l)
		}
	}
	if err != nil {
		b.Fatal(err)
	}
}
