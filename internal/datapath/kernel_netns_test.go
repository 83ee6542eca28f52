package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/sirupsen/logrus"
	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft/internal/netnstest"
)

func discard() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

// newKernel enters a new namespace, the host, and opens a Kernel in it.
func newKernel(tb testing.TB) (*Kernel, *netnstest.NS) {
	tb.Helper()
	host := netnstest.Enter(tb)
	// A new namespace inherits what is set where the tests run.
	host.Exec("sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
	k, err := New(Config{Log: discard()})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(k.Close)
	k.resolvConf = tb.TempDir() + "/resolv.conf"
	// A connection belongs to the namespace of the thread that opens it, and
	// the proxy has goroutines of its own.
	k.sockets.proxy.dial = func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		host.Do(func() { c, err = (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, addr) })
		return c, err
	}
	return k, host
}

func ensure(tb testing.TB, k *Kernel, s State) []string {
	tb.Helper()
	lines, err := k.Ensure(tb.Context(), s)
	if err != nil {
		tb.Fatalf("ensure: %v", err)
	}
	return lines
}

func remove(tb testing.TB, k *Kernel, s State) {
	tb.Helper()
	if err := k.Remove(tb.Context(), s); err != nil {
		tb.Fatalf("remove: %v", err)
	}
}

func owned(tb testing.TB, k *Kernel) State {
	tb.Helper()
	s, err := k.Owned(tb.Context())
	if err != nil {
		tb.Fatalf("owned: %v", err)
	}
	return s
}

// same fails the test unless the kernel holds exactly want.
func same(tb testing.TB, k *Kernel, want State) {
	tb.Helper()
	have := owned(tb, k)
	if m := want.Minus(have); !m.Empty() {
		tb.Errorf("missing in the kernel:\n%s", m)
	}
	if m := have.Minus(want); !m.Empty() {
		tb.Errorf("surplus in the kernel:\n%s", m)
	}
}

func prefix(s string) netip.Prefix     { return netip.MustParsePrefix(s) }
func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func mac(n byte) MAC { return MAC{0x02, 0x42, 0, 0, 0, n} }

// network is what a whole network with two endpoints asks for.
func network() State {
	return State{
		Bridges: []Bridge{{Name: "wfnet", MAC: mac(1), MTU: 1450, Addrs: []netip.Prefix{prefix("10.7.0.1/24"), prefix("fd07::1/64")}}},
		Veths: []Veth{
			{Name: "wfa", Peer: "wfap", Master: "wfnet", MTU: 1450, PeerMAC: mac(2)},
			{Name: "wfb", Peer: "wfbp", Master: "wfnet", MTU: 1450, PeerMAC: mac(3), Isolated: true},
			{Name: "wfc", Peer: "wfcp", Master: "wfnet", MTU: 1450, PeerMAC: mac(4), Hairpin: true},
		},
		Elements: []Element{
			{Set: SetBridges, Link: "wfnet"},
			{Set: SetMasquerade, Net: prefix("10.7.0.0/24")},
			{Set: SetPublished, Net: prefix("0.0.0.0/0"), Proto: TCP, Port: 8080, To: netip.MustParseAddr("10.7.0.2"), ToPort: 80},
		},
		Sockets: []Socket{
			{Proto: TCP, Host: addrPort("0.0.0.0:8080"), To: addrPort("10.7.0.2:80")},
			{Proto: UDP, Host: addrPort("[::]:5353"), To: addrPort("10.7.0.2:53")},
		},
	}
}

func TestEnsureAgainOwnedRemove(t *testing.T) {
	k, host := newKernel(t)
	s := network()
	same(t, k, State{})
	if lines := ensure(t, k, s); len(lines) == 0 {
		t.Error("making everything changed nothing")
	}
	same(t, k, s)
	if lines := ensure(t, k, s); len(lines) != 0 {
		t.Errorf("the second time changed %q", lines)
	}
	peer, err := netlink.LinkByName("wfap")
	if err != nil {
		t.Fatal(err)
	}
	if a := peer.Attrs(); a.HardwareAddr.String() != mac(2).String() || a.MTU != 1450 || a.Group == Group {
		t.Errorf("peer has address %s, MTU %d, group %d", a.HardwareAddr, a.MTU, a.Group)
	}
	for name, want := range map[string]string{
		"net.ipv4.conf.wfnet.route_localnet": "1", "net.ipv6.conf.wfnet.accept_ra": "0", "net.ipv6.conf.wfnet.disable_ipv6": "0",
	} {
		if got := strings.TrimSpace(host.Exec("sysctl", "-n", name)); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	remove(t, k, s)
	same(t, k, State{})
	remove(t, k, s)
	for _, name := range []string{"wfnet", "wfa", "wfap"} {
		if _, err := netlink.LinkByName(name); err == nil {
			t.Errorf("%s is left", name)
		}
	}
}

// TestBridgeForwardsIPv6AtOnce: the bridge's link-local address, from which the
// kernel asks for neighbours when it forwards, is usable as soon as it is there.
func TestBridgeForwardsIPv6AtOnce(t *testing.T) {
	k, host := newKernel(t)
	ensure(t, k, network())
	container := netnstest.New(t)
	container.Take("wfap", "eth0", prefix("10.7.0.2/24"))
	linkLocal := func(more ...string) string {
		return host.Exec("ip", append([]string{"-6", "-o", "addr", "show", "dev", "wfnet", "scope", "link"}, more...)...)
	}
	for stop := time.Now().Add(5 * time.Second); linkLocal() == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(stop) {
			t.Fatal("the bridge has no link-local address")
		}
	}
	if got := linkLocal("tentative"); got != "" {
		t.Errorf("not usable yet: %s", got)
	}
}

// TestOwnedPeer: a pair whose container end nobody took can be told from one
// in use.
func TestOwnedPeer(t *testing.T) {
	k, _ := newKernel(t)
	ensure(t, k, network())
	container := netnstest.New(t)
	container.Take("wfap", "eth0", prefix("10.7.0.2/24"))
	got := map[string]string{}
	for _, v := range owned(t, k).Veths {
		got[v.Name] = v.Peer
	}
	if want := map[string]string{"wfa": "", "wfb": "wfbp", "wfc": "wfcp"}; !maps.Equal(got, want) {
		t.Errorf("peers %v, want %v", got, want)
	}
}

func TestEnsureMends(t *testing.T) {
	bare := network()
	bare.Sockets, bare.Elements = nil, nil
	for _, c := range []struct {
		name, damage string
		changes      int
	}{
		{"bridge gone", "ip link del wfnet", 12},     // bridge, filter, 3 sysctls, 2 addresses, 3 ports back in, 2 port flags
		{"bridge down", "ip link set wfnet down", 2}, // takes the IPv6 address with it
		{"bridge MTU", "ip link set wfnet mtu 1300", 1},
		{"bridge MAC", "ip link set wfnet address 02:00:00:00:00:99", 1},
		{"bridge address lost", "ip addr del 10.7.0.1/24 dev wfnet", 1},
		{"bridge address surplus", "ip addr add 10.9.0.1/24 dev wfnet", 1},
		{"bridge address replaced", "ip addr del 10.7.0.1/24 dev wfnet; ip addr add 10.7.0.9/24 dev wfnet", 2},
		{"bridge address behind another", "ip addr del 10.7.0.1/24 dev wfnet; ip addr add 10.7.0.9/24 dev wfnet; ip addr add 10.7.0.1/24 dev wfnet", 2},
		{"sysctl", "sysctl -qw net.ipv4.conf.wfnet.route_localnet=0", 1},
		{"filter gone", "tc filter del dev wfnet ingress", 1},
		{"filter gone with its qdisc", "tc qdisc del dev wfnet clsact", 1},
		{"port out", "ip link set wfa nomaster", 1},
		{"isolated port out", "ip link set wfb nomaster", 2},
		{"isolated port elsewhere", "ip link add other type bridge; ip link set wfb master other; bridge link set dev wfb isolated on", 2},
		{"port down", "ip link set wfa down", 1},
		{"port MTU", "ip link set wfa mtu 1280", 1},
		{"port flags", "bridge link set dev wfb isolated off; bridge link set dev wfc hairpin off", 2},
		{"veth gone", "ip link del wfa", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, host := newKernel(t)
			ensure(t, k, bare)
			host.Exec("sh", "-ec", c.damage)
			if c.name != "sysctl" && bare.Minus(owned(t, k)).Empty() && owned(t, k).Minus(bare).Empty() {
				t.Error("Owned does not show the damage")
			}
			lines := ensure(t, k, bare)
			if len(lines) != c.changes {
				t.Errorf("changes %q, want %d", lines, c.changes)
			}
			if len(lines) == 0 {
				t.Error("nothing mended")
			}
			same(t, k, bare)
			if lines := ensure(t, k, bare); len(lines) != 0 {
				t.Errorf("mended again: %q", lines)
			}
		})
	}
}

// Links of others with our names are refused, not used, not changed, and not
// removed: ours of that name are gone, which is what the removal is for.
func TestForeignLinksAreLeftAlone(t *testing.T) {
	k, host := newKernel(t)
	host.Exec("sh", "-ec", `
		ip link add wfnet address 02:00:00:00:00:01 type bridge
		ip link add wfa type veth peer name other`)
	foreign := func() string { return host.Exec("ip", "-o", "link") }
	before := foreign()
	s := network()
	s.Elements, s.Sockets = nil, nil
	_, err := k.Ensure(t.Context(), State{Bridges: s.Bridges})
	wantError(t, err, "wfnet", "not ours")
	_, err = k.Ensure(t.Context(), State{Veths: s.Veths[:1]})
	wantError(t, err, "wfa", "not ours")
	remove(t, k, s)
	if after := foreign(); after != before {
		t.Errorf("links changed:\n%s", cmp.Diff(before, after))
	}
	// An existing bridge is used, never changed.
	ours := State{
		Bridges: []Bridge{{Name: "wfnet", Existing: true, MTU: 1234, Addrs: []netip.Prefix{prefix("10.1.0.1/24")}}},
		Veths:   []Veth{{Name: "wfx", Peer: "wfxp", Master: "wfnet", MTU: 1400}},
	}
	ensure(t, k, ours)
	if got := owned(t, k); len(got.Bridges) != 0 || len(got.Veths) != 1 || got.Veths[0].Master != "wfnet" {
		t.Errorf("owned:\n%s", got)
	}
	remove(t, k, ours)
	br, err := netlink.LinkByName("wfnet")
	if err != nil {
		t.Fatal(err)
	}
	if addrs, _ := netlink.AddrList(br, netlink.FAMILY_V4); br.Attrs().MTU != 1500 || len(addrs) != 0 {
		t.Errorf("existing bridge changed: MTU %d, addresses %v", br.Attrs().MTU, addrs)
	}
}

func wantError(tb testing.TB, err error, words ...string) {
	tb.Helper()
	if err == nil {
		tb.Errorf("no error, want one with %q", words)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			tb.Errorf("error %q does not say %q", err, w)
		}
	}
}

func TestErrorsNameTheObject(t *testing.T) {
	k, host := newKernel(t)
	host.Exec("sh", "-ec", "ip link add card type veth peer name card2; ip link add free type veth peer name free2")
	for _, c := range []struct {
		name  string
		s     State
		words []string
	}{
		{"no bridge", State{Veths: []Veth{{Name: "wfa", Peer: "wfap", Master: "wfnone", MTU: 1500}}}, []string{"wfa", "wfnone", "does not exist"}},
		{"master is no bridge", State{Veths: []Veth{{Name: "wfa", Peer: "wfap", Master: "card", MTU: 1500}}}, []string{"wfa", "card", "not a bridge"}},
		{"existing is absent", State{Bridges: []Bridge{{Name: "br0", Existing: true}}}, []string{"br0", "does not exist"}},
		{"existing is no bridge", State{Bridges: []Bridge{{Name: "card", Existing: true}}}, []string{"card", "not a bridge", "veth"}},
		{"MTU", State{Bridges: []Bridge{{Name: "wfbr", MTU: 99999999}}}, []string{"wfbr"}},
		{"name", State{Bridges: []Bridge{{Name: "longer-than-sixteen", MTU: 1500}}}, []string{"longer-than-sixteen"}},
		{"peer exists", State{
			Bridges: []Bridge{{Name: "wfbr", MTU: 1500}},
			Veths:   []Veth{{Name: "wfa", Peer: "free", Master: "wfbr", MTU: 1500}},
		}, []string{"wfa", "free"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			host.Do(func() {
				_, err := k.Ensure(t.Context(), c.s)
				wantError(t, err, c.words...)
				same(t, k, State{})
			})
		})
	}
}

// countdown is a context that is cancelled at its nth look.
type countdown struct {
	context.Context
	cancel context.CancelFunc
	left   int
}

func newCountdown(tb testing.TB, n int) *countdown {
	tb.Helper()
	ctx, cancel := context.WithCancel(tb.Context())
	tb.Cleanup(cancel)
	return &countdown{ctx, cancel, n}
}

func (c *countdown) Err() error {
	if c.left--; c.left < 0 {
		c.cancel()
	}
	return c.Context.Err()
}

// Cancelled at any step, Ensure leaves nothing and the next call succeeds.
func TestEnsureCancelledAtEveryStepLeavesNothing(t *testing.T) {
	k, _ := newKernel(t)
	s := network()
	for step := 0; ; step++ {
		if step > 100 {
			t.Fatal("never gets through")
		}
		_, err := k.Ensure(newCountdown(t, step), s)
		if err == nil {
			if step < 5 {
				t.Errorf("only %d steps look at the context", step)
			}
			break
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("step %d: %v", step, err)
		}
		same(t, k, State{})
	}
	same(t, k, s)
}

// Whatever object cannot be made, nothing is left of the others, and what was
// there before stays.
func TestEnsureFailingAtEveryObjectLeavesNothing(t *testing.T) {
	for name, spoil := range map[string]struct {
		how  string
		f    func(*State)
		word string
	}{
		"first element": {f: func(s *State) { s.Elements = slices.Insert(s.Elements, 0, Element{Set: "nosuch"}) }, word: "nosuch"},
		"last element":  {f: func(s *State) { s.Elements[2].To = netip.Addr{} }, word: "published"},
		"bridge":        {how: "ip link add wfnet type bridge", word: "wfnet"},
		"bridge address": {f: func(s *State) {
			s.Bridges[0].Addrs = append(s.Bridges[0].Addrs, prefix("ff02::1/64"))
		}, word: "ff02::1"},
		"veth 1":   {how: "ip link add wfa type veth peer name foreign", word: "wfa"},
		"veth 2":   {how: "ip link add wfb type bridge", word: "wfb"},
		"veth 3":   {how: "ip link add wfcp type bridge", word: "wfcp"},
		"socket 1": {how: "tcp4 0.0.0.0:8080", word: "8080/tcp"},
		"socket 2": {how: "udp6 [::]:5353", word: "5353/udp"},
	} {
		t.Run(name, func(t *testing.T) {
			k, host := newKernel(t)
			before := State{
				Bridges:  []Bridge{{Name: "wfold", MAC: mac(9), MTU: 1500, Addrs: []netip.Prefix{prefix("10.8.0.1/24")}}},
				Veths:    []Veth{{Name: "wfoldv", Peer: "wfoldp", Master: "wfold", MTU: 1500}},
				Elements: []Element{{Set: SetBridges, Link: "wfold"}},
				Sockets:  []Socket{{Proto: TCP, Host: addrPort("127.0.0.1:9"), To: addrPort("10.8.0.2:9")}},
			}
			ensure(t, k, before)
			s := network()
			if spoil.f != nil {
				spoil.f(&s)
			}
			s.Add(before)
			// An address that an old bridge gets from the call that fails.
			s.Bridges = []Bridge{s.Bridges[1], s.Bridges[0]}
			s.Bridges[0].Addrs = append(slices.Clone(s.Bridges[0].Addrs), prefix("10.8.1.1/24"))
			switch kind, addr, _ := strings.Cut(spoil.how, " "); kind {
			case "":
			case "tcp4":
				closeLater(t)(net.Listen(kind, addr))
			case "udp6":
				closeLater(t)(net.ListenPacket(kind, addr))
			default:
				host.Exec("sh", "-ec", spoil.how)
			}
			_, err := k.Ensure(t.Context(), s)
			wantError(t, err, spoil.word)
			same(t, k, before)
		})
	}
}

func closeLater(tb testing.TB) func(io.Closer, error) {
	tb.Helper()
	return func(c io.Closer, err error) {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { _ = c.Close() })
	}
}

// Left to itself a bridge takes the smallest MTU of its ports, and 1500
// without any.
func TestBridgeKeepsItsMTU(t *testing.T) {
	k, _ := newKernel(t)
	for _, mtu := range []int{1280, 1500, 9000} {
		s := State{
			Bridges: []Bridge{{Name: "wfnet", MAC: mac(1), MTU: mtu}},
			Veths:   []Veth{{Name: "wfa", Peer: "wfap", Master: "wfnet", MTU: mtu}},
		}
		ensure(t, k, s)
		remove(t, k, State{Veths: s.Veths})
		same(t, k, State{Bridges: s.Bridges})
		remove(t, k, s)
	}
}

// The engine has the container's end while Leave deletes ours.
func TestRemoveVethWhosePeerIsInAContainer(t *testing.T) {
	k, _ := newKernel(t)
	s := network()
	s.Sockets, s.Elements = nil, nil
	ensure(t, k, s)
	container := netnstest.New(t)
	container.Take("wfap", "eth0", prefix("10.7.0.2/24"))
	container.Gateway(netip.MustParseAddr("10.7.0.1"))
	reachable(t, "10.7.0.2")
	if lines := ensure(t, k, s); len(lines) != 0 {
		t.Errorf("a moved peer is taken for damage: %q", lines)
	}
	same(t, k, s)
	one := State{Veths: s.Veths[:1]}
	remove(t, k, one)
	if out, err := container.Output("ip", "link", "show", "eth0"); err == nil {
		t.Errorf("the container's end is left: %s", out)
	}
	remove(t, k, one)
}

func TestForwardingAndGuard(t *testing.T) {
	k, host := newKernel(t)
	host.Exec("sh", "-ec", `
		ip link add lan type veth peer name lan2
		ip link add quiet type veth peer name quiet2
		sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0
		sysctl -qw net.ipv6.conf.lan.accept_ra=1 net.ipv6.conf.quiet.accept_ra=0 net.ipv6.conf.default.accept_ra=1`)
	ensure(t, k, State{Forward4: true})
	if v4, v6 := k.Guarded(); !v4 || v6 {
		t.Errorf("guards %t %t after switching IPv4 on", v4, v6)
	}
	ensure(t, k, State{Forward4: true, Forward6: true})
	if v4, v6 := k.Guarded(); !v4 || !v6 {
		t.Errorf("guards %t %t after switching both on", v4, v6)
	}
	if lines := ensure(t, k, State{Forward4: true, Forward6: true}); len(lines) != 0 {
		t.Errorf("again changed %q", lines)
	}
	same(t, k, State{Forward4: true, Forward6: true})
	host.Exec("ip", "link", "add", "later", "type", "veth", "peer", "name", "later2") // a card that is plugged in
	for name, want := range map[string]string{"lan": "2", "quiet": "0", "later": "2"} {
		if got := strings.TrimSpace(host.Exec("sysctl", "-n", "net.ipv6.conf."+name+".accept_ra")); got != want {
			t.Errorf("accept_ra of %s is %s, want %s", name, got, want)
		}
	}
	remove(t, k, State{Forward4: true, Forward6: true})
	same(t, k, State{Forward4: true, Forward6: true})
	guards := func(when string, want4, want6 bool) {
		t.Helper()
		if v4, v6 := k.Guarded(); v4 != want4 || v6 != want6 {
			t.Errorf("%s: guards %t %t", when, v4, v6)
		}
	}
	lift := func(need4, need6 bool) {
		t.Helper()
		if err := k.LiftGuard(t.Context(), func() (bool, bool) { return need4, need6 }); err != nil {
			t.Error(err)
		}
	}
	lift(true, true)
	guards("both needed", true, true)
	lift(true, false)
	guards("IPv6 not needed", true, false)
	ensure(t, k, State{Forward4: true})
	guards("an endpoint with IPv4", true, false)
	host.Exec("nft", "flush", "ruleset") // what is lifted stays lifted
	ensure(t, k, network())
	guards("rebuilt", true, false)
	ensure(t, k, State{Forward6: true})
	guards("an endpoint with IPv6", true, true)
	lift(false, false)
	guards("none needed", false, false)
}

// TestUnguarded: whoever wants none has none, also where there was one.
func TestUnguarded(t *testing.T) {
	k, host := newKernel(t)
	host.Exec("sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
	ensure(t, k, State{Forward4: true})
	k.unguarded = true
	ensure(t, k, State{Forward4: true, Forward6: true})
	if err := k.LiftGuard(t.Context(), func() (bool, bool) { return true, true }); err != nil {
		t.Error(err)
	}
	if v4, v6 := k.Guarded(); v4 || v6 {
		t.Errorf("guards %t %t", v4, v6)
	}
}

func TestNoGuardWhereForwardingWasOn(t *testing.T) {
	k, host := newKernel(t)
	host.Exec("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	if lines := ensure(t, k, State{Forward4: true, Forward6: true}); len(lines) != 0 {
		t.Errorf("changed %q", lines)
	}
	if v4, v6 := k.Guarded(); v4 || v6 {
		t.Errorf("guards %t %t on a host that is a router", v4, v6)
	}
}

func TestOwnedUnderChurn(t *testing.T) {
	k, _ := newKernel(t)
	s := State{Bridges: []Bridge{{Name: "wfnet", MAC: mac(1), MTU: 1500}}}
	for i := range 300 {
		s.Veths = append(s.Veths, Veth{Name: fmt.Sprintf("wf%d", i), Peer: fmt.Sprintf("wp%d", i), Master: "wfnet", MTU: 1500})
	}
	ensure(t, k, s)
	// Changes come at the pace of dumps, whatever that is on this machine:
	// some interrupt a dump, and some dumps find room between two.
	begin := time.Now()
	const quiet = 5
	for range quiet {
		if _, err := k.links.dumps.listOnce(); err != nil {
			t.Fatal(err)
		}
	}
	pause := 2 * time.Since(begin) / quiet
	stop := make(chan struct{})
	ended := make(chan struct{})
	end := sync.OnceFunc(func() { close(stop); <-ended })
	t.Cleanup(end)
	go func() {
		defer close(ended)
		c := &rtnl{sockets: k.links.change.sockets} // group 0
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(pause):
			}
			name := fmt.Sprintf("churn%d", i)
			if err := c.create(link{name: name, kind: "bridge"}); err != nil {
				t.Errorf("churn: %v", err)
				return
			}
			// Group 0: not ours, so never in Owned.
			if l, err := c.get(name); err == nil {
				_ = c.remove(l.index)
			}
		}
	}()
	interrupted := 0
	for range 40 {
		if _, err := k.links.dumps.listOnce(); err != nil {
			interrupted++
		}
		same(t, k, s)
	}
	end()
	t.Logf("%d of 40 single dumps were interrupted", interrupted)
}

func TestInUse(t *testing.T) {
	k, host := newKernel(t)
	host.Exec("sh", "-ec", `
		ip link add lan type veth peer name lan2; ip link set lan up; ip link set lan2 up
		ip addr add 192.0.2.5/24 dev lan; ip addr add fd09::5/64 dev lan nodad
		ip route add default via 192.0.2.1
		ip route add 10.20.0.0/16 via 192.0.2.1
		ip route add 10.30.0.0/16 via 192.0.2.1 table 77
		ip route add blackhole 10.40.0.0/16
		ip -6 route add fd10::/48 via fd09::1
		printf 'search x\nnameserver 198.51.100.53\nnameserver fe80::1%%lan\nnameserver nonsense\n' > `+k.resolvConf)
	got, err := k.InUse(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got = slices.DeleteFunc(got, func(p netip.Prefix) bool { return p.Addr().IsLoopback() })
	want := []netip.Prefix{prefix("10.20.0.0/16"), prefix("10.30.0.0/16"), prefix("10.40.0.0/16"), prefix("192.0.2.0/24"),
		prefix("192.0.2.5/24"), prefix("198.51.100.53/32"), prefix("fd09::/64"), prefix("fd09::5/64"), prefix("fd10::/48"), prefix("fe80::1/128")}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); d != "" {
		t.Errorf("in use (-want +got):\n%s", d)
	}
}

func TestPathMTU(t *testing.T) {
	k, host := newKernel(t)
	check := func(want int) {
		t.Helper()
		if got, err := k.PathMTU(t.Context()); err != nil || got != want {
			t.Errorf("path MTU %d, %v, want %d", got, err, want)
		}
	}
	check(1500)
	host.Exec("sh", "-ec", `
		for i in 1 2 3; do ip link add l$i type veth peer name p$i; ip link set p$i up; ip link set l$i up; ip addr add 192.0.$i.5/24 dev l$i; done
		ip link set l1 mtu 1400; ip link set l2 mtu 9000
		ip route add default via 192.0.1.1 metric 200`)
	check(1400)
	host.Exec("ip", "route", "add", "default", "via", "192.0.2.1", "metric", "100")
	check(9000)
	host.Exec("ip", "route", "replace", "default", "via", "192.0.2.1", "metric", "100", "mtu", "1420")
	check(1420)
	host.Exec("sh", "-ec", "ip route flush default; ip route add default nexthop via 192.0.1.1 nexthop via 192.0.2.1")
	check(1400)
}

func TestUplinks(t *testing.T) {
	k, host := newKernel(t)
	host.Exec("sh", "-ec", `
		for b in brlan brgw brvm brempty; do ip link add $b type bridge; ip link set $b up; done
		ip link add card type macvlan mode bridge 2>/dev/null || true
		ip link add vx0 type vxlan id 7 dstport 4789 local 127.0.0.1; ip link set vx0 master brlan
		ip link add c0 type veth peer name c1; ip link set c0 master brvm
		ip tuntap add tap0 mode tap; ip link set tap0 master brvm
		ip addr add 192.0.2.5/24 dev brgw; ip route add default via 192.0.2.1
		ip addr add 192.0.3.5/24 dev brlan
		ip addr add 10.66.0.1/24 dev brvm; ip addr add 10.66.0.9/24 dev brvm; ip addr add fd66::1/64 dev brvm nodad; ip addr add 10.67.0.1/32 dev brvm`)
	s := network()
	s.Sockets, s.Elements = nil, nil
	ensure(t, k, s)
	all, err := k.links.list(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.links.uplinks(t.Context(), all)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"brgw", "brlan"}, got); d != "" {
		t.Errorf("uplinks (-want +got):\n%s", d)
	}
	if out := host.Exec("nft", "list", "table", "inet", "weft"); !strings.Contains(out, "brgw") || strings.Contains(out, "brvm") {
		t.Errorf("the firewall was told otherwise:\n%s", out)
	}
}
