package datapath

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/netnstest"
)

// world is a host with networks of every sort, ours and an engine's, and two
// neighbours outside: "out" behind eth0 and "far" behind eth1.
type world struct {
	t    *testing.T
	host *netnstest.NS
	ns   map[string]*netnstest.NS
	addr map[string][2]netip.Addr // IPv4, IPv6
	fw   *firewall
	hook *hook

	mu    sync.Mutex
	heard map[string]bool // "server client", every datagram that arrived
}

// nets are the bridges, by the number that makes their subnets: 10.n.0.0/24
// and fd00:n::/64, gateway 1, containers from 2 on. The container names are
// the first letter and a number.
var nets = []struct {
	n          int
	link       string
	containers int
}{
	{1, "wfa", 2},     // plain
	{2, "wfb", 1},     // plain
	{3, "wfi", 2},     // internal
	{4, "wfc", 2},     // ICC off
	{5, "wfo", 1},     // open (nat-unprotected)
	{6, "wfr", 1},     // routed, one exposed port
	{7, "wfs", 1},     // source NAT to a fixed address
	{8, "docker0", 1}, // somebody else's
	{9, "brn", 1},     // somebody else's, internal
}

func quiet() *logrus.Logger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

// newWorld must run on the test's own goroutine; it enters the host.
func newWorld(t *testing.T, bridgeNF bool) *world {
	t.Helper()
	w := &world{t: t, host: netnstest.Enter(t), ns: map[string]*netnstest.NS{"": nil}, addr: map[string][2]netip.Addr{}, heard: map[string]bool{}}
	w.ns["host"] = w.host
	w.sysctl("ipv4/ip_forward", "1")
	w.sysctl("ipv6/conf/all/forwarding", "1")
	w.sysctl("ipv6/conf/default/accept_dad", "0")
	nf := "0"
	if bridgeNF {
		nf = "1"
	}
	w.sysctl("bridge/bridge-nf-call-iptables", nf)
	w.sysctl("bridge/bridge-nf-call-ip6tables", nf)
	for i, out := range []string{"out", "far"} {
		w.neighbour(out, fmt.Sprintf("eth%d", i), 200+i)
	}
	w.host.Exec("ip", "addr", "add", "10.200.0.5/24", "dev", "eth0") // for source NAT
	w.host.Exec("ip", "addr", "add", "fd00:200::5/64", "dev", "eth0", "nodad", "preferred_lft", "0")
	for _, n := range nets {
		w.bridge(n.link, n.n)
		w.sysctl("ipv4/conf/"+n.link+"/route_localnet", "1")
		for c := range n.containers {
			name := fmt.Sprintf("%c%d", n.link[len(n.link)-1], c+1)
			if n.link == "docker0" {
				name = "e1"
			}
			w.container(name, n.link, n.n, c+2)
			if n.link == "wfc" {
				w.host.Exec("bridge", "link", "set", "dev", "h-"+name, "isolated", "on")
			}
		}
	}
	var err error
	if w.fw, err = newFirewall(quiet(), tableName); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.fw.close)
	w.hook = newHook(quiet(), "weft")
	return w
}

func (w *world) sysctl(name, value string) {
	w.t.Helper()
	if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0); err != nil {
		w.t.Fatal(err)
	}
}

func subnet(n, last int) [2]netip.Prefix {
	return [2]netip.Prefix{
		netip.MustParsePrefix(fmt.Sprintf("10.%d.0.%d/24", n, last)),
		netip.MustParsePrefix(fmt.Sprintf("fd00:%d::%d/64", n, last)),
	}
}

func (w *world) bridge(link string, n int) {
	w.t.Helper()
	p := subnet(n, 1)
	w.host.Exec("sh", "-ec", fmt.Sprintf("ip link add %[1]s type bridge; ip addr add %[2]s dev %[1]s; ip addr add %[3]s dev %[1]s nodad; ip link set %[1]s up", link, p[0], p[1]))
}

// neighbour is a namespace at the other end of a link of the host.
func (w *world) neighbour(name, link string, n int) {
	w.t.Helper()
	w.ns[name] = netnstest.New(w.t)
	gw := subnet(n, 1)
	w.host.Exec("sh", "-ec", fmt.Sprintf("ip link add %[1]s type veth peer name peer; ip addr add %[2]s dev %[1]s; ip addr add %[3]s dev %[1]s nodad; ip link set %[1]s up", link, gw[0], gw[1]))
	w.take(name, "peer", n, 2)
}

func (w *world) container(name, link string, n, last int) {
	w.t.Helper()
	w.ns[name] = netnstest.New(w.t)
	w.host.Exec("sh", "-ec", fmt.Sprintf("ip link add h-%[1]s type veth peer name peer; ip link set h-%[1]s master %[2]s; ip link set h-%[1]s up; bridge link set dev h-%[1]s hairpin on", name, link))
	w.take(name, "peer", n, last)
}

func (w *world) take(name, link string, n, last int) {
	w.t.Helper()
	p, gw := subnet(n, last), subnet(n, 1)
	w.ns[name].Take(link, "eth0", p[0], p[1])
	w.ns[name].Gateway(gw[0].Addr())
	w.ns[name].Gateway(gw[1].Addr())
	w.addr[name] = [2]netip.Addr{p[0].Addr(), p[1].Addr()}
	w.serve(name, 8080)
	w.serve(name, 8081)
}

// serve answers, by TCP and UDP, with the port asked and the address of who
// asks.
func (w *world) serve(name string, port int) {
	w.t.Helper()
	w.ns[name].Do(func() {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = fmt.Fprintf(c, "%s %d %s", name, port, c.RemoteAddr())
				_ = c.Close()
			}
		}()
		// A wildcard socket would answer from another address of the host.
		on := []netip.Addr{{}}
		if name == "host" {
			on = []netip.Addr{subnet(200, 1)[0].Addr(), subnet(200, 1)[1].Addr(), netip.IPv6Loopback(), netip.MustParseAddr("127.0.0.1")}
		}
		for _, a := range on {
			w.serveUDP(name, a, port)
		}
	})
}

// serveUDP is called in the namespace.
func (w *world) serveUDP(name string, on netip.Addr, port int) {
	u, err := net.ListenUDP("udp", &net.UDPAddr{IP: on.AsSlice(), Port: port})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = u.Close() })
	go func() {
		b := make([]byte, 10)
		for {
			_, a, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			w.mu.Lock()
			w.heard[name+" "+a.(*net.UDPAddr).AddrPort().Addr().Unmap().String()] = true
			w.mu.Unlock()
			_, _ = u.WriteTo(fmt.Appendf(nil, "%s %d %s", name, port, a), a)
		}
	}()
}

// ask connects and returns "name port client", or "" when nobody answers.
func (w *world) ask(from, network string, to netip.AddrPort, patience time.Duration) string {
	var got string
	w.ns[from].Do(func() {
		c, err := net.DialTimeout(network, to.String(), patience)
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		b := make([]byte, 200)
		var n int
		for end := time.Now().Add(patience); n == 0 && time.Now().Before(end); {
			_ = c.SetDeadline(end)
			if network == "udp" { // which may get lost on a busy machine
				_ = c.SetDeadline(time.Now().Add(400 * time.Millisecond))
				_, _ = c.Write([]byte("?"))
			}
			if n, err = c.Read(b); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				return
			}
		}
		if n == 0 {
			return
		}
		f := strings.Fields(string(b[:n]))
		client := netip.MustParseAddrPort(f[2])
		got = fmt.Sprintf("%s %s %s", f[0], f[1], client.Addr().Unmap())
	})
	return got
}

// probe is one question to the world, asked by both protocols.
type probe struct {
	from string
	// to is "name:port", a container's own address, "host:port", the host's
	// address on eth0, or "local:port", its loopback address.
	to string
	// want is "" for no answer, or "name:port" and who the client seems to
	// be: a name, "gwN" for the gateway of net N, or "" for do not care.
	want string
}

func (w *world) run(family int, probes []probe) {
	w.t.Helper()
	w.mu.Lock()
	clear(w.heard)
	w.mu.Unlock()
	var wg sync.WaitGroup
	for _, p := range probes {
		for _, network := range []string{"tcp", "udp"} {
			wg.Go(func() {
				to, patience := w.resolve(family, p.to), 5*time.Second
				if p.want == "" {
					patience = 400 * time.Millisecond
				}
				if got, want := w.ask(p.from, network, to, patience), w.wanted(family, p.want); got != want && (got == "" || !strings.HasSuffix(want, " ") || !strings.HasPrefix(got, want)) {
					w.t.Errorf("%s from %s to %s (%s): got %q, want %q", network, p.from, p.to, to, got, want)
				}
			})
		}
	}
	wg.Wait()
	// No answer may be an answer that was lost: nothing must arrive either.
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range probes {
		to, _, _ := strings.Cut(p.to, ":")
		if from := w.addr[p.from][family]; p.want == "" && w.heard[to+" "+from.String()] && !w.answers(probes, p.from, to) {
			w.t.Errorf("%s heard %s (%s)", to, p.from, from)
		}
	}
}

// answers reports whether another probe makes the two talk rightly.
func (w *world) answers(probes []probe, from, to string) bool {
	return slices.ContainsFunc(probes, func(p probe) bool {
		return p.from == from && p.want != "" && (strings.HasPrefix(p.to, to+":") || strings.HasPrefix(p.want, to+":"))
	})
}

func (w *world) resolve(family int, s string) netip.AddrPort {
	name, port, _ := strings.Cut(s, ":")
	var a netip.Addr
	switch name {
	case "host":
		a = subnet(200, 1)[family].Addr()
	case "local":
		a = [2]netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}[family]
	default:
		a = w.addr[name][family]
	}
	var p uint16
	_, _ = fmt.Sscan(port, &p)
	return netip.AddrPortFrom(a, p)
}

func (w *world) wanted(family int, s string) string {
	if s == "" {
		return ""
	}
	f := strings.Fields(s + " ")
	name, port, _ := strings.Cut(f[0], ":")
	client := ""
	if len(f) > 1 {
		var n, last int
		switch c, _ := fmt.Sscanf(f[1], "gw%d.%d", &n, &last); c {
		case 0:
			client = w.addr[f[1]][family].String()
		case 1:
			client = subnet(n, 1)[family].Addr().String()
		default:
			client = subnet(n, last)[family].Addr().String()
		}
	}
	return name + " " + port + " " + client
}

// plain returns the elements of a plain network with a bridge of its own.
func plain(link string, n int) []Element {
	els := []Element{{Set: SetBridges, Link: link}, {Set: SetPass, Link: link, Out: link}}
	for _, p := range subnet(n, 0) {
		els = append(els, Element{Set: SetMasquerade, Net: p.Masked()}, Element{Set: SetHairpin, Net: p.Masked(), Link: link})
	}
	return els
}

// published is one port, by TCP and UDP and in both families.
func (w *world) published(hosts [2]netip.Prefix, port uint16, name string, toPort uint16) []Element {
	var els []Element
	for i, h := range hosts {
		for _, proto := range []Proto{TCP, UDP} {
			els = append(els, Element{Set: SetPublished, Net: h, Proto: proto, Port: port, To: w.addr[name][i], ToPort: toPort})
		}
	}
	return els
}

var anyHost = [2]netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// elements is what the networks of the world add up to.
func (w *world) elements() []Element {
	var els []Element
	for _, n := range nets[:2] {
		els = append(els, plain(n.link, n.n)...)
	}
	els = append(els,
		Element{Set: SetBridges, Link: "wfi"}, Element{Set: SetPass, Link: "wfi", Out: "wfi"}, Element{Set: SetInternal, Link: "wfi"})
	for _, e := range plain("wfc", 4) {
		if e.Set != SetPass {
			els = append(els, e)
		}
	}
	els = append(els, plain("wfo", 5)...)
	els = append(els, Element{Set: SetBridges, Link: "wfr"}, Element{Set: SetPass, Link: "wfr", Out: "wfr"})
	els = append(els, Element{Set: SetBridges, Link: "wfs"}, Element{Set: SetPass, Link: "wfs", Out: "wfs"})
	for i, every := range anyHost {
		els = append(els,
			Element{Set: SetOpen, Link: "wfo", Net: every},
			Element{Set: SetRouted, Link: "wfr", Net: every},
			Element{Set: SetExposed, Net: hostPrefix(w.addr["r1"][i]), Proto: TCP, Port: 8080},
			Element{Set: SetExposed, Net: hostPrefix(w.addr["r1"][i]), Proto: UDP, Port: 8080},
			Element{Set: SetTrusted, Link: "eth0", Net: hostPrefix(w.addr["s1"][i]), Proto: TCP, Port: 8081},
			Element{Set: SetTrusted, Link: "eth0", Net: hostPrefix(w.addr["s1"][i]), Proto: UDP, Port: 8081},
			Element{Set: SetSNAT, Net: subnet(7, 0)[i].Masked(), To: subnet(200, 5)[i].Addr()},
		)
	}
	one := [2]netip.Prefix{hostPrefix(subnet(200, 1)[0].Addr()), hostPrefix(subnet(200, 1)[1].Addr())}
	els = append(els, w.published(anyHost, 80, "a1", 8080)...)
	els = append(els, w.published(one, 81, "a1", 8081)...)
	els = append(els, w.published(anyHost, 90, "b1", 8080)...)
	els = append(els, w.published(anyHost, 92, "c1", 8080)...)
	return append(els, w.published(anyHost, 93, "i1", 8080)...)
}

// engine does to the host what an engine does: FORWARD closed, DOCKER-USER,
// isolation of its bridges, one published port (94).
func (w *world) engine(variant string) {
	w.t.Helper()
	for i, ipt := range []string{"iptables", "ip6tables"} {
		ipt += "-" + variant
		to := netip.AddrPortFrom(w.addr["e1"][i], 8080)
		w.host.Exec("sh", "-ec", fmt.Sprintf(`
t=%s
$t -P FORWARD DROP
$t -N DOCKER; $t -N DOCKER-ISOLATION-STAGE-1; $t -N DOCKER-ISOLATION-STAGE-2; $t -N DOCKER-USER
$t -A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
$t -A DOCKER-ISOLATION-STAGE-1 -j RETURN
$t -A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
$t -A DOCKER-ISOLATION-STAGE-2 -j RETURN
$t -A DOCKER-USER -j RETURN
$t -A FORWARD -j DOCKER-USER
$t -A FORWARD -j DOCKER-ISOLATION-STAGE-1
$t -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
$t -A FORWARD -o docker0 -j DOCKER
$t -A FORWARD -i docker0 ! -o docker0 -j ACCEPT
$t -A FORWARD -i docker0 -o docker0 -j ACCEPT
$t -t nat -N DOCKER
$t -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
$t -t nat -A POSTROUTING -s %s ! -o docker0 -j MASQUERADE
$t -I DOCKER-ISOLATION-STAGE-1 ! -s %[3]s -o brn -j DROP
$t -I DOCKER-ISOLATION-STAGE-1 ! -d %[3]s -i brn -j DROP
for p in tcp udp; do
$t -A DOCKER -d %s ! -i docker0 -o docker0 -p $p --dport 8080 -j ACCEPT
$t -t nat -A DOCKER ! -i docker0 -p $p --dport 94 -j DNAT --to-destination %s
done`, ipt, subnet(8, 0)[i].Masked(), subnet(9, 0)[i].Masked(), to.Addr(), to))
	}
}
