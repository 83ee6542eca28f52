package overlay

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func someMessage() message {
	six := netip.MustParseAddr("fd00::1")
	p := part(1, 5, Endpoint{MAC: mac(1), Addrs: []netip.Addr{addr(1), six}, Claim: 7}, Endpoint{MAC: mac(2), Claim: 8})
	p.Version, p.VTEP = 9, six
	p.Subnets = append(p.Subnets, netip.MustParsePrefix("fd00::/64"))
	p.Ranges = []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24"), netip.MustParsePrefix("fd00::/64")}
	return message{
		From: "b", At: netip.AddrPortFrom(six, GossipPort), Query: 1, Hello: true, VNIs: []uint32{1, maxVNI}, Answer: 3, Acks: []ack{{5, 6}},
		Parts: []Known{{Part: p}, {Part: Part{Host: "c", Name: "host-2", VNI: 1, Version: 4, Gone: true}, Silent: time.Hour}},
	}
}

func TestMessage(t *testing.T) {
	passed := someMessage()
	passed.Loud, passed.To, passed.Via = true, "c", "d"
	passed.Parts[1].Guessed = true
	for _, m := range []message{{From: "b"}, someMessage(), passed} {
		b := m.encode()
		got, err := decode(append(b, "what a later release adds"...))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(m, got, ips); diff != "" {
			t.Fatal(diff)
		}
		noRanges := m
		noRanges.Parts = slices.Clone(m.Parts)
		for i := range noRanges.Parts {
			noRanges.Parts[i].Part.Ranges = nil
		}
		noRanges.Loud, noRanges.To, noRanges.Via = false, "", ""
		noWay := m
		noWay.Loud, noWay.To, noWay.Via = false, "", ""
		// What is sent by releases that know no ranges, and none of who passes on.
		older := map[int]message{len(noWay.encode()): noWay, len(noRanges.encode()): noRanges}
		for n := range b {
			if want, ok := older[n]; ok {
				if got, err := decode(b[:n]); err != nil || cmp.Diff(want, got, ips) != "" {
					t.Fatalf("a message of an older release: %v", err)
				}
				continue
			}
			if _, err := decode(b[:n]); err == nil {
				t.Fatalf("the first %d of %d bytes are taken for a message", n, len(b))
			}
		}
	}
	if _, err := decode([]byte{wireVersion + 1, 1, 'b'}); !errors.Is(err, errWire) {
		t.Fatalf("message of another version: %v", err)
	}
	if _, err := decode(make([]byte, mostState+1)); err == nil {
		t.Fatal("a message of any length is decoded")
	}
}

// TestMessageRanges refuses ranges of no part, and ranges that are longer than the
// message.
func TestMessageRanges(t *testing.T) {
	b := message{From: "b"}.encode()
	for _, tail := range [][]byte{
		{tagRanges, 0, 0, 0, 5, 0, 0, 0, 0, 0},       // of the first part, and there is none
		{tagRanges, 0xff, 0xff, 0xff, 0xff},          // 4 GiB
		{tagRanges, 0, 0, 0, 6, 0, 0, 0, 0, 1, 4, 1}, // an address that ends in the middle
		{tagRanges, 0, 0},
	} {
		if m, err := decode(append(bytes.Clone(b), tail...)); err == nil {
			t.Errorf("%v is taken for %v", tail, m)
		}
	}
}

// TestMessageSize: 20 endpoints fit into a packet.
func TestMessageSize(t *testing.T) {
	var list []Endpoint
	for i := range 20 {
		list = append(list, Endpoint{MAC: mac(i + 1), Addrs: []netip.Addr{addr(i)}, Claim: 1})
	}
	n := len(message{From: id(0), Parts: []Known{{Part: part(0, 1, list...)}}}.encode())
	t.Logf("part of 20 endpoints: %d bytes", n)
	if n > packetSpace {
		t.Fatalf("%d bytes are more than the %d of a packet", n, packetSpace)
	}
}

func FuzzMessage(f *testing.F) {
	f.Add(someMessage().encode())
	f.Add(message{From: "b", Query: 1}.encode())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		m, err := decode(b)
		if !bytes.Equal(before, b) {
			t.Fatal("decode writes to its input")
		}
		if err != nil {
			return
		}
		again, err := decode(m.encode())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(m, again, ips); diff != "" {
			t.Fatal(diff)
		}
		// Nothing that can be decoded may harm a table.
		table := tableAt("a", newClock())
		table.Set(part(0, 5))
		for _, k := range m.Parts {
			_, _ = table.Merge(k.Part, k.Silent)
		}
		table.View(5)
		table.Expire()
	})
}
