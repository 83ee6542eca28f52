//go:build e2e

package e2e

import (
	"slices"
	"strconv"
	"strings"
	"testing"
)

// lanArgs is a network on the harness's LAN; the range is the part that is free.
func lanArgs(ipRange string, more ...string) []string {
	return append([]string{"-o", "parent=lan0", "--subnet", "198.51.100.0/24", "--ip-range", ipRange, "--gateway", client4}, more...)
}

// BenchmarkConnectMacvlan is BenchmarkConnect with the built-in macvlan and ours
// on one parent.
func BenchmarkConnectMacvlan(b *testing.B) {
	e := newEngine(b, nil)
	e.installPlugin(b)
	e.must(b, slices.Concat([]string{"network", "create", "-d", "macvlan"}, lanArgs("198.51.100.128/27"), []string{"theirs"})...)
	e.oursNetwork(b, "ours", lanArgs("198.51.100.160/27", "-o", "mode=macvlan", "-o", "probe=false")...)
	e.compareConnect(b)
}

// BenchmarkLANThroughput sends from a container to the LAN, on the built-in
// macvlan and on ours in turn; and from the host to a container, on a bridge
// and on a macvlan that it has access to.
func BenchmarkLANThroughput(b *testing.B) {
	e := newEngine(b, nil)
	e.installPlugin(b)
	e.lan.client.serve(b, "tcp:7000")
	w := newWorld(b, e, ours)
	w.create("theirs", append([]string{"network", "create", "-d", "macvlan"}, lanArgs("198.51.100.128/27")...))
	w.network("ours", lanArgs("198.51.100.160/27", "-o", "mode=macvlan", "-o", "host_access=true")...)
	w.network("bridged", "--subnet", net1)
	for _, n := range []string{"theirs", "ours", "bridged"} {
		w.run("on-"+n, "--network", n)
	}
	w.look()
	w.settle()
	rate := map[string][]float64{}
	measure := func(name, from, to string) {
		b.Helper()
		addr, err := w.target(to)
		if err != nil {
			b.Fatal(err)
		}
		out, err := output(w.at(from, suite.probe, "send", addr, "1s"))
		if err != nil {
			b.Fatal(err)
		}
		r, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
		if err != nil {
			b.Fatal(err)
		}
		rate[name] = append(rate[name], r*8/1e9)
	}
	for b.Loop() {
		for range 7 {
			measure("theirs", "on-theirs", "client:7000")
			measure("ours", "on-ours", "client:7000")
			measure("to-bridge", "host", "on-bridged:80")
			measure("to-macvlan", "host", "on-ours:80")
		}
	}
	mid := func(name string) float64 {
		slices.Sort(rate[name])
		return rate[name][len(rate[name])/2]
	}
	b.ReportMetric(mid("ours")/mid("theirs"), "lan-ours/builtin")
	b.ReportMetric(mid("to-macvlan")/mid("to-bridge"), "host-macvlan/bridge")
	for name := range rate {
		b.ReportMetric(mid(name), name+"-Gbit/s")
	}
	w.close()
	e.checkClean(b)
}
