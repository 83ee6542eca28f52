package datapath

import (
	"strings"
	"testing"

	"github.com/weftnet/weft/internal/netnstest"
)

// second opens another instance in the namespace of the first.
func second(tb testing.TB, name string) *Kernel {
	tb.Helper()
	k, err := New(Config{Log: discard(), Instance: name})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(k.Close)
	k.resolvConf = tb.TempDir() + "/resolv.conf"
	return k
}

// Two instances see nothing of each other as their own, and take nothing away.
func TestInstancesApart(t *testing.T) {
	one, host := newKernel(t)
	host.Exec("sh", "-ec", "iptables-nft -P FORWARD DROP; ip6tables-nft -P FORWARD DROP")
	two := second(t, "global")
	a, b := network(), State{
		Bridges:  []Bridge{{Name: "wfother", MAC: mac(9), MTU: 1450, NoSnooping: true}},
		VXLANs:   []VXLAN{{Name: "wfxother", Master: "wfother", VNI: 77, Port: 4793, Local: addrPort("127.0.0.1:1").Addr(), MTU: 1450, MAC: mac(8)}},
		Veths:    []Veth{{Name: "wfo", Peer: "wfop", Master: "wfother", MTU: 1450, PeerMAC: mac(7)}},
		Elements: []Element{{Set: SetBridges, Link: "wfother"}},
		Hook:     true,
	}
	a.Hook = true
	ensure(t, one, a)
	ensure(t, two, b)
	same(t, one, a)
	same(t, two, b)
	if lines := append(ensure(t, one, a), ensure(t, two, b)...); len(lines) != 0 {
		t.Errorf("the second time changed %q", lines)
	}
	// Nor is the other's a way to the LAN, although a tunnel is a port of it.
	if out := host.Exec("nft", "list", "set", "inet", "weft", "uplinks"); strings.Contains(out, "wfother") {
		t.Errorf("the other's bridge is taken for an uplink:\n%s", out)
	}
	if err := one.Remove(t.Context(), State{Bridges: b.Bridges}); err != nil {
		t.Error(err)
	}
	if _, err := one.Ensure(t.Context(), State{Bridges: b.Bridges}); err == nil || !strings.Contains(err.Error(), "another instance") {
		t.Errorf("the other's bridge was taken: %v", err)
	}
	remove(t, one, a)
	same(t, one, State{})
	same(t, two, b)
	remove(t, two, b)
	same(t, two, State{})
}

// Both firewalls judge every packet: containers of one reach those of the other as
// those of an engine's bridge would, and the guard of one does not stop the other's.
func TestReachInstances(t *testing.T) {
	w := newWorld(t, true)
	w.engine("nft")
	w.bridge("br0", 150)
	w.container("u1", "br0", 150, 2)
	other, err := newFirewall(quiet(), "weft_two")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(other.close)
	mine := append(plain("wfa", 1), w.published(anyHost, 80, "a1", 8080)...)
	theirs := append(plain("wfb", 2), w.published(anyHost, 90, "b1", 8080)...)
	theirs = append(theirs, w.published(anyHost, 150, "u1", 8080)...)
	for i, p := range subnet(150, 0) {
		theirs = append(theirs, Element{Set: SetAttached, Link: "br0", Net: hostPrefix(w.addr["u1"][i])},
			Element{Set: SetMasquerade, Net: p.Masked()}, Element{Set: SetHome, Net: p.Masked(), Link: "br0"})
	}
	for _, x := range []struct {
		fw  *firewall
		els []Element
	}{{w.fw, mine}, {other, theirs}} {
		if _, err := x.fw.add(t.Context(), x.els); err != nil {
			t.Fatal(err)
		}
		if err := x.fw.setUplinks(t.Context(), []string{"br0"}); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range []*hook{w.hook, newHook(quiet(), "weft_two")} {
		if _, err := h.ensure(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	check := func() {
		t.Helper()
		for family := range 2 {
			w.run(family, []probe{
				{"a1", "out:8080", "out:8080 gw200"}, {"b1", "out:8080", "out:8080 gw200"},
				{"out", "host:80", "a1:8080 out"}, {"out", "host:90", "b1:8080 out"}, {"out", "host:150", "u1:8080 gw150"},
				{"a1", "b1:8080", ""}, {"b1", "a1:8080", ""},
				{"a1", "host:90", "b1:8080 gw2"}, {"b1", "host:80", "a1:8080 gw1"},
				{"out", "a1:8080", ""}, {"out", "b1:8080", ""},
				{"u1", "out:8080", "out:8080 gw200"}, {"out", "u1:8080", "u1:8080 out"},
			})
		}
	}
	check()
	for _, fw := range []*firewall{w.fw, other} { // each was first to be made once
		if err := fw.setFamilies(t.Context(), setGuard, true, true); err != nil {
			t.Fatal(err)
		}
		check()
		if err := fw.setFamilies(t.Context(), setGuard, false, false); err != nil {
			t.Fatal(err)
		}
	}
}

func TestInstanceNames(t *testing.T) {
	for _, name := range []string{"", "local"} {
		if in, err := instanceOf(name); err != nil || in.group != Group || in.table != "weft" {
			t.Errorf("%q: %+v, %v", name, in, err)
		}
	}
	if in, err := instanceOf("global"); err != nil || in.group == Group || in.group>>24 != Group>>24 || in.table != "weft_global" {
		t.Errorf("%+v, %v", in, err)
	}
	for _, name := range []string{"Big", "a-b", "1a", "a.probe", "abcdefghijklmnop", "ü", " "} {
		if err := CheckInstance(name); err == nil {
			t.Errorf("%q is a name", name)
		}
	}
}

func TestLock(t *testing.T) {
	netnstest.Enter(t)
	first, err := Acquire(t.Context(), discard(), "", "state /one")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Acquire(t.Context(), discard(), "local", "x"); err == nil || !strings.Contains(err.Error(), "state /one") || !strings.Contains(err.Error(), "INSTANCE=") {
		t.Errorf("a second one of the same instance: %v", err)
	}
	if _, err := Acquire(t.Context(), discard(), "No!", "x"); err == nil {
		t.Error("an odd name was taken")
	}
	other, err := Acquire(t.Context(), discard(), "global", "x")
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	first.Close()
	again, err := Acquire(t.Context(), discard(), "local", "x")
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}
