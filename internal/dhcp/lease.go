package dhcp

import (
	"fmt"
	"net/netip"
	"time"
)

// Lease is what a server granted, or in an offer would grant. As JSON it is
// part of a record that outlives the process.
type Lease struct {
	// Address has the server's mask (option 1). DHCPv6 knows none: there it has
	// that of the prefix that the address was asked for within.
	Address netip.Prefix
	// Server is the server identifier (option 54); of DHCPv6 there is
	// ServerDUID instead.
	Server     netip.Addr `json:",omitzero"`
	ServerDUID []byte     `json:",omitempty"`

	// Router is the default one; the zero Addr if there is none. Where a server
	// gives classless routes the default route among them counts and the router
	// option does not (RFC 3442).
	Router netip.Addr   `json:",omitzero"`
	MTU    int          `json:",omitzero"`  // bytes (option 26); 0 if not said
	Routes []Route      `json:",omitempty"` // the first ones; MoreRoutes is how many followed
	DNS    []netip.Addr `json:",omitempty"`
	Domain string       `json:",omitempty"` // option 15; of DHCPv6 the first of Search
	Search []string     `json:",omitempty"` // domains to search (option 119)

	MoreRoutes int `json:",omitempty"`

	// Granted is when the question was first sent that this answers: the times run
	// from there (RFC 2131, 4.4.1), so that the server's end is never before ours.
	Granted time.Time
	// After Renew (T1) the lease is to be extended, after Rebind (T2) by
	// whichever server, and after Valid it is over. One for ever has 2^32-1
	// seconds.
	Renew, Rebind, Valid time.Duration
}

// What is kept of what a server says: a lease is a record, and anybody on the LAN
// may answer.
const (
	mostRoutes = 64
	mostNames  = 16 // name servers, and domains to search
)

// Route is a classless route (RFC 3442). An unspecified Via (0.0.0.0) means
// that the destination is on the link.
type Route struct {
	To  netip.Prefix
	Via netip.Addr
}

// server names who granted the lease, in messages for people.
func (l *Lease) server() string {
	if l.Server.IsValid() {
		return l.Server.String()
	}
	return fmt.Sprintf("with DUID %x", l.ServerDUID)
}

// times sets T1 and T2 to their defaults (RFC 2131, 4.4.5) where the server
// left them out, or said what cannot be.
func (l *Lease) times() {
	if l.Rebind <= 0 || l.Rebind > l.Valid {
		l.Rebind = l.Valid / 8 * 7
	}
	if l.Renew <= 0 || l.Renew > l.Rebind {
		l.Renew = min(l.Valid/2, l.Rebind)
	}
}

// unfit says why a station cannot have the address of a lease, or must not
// because it is outside the prefix that was asked for; "" if it can.
func (l *Lease) unfit(within netip.Prefix) string {
	a := l.Address.Addr()
	switch {
	case !l.Address.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback():
		return "which is not an address for a station"
	case within.IsValid() && !within.Contains(a):
		return "which is outside " + within.Masked().String()
	case a == l.Router:
		return "which is its router's"
	case edge(l.Address) || within.IsValid() && edge(netip.PrefixFrom(a, within.Bits())):
		return "which is the subnet's own or its broadcast address"
	}
	return ""
}

// edge reports whether the address of a prefix is its first or last. The last
// of an IPv6 prefix is like others, and prefixes of two addresses have neither
// (RFC 3021, RFC 6164).
func edge(p netip.Prefix) bool {
	a := p.Addr()
	if a.BitLen()-p.Bits() < 2 {
		return false
	}
	return a == p.Masked().Addr() || a.Is4() && !p.Contains(a.Next())
}
