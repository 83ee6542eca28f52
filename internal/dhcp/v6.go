package dhcp

import (
	"cmp"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/insomniacslk/dhcp/rfc1035label"
)

// v6 is DHCPv6 (RFC 8415) for one station and one transaction: one IA_NA of the
// host.
type v6 struct {
	station Station
	xid     [3]byte
}

// kinds6 are the messages for the kinds of question.
var kinds6 = map[kind]dhcpv6.MessageType{
	discover: dhcpv6.MessageTypeSolicit,
	request:  dhcpv6.MessageTypeRequest,
	renew:    dhcpv6.MessageTypeRenew,
	rebind:   dhcpv6.MessageTypeRebind,
	release:  dhcpv6.MessageTypeRelease,
	decline:  dhcpv6.MessageTypeDecline,
}

func (d *v6) compose(k kind, about Lease, waited time.Duration) []byte {
	m := dhcpv6.Message{MessageType: kinds6[k], TransactionID: d.xid}
	m.AddOption(raw(dhcpv6.OptionClientID, d.station.DUID))
	m.AddOption(dhcpv6.OptElapsedTime(min(waited, 0xffff*10*time.Millisecond)))
	if k != discover && k != rebind {
		m.AddOption(raw(dhcpv6.OptionServerID, about.ServerDUID))
	}
	ia := &dhcpv6.OptIANA{IaId: d.iaid()}
	if about.Address.IsValid() { // lifetimes are the server's to say
		ia.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: about.Address.Addr().AsSlice()})
	}
	m.AddOption(ia)
	if k == release || k == decline {
		return m.ToBytes()
	}
	m.AddOption(dhcpv6.OptRequestedOption(dhcpv6.OptionDNSRecursiveNameServer, dhcpv6.OptionDomainSearchList))
	if name := d.station.label(); name != "" {
		var flags uint8
		if d.station.Register {
			flags = 1 // S: the server enters it into the DNS (RFC 4704, 4.1)
		}
		m.AddOption(&dhcpv6.OptFQDN{Flags: flags, DomainName: &rfc1035label.Labels{Labels: []string{name}}})
	}
	return m.ToBytes()
}

func (d *v6) iaid() (id [4]byte) {
	binary.BigEndian.PutUint32(id[:], d.station.IAID)
	return id
}

// raw is an option as its bytes: the library would read a DUID, and write it
// again in its own way.
func raw(code dhcpv6.OptionCode, b []byte) dhcpv6.Option {
	return &dhcpv6.OptionGeneric{OptionCode: code, OptionData: b}
}

func (d *v6) read(b []byte, bits int) (answer, error) {
	m, err := dhcpv6.MessageFromBytes(b)
	if err != nil {
		return answer{}, err
	}
	client, server := m.GetOneOption(dhcpv6.OptionClientID), m.GetOneOption(dhcpv6.OptionServerID)
	if m.TransactionID != d.xid || client == nil || !slices.Equal(client.ToBytes(), d.station.DUID) {
		return answer{}, errElse
	}
	if server == nil || len(server.ToBytes()) == 0 {
		return answer{}, errors.New("it has no server identifier (option 2)")
	}
	a := answer{lease: Lease{ServerDUID: server.ToBytes()}}
	switch m.MessageType {
	case dhcpv6.MessageTypeAdvertise:
		a.verdict = offered
	case dhcpv6.MessageTypeReply:
		a.verdict = granted
	default:
		return answer{}, errElse
	}
	if a.refuse(m.Options.Status()) {
		return a, nil
	}
	for _, ia := range m.Options.IANA() {
		if ia.IaId != d.iaid() {
			continue
		}
		if a.refuse(ia.Options.Status()) {
			return a, nil
		}
		a.lease.read6(ia, bits)
	}
	if a.lease.Address.IsValid() && a.lease.Valid == 0 {
		a.verdict, a.reason = refused, "the address is no longer valid"
	}
	a.lease.DNS = some(addrs(m.Options.DNS()), mostNames)
	if list := m.Options.DomainSearchList(); list != nil {
		if a.lease.Search = names(list.Labels); len(a.lease.Search) > 0 {
			a.lease.Domain = a.lease.Search[0]
		}
	}
	return a, nil
}

// refuse makes an answer a refusal if its status says so.
func (a *answer) refuse(s *dhcpv6.OptStatusCode) bool {
	if s == nil || s.StatusCode == iana.StatusSuccess {
		return false
	}
	a.verdict, a.reason = refused, s.StatusCode.String()
	if text := printable(s.StatusMessage); text != "" {
		a.reason += ", " + text
	}
	return true
}

// read6 fills in the first address of an IA. After an address changed, the old
// one may be there with a lifetime of 0.
func (l *Lease) read6(ia *dhcpv6.OptIANA, bits int) {
	for _, x := range ia.Options.Addresses() {
		a, ok := netip.AddrFromSlice(x.IPv6Addr)
		if !ok || a.Is4In6() || x.Options.Status() != nil && x.Options.Status().StatusCode != iana.StatusSuccess {
			continue
		}
		if l.Address.IsValid() && (l.Valid > 0 || x.ValidLifetime == 0) {
			continue
		}
		l.Address = netip.PrefixFrom(a, bits)
		l.Renew, l.Rebind, l.Valid = ia.T1, ia.T2, x.ValidLifetime
		// The server leaves it to the client: by how long the address is preferred (RFC
		// 8415, 14.2).
		if p := x.PreferredLifetime; p > 0 && p < l.Valid {
			l.Renew, l.Rebind = cmp.Or(l.Renew, p/2), cmp.Or(l.Rebind, p/5*4)
		}
		l.times()
	}
}
