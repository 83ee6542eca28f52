package dhcp

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
)

// TestToldOptions: what a user has servers told is in each message that has room for
// it, also after the station was read from disk.
func TestToldOptions(t *testing.T) {
	plain, s := station(1), station(1)
	plain.Name, s.Name = "Web_1", "Web_1"
	s.ClientID, s.Vendor, s.Register = []byte("\x00cam"), "docker", true
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	byMAC := station(1)
	byMAC.ByMAC = true
	lease := Lease{Address: prefix("10.77.0.5/24"), Server: addr("10.77.0.1")}
	for _, k := range []kind{discover, request, renew, rebind, release, decline} {
		get := func(s Station, code dhcpv4.OptionCode) []byte {
			m, err := dhcpv4.FromBytes((&v4{station: s}).compose(k, lease, 0))
			if err != nil {
				t.Fatal(err)
			}
			return m.Options.Get(code)
		}
		check := func(what string, got []byte, want string) {
			t.Helper()
			if !bytes.Equal(got, []byte(want)) {
				t.Errorf("%v, %s: %q, want %q", k, what, got, want)
			}
		}
		check("client identifier", get(s, dhcpv4.OptionClientIdentifier), "\x00cam")
		check("client identifier of a MAC address", get(byMAC, dhcpv4.OptionClientIdentifier), "\x01"+string(byMAC.MAC[:]))
		check("no vendor class", get(plain, dhcpv4.OptionClassIdentifier), "")
		check("no name", get(plain, dhcpv4.OptionFQDN), "")
		if k == release || k == decline {
			check("vendor class", get(s, dhcpv4.OptionClassIdentifier), "")
			continue
		}
		check("vendor class", get(s, dhcpv4.OptionClassIdentifier), "docker")
		check("host name", get(s, dhcpv4.OptionHostName), "web-1")
		check("name to register", get(s, dhcpv4.OptionFQDN), "\x05\x00\x00\x05web-1") // E and S; a part of a name
	}
	for _, s := range []Station{plain, s} {
		m, err := dhcpv6.MessageFromBytes((&v6{station: s}).compose(discover, Lease{}, 0))
		if err != nil {
			t.Fatal(err)
		}
		var want uint8
		if s.Register {
			want = 1
		}
		if f := m.Options.FQDN(); f == nil || f.Flags != want {
			t.Errorf("DHCPv6, register %t: %+v", s.Register, f)
		}
	}
}

// TestWhatAnybodySays: a server that says too much, or what would move the cursor of a
// terminal, does not get it into records.
func TestWhatAnybodySays(t *testing.T) {
	d := &v4{station: station(1)}
	question, err := dhcpv4.FromBytes(d.compose(discover, Lease{}, 0))
	if err != nil {
		t.Fatal(err)
	}
	m := proper(question)
	var routes, servers []byte
	for i := range 400 {
		routes = append(routes, 24, 100, byte(64+i/250), byte(i%250), 10, 77, 0, 1)
		servers = append(servers, 9, 9, byte(i/250), byte(i%250+1))
	}
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClasslessStaticRoute, routes))
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionDomainNameServer, servers))
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionDomainName, []byte("lan\x1b[2J.\xff\n\x00example")))
	search := []byte("\x07\x1b[2Jlan\x00\x03a b\x00\x01x\xc0\x00") // an escape, a space, a pointer
	for range 100 {
		search = append(search, "\x03lan\x00"...)
	}
	m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionDNSDomainSearchList, search))
	a, err := d.read(m.ToBytes(), 24)
	if err != nil {
		t.Fatal(err)
	}
	l := a.lease
	if len(l.Routes) != mostRoutes || l.MoreRoutes != 400-mostRoutes || len(l.DNS) != mostNames || len(l.Search) > mostNames || len(l.Search) == 0 {
		t.Errorf("kept %d routes and %d more, %d name servers, domains %q", len(l.Routes), l.MoreRoutes, len(l.DNS), l.Search)
	}
	if l.Domain != "" { // what is left of it has a bracket
		t.Errorf("domain %q", l.Domain)
	}
	for _, s := range l.Search {
		if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) {
			t.Errorf("domain to search %q", s)
		}
	}
	if text, err := json.Marshal(l); err != nil || len(text) > 8<<10 {
		t.Errorf("the record of the lease has %d bytes, %v", len(text), err)
	}
}
