//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"slices"
	"testing"
)

// What is on the LAN's VLANs, and behind the host in ipvlan's modes that
// route. The client is the router in each.
const (
	vlanClient, vlanNet = "203.0.113.100", "203.0.113.0/24"
	qinqClient, qinqNet = "10.212.0.100", "10.212.0.0/24"
	layer3Net           = "10.211.0.0/24"
)

// needKind skips a test on a kernel without the links that it is about. With
// REQUIRE_KERNEL=1, as on the kernel that is there to have them, it fails.
func needKind(t *testing.T, m *machine, kind string) {
	t.Helper()
	args := []string{"ip", "link", "add", "kindtest0"}
	if kind != "dummy" {
		args = []string{"ip", "link", "add", "link", "lan0", "name", "kindtest0"}
	}
	args = append(args, "type", kind)
	if kind == "vlan" {
		args = append(args, "id", "4094")
	}
	_, err := output(m.inNet(args...))
	if err == nil {
		m.net(t, "ip", "link", "del", "kindtest0")
		return
	}
	if os.Getenv("REQUIRE_KERNEL") == "1" {
		t.Fatalf("this kernel was to have links of kind %s: %v", kind, err)
	}
	note("SKIPPED %s: the kernel has no links of kind %s", t.Name(), kind)
	t.Skipf("the kernel has no links of kind %s: %v", kind, err)
}

// TestLANParityKinds asks about what not every kernel has.
func TestLANParityKinds(t *testing.T) {
	t.Parallel()
	parity(t, newEngine(t, nil), slices.Concat(ipvlanTable(), layer3Table(), vlanTable(), nowhereTable(), routerTable("ipvlan")))
}

func ipvlanTable() []group {
	var list []group
	for _, x := range []struct {
		name, flag string
		since      int // first engine whose built-in driver has the flag
		between    bool
	}{
		{"ipvlan", "", 0, true},
		{"ipvlan_flag=private", "private", 22, false},
		{"ipvlan_flag=vepa", "vepa", 22, false},
	} {
		args := lan4Args()
		if x.flag != "" {
			args = lan4Args("-o", "ipvlan_mode=l2", "-o", "ipvlan_flag="+x.flag)
		}
		list = append(list, group{
			name: x.name, twin: "ipvlan", kind: "ipvlan", builtinSince: x.since,
			setup: func(w *world) {
				w.onLAN("lan", "ipvlan", args...)
				pair(w)
			},
			probes: append(reachProbes(x.between),
				probe{name: "MAC address", ask: fact("alpha", mac), want: cardMAC(host4)},
				probe{name: "the host's card", ask: card, want: "as it was"},
			),
			steps: []probe{
				{name: "restart: started again", ask: restart("beta"), want: "ok"},
				{name: "restart: from the LAN", ask: dial("client", "tcp", "beta:80", "-wait", "5s"), want: "beta sees client"},
			},
		})
	}
	refusedByBuiltin := map[int]string{0: "refused"}
	return append(list,
		group{
			name: "ipvlan, dual stack and mtu", twin: "ipvlan", kind: "ipvlan",
			setup: func(w *world) {
				w.onLAN("lan", "ipvlan", lan6Args("-o", "com.docker.network.driver.mtu=1400")...)
				pair(w)
			},
			probes: []probe{
				{name: "container to container", ask: dial("alpha", "tcp", "beta6:80"), want: "beta sees alpha"},
				{name: "to the LAN", ask: dial("alpha", "tcp", "client6:7000"), want: "client sees alpha"},
				{name: "from the LAN", ask: dial("client", "tcp", "alpha6:80"), want: "alpha sees client"},
				{name: "interface", ask: fact("alpha", interfaceFacts), want: "eth0 mtu 1400 up",
					differs: map[int]string{0: "eth0 mtu 1500 up"}, why: "the built-in driver ignores the option"},
				{name: "routes", ask: fact("alpha", routes), want: "198.51.100.0/24 dev eth0, 2001:db8:1::/64 dev eth0, default via client dev eth0, default via client dev eth0"},
			},
		},
		group{
			name: "ipvlan, publish", twin: "ipvlan", kind: "ipvlan",
			setup: func(w *world) {
				w.onLAN("lan", "ipvlan", lan4Args()...)
				pair(w, "-p", "8080:80", "-p", "8053:53/udp")
				w.learnHop()
			},
			probes: []probe{
				{name: "from the LAN", ask: dial("client", "tcp", "host:8080"), want: "alpha sees hop", differs: refusedByBuiltin, why: deaf},
				{name: "from the LAN, udp", ask: dial("client", "udp", "host:8053"), want: "alpha sees hop", differs: refusedByBuiltin, why: deaf},
				{name: "from the LAN, the container's own address", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "from the host", ask: dial("host", "tcp", "host:8080"), want: "alpha sees hop", differs: refusedByBuiltin, why: deaf},
				{name: "from the host by 127.0.0.1", ask: dial("host", "tcp", "lo:8080"), want: "alpha sees hop", differs: refusedByBuiltin, why: deaf},
			},
			steps: []probe{
				{name: "port free when it is over", ask: over(hostPort("tcp", ":8080")), want: "free"},
			},
		},
		group{
			name: "ipvlan, host_access", twin: "ipvlan", kind: "ipvlan", builtinSince: never,
			setup: func(w *world) {
				w.onLAN("lan", "ipvlan", lan6Args("-o", "host_access=true")...)
				w.foreign("bridged", "--subnet", net3)
				w.network("own", "--subnet", net1)
				w.all(
					func() { w.run("gamma", "--network", "own", "-p", "8091:80") },
					func() { w.run("third", "--network", "bridged") },
				)
				pair(w)
				w.learnHop()
			},
			probes: []probe{
				{name: "from the host", ask: dial("host", "tcp", "alpha:80"), want: "alpha sees host"},
				{name: "from the host, IPv6", ask: dial("host", "tcp", "alpha6:80"), want: "alpha sees host"},
				{name: "to the host", ask: dial("alpha", "tcp", "host:7000"), want: "host sees alpha"},
				{name: "to the host, IPv6", ask: dial("alpha", "tcp", "host6:7000"), want: "host sees alpha"},
				{name: "from a bridged container", ask: dial("gamma", "tcp", "alpha:80"), want: "alpha sees hop"},
				{name: "to a bridged container, published", ask: dial("alpha", "tcp", "host:8091"), want: "gamma sees alpha"},
				{name: "from a container on the engine's bridge", ask: dial("third", "tcp", "alpha:80"), want: "alpha sees hop"},
				{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
				{name: "from the LAN", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "one MAC for the container", ask: arping("client", "198.51.100.160"), want: cardMAC(host4)},
				{name: "one MAC for the host", ask: arping("client", host4), want: cardMAC(host4)},
			},
		},
	)
}

// layer3Table is about ipvlan's modes in which the host's own table routes.
// The client knows that 10.0.0.0/8 is behind the host.
func layer3Table() []group {
	var list []group
	for _, mode := range []string{"l3", "l3s"} {
		since := 0
		if mode == "l3s" {
			since = 22 // 20.10 takes it for no mode
		}
		list = append(list,
			group{
				name: "ipvlan_mode=" + mode, twin: "ipvlan", kind: "ipvlan", builtinSince: since,
				setup: func(w *world) {
					w.onLAN("lan", "ipvlan", "--subnet", layer3Net, "-o", "parent=lan0", "-o", "ipvlan_mode="+mode)
					pair(w)
				},
				probes: []probe{
					{name: "container to container", ask: dial("alpha", "tcp", "beta:80"), want: "beta sees alpha"},
					{name: "by name", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
					{name: "container to container, udp", ask: dial("alpha", "udp", "beta:53"), want: "beta sees alpha"},
					{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
					{name: "from the LAN", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
					{name: "from the LAN, ping", ask: ping("client", "alpha"), want: "answer"},
					{name: "from the host", ask: dial("host", "tcp", "alpha:80"), want: "unreachable"},
					{name: "routes", ask: fact("alpha", routes), want: "10.211.0.0/24 dev eth0, default dev eth0"},
					{name: "interface", ask: fact("alpha", interfaceFacts), want: "eth0 mtu 1500 up"},
				},
			},
			group{
				name: "ipvlan_mode=" + mode + ", host_access", twin: "ipvlan", kind: "ipvlan", builtinSince: never,
				setup: func(w *world) {
					w.onLAN("lan", "ipvlan", "--subnet", layer3Net, "-o", "parent=lan0", "-o", "ipvlan_mode="+mode, "-o", "host_access=true")
					w.network("own", "--subnet", net1)
					w.run("gamma", "--network", "own")
					pair(w)
					w.learnHop()
				},
				probes: []probe{
					{name: "container to container", ask: dial("alpha", "tcp", "beta:80"), want: "beta sees alpha"},
					{name: "from the host", ask: dial("host", "tcp", "alpha:80"), want: "alpha sees host"},
					{name: "to the host", ask: dial("alpha", "tcp", "host:7000"), want: "host sees alpha"},
					{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
					{name: "from a bridged container", ask: dial("gamma", "tcp", "alpha:80"), want: "alpha sees hop"},
					// The parent's namespace looks only for routes by the parent.
					{name: "to a bridged container", ask: dial("alpha", "tcp", "gamma:80"), want: "timeout"},
				},
			})
	}
	return list
}

// joinVLAN gives the client its place in the VLANs: 10, and 20 within 10.
func (w *world) joinVLAN() {
	w.Helper()
	c := w.e.lan.client
	if _, err := output(c.inNet("ip", "link", "show", "lan0.10")); err != nil {
		c.net(w, "ip", "link", "add", "link", "lan0", "name", "lan0.10", "type", "vlan", "id", "10")
		c.net(w, "ip", "addr", "add", vlanClient+"/24", "dev", "lan0.10")
		c.net(w, "ip", "link", "set", "lan0.10", "up")
		c.net(w, "ip", "link", "add", "link", "lan0.10", "name", "lan0.10.20", "type", "vlan", "id", "20")
		c.net(w, "ip", "addr", "add", qinqClient+"/24", "dev", "lan0.10.20")
		c.net(w, "ip", "link", "set", "lan0.10.20", "up")
	}
	w.learn("router", vlanClient)
	w.learn("inner", qinqClient)
}

func vlanTable() []group {
	var list []group
	for _, kind := range []string{"macvlan", "ipvlan"} {
		needs := "vlan"
		if kind == "ipvlan" {
			needs = "ipvlan" // a kernel that has it has both
		}
		list = append(list, group{
			name: kind + " on a VLAN", twin: kind, kind: needs,
			setup: func(w *world) {
				w.joinVLAN()
				w.onLAN("lan", kind, "--subnet", vlanNet, "--ip-range", "203.0.113.160/27", "--gateway", vlanClient, "-o", "parent=lan0.10")
				pair(w)
				w.learn("router", vlanClient)
			},
			probes: []probe{
				{name: "container to container", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
				{name: "to the VLAN", ask: dial("alpha", "tcp", "router:7000"), want: "client sees alpha"},
				{name: "from the VLAN", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees router"},
				{name: "from the host", ask: dial("host", "tcp", "alpha:80"), want: "unreachable"},
				{name: "routes", ask: fact("alpha", routes), want: "203.0.113.0/24 dev eth0, default via router dev eth0"},
				{name: "interface", ask: fact("alpha", interfaceFacts), want: "eth0 mtu 1500 up"},
				{name: "parent", ask: there("lan0.10"), want: "there"},
			},
			steps: []probe{
				{name: "parent when it is over", ask: over(there("lan0.10")), want: "gone"},
			},
		})
	}
	return append(list,
		group{
			name: "two networks on a VLAN", twin: "macvlan", kind: "vlan", builtinSince: never,
			setup: func(w *world) {
				w.joinVLAN()
				w.onLAN("lan", "macvlan", "--subnet", vlanNet, "--ip-range", "203.0.113.160/27", "--gateway", vlanClient, "-o", "parent=lan0.10")
				w.onLAN("lan2", "macvlan", "--subnet", "10.213.0.0/24", "-o", "parent=lan0.10")
				pair(w)
				w.learn("router", vlanClient)
			},
			steps: []probe{
				{name: "one of them goes", ask: command("network", "rm", "lan2"), want: "ok"},
				{name: "parent stays", ask: func(w *world) string { w.nets = []string{"lan"}; return there("lan0.10")(w) }, want: "there"},
				{name: "to the VLAN", ask: dial("alpha", "tcp", "router:7000"), want: "client sees alpha"},
				{name: "parent when it is over", ask: over(there("lan0.10")), want: "gone"},
			},
		},
		group{
			name: "a VLAN in a VLAN", twin: "macvlan", kind: "vlan", builtinSince: never,
			setup: func(w *world) {
				w.joinVLAN()
				w.onLAN("lan", "macvlan", "--subnet", qinqNet, "--ip-range", "10.212.0.160/27", "--gateway", qinqClient, "-o", "parent=lan0.10.20", "-o", "host_access=true")
				pair(w)
				w.learn("inner", qinqClient)
				w.learnHop()
			},
			probes: []probe{
				{name: "container to container", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
				{name: "to the VLAN", ask: dial("alpha", "tcp", "inner:7000"), want: "client sees alpha"},
				{name: "from the VLAN", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees inner"},
				// The host has no address there but the one of its own sub-interface.
				{name: "from the host", ask: dial("host", "tcp", "alpha:80"), want: "alpha sees hop"},
				{name: "parents", ask: func(w *world) string { return there("lan0.10")(w) + " " + there("lan0.10.20")(w) }, want: "there there"},
			},
			steps: []probe{
				{name: "parents when it is over", ask: over(func(w *world) string { return there("lan0.10")(w) + " " + there("lan0.10.20")(w) }), want: "gone gone"},
			},
		})
}

// there says whether the host has a link of that name.
func there(name string) func(*world) string {
	return func(w *world) string {
		for _, l := range w.e.links(w) {
			if l.Name == name {
				return "there"
			}
		}
		return "gone"
	}
}

// over removes the group's containers and networks and asks.
func over(ask func(*world) string) func(*world) string {
	return func(w *world) string {
		w.close()
		w.boxes, w.nets = nil, nil
		return ask(w)
	}
}

// nowhereTable is about networks without a parent.
func nowhereTable() []group {
	var list []group
	for _, kind := range []string{"macvlan", "ipvlan"} {
		needs := "dummy"
		if kind == "ipvlan" {
			needs = "ipvlan" // a kernel that has it has both
		}
		list = append(list, group{
			name: kind + " without a parent", twin: kind, kind: needs,
			setup: func(w *world) {
				w.onLAN("lan", kind, "--subnet", net1)
				pair(w, "-p", "8080:80")
			},
			probes: []probe{
				{name: "container to container", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
				{name: "routes", ask: fact("alpha", routes), want: "10.201.0.0/24 dev eth0",
					differs: map[int]string{20: "10.201.0.0/24 dev eth0, default via gw.lan dev eth0"}, why: noDefault},
				{name: "interface", ask: fact("alpha", interfaceFacts), want: "eth0 mtu 1500 up"},
				{name: "to the LAN", ask: dial("alpha", "tcp", "client:7000"), want: "unreachable"},
				{name: "from the host", ask: dial("host", "tcp", "alpha:80"), want: "unreachable"},
				{name: "nothing published", ask: dial("client", "tcp", "host:8080"), want: "refused"},
			},
			steps: []probe{
				{name: "dummies when it is over", ask: over(func(w *world) string {
					n := 0
					for _, l := range w.e.links(w) {
						if l.Info.Kind == "dummy" {
							n++
						}
					}
					return fmt.Sprint(n)
				}), want: "0"},
			},
		})
	}
	return list
}
