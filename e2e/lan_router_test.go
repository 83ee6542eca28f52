//go:build e2e

package e2e

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What the LAN's router, which is the client, advertises: a prefix that is
// none of the networks', and packets smaller than the card's.
const (
	advertisedNet  = "2001:db8:2::/64"
	advertisedMTU  = "1480"
	advertisedNet2 = "2001:db8:3::/64"
)

// advertise sends a router advertisement on the LAN, from what is then a router
// that is on the prefix itself.
func (w *world) advertise(prefix string) {
	w.Helper()
	c := w.e.lan.client
	w.learn("router", linkLocal(w, c, "lan0"))
	c.net(w, "ip", "addr", "replace", netip.MustParsePrefix(prefix).Addr().Next().String()+"/64", "dev", "lan0", "nodad")
	// Stations that ask for its MAC address are told in the answer whether it is
	// a router, and forget their routes by one that no longer is.
	c.net(w, "sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/lan0/forwarding")
	c.net(w, suite.probe, "advertise", "lan0", prefix, advertisedMTU)
}

// linkLocal is a card's link-local address.
func linkLocal(tb testing.TB, m *machine, link string) string {
	tb.Helper()
	f := strings.Fields(m.net(tb, "ip", "-6", "-o", "addr", "show", "dev", link, "scope", "link"))
	if len(f) < 4 {
		tb.Fatalf("%s has no link-local address on %s", m.name, link)
	}
	return netip.MustParsePrefix(f[3]).Addr().String()
}

// advertised sends an advertisement and says whether it arrives at who,
// whatever is then made of it. At the host it always does.
func advertised(who, prefix string) func(*world) string {
	return func(w *world) string {
		var before, now [2]int
		count := func(n *[2]int) (err error) {
			for i, x := range []string{"host", who} {
				if n[i], err = w.advertisements(x); err != nil {
					return err
				}
			}
			return nil
		}
		if err := count(&before); err != nil {
			return err.Error()
		}
		w.advertise(prefix)
		for stop := time.Now().Add(time.Second * suite.slow); time.Now().Before(stop); time.Sleep(20 * time.Millisecond) {
			if err := count(&now); err != nil {
				return err.Error()
			}
			if now[1] > before[1] {
				// It is counted before it is read.
				time.Sleep(200 * time.Millisecond * suite.slow)
				return "arrives"
			}
		}
		if now[0] == before[0] {
			return "reaches nobody"
		}
		return "timeout"
	}
}

// advertisements is how many router advertisements the kernel received for who.
func (w *world) advertisements(who string) (int, error) {
	read := []string{"cat", "/proc/net/snmp6"}
	if who != "host" {
		// In the container's files /proc knows only the container's processes.
		read = append([]string{"nsenter", "-t", w.pids[who], "-n"}, read...)
	}
	out, err := output(w.e.inside(read...))
	if err != nil {
		return 0, err
	}
	for l := range strings.Lines(out) {
		if f := strings.Fields(l); f[0] == "Icmp6InRouterAdvertisements" {
			return strconv.Atoi(f[1])
		}
	}
	return 0, fmt.Errorf("%s does not count advertisements", who)
}

// setting6 is a setting of IPv6 of who's interface.
func setting6(who, link, name string) func(*world) string {
	return func(w *world) string {
		out, err := output(w.at(who, "busybox", "cat", "/proc/sys/net/ipv6/conf/"+link+"/"+name))
		if err != nil {
			return err.Error()
		}
		return strings.TrimSpace(out)
	}
}

// selfMade counts the addresses that a container made itself of what was
// advertised.
func selfMade(_ *world, ifs []iface) string {
	n := 0
	for _, a := range ifs[0].Addrs {
		if netip.MustParsePrefix(advertisedNet).Contains(netip.MustParsePrefix(a).Addr()) {
			n++
		}
	}
	return fmt.Sprint(n)
}

// hostRouter is the host's default route by IPv6.
func hostRouter(w *world) string {
	f := strings.Fields(w.e.net(w, "ip", "-6", "route", "show", "default"))
	if len(f) < 7 {
		return "none"
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if s, ok := w.symbol[f[2]]; ok {
		f[2] = s
	}
	return strings.Join(f[1:7], " ")
}

// selfMadeByHost counts the addresses of a prefix that the host has.
func (w *world) selfMadeByHost(prefix string) string {
	n := 0
	for _, l := range w.e.links(w) {
		for _, a := range l.Addrs {
			if netip.MustParsePrefix(prefix).Contains(netip.MustParseAddr(a.Local)) {
				n++
			}
		}
	}
	return fmt.Sprint(n)
}

// onlyForContainer puts a container on the network lan with IPv6 switched on in it.
// Since 27 the engine switches it off on each interface that has no address, and
// has an option to set it on one.
func onlyForContainer() []string {
	if suite.version.major < 27 {
		return []string{"--network", "lan", "--sysctl", "net.ipv6.conf.all.disable_ipv6=0"}
	}
	return []string{"--network", "name=lan,driver-opt=com.docker.network.endpoint.sysctls=net.ipv6.conf.IFNAME.disable_ipv6=0"}
}

// advertisedRoutes puts a container on the network lan that takes the routes which
// routers advertise, those of up to 64 bits, as docs/lan.md has it.
func advertisedRoutes() []string {
	if suite.version.major < 27 {
		return []string{"--network", "lan", "--sysctl", "net.ipv6.conf.eth0.accept_ra_rt_info_max_plen=64"}
	}
	return []string{"--network", "name=lan,driver-opt=com.docker.network.endpoint.sysctls=net.ipv6.conf.IFNAME.accept_ra_rt_info_max_plen=64"}
}

// routerTable is about what a container takes from the advertisements of the
// LAN's router: the engine decides whether it has IPv6 at all, its kernel the
// rest, and neither driver has a say. It comes last in a table, because the host
// takes what it is told too, and keeps it.
func routerTable(kind string) []group {
	const (
		own4, own6 = "198.51.100.0/24 dev eth0, ", "2001:db8:1::/64 dev eth0, "
		made6      = "2001:db8:2::/64 dev eth0, "
		learned    = "default via router dev eth0"
		given      = "default via client dev eth0"
	)
	needs := ""
	if kind == "ipvlan" {
		needs = kind
	}
	var list []group
	for _, x := range []struct {
		name                       string
		args                       []string
		arrives, made, routes, mtu string
		off                        string // disable_ipv6
		beyond                     string
		// ipvlan is also asked of it: the rest is the engine's doing, whatever the
		// link, and the machine that has ipvlan is emulated and slow.
		ipvlan bool
		run    []string
	}{
		{"", lan6Args(), "arrives", "1", own4 + own6 + made6 + given + ", " + given + ", " + learned, advertisedMTU, "0", "answer", true, nil},
		// The engine takes the first address of the range for the gateway that is not
		// named. Which of its two routes is used is left open.
		{", no IPv6 gateway", lan4Args("--ipv6", "--subnet", lan6, "--ip-range", lan6Range), "arrives", "1",
			own4 + own6 + made6 + given + ", " + learned, advertisedMTU, "0", "", false, nil},
		// A border router of Thread advertises what is behind it.
		{
			", routes that are advertised", lan6Args(), "arrives", "1", own4 + own6 + made6 + given + ", " + given + ", " + learned + ", fd00:77::/64 via router dev eth0",
			advertisedMTU, "0", "", false, advertisedRoutes(),
		},
		// Nobody gives it a way out, and it learns one from the LAN.
		{", internal", lan6Args("--internal"), "arrives", "1", own4 + own6 + made6 + learned, advertisedMTU, "0", "answer", false, nil},
		{", no IPv6", lan4Args(), "timeout", "0", own4 + given, "1500", "1", "no answer", false, nil},
		// What is left to the container's kernel where IPv4 is from a DHCP server. Its
		// address may not be used for a second, so that nobody is asked with it.
		{
			", no IPv6 but for the container", lan4Args(), "arrives", "1", own4 + made6 + given + ", " + learned, advertisedMTU, "0", "", false,
			onlyForContainer(),
		},
	} {
		if kind == "ipvlan" && !x.ipvlan {
			continue
		}
		steps := []probe{
			{name: "advertisement", ask: advertised("alpha", advertisedNet), want: x.arrives},
			{name: "addresses made of its prefix", ask: fact("alpha", selfMade), want: x.made},
			{name: "routes", ask: fact("alpha", routes), want: x.routes},
			{name: "MTU of IPv6", ask: setting6("alpha", "eth0", "mtu"), want: x.mtu},
			{name: "interface", ask: fact("alpha", interfaceFacts), want: "eth0 mtu 1500 up"},
			{name: "accept_ra", ask: setting6("alpha", "eth0", "accept_ra"), want: "1"},
			{name: "disable_ipv6", ask: setting6("alpha", "eth0", "disable_ipv6"), want: x.off},
		}
		if x.name == ", no IPv6 gateway" {
			steps[2].differs = map[int]string{0: own4 + own6 + made6 + "default via 2001:db8:1::a00 dev eth0, " + given + ", " + learned}
			steps[2].why = "the built-in driver takes an address that nobody has for the gateway"
		}
		if x.beyond != "" {
			steps = append(steps, probe{name: "beyond the router, ping", ask: ping("alpha", "beyond6"), want: x.beyond})
		}
		list = append(list, group{
			name: kind + ", router advertisement" + x.name, twin: kind, kind: needs, steps: steps,
			setup: func(w *world) {
				w.beyond()
				w.onLAN("lan", kind, x.args...)
				if x.run == nil {
					x.run = []string{"--network", "lan"}
				}
				w.run("alpha", x.run...)
			},
		})
	}
	return list
}

// TestLANKeepsRouter is about the host's own card: it learned its way out from
// the LAN's router, and goes on learning when a network of ours has the host
// forward, where the kernel would forget it all.
func TestLANKeepsRouter(t *testing.T) {
	t.Parallel()
	w := newLANWorld(t)
	e := w.e
	w.beyond()
	// Whatever this machine's new namespaces begin with.
	if out, err := output(e.inside("sh", "-c", "cd /proc/sys/net/ipv6/conf && echo 0 >all/forwarding && echo 1 >lan0/accept_ra")); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	learned := func(prefix string) []probe {
		return []probe{
			{name: "default route", ask: hostRouter, want: "via router dev lan0 proto ra"},
			{name: "addresses of " + prefix, ask: func(w *world) string { return w.selfMadeByHost(prefix) }, want: "1"},
			{name: "beyond the router", ask: ping("host", "beyond6"), want: "answer"},
		}
	}
	w.check("", probe{name: "advertisement", ask: advertised("host", advertisedNet), want: "arrives"})
	w.check("before: ", learned(advertisedNet)...)
	w.onLAN("lan", "macvlan", lan6Args("-o", "host_access=true")...)
	w.run("alpha", "--network", "lan")
	w.ready()
	w.check("", probe{name: "the host forwards", ask: setting6("host", "all", "forwarding"), want: "1"},
		probe{name: "accept_ra", ask: setting6("host", "lan0", "accept_ra"), want: "2"})
	w.check("with a network: ", learned(advertisedNet)...)
	w.check("", probe{name: "second advertisement", ask: advertised("host", advertisedNet2), want: "arrives"})
	w.check("advertised since: ", learned(advertisedNet2)...)
	w.check("", probe{name: "host to container", ask: dial("host", "tcp", "alpha6:80"), want: "alpha sees host"})
	w.close()
	e.checkClean(t)
}
