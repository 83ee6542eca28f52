//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// The LAN's subnets, of which containers get a part; the client is its router.
const (
	lan4, lan4Range = "198.51.100.0/24", "198.51.100.160/27"
	lan6, lan6Range = "2001:db8:1::/64", "2001:db8:1::a00/120"
)

// Reasons that several differences share.
const (
	deaf      = "the built-in driver publishes nothing: ports answer at the container's own address alone"
	announced = "before engine 28 nobody told the LAN of a new container"
	wayBack   = "the container of a published port is given a way back to the host"
)

// onLAN makes a network of the kind on a parent, with whatever is under test.
func (w *world) onLAN(name, kind string, args ...string) {
	w.Helper()
	if w.driver == ours {
		args = append([]string{"-o", "mode=" + kind}, args...)
	}
	w.network(name, args...)
	// The other driver's container had the same address and another MAC.
	w.e.lan.client.net(w, "ip", "neigh", "flush", "all")
	w.e.net(w, "ip", "neigh", "flush", "all")
	// The client is the gateway, and is to be called by its own name.
	w.learn("client", client4)
	w.learn("client6", client6)
}

// lan4Args and lan6Args are how a network takes part in the LAN.
func lan4Args(args ...string) []string {
	return append([]string{"--subnet", lan4, "--ip-range", lan4Range, "--gateway", client4, "-o", "parent=lan0"}, args...)
}

func lan6Args(args ...string) []string {
	return append(lan4Args("--ipv6", "--subnet", lan6, "--ip-range", lan6Range, "--gateway", client6), args...)
}

// learnHop knows the addresses by which containers send to the host, which are
// nobody's on the LAN, and destinations that are a single address.
func (w *world) learnHop() {
	w.Helper()
	for _, l := range w.e.links(w) {
		for _, a := range l.Addrs {
			switch {
			case !strings.HasPrefix(l.Name, "wfs"):
			case strings.HasPrefix(a.Local, "169.254."):
				w.learn("hop", a.Local)
				w.learn("hop/32", a.Local+"/32")
			case strings.HasPrefix(a.Local, "fd"):
				w.learn("hop6", a.Local)
				w.learn("hop/128", a.Local+"/128")
			}
		}
	}
	w.learn("host/32", host4+"/32")
	w.learn("second/32", second4+"/32")
}

// TestLANParity asks the built-in macvlan driver and ours the same questions.
func TestLANParity(t *testing.T) {
	t.Parallel()
	parity(t, newEngine(t, nil), slices.Concat(lanReachTable(), lanModeTable(), lanOptionTable(), lanAddressTable(), routerTable("macvlan")))
}

// pair starts the two containers that most groups have.
func pair(w *world, args ...string) {
	w.Helper()
	w.all(
		func() { w.run("alpha", append([]string{"--network", "lan"}, args...)...) },
		func() { w.run("beta", "--network", "lan") },
	)
}

// reachProbes are what two containers, the LAN and the host are to each
// other; between says whether the two containers reach each other.
func reachProbes(between bool) []probe {
	tcp, udp, echo := "beta sees alpha", "beta sees alpha", "answer"
	if !between {
		tcp, udp, echo = "timeout", "timeout", "no answer"
	}
	return []probe{
		{name: "container to container, tcp", ask: dial("alpha", "tcp", "beta:80"), want: tcp},
		{name: "container to container, udp", ask: dial("alpha", "udp", "beta:53"), want: udp},
		{name: "container to container, ping", ask: ping("alpha", "beta"), want: echo},
		{name: "by name", ask: dial("alpha", "tcp", "name/beta:80"), want: tcp},
		{name: "to the LAN, tcp", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
		{name: "to the LAN, udp", ask: dial("alpha", "udp", "client:7000"), want: "client sees alpha"},
		{name: "to the LAN, ping", ask: ping("alpha", "client"), want: "answer"},
		{name: "from the LAN, tcp", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
		{name: "from the LAN, udp", ask: dial("client", "udp", "alpha:53"), want: "alpha sees client"},
		{name: "from the LAN, ping", ask: ping("client", "alpha"), want: "answer"},
		{name: "to the host", ask: dial("alpha", "tcp", "host:7000"), want: "timeout"},
		{name: "to the host, ping", ask: ping("alpha", "host"), want: "no answer"},
		{name: "from the host", ask: dial("host", "tcp", "alpha:80"), want: "timeout"},
		{name: "from the host, ping", ask: ping("host", "alpha"), want: "no answer"},
		{name: "routes", ask: fact("alpha", routes), want: "198.51.100.0/24 dev eth0, default via client dev eth0"},
		{name: "interface", ask: fact("alpha", interfaceFacts), want: "eth0 mtu 1500 up"},
	}
}

func lanReachTable() []group {
	return []group{
		{
			name: "macvlan", twin: "macvlan",
			setup: func(w *world) {
				w.onLAN("lan", "macvlan", lan4Args()...)
				pair(w)
			},
			probes: append(reachProbes(true),
				probe{name: "mode", ask: childMode, want: "bridge"},
				probe{name: "MAC address", ask: fact("alpha", macKind), want: "derived from the address",
					differs: map[int]string{28: "random"}, why: "derived addresses stay the same when a container is started again; engine 28 gave them up"},
				probe{name: "gateway", ask: func(w *world) string { return w.address["gw.lan"] }, want: client4},
				probe{name: "the host's routes", ask: hostRoutes, want: "198.51.100.0/24 dev lan0"},
				probe{name: "the host's card", ask: card, want: "as it was"},
			),
			steps: []probe{
				{name: "restart: started again", ask: restart("beta"), want: "ok"},
				{name: "restart: reached by name", ask: dial("alpha", "tcp", "name/beta:80", "-wait", "5s"), want: "beta sees alpha"},
				{name: "restart: from the LAN", ask: dial("client", "tcp", "beta:80", "-wait", "5s"), want: "beta sees client"},
			},
		},
		{
			name: "macvlan, same MAC after a restart", twin: "macvlan", builtinSince: never,
			setup: func(w *world) {
				w.onLAN("lan", "macvlan", lan4Args()...)
				w.run("alpha", "--network", "lan", "--ip", "198.51.100.180")
			},
			steps: []probe{
				{name: "before", ask: fact("alpha", mac), want: "02:42:c6:33:64:b4"},
				{name: "known to the client", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "started again", ask: restart("alpha"), want: "ok"},
				{name: "after", ask: fact("alpha", mac), want: "02:42:c6:33:64:b4"},
				{name: "reached at once", ask: dial("client", "tcp", "alpha:80", "-wait", "1s"), want: "alpha sees client"},
			},
		},
		{
			name: "macvlan, dual stack", twin: "macvlan",
			setup: func(w *world) {
				w.onLAN("lan", "macvlan", lan6Args("-o", "macvlan_mode=bridge")...)
				pair(w)
			},
			probes: []probe{
				{name: "container to container", ask: dial("alpha", "tcp", "beta6:80"), want: "beta sees alpha"},
				{name: "container to container, udp", ask: dial("alpha", "udp", "beta6:53"), want: "beta sees alpha"},
				{name: "by name, IPv6", ask: dial("alpha", "tcp6", "name/beta:80"), want: "beta sees alpha"},
				{name: "by name, IPv4", ask: dial("alpha", "tcp4", "name/beta:80"), want: "beta sees alpha"},
				{name: "to the LAN", ask: dial("alpha", "tcp", "client6:7000"), want: "client sees alpha"},
				{name: "to the LAN, ping", ask: ping("alpha", "client6"), want: "answer"},
				{name: "from the LAN", ask: dial("client", "tcp", "alpha6:80"), want: "alpha sees client"},
				{name: "from the LAN, udp", ask: dial("client", "udp", "alpha6:53"), want: "alpha sees client"},
				{name: "from the LAN, IPv4", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "to the host", ask: dial("alpha", "tcp", "host6:7000"), want: "timeout"},
				{name: "from the host", ask: dial("host", "tcp", "alpha6:80"), want: "timeout"},
				{name: "routes", ask: fact("alpha", routes), want: "198.51.100.0/24 dev eth0, 2001:db8:1::/64 dev eth0, default via client dev eth0, default via client dev eth0"},
			},
		},
		{
			name: "macvlan, address that another station had", twin: "macvlan",
			setup: func(w *world) {
				w.onLAN("lan", "macvlan", lan6Args()...)
				for _, a := range []string{"198.51.100.181", "2001:db8:1::a81"} {
					w.e.lan.client.net(w, "ip", "neigh", "replace", a, "lladdr", "02:00:00:00:00:99", "dev", "lan0", "nud", "stale")
				}
				w.run("alpha", "--network", "lan", "--ip", "198.51.100.181", "--ip6", "2001:db8:1::a81")
			},
			probes: []probe{
				{name: "from the LAN", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client",
					differs: map[int]string{20: "timeout"}, why: announced},
				{name: "from the LAN, IPv6", ask: dial("client", "tcp", "alpha6:80"), want: "alpha sees client",
					differs: map[int]string{20: "timeout"}, why: announced},
			},
		},
		lanPublishGroup(),
		{
			name: "macvlan, host_access", twin: "macvlan", builtinSince: never,
			setup: func(w *world) {
				w.onLAN("lan", "macvlan", lan4Args("-o", "host_access=true")...)
				pair(w)
				w.learnHop()
			},
			probes: []probe{
				{name: "container to container", ask: dial("alpha", "tcp", "beta:80"), want: "beta sees alpha"},
				{name: "from the host", ask: dial("host", "tcp", "alpha:80"), want: "alpha sees host"},
				{name: "to the host", ask: dial("alpha", "tcp", "host:7000"), want: "host sees alpha"},
				{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
				{name: "from the LAN", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "routes", ask: fact("alpha", routes), want: "198.51.100.0/24 dev eth0, default via client dev eth0, " +
					"host/32 via hop dev eth0, second/32 via hop dev eth0"},
			},
		},
	}
}

func lanPublishGroup() group {
	refusedByBuiltin := map[int]string{0: "refused"}
	return group{
		name: "macvlan, publish", twin: "macvlan",
		setup: func(w *world) {
			w.onLAN("lan", "macvlan", lan6Args()...)
			pair(w, "-p", "8080:80", "-p", "8053:53/udp")
			w.learnHop()
		},
		probes: []probe{
			{name: "from the LAN", ask: dial("client", "tcp", "host:8080"), want: "alpha sees hop", differs: refusedByBuiltin, why: deaf},
			{name: "from the LAN, udp", ask: dial("client", "udp", "host:8053"), want: "alpha sees hop", differs: refusedByBuiltin, why: deaf},
			{name: "from the LAN, IPv6", ask: dial("client", "tcp", "host6:8080"), want: "alpha sees hop", differs: refusedByBuiltin, why: deaf},
			{name: "from the LAN, the container's own address", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
			{name: "from the host", ask: dial("host", "tcp", "host:8080"), want: "alpha sees hop", differs: refusedByBuiltin, why: deaf},
			{name: "from the host, IPv6", ask: dial("host", "tcp", "host6:8080"), want: "alpha sees hop", differs: refusedByBuiltin, why: deaf},
			{name: "from the host by 127.0.0.1", ask: dial("host", "tcp", "lo:8080"), want: "alpha sees hop", differs: refusedByBuiltin, why: deaf},
			{name: "from the host by [::1]", ask: dial("host", "tcp", "lo6:8080"), want: "alpha sees hop", differs: refusedByBuiltin, why: deaf},
			{name: "port not published", ask: dial("client", "tcp", "host:8081"), want: "refused"},
			{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
			{name: "routes", ask: fact("alpha", routes),
				want:    "198.51.100.0/24 dev eth0, 2001:db8:1::/64 dev eth0, default via client dev eth0, default via client dev eth0, hop/128 dev eth0",
				differs: map[int]string{0: "198.51.100.0/24 dev eth0, 2001:db8:1::/64 dev eth0, default via client dev eth0, default via client dev eth0"}, why: wayBack},
		},
		steps: []probe{
			{name: "port free when it is over", ask: over(hostPort("tcp", ":8080")), want: "free"},
			{name: "from the LAN when it is over", ask: dial("client", "tcp", "host:8080"), want: "refused"},
		},
	}
}

// hostRoutes are the routes of the host by its card and by links of ours.
func hostRoutes(w *world) string {
	var all []string
	for l := range strings.Lines(w.e.net(w, "ip", "-4", "route", "show")) {
		if f := strings.Fields(l); strings.Contains(l, " lan0 ") || strings.Contains(l, " wf") {
			all = append(all, strings.Join(f[:3], " "))
		}
	}
	return strings.Join(all, ", ")
}

// card says what became of the MAC address of the host's own card.
func card(w *world) string {
	var l []struct{ Address string }
	if err := json.Unmarshal([]byte(w.e.net(w, "ip", "-j", "link", "show", "lan0")), &l); err != nil {
		return err.Error()
	}
	if l[0].Address != cardMAC(host4) {
		return l[0].Address
	}
	return "as it was"
}

// mac is the container's MAC address.
func mac(_ *world, ifs []iface) string { return ifs[0].MAC }

// addrs are the container's addresses.
func addrs(_ *world, ifs []iface) string { return strings.Join(ifs[0].Addrs, " ") }

// lanModeTable is about macvlan_mode.
func lanModeTable() []group {
	return []group{
		{
			name: "macvlan_mode=private", twin: "macvlan",
			setup: func(w *world) {
				w.onLAN("lan", "macvlan", lan4Args("-o", "macvlan_mode=private")...)
				pair(w)
			},
			probes: append(reachProbes(false), probe{name: "mode", ask: childMode, want: "private"}),
			steps: []probe{
				{name: "with a switch that sends frames back", ask: reflect("on", dial("alpha", "tcp", "beta:80")), want: "timeout"},
				{name: "with one that does not", ask: reflect("off", dial("client", "tcp", "alpha:80")), want: "alpha sees client"},
			},
		},
		{
			name: "macvlan_mode=vepa", twin: "macvlan",
			setup: func(w *world) {
				w.onLAN("lan", "macvlan", lan4Args("-o", "macvlan_mode=vepa")...)
				pair(w)
			},
			probes: append(reachProbes(false), probe{name: "mode", ask: childMode, want: "vepa"}),
			steps: []probe{
				{name: "with a switch that sends frames back", ask: reflect("on", dial("alpha", "tcp", "beta:80")), want: "beta sees alpha"},
				{name: "from the LAN then", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "with one that does not", ask: reflect("off", dial("alpha", "tcp", "client:7000")), want: "client sees alpha"},
			},
		},
		{
			name: "macvlan_mode=passthru", twin: "macvlan",
			setup: func(w *world) {
				w.onLAN("lan", "macvlan", lan4Args("-o", "macvlan_mode=passthru")...)
				w.run("alpha", "--network", "lan")
			},
			probes: []probe{
				{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
				{name: "from the LAN", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "mode", ask: childMode, want: "passthru"},
				{name: "interface", ask: fact("alpha", interfaceFacts), want: "eth0 mtu 1500 up"},
			},
			steps: []probe{
				{name: "second container", ask: func(w *world) string { return refused(w, "", "--network", "lan") }, want: "refused, says "},
				{name: "first one works", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "the card when it is over", ask: over(card), want: "as it was"},
			},
		},
	}
}

// childMode is the mode of alpha's sub-interface as the kernel has it.
func childMode(w *world) string {
	out, err := output(w.e.inside("nsenter", "-t", w.pids["alpha"], "-n", "ip", "-d", "-j", "link", "show", "dev", "eth0"))
	if err != nil {
		return err.Error()
	}
	var l []struct {
		Linkinfo struct {
			Data struct{ Mode string } `json:"info_data"`
		}
	}
	if err := json.Unmarshal([]byte(out), &l); err != nil {
		return fmt.Sprintf("%v in %s", err, out)
	}
	return l[0].Linkinfo.Data.Mode
}

// reflect makes the switch send frames back by the port they came from, which
// VEPA (IEEE 802.1Qbg) is made for, or not, and asks.
func reflect(state string, ask func(*world) string) func(*world) string {
	return func(w *world) string {
		w.e.lan.wire.net(w, "ip", "link", "set", "p-host", "type", "bridge_slave", "hairpin", state)
		// Neither of the two remembers that it found nobody.
		for _, b := range w.boxes {
			if out, err := output(w.e.inside("nsenter", "-t", w.pids[b], "-n", "ip", "neigh", "flush", "all")); err != nil {
				return err.Error() + out
			}
		}
		return ask(w)
	}
}

// lanOptionTable is about the other options.
func lanOptionTable() []group {
	return []group{
		{
			name: "macvlan, mtu", twin: "macvlan",
			setup: func(w *world) {
				w.onLAN("lan", "macvlan", lan4Args("-o", "com.docker.network.driver.mtu=1400")...)
				pair(w)
			},
			probes: []probe{
				{name: "interface", ask: fact("alpha", interfaceFacts), want: "eth0 mtu 1400 up",
					differs: map[int]string{0: "eth0 mtu 1500 up"}, why: "the built-in driver takes the parent's, whatever is asked for"},
				{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
				{name: "the card's", ask: func(w *world) string { return strings.Fields(w.e.net(w, "ip", "-o", "link", "show", "lan0"))[4] }, want: "1500"},
			},
		},
		{
			name: "macvlan, egress=none", twin: "macvlan", builtinSince: never,
			setup: func(w *world) {
				w.beyond()
				w.onLAN("lan", "macvlan", lan4Args("-o", "egress=none")...)
				pair(w, "-p", "8080:80")
			},
			probes: []probe{
				{name: "routes", ask: fact("beta", routes), want: "198.51.100.0/24 dev eth0"},
				{name: "container to container", ask: dial("alpha", "tcp", "beta:80"), want: "beta sees alpha"},
				{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
				{name: "from the LAN", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "beyond the LAN", ask: dial("beta", "tcp", "beyond:7000"), want: "unreachable"},
				{name: "nothing published", ask: dial("client", "tcp", "host:8080"), want: "refused"},
			},
		},
		{
			name: "macvlan, routes", twin: "macvlan", builtinSince: never,
			setup: func(w *world) {
				w.beyond()
				w.onLAN("lan", "macvlan", lan4Args("-o", "egress=none", "-o", "routes=192.0.2.0/24 via "+client4)...)
				pair(w)
			},
			probes: []probe{
				{name: "routes", ask: fact("alpha", routes), want: "192.0.2.0/24 via client dev eth0, 198.51.100.0/24 dev eth0"},
				{name: "by the route", ask: dial("alpha", "tcp", "beyond:7000"), want: "client sees alpha"},
			},
		},
		{
			name: "macvlan, two networks on one parent", twin: "macvlan",
			setup: func(w *world) {
				w.onLAN("lan", "macvlan", lan4Args()...)
				pair(w)
			},
			steps: []probe{
				{name: "second network", ask: func(w *world) string {
					args := []string{"network", "create", "-d", w.driver, "-o", "parent=lan0", "--subnet", "10.211.0.0/24"}
					if w.driver == ours {
						args = append(args, "--ipam-driver", ours, "-o", "mode=macvlan")
					}
					if _, err := w.e.docker(append(args, "second")...); err != nil {
						return "refused"
					}
					w.nets = append(w.nets, "second")
					w.run("other", "--network", "second")
					w.look()
					return "ok"
				}, want: "ok", differs: map[int]string{20: "refused"}, why: "the built-in driver of 20.10 allows one network for each parent"},
				{name: "first one works", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
			},
		},
	}
}

// beyond makes an address of each family behind the client, which is the router.
func (w *world) beyond() {
	w.Helper()
	for symbol, a := range map[string]string{"beyond": "192.0.2.1", "beyond6": "2001:db8:9::1"} {
		w.e.lan.client.net(w, "ip", "addr", "replace", a, "dev", "lo")
		w.learn(symbol, a)
	}
}

// lanAddressTable is about what the user asks for by number, and about
// networks that lead nowhere.
func lanAddressTable() []group {
	return []group{
		{
			name: "macvlan, addresses", twin: "macvlan",
			setup: func(w *world) {
				w.onLAN("net1", "macvlan", lan4Args("--aux-address", "printer=198.51.100.161")...)
				w.run("auto", "--network", "net1")
				w.run("next", "--network", "net1")
				w.run("fixed", "--network", "net1", "--ip", "198.51.100.50", "--mac-address", "02:11:22:33:44:55")
			},
			probes: []probe{
				{name: "first of the range", ask: fact("auto", addrs), want: "198.51.100.160/24"},
				{name: "after the aux address", ask: fact("next", addrs), want: "198.51.100.162/24"},
				{name: "--ip outside the range", ask: fact("fixed", addrs), want: "198.51.100.50/24"},
				{name: "--mac-address", ask: fact("fixed", mac), want: "02:11:22:33:44:55"},
				{name: "from the LAN", ask: dial("client", "tcp", "fixed:80"), want: "fixed sees client"},
				{name: "known on the LAN by its MAC", ask: arping("client", "198.51.100.50"), want: "02:11:22:33:44:55"},
			},
			steps: []probe{
				{name: "--ip twice", ask: refusedIP("198.51.100.50"), want: "refused, says "},
				{name: "--ip of the gateway", ask: refusedIP(client4), want: "refused, says "},
				{name: "--ip of an aux address", ask: refusedIP("198.51.100.161"), want: "refused, says "},
				{name: "--ip outside the subnet", ask: refusedIP("10.99.0.1"), want: "refused, says "},
			},
		},
		{
			name: "macvlan, internal", twin: "macvlan",
			setup: func(w *world) {
				w.beyond()
				w.onLAN("lan", "macvlan", lan4Args("--internal")...)
				pair(w, "-p", "8080:80")
			},
			probes: []probe{
				{name: "container to container", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
				{name: "routes", ask: fact("alpha", routes), want: "198.51.100.0/24 dev eth0"},
				{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
				{name: "from the LAN", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "beyond the LAN", ask: dial("alpha", "tcp", "beyond:7000"), want: "unreachable"},
				{name: "nothing published", ask: dial("client", "tcp", "host:8080"), want: "refused"},
			},
		},
		{
			name: "macvlan, MAC of one network", twin: "macvlan", engine: 28,
			setup: func(w *world) {
				w.onLAN("lan", "macvlan", lan4Args()...)
				w.run("alpha", "--network", "name=lan,mac-address=02:11:22:33:44:66,ip=198.51.100.51")
			},
			probes: []probe{
				{name: "MAC", ask: fact("alpha", mac), want: "02:11:22:33:44:66"},
				{name: "known on the LAN by it", ask: arping("client", "198.51.100.51"), want: "02:11:22:33:44:66"},
			},
		},
	}
}
