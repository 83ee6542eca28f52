// Package dhcp leases addresses from the DHCP servers of a LAN, for stations
// (containers) that this host speaks for.
//
// It owns the messages of DHCPv4 (RFC 2131) and DHCPv6 (RFC 8415), and for as
// long as a call lasts one packet socket on the link to the LAN. It never sets an
// address, keeps a lease, or decides when one is extended: a [Lease] is a plain
// value that the caller keeps, and the time for [Client.Extend] is the caller's
// to watch.
//
// A station need not exist yet. Its MAC is named in the messages (chaddr), which
// are sent with the link's own, and answers are asked to be broadcast: nothing
// is sent to or from the address that is leased. Stations are known to servers
// by client identifiers of RFC 4361, in every message. See docs/adr/0019.
//
// The link may be the parent of macvlan or ipvlan networks or a bridge. What a
// parent sends never reaches the links above it, so a server in a container on
// the same parent, or on the host itself, is not heard.
//
// Sockets are opened in the network namespace of the calling thread. A call
// waits on its caller's goroutine and leaves none behind. Calls about different
// stations do not meet but for a moment's mutex: a [Client] knows when each link's
// server last answered. Of one station there should be one call at a time, else
// its server decides.
//
// Entry points: [Client.Acquire], [Client.Extend], [Client.Release],
// [Client.Decline]; [Client.Offer] asks what a LAN has.
package dhcp
