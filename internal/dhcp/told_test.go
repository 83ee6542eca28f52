package dhcp

import (
	"bytes"
	"encoding/json"
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
