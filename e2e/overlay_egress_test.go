//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// asks dials and returns the answer, or what happened instead.
func (b box) asks(to string) string {
	out, err := b.probe("dial", "-timeout", "1500ms", "tcp", to)
	if err != nil {
		return err.Error()
	}
	var a struct{ Src, Err string }
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		return out
	}
	return a.Src + a.Err
}

// facts are those of the container's interfaces.
func (b box) facts(tb testing.TB) []iface {
	tb.Helper()
	out, err := b.probe("facts")
	if err != nil {
		tb.Fatal(err)
	}
	ifs, err := parseFacts(out)
	if err != nil {
		tb.Fatal(err)
	}
	return ifs
}

// hostAddrs are the host's own, IPv4 and IPv6.
func (e *engine) hostAddrs() (v4, v6 string) {
	return netip.MustParsePrefix(e.addrs[0]).Addr().String(), netip.MustParsePrefix(e.addrs[1]).Addr().String()
}

// egress is how containers on an overlay network reach the LAN, and are reached
// from there.
func (all members) egress(t *testing.T) {
	t.Helper()
	client := all[0].lan.client
	client.serve(t, "tcp:7000")

	for _, e := range all {
		v4, _ := e.hostAddrs()
		e.run(t, "shown", "--network", "blue", "-p", "8080:80")
		if out := e.must(t, "ps", "--filter", "name=shown", "--format", "{{.Ports}}"); !strings.Contains(out, ":8080->80/tcp") {
			t.Errorf("egress=engine on %s: docker ps shows %q", e.name, out)
		}
		e.sees(t, client, v4+":8080", "shown")
		if got := (box{e: e, name: "shown"}).asks(client4 + ":7000"); got != v4 {
			t.Errorf("egress=engine: from %s the client is reached as %q, want %s", e.name, got, v4)
		}
		e.must(t, "rm", "-f", "shown")
	}

	for _, e := range all {
		e.must(t, e.overlayArgs("out", 46, "-o", "vni=4600", "-o", "egress=driver", "--gateway", "10.46.0.1", "--gateway", "fd46::1")...)
	}
	var list []box
	for _, e := range all {
		v4, v6 := e.hostAddrs()
		b := box{e: e, name: "out-" + e.name}
		e.run(t, b.name, "--network", "out", "-p", "8081:80")
		b.addrs = e.addresses(t, b.name, "out")
		list = append(list, b)
		ifs := b.facts(t)
		if len(ifs) != 1 || !slices.Contains(ifs[0].Routes, "default via 10.46.0.1") || !slices.Contains(ifs[0].Routes, "default via fd46::1") {
			t.Errorf("egress=driver on %s: %+v, want one interface with both default routes", e.name, ifs)
		}
		for to, want := range map[string]string{client4: v4, "[" + client6 + "]": v6} {
			if got := b.asks(to + ":7000"); got != want {
				t.Errorf("egress=driver: from %s the client is reached as %q, want %s", e.name, got, want)
			}
		}
		e.sees(t, client, v4+":8081", b.name)
		e.sees(t, client, "["+v6+"]:8081", b.name)
	}
	reachAll(t, list)
	all.agree(t, "out")
	for i, e := range all {
		// All hosts have the gateway's address, so none may look for another.
		if out := e.net(t, "ip", "-6", "addr", "show", "dadfailed"); out != "" {
			t.Errorf("%s: addresses taken for duplicates:\n%s", e.name, out)
		}
		for _, gw := range []string{"10.46.0.1", "fd46::1"} {
			if out, err := list[i].probe("ping", gw); err != nil || strings.Contains(out, `"err"`) {
				t.Errorf("%s pings the gateway %s: %s %v", list[i].name, gw, out, err)
			}
		}
	}
	all.drop(t, "out", list)

	for name, args := range map[string][]string{"inner": {"--internal"}, "shut": {"-o", "egress=none"}} {
		var list []box
		for _, e := range all[:2] {
			e.must(t, e.overlayArgs(name, 47, append(args, "-o", "vni=4700")...)...)
			b := box{e: e, name: name + "-" + e.name}
			e.run(t, b.name, "--network", name, "-p", "8082:80")
			b.addrs = e.addresses(t, b.name, name)
			list = append(list, b)
			v4, v6 := e.hostAddrs()
			for _, to := range []string{client4, "[" + client6 + "]", v4, "[" + v6 + "]"} {
				if got := b.asks(to + ":7000"); got != "unreachable" {
					t.Errorf("%s: %s from %s: %q, want unreachable", strings.Join(args, " "), to, e.name, got)
				}
			}
			for _, to := range []string{v4, "[" + v6 + "]"} {
				out, err := output(client.inNet(suite.probe, "dial", "-timeout", "1s", "tcp", to+":8082"))
				if err != nil || !strings.Contains(out, `"err"`) {
					t.Errorf("%s: published on %s, from the LAN: %s %v, want no answer", strings.Join(args, " "), e.name, out, err)
				}
			}
			if ifs := b.facts(t); len(ifs) != 1 || strings.Contains(fmt.Sprint(ifs[0].Routes), "default") {
				t.Errorf("%s: %+v, want one interface without a default route", strings.Join(args, " "), ifs)
			}
		}
		reachAll(t, list)
		all[:2].agree(t, name)
		all[:2].drop(t, name, list)
	}
}
