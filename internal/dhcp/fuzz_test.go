package dhcp

import (
	"bytes"
	"encoding/json"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
)

// FuzzAnswer4 reads what may come from anybody on the LAN.
func FuzzAnswer4(f *testing.F) {
	d := &v4{station: station(1)}
	discover, err := dhcpv4.FromBytes(d.compose(discover, Lease{}, 0))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(proper(discover).ToBytes(), 24)
	f.Add(nak(discover).ToBytes(), -1)
	all := proper(discover)
	all.UpdateOption(dhcpv4.OptDNS(net.IP{9, 9, 9, 9}, net.IP{0, 0, 0, 0}))
	all.UpdateOption(dhcpv4.OptDomainName("lan\x00.example"))
	all.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{5, 0x78}))
	all.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClasslessStaticRoute, []byte{0, 10, 77, 0, 1, 12, 10, 80, 10, 77, 0, 2}))
	all.UpdateOption(dhcpv4.OptRenewTimeValue(time.Hour))
	all.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionDNSDomainSearchList, []byte("\x03lan\x07\x1b[2Jx y\x00\x01a\xc0\x00")))
	f.Add(all.ToBytes(), 24)
	all.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClasslessStaticRoute, []byte{33, 10, 77}))
	f.Add(all.ToBytes(), 24)
	f.Fuzz(func(t *testing.T, b []byte, bits int) {
		if len(b) >= 34 { // what the filter and the first look would keep out
			b = slices.Clone(b)
			clear(b[4:8])
			copy(b[28:34], d.station.MAC[:])
		}
		checkAnswer(t, d, b, bits)
	})
}

// FuzzAnswer6 is the same for DHCPv6.
func FuzzAnswer6(f *testing.F) {
	d := &v6{station: station(1)}
	ia := &dhcpv6.OptIANA{IaId: d.iaid(), T1: time.Minute, T2: time.Hour}
	ia.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP("fd77::5"), ValidLifetime: 0})
	ia.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP("fd77::6"), ValidLifetime: 2 * time.Minute})
	for _, status := range []iana.StatusCode{iana.StatusSuccess, iana.StatusNoAddrsAvail} {
		for _, kind := range []dhcpv6.MessageType{dhcpv6.MessageTypeAdvertise, dhcpv6.MessageTypeReply} {
			m := &dhcpv6.Message{MessageType: kind}
			m.AddOption(raw(dhcpv6.OptionServerID, []byte{0, 5, 1}))
			m.AddOption(&dhcpv6.OptStatusCode{StatusCode: status, StatusMessage: "no\nmore"})
			m.AddOption(ia)
			m.AddOption(dhcpv6.OptDNS(net.ParseIP("fd77::1")))
			f.Add(m.ToBytes(), 64)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, bits int) {
		if len(b) >= 4 {
			b = slices.Clone(b)
			clear(b[1:4])
			id := append([]byte{0, byte(dhcpv6.OptionClientID), 0, byte(len(d.station.DUID))}, d.station.DUID...)
			b = slices.Insert(b, 4, id...)
		}
		checkAnswer(t, d, b, bits)
	})
}

// checkAnswer expects of an answer that has a meaning that it can be kept, and
// of a lease that fits that a caller can plan with it.
func checkAnswer(t *testing.T, d dialect, b []byte, bits int) {
	t.Helper()
	a, err := d.read(b, max(min(bits, 128), -1))
	if err != nil {
		return
	}
	l := a.lease
	if a.verdict == refused || l.unfit(netip.Prefix{}) != "" {
		if bytes.ContainsAny([]byte(a.reason), "\n\x1b") {
			t.Errorf("refused because of %q", a.reason)
		}
		return
	}
	if l.Renew <= 0 || l.Renew > l.Rebind || l.Rebind > l.Valid {
		t.Errorf("T1 %s, T2 %s, whole time %s", l.Renew, l.Rebind, l.Valid)
	}
	if !l.Server.IsValid() && len(l.ServerDUID) == 0 {
		t.Error("a lease of nobody")
	}
	if len(l.Routes) > mostRoutes || len(l.DNS) > mostNames || len(l.Search) > mostNames {
		t.Errorf("%d routes, %d name servers, %d domains are kept", len(l.Routes), len(l.DNS), len(l.Search))
	}
	for _, s := range append([]string{l.Domain}, l.Search...) {
		if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) {
			t.Errorf("a domain is %q", s)
		}
	}
	text, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	var again Lease
	if err := json.Unmarshal(text, &again); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	if diff := cmp.Diff(l, again, byValue); diff != "" {
		t.Errorf("from disk (-want +got):\n%s", diff)
	}
}

// FuzzPayload takes datagrams apart that may be shorter than they say.
func FuzzPayload(f *testing.F) {
	f.Add(datagram(netip.IPv4Unspecified(), []byte("four")), uint8(0))
	f.Add(datagram(addr("fe80::1"), []byte("six")), uint8(3))
	f.Fuzz(func(t *testing.T, b []byte, cut uint8) {
		if p, ok := payload(b); ok && len(p)+udpLen+ipv4Len > len(b) {
			t.Errorf("%d bytes carry %d", len(b), len(p))
		}
		for _, from := range []netip.Addr{netip.IPv4Unspecified(), addr("fe80::1")} {
			d := datagram(from, b[:min(len(b), 1400)])
			p, ok := payload(append(d, make([]byte, cut)...)) // a short frame is padded
			if !ok || !bytes.Equal(p, b[:min(len(b), 1400)]) {
				t.Errorf("sent %x, read %x, %t", b, p, ok)
			}
			if cut > 0 {
				if _, ok := payload(d[:len(d)-min(int(cut), len(d))]); ok {
					t.Errorf("%x without its last %d bytes is whole", d, cut)
				}
			}
		}
	})
}
