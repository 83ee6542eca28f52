//go:build e2e

package e2e

import "testing"

// checkBoth has containers on a LAN network that the host has access to and on a
// bridge or a second LAN network, connected while they run and before, in either
// order, and started again. The engine refuses an interface whose subnet a route in
// the container leads into, and the kernel the same route twice.
func checkBoth(t *testing.T, w *world) {
	t.Helper()
	e := w.e
	// In none of the networks' subnets, as of what the LAN's router advertises.
	const beside6 = "2001:db8:77::10"
	e.net(t, "ip", "addr", "add", beside6+"/64", "dev", "lan0", "nodad")
	w.learn("beside6", beside6)
	// Known to the container only while no other network is on the parent.
	w.run("first", "--network", "lan")
	w.look()
	w.check("", probe{name: "to an address beside the subnet", ask: dial("first", "tcp", "beside6:7000", "-wait", "5s"), want: "host sees first"})
	w.network("lan2", "--subnet", "203.0.113.0/24", "--gateway", "203.0.113.1", "--ipv6", "--subnet", "2001:db8:9::/64", "--gateway", "2001:db8:9::1",
		"-o", "mode=macvlan", "-o", "parent=lan0", "-o", "host_access=true", "-o", "probe=false")
	w.all(
		func() {
			w.run("second", "--network", "bridged", "-p", "8094:80")
			e.must(t, "network", "connect", "lan", "second")
		},
		func() {
			w.run("third", "--network", "lan")
			e.must(t, "network", "connect", "theirs", "third")
		},
		func() { e.must(t, "network", "connect", "lan2", "first") },
	)
	probes := []probe{
		{name: "host, bridge first", ask: dial("host", "tcp", "second@lan:80", "-wait", "5s"), want: "second sees host"},
		{name: "host, bridge first, IPv6", ask: dial("host", "tcp", "second@lan6:80"), want: "second sees host"},
		{name: "to the host, bridge first", ask: dial("second", "tcp", "host:7000"), want: "host sees second@lan"},
		{name: "LAN, bridge first", ask: dial("client", "tcp", "second@lan:80"), want: "second sees client"},
		// It leaves by the bridge, but has a way of its own to the client.
		{name: "LAN, published, bridge first", ask: dial("client", "tcp", "host:8094", "-wait", "5s"), want: "second sees gw.bridged"},
		{name: "its own bridge, bridge first", ask: dial("gamma", "tcp", "second@bridged:80"), want: "second sees gamma"},
		{name: "to its own bridge, bridge first", ask: dial("second", "tcp", "gamma:80"), want: "gamma sees second@bridged"},
		{name: "host, LAN first", ask: dial("host", "tcp", "third@lan:80", "-wait", "5s"), want: "third sees host"},
		{name: "host, LAN first, IPv6", ask: dial("host", "tcp", "third@lan6:80"), want: "third sees host"},
		{name: "LAN, LAN first", ask: dial("client", "tcp", "third@lan6:80"), want: "third sees client"},
		{name: "to the engine's bridge, LAN first", ask: dial("third", "tcp", "delta:80"), want: "delta sees third@theirs"},
		{name: "host, two LANs", ask: dial("host", "tcp", "first@lan:80", "-wait", "5s"), want: "first sees host"},
		{name: "to the host, two LANs", ask: dial("first", "tcp", "host6:7000"), want: "host sees first@lan"},
		{name: "host, two LANs, by the second", ask: dial("host", "tcp", "first@lan2:80"), want: "first sees hop"},
	}
	w.look()
	w.settle()
	w.learnHop()
	w.check("connected while running: ", probes...)
	e.must(t, "restart", "-t", "0", "first", "second", "third")
	w.look()
	w.settle()
	w.check("started on both: ", probes...)
	e.must(t, "rm", "-f", "first", "second", "third")
	e.must(t, "network", "rm", "lan2")
	w.boxes = w.boxes[:len(w.boxes)-3]
	w.nets = w.nets[:len(w.nets)-1]
	e.net(t, "ip", "addr", "del", beside6+"/64", "dev", "lan0")
	w.learnHop() // that of lan is the only one again
}

// checkMoved has an address of a bridge network come back with another MAC address:
// whoever knows the old one learns the new one at once.
func checkMoved(t *testing.T, w *world) {
	t.Helper()
	args := []string{"--network", "bridged", "--ip", "10.201.0.77"}
	probes := []probe{
		{name: "from a container", ask: dial("gamma", "tcp", "moved:80", "-wait", "3s"), want: "moved sees gamma"},
		{name: "from the host", ask: dial("host", "tcp", "moved:80", "-wait", "3s"), want: "moved sees gw.bridged"},
	}
	w.run("moved", args...)
	w.look()
	w.settle()
	w.check("an address: ", probes...)
	w.e.must(t, "rm", "-f", "moved")
	w.e.run(w, "moved", append(args, "--mac-address", "02:00:00:00:77:77")...)
	w.look()
	w.settle()
	w.check("the address with another MAC: ", probes...)
	w.e.must(t, "rm", "-f", "moved")
	w.boxes = w.boxes[:len(w.boxes)-1]
}

// checkNoGateway has containers on a network of ours that leads nowhere, and on a
// bridge that leads out: in either order they reach the LAN by the bridge, and what
// they publish is reached.
func checkNoGateway(t *testing.T, w *world) {
	t.Helper()
	e := w.e
	w.network("inner", "--subnet", "10.209.0.0/24", "-o", "egress=none")
	ports := map[string]string{}
	var starts []func()
	for _, x := range []struct{ name, first, then, port string }{
		{"inner-theirs", "inner", "theirs", "8095"}, {"theirs-inner", "theirs", "inner", "8096"},
		{"inner-ours", "inner", "bridged", "8097"}, {"ours-inner", "bridged", "inner", "8098"},
	} {
		ports[x.name] = x.port
		starts = append(starts, func() {
			w.run(x.name, "--network", x.first, "-p", x.port+":80")
			e.must(t, "network", "connect", x.then, x.name)
			e.must(t, "restart", "-t", "0", x.name)
		})
	}
	w.all(starts...)
	w.look()
	w.settle()
	for name, port := range ports {
		w.check(name+": ",
			probe{name: "out", ask: dial(name, "tcp", "client:7000", "-wait", "3s"), want: "client sees host"},
			probe{name: "published", ask: dial("client", "tcp", "host:"+port, "-wait", "3s"), want: name + " sees client"})
		e.must(t, "rm", "-f", name)
	}
	e.must(t, "network", "rm", "inner")
	w.boxes = w.boxes[:len(w.boxes)-4]
	w.nets = w.nets[:len(w.nets)-1]
}
