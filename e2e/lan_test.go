//go:build e2e

package e2e

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// newLANWorld is an engine with the plugin, servers on the host and the client,
// and a world of ours.
func newLANWorld(t *testing.T) *world {
	t.Helper()
	e := newEngine(t, nil)
	e.installPlugin(t)
	e.lan.client.serve(t, "tcp:7000", "udp:7000")
	e.serve(t, "tcp:7000", "udp:7000")
	return newWorld(t, e, ours)
}

// ready looks where the containers are and waits until they serve.
func (w *world) ready() {
	w.Helper()
	w.look()
	w.settle()
	w.learnHop()
}

// accessProbes are what host_access=true is for: the host reaches the LAN's
// containers and back, containers on bridges reach them, and what these publish is
// reached from them. as is what the host's address is to the containers.
func accessProbes(as string) []probe {
	hop6 := "hop" // of those on the host's own sub-interface, the one most like the container's
	if as == "given" {
		hop6 = as
	}
	return []probe{
		{name: "host to container", ask: dial("host", "tcp", "alpha:80"), want: "alpha sees " + as},
		{name: "host to container, udp", ask: dial("host", "udp", "alpha:53"), want: "alpha sees " + as},
		{name: "host to container, ping", ask: ping("host", "alpha"), want: "answer"},
		{name: "host to container, IPv6", ask: dial("host", "tcp", "alpha6:80"), want: "alpha sees " + as},
		{name: "host to container, ping, IPv6", ask: ping("host", "alpha6"), want: "answer"},
		{name: "container to host", ask: dial("alpha", "tcp", "host:7000"), want: "host sees alpha"},
		{name: "container to host, udp", ask: dial("beta", "udp", as+":7000"), want: "host sees beta"},
		{name: "container to host, IPv6", ask: dial("alpha", "tcp", "host6:7000"), want: "host sees alpha"},
		{name: "container to the host's other address", ask: dial("alpha", "tcp", "second:7000"), want: "host sees alpha"},
		{name: "container to container", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
		{name: "container to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
		{name: "container to the LAN, IPv6", ask: dial("alpha", "tcp", "client6:7000"), want: "client sees alpha"},
		{name: "LAN to container", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
		{name: "LAN to container, IPv6", ask: dial("client", "tcp", "alpha6:80"), want: "alpha sees client"},
		{name: "a bridge of ours to container", ask: dial("gamma", "tcp", "alpha:80"), want: "alpha sees hop"},
		{name: "a bridge of ours to container, IPv6", ask: dial("gamma", "tcp", "alpha6:80"), want: "alpha sees " + hop6},
		{name: "a bridge of ours to container, ping", ask: ping("gamma", "beta"), want: "answer"},
		{name: "container to a bridge of ours, published", ask: dial("alpha", "tcp", "host:8091"), want: "gamma sees alpha"},
		{name: "container to a bridge of ours, published, IPv6", ask: dial("alpha", "tcp", "host6:8091"), want: "gamma sees alpha"},
		{name: "container to a bridge of ours", ask: dial("alpha", "tcp", "gamma:80"), want: "timeout"},
		{name: "the engine's bridge to container", ask: dial("delta", "tcp", "alpha:80"), want: "alpha sees hop"},
		{name: "the engine's bridge to container, udp", ask: dial("delta", "udp", "alpha:53"), want: "alpha sees hop"},
		{name: "the engine's bridge to container, ping", ask: ping("delta", "beta"), want: "answer"},
		{name: "the engine's bridge to container, IPv6", ask: dial("delta", "tcp", "alpha6:80"), want: "alpha sees " + hop6},
		{name: "the engine's bridge to container, ping, IPv6", ask: ping("delta", "alpha6"), want: "answer"},
		{name: "container to the engine's bridge, published", ask: dial("alpha", "tcp", "host:8090"), want: "delta sees alpha"},
		{name: "container to the engine's bridge", ask: dial("alpha", "tcp", "delta:80"), want: "timeout"},
		{name: "LAN to a bridge of ours", ask: dial("client", "tcp", "gamma:80"), want: "timeout"},
		{name: "station to host", ask: dial("station", "tcp", "host:7000"), want: "host sees station"},
		{name: "station to host, IPv6", ask: dial("station", "tcp", "host6:7000"), want: "host sees station"},
		{name: "station to the host's other address", ask: dial("station", "tcp", "second:7000"), want: "host sees station"},
		{name: "one MAC for the host on the LAN", ask: arping("station", host4), want: cardMAC(host4)},
		{name: "one MAC for the host's other address", ask: arping("station", second4), want: cardMAC(host4)},
		// Linux answers for every address of the host by every card; the host's own
		// sub-interface keeps silent.
		{name: "one MAC for the hop", ask: func(w *world) string { return arping("station", w.address["hop"])(w) }, want: cardMAC(host4)},
		{name: "a MAC of its own for the container", ask: arping("station", "198.51.100.160"), want: "02:42:c6:33:64:a0"},
	}
}

// TestLANAccess is host_access=true, through whatever happens to a host.
func TestLANAccess(t *testing.T) {
	t.Parallel()
	w := newLANWorld(t)
	e := w.e
	station := e.lan.station(t, "station", "198.51.100.50/24", "2001:db8:1::50/64")
	w.stations = map[string]*machine{"station": station}
	w.learn("station", "198.51.100.50")
	w.learn("station6", "2001:db8:1::50")
	heard := station.listen(t)
	w.network("bridged", "--subnet", net1, "--ipv6", "--subnet", net1v6)
	w.foreign("theirs", "--subnet", net3, "--ipv6", "--subnet", "fd00:203::/64")
	before := hostState(w)
	w.onLAN("lan", "macvlan", lan6Args("-o", "host_access=true")...)
	always := []string{"--restart", "always", "--network"}
	w.all(
		func() {
			w.run("alpha", append(always, "lan", "--ip", "198.51.100.160", "--ip6", "2001:db8:1::a00")...)
		},
		func() {
			w.run("beta", append(always, "lan", "--ip", "198.51.100.161", "--ip6", "2001:db8:1::a01")...)
		},
		func() { w.run("gamma", append(always, "bridged", "-p", "8091:80")...) },
		func() { w.run("delta", append(always, "theirs", "-p", "8090:80")...) },
	)
	w.ready()
	w.check("", accessProbes("host")...)
	if out := e.net(t, "ip", "route", "show", "proto", routeProtocol); strings.Count(out, "\n") != 2 {
		t.Errorf("routes to two containers:\n%s", out)
	}
	checkBoth(t, w)
	checkMoved(t, w)
	checkNoGateway(t, w)

	e.killPlugin(t)
	w.check("while the plugin is dead: ", accessProbes("host")[:6]...)
	e.waitPlugin(t)
	w.check("plugin killed: ", accessProbes("host")...)
	e.checkAgrees(t)

	e.must(t, "stop", "-t", "0", "beta")
	if out := e.net(t, "ip", "route", "show", "proto", routeProtocol); strings.Count(out, "\n") != 1 {
		t.Errorf("routes to one container:\n%s", out)
	}
	e.must(t, "start", "beta")

	e.reboot(t)
	e.waitPlugin(t)
	e.serve(t, "tcp:7000", "udp:7000")
	w.ready()
	w.check("after a reboot: ", accessProbes("host")...)
	e.checkAgrees(t)

	e.must(t, "rm", "-f", "alpha", "beta")
	e.must(t, "network", "rm", "lan")
	w.boxes, w.nets = []string{"gamma", "delta"}, []string{"bridged", "theirs"}
	if after := hostState(w); after != before {
		t.Errorf("the host's links and routes changed:\nbefore %s\nafter  %s", before, after)
	}

	const given4, given6 = "198.51.100.7", "2001:db8:1::7"
	w.onLAN("lan", "macvlan", lan6Args("-o", "host_access=true", "-o", "host_address="+given4+","+given6)...)
	w.learn("given", given4)
	w.learn("given6", given6)
	w.run("alpha", "--network", "lan")
	w.run("beta", "--network", "lan")
	w.ready()
	w.check("host_address: ", append(accessProbes("given"),
		probe{name: "container to it", ask: dial("alpha", "tcp", "given:7000"), want: "host sees alpha"},
		probe{name: "container to it, IPv6", ask: dial("alpha", "tcp", "given6:7000"), want: "host sees alpha"},
	)...)
	w.close()
	e.checkClean(t)
	heard.check(t, map[string]string{host4: cardMAC(host4), second4: cardMAC(host4), host6: cardMAC(host4), second6: cardMAC(host4)})
}

// hostState is the host's links and routes by name.
func hostState(w *world) string {
	var all []string
	for _, l := range w.e.links(w) {
		// Containers' veth pairs of the other networks come and go with them.
		if !strings.HasPrefix(l.Name, "veth") && !strings.HasPrefix(l.Name, "wfv") {
			all = append(all, l.Name)
		}
	}
	routes := w.e.net(w, "ip", "route", "show") + w.e.net(w, "ip", "-6", "route", "show", "proto", routeProtocol)
	for r := range strings.Lines(routes) {
		f := strings.Fields(r)
		all = append(all, strings.Join(f[:3], " "))
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// listener writes down what a machine learns about its neighbours.
type listener struct {
	cmd *exec.Cmd
	out strings.Builder
}

func (m *machine) listen(tb testing.TB) *listener {
	tb.Helper()
	l := &listener{cmd: m.inNet("ip", "-o", "monitor", "neigh")}
	l.cmd.Stdout = &l.out
	if err := l.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { end(l.cmd) })
	return l
}

// check fails if an address was learned with another MAC than the one given,
// or if nothing was learned at all.
func (l *listener) check(tb testing.TB, want map[string]string) {
	tb.Helper()
	end(l.cmd)
	n := 0
	for line := range strings.Lines(l.out.String()) {
		f := strings.Fields(strings.TrimPrefix(line, "Deleted "))
		_, after, ok := strings.Cut(line, "lladdr ")
		if len(f) == 0 || want[f[0]] == "" || !ok {
			continue
		}
		n++
		if got := strings.Fields(after)[0]; got != want[f[0]] {
			tb.Errorf("the LAN learned that %s is at %s, its card is %s", f[0], got, want[f[0]])
		}
	}
	if n == 0 {
		tb.Errorf("the LAN learned nothing of the host:\n%s", l.out.String())
	}
}

// arping lists who on the LAN says that it has the address: MAC addresses,
// sorted, each once.
func arping(from, addr string) func(*world) string {
	return func(w *world) string {
		out, err := output(w.at(from, "busybox", "arping", "-b", "-c", "2", "-I", "lan0", addr))
		if err != nil && out == "" {
			return err.Error()
		}
		var all []string
		for l := range strings.Lines(out) {
			if _, rest, ok := strings.Cut(l, "["); ok {
				m, _, _ := strings.Cut(rest, "]")
				all = append(all, strings.ToLower(m))
			}
		}
		slices.Sort(all)
		return strings.Join(slices.Compact(all), ", ")
	}
}

// TestLANPublish publishes ports of containers on the LAN at the host's
// addresses.
func TestLANPublish(t *testing.T) {
	t.Parallel()
	w := newLANWorld(t)
	w.onLAN("net1", "macvlan", lan4Args()...)
	w.network("bridged", "--subnet", net1)
	w.all(
		func() {
			w.run("alpha", append([]string{"--network", "net1", "-p", "8080:80", "-p", "8053:53/udp", "-p", "8000-8003:8000-8003",
				"-p", "127.0.0.1:8081:80", "-p", second4 + ":8082:80", "-p", "90"},
				servers("tcp:80", "udp:53", "tcp:8000", "tcp:8001", "tcp:8002", "tcp:8003", "tcp:90")...)...)
		},
		func() { w.run("beta", "--network", "net1") },
		func() { w.run("other", "--network", "bridged") },
	)
	w.ready()
	published := []probe{
		// The answer has to come back through the host, by the hop.
		{name: "from the LAN, tcp", ask: dial("client", "tcp", "host:8080"), want: "alpha sees hop"},
		{name: "from the LAN, by the host's other address", ask: dial("client", "tcp", "second:8080"), want: "alpha sees hop"},
		{name: "from the LAN, udp", ask: dial("client", "udp", "host:8053"), want: "alpha sees hop"},
		{name: "from the LAN, first of a range", ask: dial("client", "tcp", "host:8000"), want: "alpha sees hop"},
		{name: "from the LAN, last of a range", ask: dial("client", "tcp", "host:8003"), want: "alpha sees hop"},
		{name: "from the LAN, after the range", ask: dial("client", "tcp", "host:8004"), want: "refused"},
		{name: "from the LAN, port chosen by the driver", ask: dialRandom("alpha", 90), want: "alpha sees hop"},
		{name: "from the LAN, host IP 127.0.0.1", ask: dial("client", "tcp", "host:8081"), want: "refused"},
		{name: "from the LAN, host IP of the LAN", ask: dial("client", "tcp", "second:8082"), want: "alpha sees hop"},
		{name: "from the LAN, other address than the host IP", ask: dial("client", "tcp", "host:8082"), want: "refused"},
		{name: "from the LAN, by IPv6 to an IPv4 container", ask: dial("client", "tcp", "host6:8080"), want: "alpha sees hop"},
		{name: "from the LAN, the container's own address", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
		{name: "from the host by its LAN address", ask: dial("host", "tcp", "host:8080"), want: "alpha sees hop"},
		{name: "from the host by 127.0.0.1", ask: dial("host", "tcp", "lo:8080"), want: "alpha sees hop"},
		{name: "from the host by 127.0.0.1, udp", ask: dial("host", "udp", "lo:8053"), want: "alpha sees hop"},
		{name: "from the host by [::1]", ask: dial("host", "tcp", "lo6:8080"), want: "alpha sees hop"},
		{name: "from the host by its IPv6 address", ask: dial("host", "tcp", "host6:8080"), want: "alpha sees hop"},
		{name: "from the host, host IP 127.0.0.1", ask: dial("host", "tcp", "lo:8081"), want: "alpha sees hop"},
		{name: "from a bridge network", ask: dial("other", "tcp", "host:8080"), want: "alpha sees hop"},
		{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
	}
	w.check("", published...)
	w.check("", probe{name: "taken by a container", ask: refusedPort("8080:80", "8080"), want: "refused, says 8080"})
	w.check("", probe{name: "taken by a program", ask: takenByProgram("tcp", 8999), want: "refused, says 8999"})
	w.check("",
		probe{name: "held against programs", ask: hostPort("tcp", ":8080"), want: "in use"},
		probe{name: "held against programs, udp", ask: hostPort("udp", ":8053"), want: "in use"})
	w.e.killPlugin(t)
	w.e.waitPlugin(t)
	time.Sleep(time.Second) // the engine registers it again
	w.check("plugin killed: ", published...)
	w.check("", probe{name: "restart: started again", ask: restart("alpha"), want: "ok"})
	w.check("restart: ", probe{name: "from the LAN", ask: dial("client", "tcp", "host:8080", "-wait", "5s"), want: "alpha sees hop"})
	w.check("", probe{name: "stopped: port free", ask: stopThen("alpha", hostPort("tcp", ":8080")), want: "free"})
	w.check("stopped: ",
		probe{name: "udp port free", ask: hostPort("udp", ":8053"), want: "free"},
		probe{name: "from the LAN", ask: dial("client", "tcp", "host:8080"), want: "refused"})
	w.close()
	w.e.checkClean(t)
}

// bridgeLAN makes what many hosts have: a bridge that holds the host's
// addresses, with the card as a port, and the LAN's router as default gateway.
func (e *engine) bridgeLAN(tb testing.TB) {
	tb.Helper()
	e.net(tb, "ip", "link", "add", "br0", "address", cardMAC(host4), "type", "bridge")
	e.net(tb, "ip", "link", "set", "br0", "up")
	e.net(tb, "ip", "addr", "flush", "dev", "lan0")
	e.net(tb, "ip", "link", "set", "lan0", "master", "br0")
	for _, a := range e.addrs {
		e.net(tb, "ip", "addr", "add", a, "dev", "br0", "nodad")
	}
	e.net(tb, "ip", "route", "add", "default", "via", client4)
}

// TestLANBridge puts containers on the LAN by a bridge of the host.
func TestLANBridge(t *testing.T) {
	t.Parallel()
	w := newLANWorld(t)
	w.e.bridgeLAN(t)
	w.network("lan", "--subnet", lan4, "--ip-range", lan4Range, "--gateway", client4, "-o", "mode=bridge", "-o", "bridge=br0")
	w.learn("client", client4)
	pair(w, "-p", "8080:80")
	w.ready()
	w.check("",
		probe{name: "container to container", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
		probe{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
		probe{name: "to the LAN, udp", ask: dial("alpha", "udp", "client:7000"), want: "client sees alpha"},
		probe{name: "to the LAN, ping", ask: ping("alpha", "client"), want: "answer"},
		probe{name: "from the LAN", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
		probe{name: "from the LAN, nothing published", ask: dial("client", "tcp", "beta:80"), want: "beta sees client"},
		probe{name: "from the host", ask: dial("host", "tcp", "alpha:80"), want: "alpha sees host"},
		probe{name: "to the host", ask: dial("alpha", "tcp", "host:7000"), want: "host sees alpha"},
		probe{name: "published, from the LAN", ask: dial("client", "tcp", "host:8080"), want: "alpha sees host"},
		probe{name: "published, from the host", ask: dial("host", "tcp", "host:8080"), want: "alpha sees host"},
		probe{name: "routes", ask: fact("alpha", routes), want: "198.51.100.0/24 dev eth0, default via client dev eth0"},
		probe{name: "MAC known on the LAN", ask: arping("client", "198.51.100.160"), want: fmt.Sprintf("02:42:%02x:%02x:%02x:%02x", 198, 51, 100, 160)},
	)
	w.close()
	w.e.checkClean(t)
}
