package datapath

import (
	"bytes"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/netnstest"
)

// connects reports whether a TCP connection from a container to a port of the
// other carries a line there and back.
func connects(t *testing.T, from, to *netnstest.NS, addr string) bool {
	t.Helper()
	var l net.Listener
	to.Do(func() {
		var err error
		if l, err = new(net.ListenConfig).Listen(t.Context(), "tcp", net.JoinHostPort(addr, "0")); err != nil {
			t.Fatal(err)
		}
	})
	defer func() { _ = l.Close() }()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return // closed, or nobody came
		}
		defer func() { _ = c.Close() }()
		b := make([]byte, 4)
		if _, err := c.Read(b); err == nil {
			_, _ = c.Write(b)
		}
	}()
	ok := false
	from.Do(func() {
		c, err := (&net.Dialer{Timeout: 300 * time.Millisecond}).DialContext(t.Context(), "tcp", l.Addr().String())
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(time.Second))
		b := make([]byte, 4)
		_, werr := c.Write([]byte("weft"))
		_, rerr := c.Read(b)
		ok = werr == nil && rerr == nil && string(b) == "weft"
	})
	return ok
}

// knows tells a container the other's hardware address: requests for it go by
// the bridge, and here the container is to be off it.
func (e *tunnelEnd) knows(n int) {
	e.container.Exec("sh", "-ec", fmt.Sprintf(`
		ip neigh replace 10.7.0.%d lladdr %s dev eth0 nud permanent
		ip neigh replace fd07::%[1]d lladdr %[2]s dev eth0 nud permanent`, n, mac(byte(n))))
}

// TestShortcut: what the maps know needs no bridge, in either direction; what
// they do not know goes by the bridge.
func TestShortcut(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(vtep(1, v6).String(), func(t *testing.T) {
			a, b := tunnelled(t, v6, 1500)
			a.knows(2)
			b.knows(1)
			try := func(when string, want bool) {
				t.Helper()
				for _, addr := range []string{"10.7.0.2", "fd07::2"} {
					if got := connects(t, a.container, b.container, addr); got != want {
						t.Errorf("%s: %s reached: %t, want %t", when, addr, got, want)
					}
				}
			}
			try("with both", true)
			// Off its bridge a container can only be reached by a shortcut.
			for _, e := range []*tunnelEnd{a, b} {
				e.host.Exec("ip", "link", "set", "wfv0", "nomaster")
			}
			try("off the bridges", true)
			for _, missing := range a.state.Shortcuts[1:] {
				a.host.Do(func() { remove(t, a.k, State{Shortcuts: []Shortcut{missing}}) })
				try("without "+missing.String(), false)
				a.host.Do(func() { ensure(t, a.k, State{Shortcuts: a.state.Shortcuts}) })
			}
			try("with all again", true)
			for _, e := range []*tunnelEnd{a, b} {
				e.host.Exec("ip", "link", "set", "wfv0", "master", "wfb0")
			}
			for _, missing := range a.state.Shortcuts[1:] {
				a.host.Do(func() { remove(t, a.k, State{Shortcuts: []Shortcut{missing}}) })
				try("by the bridge, without "+missing.String(), true)
				a.host.Do(func() { ensure(t, a.k, State{Shortcuts: a.state.Shortcuts}) })
			}
			a.same(t)
			b.same(t)
		})
	}
}

// TestShortcutOfAnotherNetwork: a container does not get to those of another
// network, whatever hardware address it sends to.
func TestShortcutOfAnotherNetwork(t *testing.T) {
	a, b := tunnelled(t, false, 1500)
	other := netnstest.New(t)
	a.host.Do(func() {
		ensure(t, a.k, State{
			Bridges:   []Bridge{{Name: "wfb1", MAC: MAC{2, 0, 0, 0, 1, 9}, MTU: 1450, NoSnooping: true}},
			VXLANs:    []VXLAN{{Name: "wfx1", Master: "wfb1", VNI: 9, Port: 4789, Local: vtep(1, false), MTU: 1450, MAC: MAC{2, 0, 0, 0, 2, 9}}},
			Veths:     []Veth{{Name: "wfv1", Peer: "wfc1", Master: "wfb1", MTU: 1450, PeerMAC: mac(9)}},
			Shortcuts: []Shortcut{{Tunnel: "wfx1", Link: "wfx1"}, {Tunnel: "wfx1", Link: "wfv1"}, {Tunnel: "wfx1", Link: "wfv1", MAC: mac(9)}},
		})
		other.Take("wfc1", "eth0", prefix("10.7.0.9/24"))
	})
	passes(t, other, "eth0")
	other.Exec("ip", "neigh", "replace", "10.7.0.2", "lladdr", mac(2).String(), "dev", "eth0", "nud", "permanent")
	heard := capture(t, b.container, "host 10.7.0.9")
	if connects(t, other, b.container, "10.7.0.2") {
		t.Error("reached from another network")
	}
	if got := heard(0); got != "" {
		t.Errorf("heard from another network: %s", got)
	}
}

// TestShortcutWithoutLinks: what is left of links that somebody deleted, or
// that went with their container, is seen and goes.
func TestShortcutWithoutLinks(t *testing.T) {
	k, host := newKernel(t)
	s := overlay(1, false, 1400)
	ensure(t, k, s)
	host.Exec("ip", "link", "del", "wfv0")
	rest := s
	rest.Veths, rest.Shortcuts = nil, s.Shortcuts[:2]
	stray := owned(t, k).Minus(rest)
	if len(stray.Shortcuts) == 0 {
		t.Error("nothing is seen of the container's shortcuts")
	}
	remove(t, k, stray)
	same(t, k, rest)
	// A tunnel of which only the maps are left.
	host.Exec("sh", "-ec", "nft delete chain netdev weft wfx0; ip link del wfx0; ip link del wfb0")
	stray = owned(t, k)
	remove(t, k, stray)
	same(t, k, State{})
	if got := host.Exec("nft", "list", "tables", "netdev"); got != "" {
		t.Errorf("left behind: %s", got)
	}
}

// TestShortcutMissing: a kernel without the means says so once, and all goes by
// the bridge.
func TestShortcutMissing(t *testing.T) {
	k, host := newKernel(t)
	var said bytes.Buffer
	log := logrus.New()
	log.SetOutput(&said)
	k.shortcuts.log, k.shortcuts.probe = log, "no link has such a name"
	s := overlay(1, false, 1400)
	for range 2 {
		ensure(t, k, s)
	}
	have := owned(t, k)
	if m := s.Minus(have); !m.Empty() || len(have.Shortcuts) != 0 {
		t.Errorf("missing: %s, there: %v", m, have.Shortcuts)
	}
	if n := strings.Count(said.String(), "no shortcuts"); n != 1 {
		t.Errorf("said %d times: %s", n, &said)
	}
	remove(t, k, s)
	if got := host.Exec("nft", "list", "tables", "netdev"); got != "" {
		t.Errorf("left behind: %s", got)
	}
}

// TestShortcutReadable: nft shows what we mean, and can read back what it shows.
func TestShortcutReadable(t *testing.T) {
	k, host := newKernel(t)
	s := overlay(1, false, 1400)
	ensure(t, k, s)
	got := host.Exec("nft", "list", "table", "netdev", "weft")
	for _, want := range []string{
		"elements = { 02:42:00:00:00:01 : \"wfv0\" }",
		"elements = { 02:42:00:00:00:02 : \"wfx0\" }",
		"type filter hook ingress device \"wfv0\" priority filter; policy accept;",
		"meta l4proto != ipv6-icmp fwd to ether daddr map @away_wfx0",
		"meta l4proto != ipv6-icmp fwd to ether daddr map @here_wfx0",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("lacks %q:\n%s", want, got)
		}
	}
	host.Exec("sh", "-ec", "nft list table netdev weft >saved; nft delete table netdev weft; nft -f saved; rm saved")
	same(t, k, s)
}

func TestShortcutKey(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		a, b Shortcut
		same bool
	}{
		{Shortcut{Tunnel: "x", Link: "v"}, Shortcut{Link: "v", Altered: true}, true},
		{Shortcut{Tunnel: "x", Link: "v"}, Shortcut{Tunnel: "x", Link: "x"}, false},
		{Shortcut{Tunnel: "x", Link: "v", MAC: mac(1)}, Shortcut{Tunnel: "x", MAC: mac(1)}, true},
		{Shortcut{Tunnel: "x", Link: "v", MAC: mac(1)}, Shortcut{Tunnel: "x", Link: "x", MAC: mac(1)}, false},
		{Shortcut{Tunnel: "x", Link: "x", MAC: mac(1)}, Shortcut{Tunnel: "y", Link: "y", MAC: mac(1)}, false},
	} {
		if got := c.a.Key() == c.b.Key(); got != c.same {
			t.Errorf("%+v and %+v are one: %t, want %t", c.a, c.b, got, c.same)
		}
	}
}

// BenchmarkShortcut is what a container costs more with the shortcut than
// without.
func BenchmarkShortcut(b *testing.B) {
	k, _ := newKernel(b)
	s := overlay(1, false, 1400)
	ensure(b, k, s)
	for i := range 1000 {
		s.Shortcuts = append(s.Shortcuts, Shortcut{Tunnel: "wfx0", Link: "wfx0", MAC: MAC{2, 1, 0, 0, byte(i >> 8), byte(i)}})
	}
	ensure(b, k, State{Shortcuts: s.Shortcuts})
	ours := State{Shortcuts: s.Shortcuts[2:4]}
	var made, gone time.Duration
	for b.Loop() {
		start := time.Now()
		remove(b, k, ours)
		gone += time.Since(start)
		start = time.Now()
		ensure(b, k, ours)
		made += time.Since(start)
	}
	b.ReportMetric(float64(made.Microseconds())/float64(b.N), "us/ensure")
	b.ReportMetric(float64(gone.Microseconds())/float64(b.N), "us/remove")
}
