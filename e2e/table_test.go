//go:build e2e

package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
)

// Every group uses the same subnets for both drivers, one driver after the
// other, so that answers compare as text.
const (
	net1, net1v6 = "10.201.0.0/24", "fd00:201::/64"
	net2, net2v6 = "10.202.0.0/24", "fd00:202::/64"
	net3         = "10.203.0.0/24"
	net4         = "10.204.0.0/24"
)

// Reasons that several differences share.
const (
	unrouted  = "the built-in bridge of 20.10 lets neighbours that route to the container reach its published ports there, whatever the host IP says; engine 28 closed this, ours is closed on both"
	proxied   = "the built-in bridge passes these connections through a proxy process; ours translates and keeps the client's address"
	rawDrop   = "engine 28 drops in its raw table whatever comes for a container's address in mode nat, answers to connections of the container included"
	noDefault = "the built-in bridge of 20.10 leaves a default route in internal networks; engine 28 and ours do not"
)

// parityTable is every probe.
func parityTable() []group {
	return slices.Concat(reachTable(), optionTable(), addressTable(), ipv6Table(), modeTable())
}

// servers is the command of a container that listens on more than the usual.
func servers(specs ...string) []string {
	return append([]string{image, "/probe", "serve"}, specs...)
}

func reachTable() []group {
	return []group{
		{
			name: "reach",
			setup: func(w *world) {
				w.network("net1", "--subnet", net1)
				w.network("net2", "--subnet", net2)
				w.foreign("bridged", "--subnet", net3)
				w.all(
					func() { w.run("alpha", "--network", "net1") },
					func() { w.run("beta", "--network", "net1", "--network-alias", "bee") },
					func() { w.run("other", "--network", "net2") },
					func() { w.run("third", "--network", "bridged") },
				)
			},
			probes: []probe{
				{name: "container to container, tcp", ask: dial("alpha", "tcp", "beta:80"), want: "beta sees alpha"},
				{name: "container to container, udp", ask: dial("alpha", "udp", "beta:53"), want: "beta sees alpha"},
				{name: "container to container, ping", ask: ping("alpha", "beta"), want: "answer"},
				{name: "by name", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
				{name: "by alias", ask: dial("alpha", "tcp", "name/bee:80"), want: "beta sees alpha"},
				{name: "name of another network", ask: dial("alpha", "tcp", "name/other:80"), want: "no such name"},
				{name: "to the gateway address", ask: dial("alpha", "tcp", "gw.net1:7000"), want: "host sees alpha"},
				{name: "to the gateway address, udp", ask: dial("alpha", "udp", "gw.net1:7000"), want: "host sees alpha"},
				{name: "to the host's LAN address", ask: dial("alpha", "tcp", "host:7000"), want: "host sees alpha"},
				{name: "to the gateway address of another network", ask: dial("alpha", "tcp", "gw.net2:7000"), want: "host sees alpha"},
				{name: "host to container", ask: dial("host", "tcp", "alpha:80"), want: "alpha sees gw.net1"},
				{name: "host to container, ping", ask: ping("host", "alpha"), want: "answer"},
				{name: "to outside, tcp", ask: dial("alpha", "tcp", "client:7000"), want: "client sees host"},
				{name: "to outside, udp", ask: dial("alpha", "udp", "client:7000"), want: "client sees host"},
				{name: "to outside, ping", ask: ping("alpha", "client"), want: "answer"},
				{name: "to another network of the driver", ask: dial("alpha", "tcp", "other:80"), want: "timeout"},
				{name: "from another network of the driver", ask: dial("other", "tcp", "alpha:80"), want: "timeout"},
				{name: "to a built-in bridge network", ask: dial("alpha", "tcp", "third:80"), want: "timeout"},
				{name: "from a built-in bridge network", ask: dial("third", "tcp", "alpha:80"), want: "timeout"},
				{name: "ping from a built-in bridge network", ask: ping("third", "alpha"), want: "no answer"},
				{name: "from outside to the container's address", ask: dial("client", "tcp", "alpha:80"), want: "timeout"},
				{name: "from outside to the container's address, udp", ask: dial("client", "udp", "alpha:53"), want: "timeout"},
				{name: "from outside to the container's address, ping", ask: ping("client", "alpha"), want: "no answer"},
				{name: "routes", ask: fact("alpha", routes), want: "10.201.0.0/24 dev eth0, default via gw.net1 dev eth0"},
				{name: "interface", ask: fact("alpha", interfaceFacts), want: "eth0 mtu 1500 up"},
				{name: "MAC address", ask: fact("alpha", macKind), want: "derived from the address",
					differs: map[int]string{28: "random"}, why: "derived addresses stay the same when a container is started again; engine 28 gave them up"},
				{name: "bridge promiscuity", ask: bridgePromiscuity, want: "off"},
			},
			steps: []probe{
				{name: "restart: started again", ask: restart("alpha"), want: "ok"},
				{name: "restart: to outside", ask: dial("alpha", "tcp", "client:7000"), want: "client sees host"},
				{name: "restart: reached by name", ask: dial("beta", "tcp", "name/alpha:80", "-wait", "5s"), want: "alpha sees beta"},
			},
		},
		publishGroup(),
	}
}

func publishGroup() group {
	return group{
		name: "publish",
		setup: func(w *world) {
			w.network("net1", "--subnet", net1)
			w.network("net2", "--subnet", net2)
			w.foreign("bridged", "--subnet", net3)
			w.foreign("inside", "--subnet", net4, "--internal")
			w.all(
				func() {
					w.run("alpha", append([]string{"--network", "net1", "-p", "8080:80", "-p", "8053:53/udp", "-p", "8000-8003:8000-8003",
						"-p", "127.0.0.1:8081:80", "-p", second4 + ":8082:80", "-p", "90"},
						servers("tcp:80", "udp:53", "tcp:8000", "tcp:8001", "tcp:8002", "tcp:8003", "tcp:90")...)...)
				},
				func() { w.run("beta", "--network", "net1") },
				func() { w.run("other", "--network", "net2", "-p", "8090:80") },
				func() { w.run("third", "--network", "bridged", "-p", "8091:80") },
				func() { w.run("sealed", "--network", "inside") },
			)
		},
		probes: []probe{
			{name: "from outside, tcp", ask: dial("client", "tcp", "host:8080"), want: "alpha sees client"},
			{name: "from outside, by the host's other address", ask: dial("client", "tcp", "second:8080"), want: "alpha sees client"},
			{name: "from outside, udp", ask: dial("client", "udp", "host:8053"), want: "alpha sees client"},
			{name: "from outside, first of a range", ask: dial("client", "tcp", "host:8000"), want: "alpha sees client"},
			{name: "from outside, last of a range", ask: dial("client", "tcp", "host:8003"), want: "alpha sees client"},
			{name: "from outside, after the range", ask: dial("client", "tcp", "host:8004"), want: "refused"},
			{name: "from outside, port chosen by the driver", ask: dialRandom("alpha", 90), want: "alpha sees client"},
			{name: "from outside, host IP 127.0.0.1", ask: dial("client", "tcp", "host:8081"), want: "refused"},
			{name: "from outside, host IP of the LAN", ask: dial("client", "tcp", "second:8082"), want: "alpha sees client"},
			{name: "from outside, other address than the host IP", ask: dial("client", "tcp", "host:8082"), want: "refused"},
			{name: "from outside, by IPv6 to an IPv4 container", ask: dial("client", "tcp", "host6:8080"), want: "alpha sees gw.net1"},
			{name: "from outside, the container's own address and port", ask: dial("client", "tcp", "alpha:80"), want: "timeout",
				differs: map[int]string{20: "alpha sees client"}, why: unrouted},
			{name: "from the host by its LAN address", ask: dial("host", "tcp", "host:8080"), want: "alpha sees host"},
			{name: "from the host by 127.0.0.1", ask: dial("host", "tcp", "lo:8080"), want: "alpha sees gw.net1"},
			{name: "from the host by 127.0.0.1, udp", ask: dial("host", "udp", "lo:8053"), want: "alpha sees gw.net1"},
			{name: "from the host by [::1]", ask: dial("host", "tcp", "lo6:8080"), want: "alpha sees gw.net1"},
			{name: "from the host by its IPv6 address", ask: dial("host", "tcp", "host6:8080"), want: "alpha sees gw.net1"},
			{name: "from the host, host IP 127.0.0.1", ask: dial("host", "tcp", "lo:8081"), want: "alpha sees gw.net1"},
			{name: "from the host by the gateway address", ask: dial("host", "tcp", "gw.net1:8080"), want: "alpha sees gw.net1"},
			{name: "from the same network by the host's address", ask: dial("beta", "tcp", "host:8080"), want: "alpha sees gw.net1"},
			{name: "from the same network by the gateway address", ask: dial("beta", "tcp", "gw.net1:8080"), want: "alpha sees gw.net1"},
			{name: "from the same network, udp", ask: dial("beta", "udp", "host:8053"), want: "alpha sees gw.net1",
				differs: map[int]string{20: "timeout"}, why: "docker-proxy of 20.10 answers from the bridge's address instead of the one asked"},
			{name: "from the container itself", ask: dial("alpha", "tcp", "host:8080"), want: "alpha sees gw.net1"},
			{name: "from another network by the host's address", ask: dial("other", "tcp", "host:8080"), want: "alpha sees other",
				differs: map[int]string{0: "alpha sees gw.net1"}, why: proxied},
			{name: "from another network, host IP 127.0.0.1", ask: dial("other", "tcp", "host:8081"), want: "refused"},
			{name: "from a built-in network by the host's address", ask: dial("third", "tcp", "host:8080"), want: "alpha sees gw.net1"},
			{name: "from an internal built-in network by its gateway's address", ask: dial("sealed", "tcp", "gw.inside:8080"), want: "timeout"},
			{name: "to a built-in network's port by the host's address", ask: dial("alpha", "tcp", "host:8091"), want: "third sees gw.bridged"},
			{name: "from another network, port and container address", ask: dial("other", "tcp", "alpha:80"), want: "timeout"},
		},
		steps: []probe{
			{name: "taken by a container", ask: refusedPort("8080:80", "8080"), want: "refused, says 8080"},
			{name: "taken by a program", ask: takenByProgram("tcp", 8999), want: "refused, says 8999"},
			{name: "taken by a program, udp", ask: takenByProgram("udp", 8998), want: "refused, says 8998"},
			{name: "held against programs", ask: hostPort("tcp", ":8080"), want: "in use"},
			{name: "held against programs, udp", ask: hostPort("udp", ":8053"), want: "in use"},
			{name: "restart: started again", ask: restart("alpha"), want: "ok"},
			{name: "restart: from outside", ask: dial("client", "tcp", "host:8080", "-wait", "5s"), want: "alpha sees client"},
			{name: "restart: from outside, udp", ask: dial("client", "udp", "host:8053", "-wait", "5s"), want: "alpha sees client"},
			{name: "stopped: port free", ask: stopThen("alpha", hostPort("tcp", ":8080")), want: "free"},
			{name: "stopped: udp port free", ask: hostPort("udp", ":8053"), want: "free"},
			{name: "stopped: from outside", ask: dial("client", "tcp", "host:8080"), want: "refused"},
			{name: "sctp", ask: publishSCTP, want: "no SCTP in this kernel"},
		},
	}
}

// interfaceFacts says what is the same for every container of a network.
func interfaceFacts(_ *world, ifs []iface) string {
	var all []string
	for _, i := range ifs {
		s := fmt.Sprintf("%s mtu %d", i.Name, i.MTU)
		if i.Up {
			s += " up"
		}
		if i.Promiscuous {
			s += " promiscuous"
		}
		all = append(all, s)
	}
	return strings.Join(all, ", ")
}

// macKind says where a container's MAC address comes from.
func macKind(_ *world, ifs []iface) string {
	for _, i := range ifs {
		for _, a := range i.Addrs {
			p, err := netip.ParsePrefix(a)
			if err != nil || !p.Addr().Is4() {
				continue
			}
			b := p.Addr().As4()
			if i.MAC == fmt.Sprintf("02:42:%02x:%02x:%02x:%02x", b[0], b[1], b[2], b[3]) {
				return "derived from the address"
			}
		}
	}
	return "random"
}

// bridgePromiscuity looks at net1's bridge on the host.
func bridgePromiscuity(w *world) string {
	br, err := w.bridge("gw.net1")
	if err != nil {
		return err.Error()
	}
	if br.Promiscuity != 0 {
		return fmt.Sprintf("%s is promiscuous", br.Name)
	}
	return "off"
}

// restart restarts a container and looks where it is now.
func restart(name string) func(*world) string {
	return func(w *world) string {
		if out, err := w.e.docker("restart", "-t", "0", name); err != nil {
			return err.Error() + out
		}
		w.look()
		return "ok"
	}
}

// stopThen stops a container and asks.
func stopThen(name string, ask func(*world) string) func(*world) string {
	return func(w *world) string {
		if out, err := w.e.docker("stop", "-t", "0", name); err != nil {
			return err.Error() + out
		}
		return ask(w)
	}
}

// hostPort says whether a program of the host could listen there.
func hostPort(proto, addr string) func(*world) string {
	return func(w *world) string {
		out, err := output(w.e.inNet(suite.probe, "free", proto, addr))
		switch {
		case err != nil:
			return err.Error()
		case strings.Contains(out, "in use"):
			return "in use"
		case out == "":
			return "free"
		}
		return out
	}
}

// refused runs a container that should not start and looks for a word in the
// error.
func refused(w *world, word string, args ...string) string {
	defer func() { _, _ = w.e.docker("rm", "-f", "refused") }()
	err := w.e.tryRun("refused", args...)
	switch {
	case err == nil:
		return "accepted"
	case strings.Contains(err.Error()[strings.Index(err.Error(), "exit status"):], word):
		return "refused, says " + word
	}
	return err.Error()
}

func refusedPort(publish, word string) func(*world) string {
	return func(w *world) string { return refused(w, word, "--network", "net1", "-p", publish) }
}

// takenByProgram publishes a port that a program of the host listens on.
func takenByProgram(proto string, port int) func(*world) string {
	return func(w *world) string {
		c := w.e.serve(w, fmt.Sprintf("%s:%d", proto, port))
		defer end(c)
		return refused(w, fmt.Sprint(port), "--network", "net1", "-p", fmt.Sprintf("%d:80/%s", port, proto))
	}
}

// dialRandom finds out which port was chosen and dials it from outside.
func dialRandom(container string, port uint16) func(*world) string {
	return func(w *world) string {
		p, err := w.publishedPort(container, port)
		if err != nil {
			return err.Error()
		}
		return w.dialFrom("client", "tcp", fmt.Sprintf("host:%d", p))
	}
}

// publishSCTP needs a kernel with SCTP, to have an end that answers.
func publishSCTP(w *world) string {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 132)
	if err != nil {
		note("SKIPPED sctp over %s: the kernel has no SCTP", w.driver)
		return "no SCTP in this kernel"
	}
	_ = syscall.Close(fd)
	return "this kernel has SCTP: write the probe"
}

// optionTable is about options of the network.
func optionTable() []group {
	return []group{
		{
			name: "masquerade off",
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "-o", "com.docker.network.bridge.enable_ip_masquerade=false")
				w.all(
					func() { w.run("alpha", "--network", "net1", "-p", "8080:80") },
					func() { w.run("beta", "--network", "net1") },
				)
			},
			probes: []probe{
				{name: "to outside", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha",
					differs: map[int]string{28: "timeout"}, why: rawDrop},
				{name: "to outside, nothing published", ask: dial("beta", "tcp", "client:7000"), want: "client sees beta",
					differs: map[int]string{28: "timeout"}, why: rawDrop},
				{name: "published", ask: dial("client", "tcp", "host:8080"), want: "alpha sees client"},
				{name: "from outside to the container's address", ask: dial("client", "tcp", "alpha:9"), want: "timeout"},
			},
		},
		{
			name: "host_ipv4",
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "-o", "com.docker.network.host_ipv4="+second4)
				w.run("alpha", "--network", "net1")
			},
			probes: []probe{
				{name: "to outside", ask: dial("alpha", "tcp", "client:7000"), want: "client sees second"},
				{name: "to the host", ask: dial("alpha", "tcp", "host:7000"), want: "host sees alpha"},
			},
		},
		{
			name: "host_binding_ipv4",
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "-o", "com.docker.network.bridge.host_binding_ipv4=127.0.0.1")
				w.run("alpha", "--network", "net1", "-p", "8080:80")
			},
			probes: []probe{
				{name: "from outside", ask: dial("client", "tcp", "host:8080"), want: "refused"},
				{name: "from the host", ask: dial("host", "tcp", "lo:8080"), want: "alpha sees gw.net1"},
			},
		},
		{
			name: "icc off",
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "-o", "com.docker.network.bridge.enable_icc=false")
				w.all(
					func() { w.run("alpha", "--network", "net1", "-p", "8080:80") },
					func() { w.run("beta", "--network", "net1") },
				)
			},
			probes: []probe{
				{name: "container to container", ask: dial("alpha", "tcp", "beta:80"), want: "timeout"},
				{name: "published, from outside", ask: dial("client", "tcp", "host:8080"), want: "alpha sees client"},
				{name: "published, from the same network", ask: dial("beta", "tcp", "host:8080"), want: "alpha sees gw.net1"},
				{name: "published, from the container itself", ask: dial("alpha", "tcp", "host:8080"), want: "alpha sees gw.net1"},
				{name: "to outside", ask: dial("alpha", "tcp", "client:7000"), want: "client sees host"},
				{name: "to the gateway", ask: dial("alpha", "tcp", "gw.net1:7000"), want: "host sees alpha"},
			},
		},
		{
			name: "internal",
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "--internal")
				w.network("net2", "--subnet", net2)
				w.all(
					func() { w.run("alpha", "--network", "net1", "-p", "8080:80") },
					func() { w.run("beta", "--network", "net1") },
					func() { w.run("other", "--network", "net2", "-p", "8090:80") },
				)
			},
			probes: []probe{
				{name: "container to container by name", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
				{name: "routes", ask: fact("alpha", routes), want: "10.201.0.0/24 dev eth0",
					differs: map[int]string{20: "10.201.0.0/24 dev eth0, default via gw.net1 dev eth0"}, why: noDefault},
				{name: "to outside", ask: dial("alpha", "tcp", "client:7000"), want: "unreachable", differs: map[int]string{20: "timeout"}, why: noDefault},
				{name: "to the host's LAN address", ask: dial("alpha", "tcp", "host:7000"), want: "unreachable",
					differs: map[int]string{20: "host sees alpha"}, why: noDefault},
				{name: "to the gateway address", ask: dial("alpha", "tcp", "gw.net1:7000"), want: "host sees alpha"},
				{name: "host to container", ask: dial("host", "tcp", "alpha:80"), want: "alpha sees gw.net1"},
				{name: "port not published", ask: dial("client", "tcp", "host:8080"), want: "refused"},
				{name: "from outside to the container's address", ask: dial("client", "tcp", "alpha:80"), want: "timeout"},
				{name: "from another network", ask: dial("other", "tcp", "alpha:80"), want: "timeout"},
				{name: "interface", ask: fact("alpha", interfaceFacts), want: "eth0 mtu 1500 up"},
			},
			steps: []probe{
				{name: "to outside with a route of its own", ask: dialWithRoute("alpha", "client:7000"), want: "timeout"},
			},
		},
		{
			name: "names and MTU",
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "-o", "com.docker.network.bridge.name=brtest",
					"-o", "com.docker.network.container_iface_prefix=lanx", "-o", "com.docker.network.driver.mtu=1400")
				w.all(
					func() { w.run("alpha", "--network", "net1") },
					func() { w.run("beta", "--network", "name=net1,driver-opt=com.docker.network.endpoint.ifname=up0") },
				)
			},
			probes: []probe{
				{name: "interface", ask: fact("alpha", interfaceFacts), want: "lanx0 mtu 1400 up"},
				{name: "name of one endpoint's interface", ask: fact("beta", interfaceFacts), want: "up0 mtu 1400 up",
					differs: map[int]string{20: "lanx0 mtu 1400 up"}, why: "the built-in driver knows the option since 28"},
				{name: "bridge", ask: func(w *world) string {
					br, err := w.bridge("gw.net1")
					if err != nil {
						return err.Error()
					}
					return br.Name
				}, want: "brtest"},
				{name: "to outside", ask: dial("alpha", "tcp", "client:7000"), want: "client sees host"},
			},
		},
		{
			name: "two networks",
			setup: func(w *world) {
				w.network("net1", "--subnet", net1)
				w.network("net2", "--subnet", net2)
				w.all(
					func() { w.run("alpha", "--network", "net1", "-p", "8080:80") },
					func() { w.run("beta", "--network", "net1") },
					func() { w.run("other", "--network", "net2") },
				)
			},
			steps: []probe{
				{name: "connect while running", ask: command("network", "connect", "net2", "alpha"), want: "ok"},
				{name: "connected: routes", ask: fact("alpha", routes), want: "10.201.0.0/24 dev eth0, 10.202.0.0/24 dev eth1, default via gw.net1 dev eth0"},
				{name: "connected: first network", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha@net1"},
				{name: "connected: second network", ask: dial("alpha", "tcp", "name/other:80"), want: "other sees alpha@net2"},
				{name: "connected: published", ask: dial("client", "tcp", "host:8080"), want: "alpha sees client"},
				{name: "disconnect the second", ask: command("network", "disconnect", "net2", "alpha"), want: "ok"},
				{name: "disconnected: second network", ask: dial("alpha", "tcp", "other:80"), want: "timeout"},
				{name: "disconnected: published", ask: dial("client", "tcp", "host:8080"), want: "alpha sees client"},
				{name: "connect again", ask: command("network", "connect", "net2", "alpha"), want: "ok"},
				{name: "disconnect the first", ask: command("network", "disconnect", "net1", "alpha"), want: "ok"},
				{name: "first gone: routes", ask: fact("alpha", destinations), want: "10.202.0.0/24, default via gw.net2"},
				{name: "first gone: to outside", ask: dial("alpha", "tcp", "client:7000"), want: "client sees host"},
				{name: "first gone: published", ask: dial("client", "tcp", "host:8080"), want: "alpha sees client"},
				{name: "connect the first again", ask: command("network", "connect", "net1", "alpha"), want: "ok"},
				{name: "both: published", ask: dial("client", "tcp", "host:8080"), want: "alpha sees client"},
				{name: "stopped: port free", ask: stopThen("alpha", hostPort("tcp", ":8080")), want: "free"},
			},
		},
	}
}

// command runs docker and looks where the containers are then.
func command(args ...string) func(*world) string {
	return func(w *world) string {
		if _, err := w.e.docker(args...); err != nil {
			return err.Error()
		}
		w.look()
		return "ok"
	}
}

// dialWithRoute adds the default route that the driver left out, as a
// container with NET_ADMIN could.
func dialWithRoute(container, to string) func(*world) string {
	return func(w *world) string {
		if _, err := output(w.at(container, "busybox", "ip", "route", "replace", "default", "via", w.address["gw.net1"])); err != nil {
			return err.Error()
		}
		return w.dialFrom(container, "tcp", to)
	}
}

// addressTable is about addresses that the user asks for.
func addressTable() []group {
	return []group{
		{
			name: "addresses",
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "--ip-range", "10.201.0.128/25", "--gateway", "10.201.0.254", "--aux-address", "printer=10.201.0.129")
				w.run("auto", "--network", "net1")
				w.run("fixed", "--network", "net1", "--ip", "10.201.0.50", "--mac-address", "02:11:22:33:44:55")
			},
			probes: []probe{
				{name: "from the range, gateway as asked", ask: fact("auto", func(w *world, ifs []iface) string {
					p, err := netip.ParsePrefix(ifs[0].Addrs[0])
					if err != nil {
						return err.Error()
					}
					in := netip.MustParsePrefix("10.201.0.128/25").Contains(p.Addr())
					return fmt.Sprintf("in range %t /%d %s", in, p.Bits(), routes(w, ifs))
				}), want: "in range true /24 10.201.0.0/24 dev eth0, default via gw.net1 dev eth0"},
				{name: "--ip outside the range", ask: fact("fixed", func(_ *world, ifs []iface) string { return strings.Join(ifs[0].Addrs, " ") }), want: "10.201.0.50/24"},
				{name: "--mac-address", ask: fact("fixed", func(_ *world, ifs []iface) string { return ifs[0].MAC }), want: "02:11:22:33:44:55"},
				{name: "gateway", ask: func(w *world) string { return w.address["gw.net1"] }, want: "10.201.0.254"},
				{name: "reach", ask: dial("auto", "tcp", "fixed:80"), want: "fixed sees auto"},
			},
			steps: []probe{
				{name: "--ip twice", ask: refusedIP("10.201.0.50"), want: "refused, says "},
				{name: "--ip of the gateway", ask: refusedIP("10.201.0.254"), want: "refused, says "},
				{name: "--ip of an aux address", ask: refusedIP("10.201.0.129"), want: "refused, says "},
				{name: "--ip outside the subnet", ask: refusedIP("10.99.0.1"), want: "refused, says "},
			},
		},
		{
			name: "exhaustion",
			setup: func(w *world) {
				w.network("net1", "--subnet", "10.201.0.0/30")
				w.run("alpha", "--network", "net1")
			},
			steps: []probe{
				{name: "last address", ask: fact("alpha", func(_ *world, ifs []iface) string { return strings.Join(ifs[0].Addrs, " ") }), want: "10.201.0.2/30"},
				{name: "one too many", ask: refusedIP(""), want: "refused, says "},
				{name: "after release", ask: func(w *world) string {
					w.e.must(w, "rm", "-f", "alpha")
					w.e.run(w, "alpha", "--network", "net1")
					return "ok"
				}, want: "ok"},
			},
		},
		{
			name: "same subnet twice",
			setup: func(w *world) {
				w.network("net1", "--subnet", net1)
				w.run("alpha", "--network", "net1")
			},
			steps: []probe{
				{name: "second network", ask: func(w *world) string {
					args := []string{"network", "create", "-d", w.driver, "--subnet", net1}
					if w.driver == ours {
						args = append(args, "--ipam-driver", ours)
					}
					_, err := w.e.docker(append(args, "again")...)
					if err == nil {
						w.e.must(w, "network", "rm", "again")
						return "accepted"
					}
					return "refused"
				}, want: "refused"},
				{name: "first one works", ask: dial("alpha", "tcp", "client:7000"), want: "client sees host"},
			},
		},
		{
			name: "automatic subnets",
			setup: func(w *world) {
				w.network("net1")
				w.network("net2")
				w.all(
					func() { w.run("alpha", "--network", "net1", "-p", "8080:80") },
					func() { w.run("beta", "--network", "net1") },
					func() { w.run("other", "--network", "net2") },
				)
			},
			probes: []probe{
				{name: "container to container", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
				{name: "to another network", ask: dial("alpha", "tcp", "other:80"), want: "timeout"},
				{name: "published", ask: dial("client", "tcp", "host:8080"), want: "alpha sees client"},
				{name: "to outside", ask: dial("alpha", "tcp", "client:7000"), want: "client sees host"},
			},
		},
		{
			name: "long names",
			setup: func(w *world) {
				long := strings.Repeat("a-very-long-network-name.", 4)
				w.network(long+"1", "--subnet", net1)
				w.network(long+"2", "--subnet", net2)
				w.run("alpha", "--network", long+"1")
				w.run("other", "--network", long+"2")
			},
			probes: []probe{
				{name: "to outside", ask: dial("alpha", "tcp", "client:7000"), want: "client sees host"},
				{name: "to the other", ask: dial("alpha", "tcp", "other:80"), want: "timeout"},
			},
		},
	}
}

func refusedIP(ip string) func(*world) string {
	return func(w *world) string {
		args := []string{"--network", "net1"}
		if ip != "" {
			args = append(args, "--ip", ip)
		}
		return refused(w, "", args...)
	}
}

// ipv6Table is dual stack, with subnets that outsiders cannot route to (NAT66).
func ipv6Table() []group {
	return []group{
		{
			name: "dual stack",
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "--ipv6", "--subnet", net1v6)
				w.network("net2", "--subnet", net2, "--ipv6", "--subnet", net2v6)
				w.all(
					func() {
						w.run("alpha", "--network", "net1", "-p", "8080:80", "-p", "8053:53/udp", "-p", "[::1]:8083:80", "-p", "["+second6+"]:8084:80")
					},
					func() { w.run("beta", "--network", "net1") },
					func() { w.run("other", "--network", "net2") },
				)
			},
			probes: []probe{
				{name: "container to container", ask: dial("alpha", "tcp", "beta6:80"), want: "beta sees alpha"},
				{name: "by name, IPv6", ask: dial("alpha", "tcp6", "name/beta:80"), want: "beta sees alpha"},
				{name: "by name, IPv4", ask: dial("alpha", "tcp4", "name/beta:80"), want: "beta sees alpha"},
				{name: "to the gateway address", ask: dial("alpha", "tcp", "gw.net16:7000"), want: "host sees alpha"},
				{name: "host to container", ask: dial("host", "tcp", "alpha6:80"), want: "alpha sees gw.net1"},
				{name: "to outside", ask: dial("alpha", "tcp", "client6:7000"), want: "client sees host"},
				{name: "to outside, udp", ask: dial("alpha", "udp", "client6:7000"), want: "client sees host"},
				{name: "to outside, ping", ask: ping("alpha", "client6"), want: "answer"},
				{name: "to outside, IPv4", ask: dial("alpha", "tcp", "client:7000"), want: "client sees host"},
				{name: "to another network", ask: dial("alpha", "tcp", "other6:80"), want: "timeout"},
				{name: "from outside to the container's address", ask: dial("client", "tcp", "alpha6:80"), want: "timeout",
					differs: map[int]string{20: "alpha sees client"}, why: unrouted},
				{name: "published, from outside", ask: dial("client", "tcp", "host6:8080"), want: "alpha sees client"},
				{name: "published, from outside, udp", ask: dial("client", "udp", "host6:8053"), want: "alpha sees client"},
				{name: "published, from outside, IPv4", ask: dial("client", "tcp", "host:8080"), want: "alpha sees client"},
				{name: "published, from the host by [::1]", ask: dial("host", "tcp", "lo6:8080"), want: "alpha sees gw.net1"},
				{name: "published, from the host by its address", ask: dial("host", "tcp", "host6:8080"), want: "alpha sees host"},
				{name: "published, host IP ::1", ask: dial("host", "tcp", "lo6:8083"), want: "alpha sees gw.net1"},
				{name: "published, host IP ::1 from outside", ask: dial("client", "tcp", "host6:8083"), want: "refused"},
				{name: "published, host IP of the LAN", ask: dial("client", "tcp", "second6:8084"), want: "alpha sees client"},
				{name: "published, other address than the host IP", ask: dial("client", "tcp", "host6:8084"), want: "refused"},
				{name: "published, from the same network", ask: dial("beta", "tcp", "host6:8080"), want: "alpha sees gw.net1"},
				{name: "published, from the container itself", ask: dial("alpha", "tcp", "host6:8080"), want: "alpha sees gw.net1"},
				{name: "published, from another network", ask: dial("other", "tcp", "host6:8080"), want: "alpha sees other",
					differs: map[int]string{0: "alpha sees gw.net1"}, why: proxied},
				{name: "routes", ask: fact("alpha", routes), want: "10.201.0.0/24 dev eth0, default via gw.net1 dev eth0, default via gw.net1 dev eth0, fd00:201::/64 dev eth0"},
			},
		},
		{
			name:   "IPv6 only",
			engine: 28,
			setup: func(w *world) {
				w.network("net1", "--ipv4=false", "--ipv6", "--subnet", net1v6)
				w.all(
					func() { w.run("alpha", "--network", "net1", "-p", "8080:80") },
					func() { w.run("beta", "--network", "net1") },
				)
			},
			probes: []probe{
				{name: "container to container by name", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
				{name: "to outside", ask: dial("alpha", "tcp", "client6:7000"), want: "client sees host"},
				{name: "published", ask: dial("client", "tcp", "host6:8080"), want: "alpha sees client"},
				{name: "published, from the host by [::1]", ask: dial("host", "tcp", "lo6:8080"), want: "alpha sees gw.net1"},
				{name: "published, by IPv4", ask: dial("client", "tcp", "host:8080"), want: "refused"},
			},
		},
	}
}

const modeOption = "com.docker.network.bridge.gateway_mode_ipv4="

// modeTable is what the built-in bridge has since 27 and 28.
func modeTable() []group {
	return []group{
		{
			name: "mode routed", builtinSince: 28,
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "-o", modeOption+"routed")
				w.network("net2", "--subnet", net2)
				w.foreign("bridged", "--subnet", net3)
				w.all(
					func() {
						w.run("alpha", append([]string{"--network", "net1", "-p", "8080:80"}, servers("tcp:80", "tcp:81")...)...)
					},
					func() { w.run("other", "--network", "net2") },
					func() { w.run("third", "--network", "bridged") },
				)
			},
			probes: []probe{
				{name: "published port at the container's address", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "other port at the container's address", ask: dial("client", "tcp", "alpha:81"), want: "timeout"},
				{name: "published port at the host's address", ask: dial("client", "tcp", "host:8080"), want: "refused"},
				{name: "ping from outside", ask: ping("client", "alpha"), want: "answer"},
				{name: "published port, from another network", ask: dial("other", "tcp", "alpha:80"), want: "alpha sees other",
					differs: map[int]string{28: "alpha sees gw.net1"}, why: "the built-in bridge translates what goes to another network"},
				{name: "other port, from another network", ask: dial("other", "tcp", "alpha:81"), want: "timeout"},
				{name: "ping from another network", ask: ping("other", "alpha"), want: "answer"},
				{name: "published port, from a built-in bridge network", ask: dial("third", "tcp", "alpha:80"), want: "alpha sees gw.net1"},
				{name: "to outside", ask: dial("alpha", "tcp", "client:7000"), want: "client sees alpha"},
			},
		},
		{
			name: "mode nat-unprotected", builtinSince: 28,
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "-o", modeOption+"nat-unprotected")
				w.network("net2", "--subnet", net2)
				w.run("alpha", append([]string{"--network", "net1", "-p", "8080:80"}, servers("tcp:80", "tcp:81")...)...)
				w.run("other", "--network", "net2")
			},
			probes: []probe{
				{name: "any port at the container's address", ask: dial("client", "tcp", "alpha:81"), want: "alpha sees client"},
				{name: "published port at the host's address", ask: dial("client", "tcp", "host:8080"), want: "alpha sees client"},
				{name: "to outside", ask: dial("alpha", "tcp", "client:7000"), want: "client sees host"},
				{name: "from another network", ask: dial("other", "tcp", "alpha:81"), want: "alpha sees other",
					differs: map[int]string{28: "timeout"}, why: "open to the LAN is open to the other networks of the host too"},
			},
		},
		{
			name: "mode isolated", builtinSince: 28,
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "--internal", "-o", modeOption+"isolated")
				w.run("alpha", "--network", "net1")
				w.run("beta", "--network", "net1")
			},
			probes: []probe{
				{name: "container to container by name", ask: dial("alpha", "tcp", "name/beta:80"), want: "beta sees alpha"},
				{name: "to outside", ask: dial("alpha", "tcp", "client:7000"), want: "unreachable"},
				{name: "bridge has no address", ask: func(w *world) string {
					if out := w.e.net(w, "ip", "-4", "addr", "show"); strings.Contains(out, "10.201.0.") {
						return out
					}
					return "none"
				}, want: "none"},
			},
		},
		{
			name: "trusted interfaces", builtinSince: 28,
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "-o", "com.docker.network.bridge.trusted_host_interfaces=lan0")
				w.run("alpha", append([]string{"--network", "net1", "-p", "80"}, servers("tcp:80", "tcp:81")...)...)
			},
			probes: []probe{
				{name: "published port at the container's address", ask: dial("client", "tcp", "alpha:80"), want: "alpha sees client"},
				{name: "other port at the container's address", ask: dial("client", "tcp", "alpha:81"), want: "timeout"},
			},
		},
		{
			name: "inhibit_ipv4", builtinSince: 28,
			setup: func(w *world) {
				w.network("net1", "--subnet", net1, "-o", "com.docker.network.bridge.inhibit_ipv4=true")
				w.run("alpha", "--network", "net1")
				w.run("beta", "--network", "net1")
			},
			probes: []probe{
				{name: "container to container", ask: dial("alpha", "tcp", "beta:80"), want: "beta sees alpha"},
				{name: "host to container", ask: dial("host", "tcp", "alpha:80"), want: "unreachable"},
			},
		},
	}
}
