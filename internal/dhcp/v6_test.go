package dhcp

import (
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
)

// reply6 is a reply to station 1, with what a test changes in it.
func reply6(change func(*dhcpv6.Message, *dhcpv6.OptIANA)) []byte {
	d := &v6{station: station(1)}
	ia := &dhcpv6.OptIANA{IaId: d.iaid(), T1: time.Minute, T2: 90 * time.Second}
	ia.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP("fd77::5"), ValidLifetime: 2 * time.Minute})
	m := &dhcpv6.Message{MessageType: dhcpv6.MessageTypeReply}
	m.AddOption(raw(dhcpv6.OptionClientID, d.station.DUID))
	m.AddOption(raw(dhcpv6.OptionServerID, []byte{0, 5, 9}))
	change(m, ia)
	m.AddOption(ia)
	return m.ToBytes()
}

func TestAnswer6(t *testing.T) {
	five := Lease{
		Address: prefix("fd77::5/64"), ServerDUID: []byte{0, 5, 9},
		Renew: time.Minute, Rebind: 90 * time.Second, Valid: 2 * time.Minute,
	}
	six := five
	six.Address = prefix("fd77::6/64")
	left := five
	left.Renew, left.Rebind = 25*time.Second, 40*time.Second
	nobody := Lease{ServerDUID: five.ServerDUID}
	ended := nobody
	ended.Address, ended.Renew, ended.Rebind = five.Address, 0, 0
	for _, tc := range []struct {
		name   string
		change func(*dhcpv6.Message, *dhcpv6.OptIANA)
		want   answer
		wrong  bool
	}{
		{name: "granted", change: func(*dhcpv6.Message, *dhcpv6.OptIANA) {}, want: answer{verdict: granted, lease: five}},
		{name: "offered", want: answer{verdict: offered, lease: five},
			change: func(m *dhcpv6.Message, _ *dhcpv6.OptIANA) { m.MessageType = dhcpv6.MessageTypeAdvertise }},
		{name: "an old address beside the new one", want: answer{verdict: granted, lease: six},
			change: func(_ *dhcpv6.Message, ia *dhcpv6.OptIANA) {
				ia.Options.Addresses()[0].ValidLifetime = 0
				ia.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP("fd77::6"), ValidLifetime: 2 * time.Minute})
			}},
		{name: "times left to the client", want: answer{verdict: granted, lease: left},
			change: func(_ *dhcpv6.Message, ia *dhcpv6.OptIANA) {
				ia.T1, ia.T2 = 0, 0
				ia.Options.Addresses()[0].PreferredLifetime = 50 * time.Second
			}},
		{name: "no longer valid", want: answer{verdict: refused, lease: ended, reason: "the address is no longer valid"},
			change: func(_ *dhcpv6.Message, ia *dhcpv6.OptIANA) { ia.Options.Addresses()[0].ValidLifetime = 0 }},
		{name: "no addresses", want: answer{verdict: refused, lease: nobody, reason: "NoAddrsAvail, sorry"},
			change: func(_ *dhcpv6.Message, ia *dhcpv6.OptIANA) {
				ia.Options.Add(&dhcpv6.OptStatusCode{StatusCode: iana.StatusNoAddrsAvail, StatusMessage: "sor\nry"})
			}},
		{name: "failed altogether", want: answer{verdict: refused, lease: nobody, reason: "UnspecFail"},
			change: func(m *dhcpv6.Message, _ *dhcpv6.OptIANA) {
				m.AddOption(&dhcpv6.OptStatusCode{StatusCode: iana.StatusUnspecFail})
			}},
		{name: "another station's", want: answer{verdict: granted, lease: nobody},
			change: func(_ *dhcpv6.Message, ia *dhcpv6.OptIANA) { ia.IaId[3]++ }},
		{name: "transaction ID", wrong: true, change: func(m *dhcpv6.Message, _ *dhcpv6.OptIANA) { m.TransactionID[2]++ }},
		{name: "another host's", wrong: true, change: func(m *dhcpv6.Message, _ *dhcpv6.OptIANA) {
			m.UpdateOption(raw(dhcpv6.OptionClientID, []byte{0, 5, 1}))
		}},
		{name: "without a client", wrong: true, change: func(m *dhcpv6.Message, _ *dhcpv6.OptIANA) { m.Options.Del(dhcpv6.OptionClientID) }},
		{name: "without a server", wrong: true, change: func(m *dhcpv6.Message, _ *dhcpv6.OptIANA) { m.Options.Del(dhcpv6.OptionServerID) }},
		{name: "a question", wrong: true, change: func(m *dhcpv6.Message, _ *dhcpv6.OptIANA) { m.MessageType = dhcpv6.MessageTypeRequest }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := &v6{station: station(1)}
			got, err := d.read(reply6(tc.change), 64)
			if (err != nil) != tc.wrong {
				t.Fatalf("error %v; want one: %t", err, tc.wrong)
			}
			if diff := cmp.Diff(tc.want, got, byValue, cmp.AllowUnexported(answer{})); diff != "" && !tc.wrong {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// Each question names the station, and its server where that is the one asked.
func TestQuestions6(t *testing.T) {
	s := station(1)
	s.Name = "web_1"
	d := &v6{station: s, xid: [3]byte{1, 2, 3}}
	l := Lease{Address: prefix("fd77::5/64"), ServerDUID: []byte{0, 5, 9}}
	for k, want := range map[kind]struct {
		name           string
		server, naming bool
	}{
		discover: {"SOLICIT", false, true},
		request:  {"REQUEST", true, true},
		renew:    {"RENEW", true, true},
		rebind:   {"REBIND", false, true},
		release:  {"RELEASE", true, false},
		decline:  {"DECLINE", true, false},
	} {
		m, err := dhcpv6.MessageFromBytes(d.compose(k, l, 3*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		ia := m.Options.OneIANA()
		if m.MessageType.String() != want.name || m.TransactionID != d.xid || (m.Options.ServerID() != nil) != want.server ||
			(m.Options.FQDN() != nil) != want.naming || string(m.Options.ClientID().ToBytes()) != string(s.DUID) ||
			m.Options.ElapsedTime() != 3*time.Second || ia.IaId != d.iaid() || !ia.Options.OneAddress().IPv6Addr.Equal(net.ParseIP("fd77::5")) {
			t.Errorf("%s: %s", want.name, m.Summary())
		}
	}
}

func TestNamesBecomeLabels(t *testing.T) {
	for name, want := range map[string]string{
		"":           "",
		"web":        "web",
		"Web_1":      "web-1",
		"web.1.abcd": "web-1-abcd",
		"--_.":       "",
		"-a-":        "a",
		"naïve":      "na-ve",
		"x1234567890123456789012345678901234567890123456789012345678901-34": "x1234567890123456789012345678901234567890123456789012345678901",
	} {
		if got := (&Station{Name: name}).label(); got != want {
			t.Errorf("%q is %q, want %q", name, got, want)
		}
	}
}
