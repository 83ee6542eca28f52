package datapath

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
)

// frame reads a hex dump with spaces.
func frame(tb testing.TB, s string) []byte {
	tb.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// The questions, byte by byte as the RFCs have them.
func TestProbeQuestions(t *testing.T) {
	want := frame(t, "0001 0800 06 04 0001 024200000001 00000000 000000000000 0a090002")
	if got := arpProbe(mac(1), netip.MustParseAddr("10.9.0.2")); string(got) != string(want) {
		t.Errorf("ARP probe\n%x, want\n%x", got, want)
	}
	// The checksum is what tcpdump calls correct.
	want = frame(t, "60000000 0018 3a ff 00000000000000000000000000000000 ff0200000000000000000001ff340002"+
		"87 00 6b32 00000000 fd090000000000000000000012340002")
	if got := solicitation(netip.MustParseAddr("fd09::1234:2")); string(got) != string(want) {
		t.Errorf("solicitation\n%x, want\n%x", got, want)
	}
}

func TestARPClaims(t *testing.T) {
	a, other, none := netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("10.9.0.3"), netip.IPv4Unspecified()
	for _, c := range []struct {
		name string
		m    arp
		want bool
	}{
		{"reply", arp{op: arpReply, from: a, to: none}, true},
		{"request of the holder", arp{op: arpRequest, from: a, to: other}, true},
		{"announcement", arp{op: arpRequest, from: a, to: a}, true},
		{"another's probe", arp{op: arpRequest, from: none, to: a}, true},
		{"another's probe for another", arp{op: arpRequest, from: none, to: other}, false},
		{"somebody looks for it", arp{op: arpRequest, from: other, to: a}, false},
		{"reply of another", arp{op: arpReply, from: other, to: none}, false},
		{"reply to it", arp{op: arpReply, from: other, to: a}, false},
		{"reverse ARP", arp{op: 3, from: a, to: a}, false},
	} {
		if got := c.m.claims(a); got != c.want {
			t.Errorf("%s: %t, want %t", c.name, got, c.want)
		}
	}
}

func TestNeighbourClaims(t *testing.T) {
	a, other, none := netip.MustParseAddr("fd09::2"), netip.MustParseAddr("fd09::3"), netip.IPv6Unspecified()
	for _, c := range []struct {
		name string
		m    neighbour
		want bool
	}{
		{"advertisement", neighbour{typeAdvert, a, a}, true},
		{"advertisement of a proxy", neighbour{typeAdvert, other, a}, true},
		{"another's question", neighbour{typeSolicit, none, a}, true},
		{"question of the holder", neighbour{typeSolicit, a, other}, true},
		{"another's question for another", neighbour{typeSolicit, none, other}, false},
		{"somebody looks for it", neighbour{typeSolicit, other, a}, false},
		{"advertisement for another", neighbour{typeAdvert, other, other}, false},
	} {
		if got := c.m.claims(a); got != c.want {
			t.Errorf("%s: %t, want %t", c.name, got, c.want)
		}
	}
}

// A packet is read whole or not at all, and every field that says what it is
// counts.
func TestProbeParsersRefuse(t *testing.T) {
	isARP := func(b []byte) bool { _, ok := parseARP(b); return ok }
	isNeighbour := func(b []byte) bool { _, ok := parseNeighbour(b); return ok }
	for _, c := range []struct {
		name  string
		good  []byte
		reads func([]byte) bool
		at    []int
	}{
		{"ARP", arpProbe(mac(1), netip.MustParseAddr("10.9.0.2")), isARP, []int{0, 1, 2, 3, 4, 5}},
		{"neighbour", solicitation(netip.MustParseAddr("fd09::2")), isNeighbour, []int{0, 5, 6, 7, 40, 41}},
	} {
		if !c.reads(c.good) || !c.reads(append(c.good, 0, 0)) {
			t.Errorf("%s: not read", c.name)
		}
		for n := range c.good {
			if c.reads(c.good[:n]) {
				t.Errorf("%s: read from %d bytes", c.name, n)
			}
		}
		for _, i := range c.at {
			c.good[i] ^= 0x10
			if c.reads(c.good) {
				t.Errorf("%s: read with byte %d wrong", c.name, i)
			}
			c.good[i] ^= 0x10
		}
	}
}

func FuzzParseARP(f *testing.F) {
	good := arpProbe(mac(1), netip.MustParseAddr("10.9.0.2"))
	f.Add(good)
	f.Add(good[:27])
	f.Add([]byte{})
	f.Add(frame(f, "0001 0800 06 04 0002 024200000001 0a090002 024200000002 00000000 0000"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, ok := parseARP(b)
		if !ok {
			return
		}
		if len(b) < arpLen || !m.from.Is4() || !m.to.Is4() {
			t.Errorf("%x gives %+v", b, m)
		}
		if m.claims(netip.MustParseAddr("10.9.0.2")) && m.from.String() != "10.9.0.2" && m.to.String() != "10.9.0.2" {
			t.Errorf("%x claims 10.9.0.2", b)
		}
	})
}

func FuzzParseNeighbour(f *testing.F) {
	good := solicitation(netip.MustParseAddr("fd09::2"))
	f.Add(good)
	f.Add(good[:63])
	f.Add([]byte{})
	f.Add(append(solicitation(netip.MustParseAddr("fe80::1")), 14, 1, 1, 2, 3, 4, 5, 6)) // with a nonce
	f.Fuzz(func(t *testing.T, b []byte) {
		m, ok := parseNeighbour(b)
		if !ok {
			return
		}
		if len(b) < neighbourLen || !m.from.Is6() || !m.target.Is6() || m.kind != typeSolicit && m.kind != typeAdvert {
			t.Errorf("%x gives %+v", b, m)
		}
		if m.claims(netip.MustParseAddr("fd09::2")) && m.from.String() != "fd09::2" && m.target.String() != "fd09::2" {
			t.Errorf("%x claims fd09::2", b)
		}
	})
}
