package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
)

// asked are the options that a lease has room for. Classless routes are asked
// for before routers (RFC 3442).
var asked = dhcpv4.OptParameterRequestList(
	dhcpv4.OptionSubnetMask,
	dhcpv4.OptionClasslessStaticRoute,
	dhcpv4.OptionRouter,
	dhcpv4.OptionDomainNameServer,
	dhcpv4.OptionDomainName,
	dhcpv4.OptionDNSDomainSearchList,
	dhcpv4.OptionInterfaceMTU,
	dhcpv4.OptionIPAddressLeaseTime,
	dhcpv4.OptionRenewTimeValue,
	dhcpv4.OptionRebindingTimeValue,
)

// v4 is DHCPv4 (RFC 2131) for one station and one transaction.
type v4 struct {
	station Station
	xid     [4]byte
}

func (d *v4) compose(k kind, about Lease, waited time.Duration) []byte {
	m := dhcpv4.DHCPv4{
		OpCode:        dhcpv4.OpcodeBootRequest,
		HWType:        iana.HWTypeEthernet,
		TransactionID: d.xid,
		NumSeconds:    uint16(min(waited/time.Second, 0xffff)),
		ClientHWAddr:  d.station.MAC[:],
		Options:       dhcpv4.Options{},
	}
	// In every message: a server that knows the station by it would take one
	// without for a stranger.
	m.UpdateOption(dhcpv4.OptClientIdentifier(d.clientID()))
	if k == release || k == decline { // nothing else (RFC 2131, table 5)
		m.UpdateOption(dhcpv4.OptServerIdentifier(about.Server.AsSlice()))
		if k == release {
			m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeRelease))
			m.ClientIPAddr = about.Address.Addr().AsSlice()
		} else {
			m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeDecline))
			m.UpdateOption(dhcpv4.OptRequestedIPAddress(about.Address.Addr().AsSlice()))
		}
		return m.ToBytes()
	}
	m.SetBroadcast()
	m.UpdateOption(asked)
	m.UpdateOption(dhcpv4.OptMaxMessageSize(1500)) // routes may need more than the 576 bytes of old
	if name := d.station.label(); name != "" {
		m.UpdateOption(dhcpv4.OptHostName(name))
		if d.station.Register {
			m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionFQDN, fqdn4(name)))
		}
	}
	if d.station.Vendor != "" {
		m.UpdateOption(dhcpv4.OptClassIdentifier(d.station.Vendor))
	}
	if about.Address.IsValid() {
		m.UpdateOption(dhcpv4.OptRequestedIPAddress(about.Address.Addr().AsSlice()))
	}
	if k == discover {
		m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeDiscover))
		return m.ToBytes()
	}
	// More time is asked for as after a reboot (INIT-REBOOT, RFC 2131, 4.3.2),
	// without ciaddr and server identifier: the answer to the usual form goes to the
	// address itself, which is the container's.
	m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeRequest))
	if k == request {
		m.UpdateOption(dhcpv4.OptServerIdentifier(about.Server.AsSlice()))
	}
	return m.ToBytes()
}

// fqdn4 asks the server to enter a name without its domain into the DNS (flag S),
// which is written as the DNS does (flag E) and without a final zero, as it is only
// the first part (RFC 4702, 3.1). The host name goes along for servers that do not
// know of it.
func fqdn4(label string) []byte {
	return append([]byte{1 | 4, 0, 0, byte(len(label))}, label...)
}

// clientID is that of RFC 4361, 6.1, where nobody has chosen another.
func (d *v4) clientID() []byte {
	switch {
	case d.station.ByMAC:
		return append([]byte{byte(iana.HWTypeEthernet)}, d.station.MAC[:]...)
	case d.station.ClientID != nil:
		return d.station.ClientID
	}
	return append(binary.BigEndian.AppendUint32([]byte{255}, d.station.IAID), d.station.DUID...)
}

func (d *v4) read(b []byte, bits int) (answer, error) {
	m, err := dhcpv4.FromBytes(b)
	if err != nil { // some leave out what ends the options
		if m, err = dhcpv4.FromBytes(append(slices.Clone(b), dhcpv4.OptionEnd.Code())); err != nil {
			return answer{}, errElse
		}
	}
	if m.OpCode != dhcpv4.OpcodeBootReply || m.TransactionID != d.xid || !slices.Equal(m.ClientHWAddr, d.station.MAC[:]) {
		return answer{}, errElse
	}
	server, ok := addr4(m.ServerIdentifier())
	if !ok {
		return answer{}, errors.New("it has no server identifier (option 54)")
	}
	a := answer{lease: Lease{Server: server}}
	switch m.MessageType() {
	case dhcpv4.MessageTypeNak:
		a.verdict, a.reason = refused, printable(m.Message())
		return a, nil
	case dhcpv4.MessageTypeOffer:
		a.verdict = offered
	case dhcpv4.MessageTypeAck:
		a.verdict = granted
	default:
		return answer{}, errElse
	}
	err = a.lease.read4(m, bits)
	if err != nil && m.Options.Has(dhcpv4.OptionOptionOverload) {
		err = fmt.Errorf("%w; what it says in the fields of boot files (option 52) is not read", err)
	}
	return a, err
}

// read4 fills in what an offer or an acknowledgement grants.
func (l *Lease) read4(m *dhcpv4.DHCPv4, bits int) error {
	if mask := m.SubnetMask(); mask != nil {
		bits, _ = mask.Size()
		if bits == 0 { // also of a mask with holes
			return fmt.Errorf("its mask %s (option 1) is none", net.IP(mask))
		}
	}
	a, ok := addr4(m.YourIPAddr)
	switch {
	case !ok:
		return errors.New("it has no address")
	case bits < 0 || bits > a.BitLen():
		return errors.New("it has no mask (option 1): give the subnet with --subnet")
	}
	l.Address = netip.PrefixFrom(a, bits)
	if l.Valid = m.IPAddressLeaseTime(0); l.Valid == 0 {
		return errors.New("it has no lease time (option 51)")
	}
	l.Renew, l.Rebind = m.IPAddressRenewalTime(0), m.IPAddressRebindingTime(0)
	l.times()

	if mtu, err := dhcpv4.GetUint16(dhcpv4.OptionInterfaceMTU, m.Options); err == nil && mtu >= 68 { // RFC 2132, 5.1
		l.MTU = int(mtu)
	}
	l.DNS = some(addrs(m.DNS()), mostNames)
	l.Domain = name(m.DomainName())
	if search := m.DomainSearch(); search != nil {
		l.Search = names(search.Labels)
	}
	if routes := m.ClasslessStaticRoute(); routes != nil {
		l.routes4(routes)
	} else if r := addrs(m.Router()); len(r) > 0 {
		l.Router = r[0]
	}
	return nil
}

// routes4 fills in the classless routes, the default one as the router.
func (l *Lease) routes4(routes []*dhcpv4.Route) {
	for _, r := range routes {
		ones, _ := r.Dest.Mask.Size()
		to, ok := netip.AddrFromSlice(r.Dest.IP)
		via, ok2 := netip.AddrFromSlice(r.Router)
		switch {
		case !ok || !ok2:
		case ones == 0 && !via.IsUnspecified():
			l.Router = via
		case len(l.Routes) == mostRoutes:
			l.MoreRoutes++
		default:
			l.Routes = append(l.Routes, Route{To: netip.PrefixFrom(to, ones).Masked(), Via: via})
		}
	}
}

// addr4 is an IPv4 address other than 0.0.0.0.
func addr4(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip.To4())
	return a, ok && !a.IsUnspecified()
}

func addrs(list []net.IP) []netip.Addr {
	var out []netip.Addr
	for _, ip := range list {
		if a, ok := netip.AddrFromSlice(ip); ok && !a.Unmap().IsUnspecified() {
			out = append(out, a.Unmap())
		}
	}
	return out
}

// some is a list that is not longer than most.
func some[T any](list []T, most int) []T { return list[:min(len(list), most)] }

// name is a domain's, "" for what is none: a name of hosts in the DNS is of letters,
// digits, dashes and dots, and no more than 253 bytes long; underscores are met.
// People paste it into a shell, so nothing else is taken.
func name(s string) string {
	bad := func(c rune) bool {
		return (c < 'a' || 'z' < c) && (c < 'A' || 'Z' < c) && (c < '0' || '9' < c) && !strings.ContainsRune("-._", c)
	}
	if s = printable(s); len(s) > 253 || strings.ContainsFunc(s, bad) || strings.HasPrefix(s, "-") {
		return ""
	}
	return s
}

// names are those of a search list that are names.
func names(list []string) (out []string) {
	for _, s := range some(list, mostNames) {
		if s = name(s); s != "" {
			out = append(out, s)
		}
	}
	return out
}

// printable is a server's text without what would garble a log or a file.
func printable(s string) string {
	return string(slices.DeleteFunc([]byte(s), func(c byte) bool { return c < ' ' || c > '~' }))
}
