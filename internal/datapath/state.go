package datapath

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// State is a set of kernel objects that should exist. It is a plain value: it
// is computed from records, compared, and given to [Kernel.Ensure] or
// [Kernel.Remove]. The zero State asks for nothing.
type State struct {
	Bridges    []Bridge
	VXLANs     []VXLAN
	Parents    []Parent
	Children   []Child
	Routes     []Route
	Veths      []Veth
	Forwards   []Forward
	Neighbours []Neighbour
	Shortcuts  []Shortcut
	Elements   []Element
	Sockets    []Socket
	// NoShortcuts is only ever set by Owned: the kernel has none, and Minus
	// does not miss them.
	NoShortcuts bool
	// Forward4 and Forward6 ask for IP forwarding in the host's namespace.
	// Remove never turns it off again: others may rely on it by then.
	Forward4, Forward6 bool
	// Hook asks for the accept rule in the FORWARD chain that others own,
	// without which their policy DROP would win over our table.
	Hook bool
}

// MAC is a 48-bit hardware address that can be compared. The zero MAC means
// "the kernel's choice".
type MAC [6]byte

// String prints the usual colon form, or "" for the zero MAC.
func (m MAC) String() string {
	if m == (MAC{}) {
		return ""
	}
	return net.HardwareAddr(m[:]).String()
}

// MarshalText implements encoding.TextMarshaler.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler; "" is the zero MAC.
func (m *MAC) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*m = MAC{}
		return nil
	}
	hw, err := net.ParseMAC(string(b))
	if err != nil || len(hw) != 6 {
		return fmt.Errorf("hardware address %q is not six bytes", b)
	}
	copy(m[:], hw)
	return nil
}

// Bridge is a Linux bridge.
type Bridge struct {
	Name string
	MAC  MAC
	MTU  int // bytes
	// Addrs are the bridge's own addresses, the gateways of its subnets. A bridge
	// without any is a switch only: the host does not speak on it.
	Addrs []netip.Prefix
	// NoSnooping sends multicast to all ports whoever has joined (IGMP and MLD
	// snooping off), as one with a VXLAN port has to: reports of one host's
	// containers are not to decide for the others'. Without it the setting is
	// left as it is.
	NoSnooping bool
	// Existing bridges were made by somebody else: Ensure only checks that
	// there is one, nothing changes or removes it.
	Existing bool
	// Down is only ever set by Owned: somebody set the bridge down. So is Open:
	// nothing but the table keeps 127.0.0.0/8 out, as with older bridges of ours.
	Down, Open bool
}

// VXLAN is a VXLAN device (RFC 7348), a port of our own bridge Master. It finds
// other hosts by Forwards alone: it joins no group and learns nothing.
type VXLAN struct {
	Name, Master string
	VNI          uint32     // VXLAN network identifier, 24 bits
	Port         uint16     // UDP port, here and on the other hosts
	Local        netip.Addr // the host's address on the underlay, and its family
	MTU          int        // bytes
	MAC          MAC
	Down         bool // only ever set by Owned: somebody set the device down
	// Altered is only ever set by Owned: the device or its bridge port learns
	// addresses, or the port does not suppress neighbour requests.
	Altered bool
}

// Forward is where the VXLAN device Link sends frames for a hardware address:
// to the host with the address VTEP. The zero MAC is a flood entry: that host
// gets a copy of what is for everybody or for nobody known. Any other is also a
// static entry of the bridge, so that frames for it do not go to local ports.
//
// Ensure replaces the VTEP of a MAC. Remove leaves one alone that another VTEP
// has replaced.
type Forward struct {
	Link string
	MAC  MAC
	VTEP netip.Addr
	// Altered is only ever set by Owned: the entry of the device or the one of
	// its bridge is lacking, or has another state than we give it.
	Altered bool
}

// Neighbour is a permanent neighbour entry of the bridge Link, from which it
// answers in place of containers on other hosts. Ensure replaces the MAC of an
// address; Remove goes by the address alone.
type Neighbour struct {
	Link string
	Addr netip.Addr
	MAC  MAC
}

// Shortcut is a part of the way past the bridge of an overlay network: frames
// between a container and one on another host, with which the host does nothing
// but switch them, go straight from the one's link to the other's. Whatever is
// not led past goes by the bridge, which lacks nothing without it.
//
// With the zero MAC it is a hook: what comes in by Link is looked up, if that is
// Tunnel among the containers of this host, if it is a container's among those
// of others. With any other it is an entry: frames for it leave by Link, which is
// Tunnel for a container on another host.
type Shortcut struct {
	Tunnel string // the network's VXLAN device
	Link   string
	MAC    MAC
	// Altered is only ever set by Owned: the hook is lacking or does something
	// else, or the entry leads elsewhere.
	Altered bool
}

// Veth is a pair whose host end, Name, is a port of Master. The other end,
// Peer, is moved into the container by the engine and not looked for again;
// Owned names it only while it has not been moved.
type Veth struct {
	Name, Peer string
	Master     string
	MTU        int // bytes, both ends
	PeerMAC    MAC
	Isolated   bool // no traffic to other isolated ports of the bridge
	Hairpin    bool // frames may leave by the port they came in on
	Down       bool // only ever set by Owned: somebody set the host end down
}

// Parent is a link that macvlan and ipvlan sub-interfaces hang on: a VLAN
// sub-interface, a dummy interface that leads nowhere, or a link of others.
type Parent struct {
	Name string
	// Lower is the link below a VLAN sub-interface (IEEE 802.1Q, tag 0x8100).
	// With no Lower the link is a dummy.
	Lower string
	VLAN  int // VLAN ID, 1 to 4094
	// Existing links were made by somebody else: Ensure only checks that there
	// is one, nothing changes or removes it.
	Existing bool
	Down     bool // only ever set by Owned: somebody set the link down
	// Narrow is only ever set by Owned: a VLAN sub-interface has not the MTU of the
	// link below it. The kernel takes it along when that shrinks, not when it grows.
	Narrow bool
}

// Child is a macvlan or ipvlan sub-interface. One that does not stay is moved
// into a container by the engine and not looked for again; Owned shows it
// before that, and after the engine has moved it back.
type Child struct {
	Name, Parent string
	Kind         string // "macvlan" or "ipvlan"
	// Mode is bridge, private, vepa or passthru for macvlan, l2, l3 or l3s for
	// ipvlan; Flag is bridge, private or vepa, for ipvlan only.
	Mode, Flag string
	MTU        int // bytes, at most the parent's; 0 is the parent's
	MAC        MAC // zero for ipvlan, which has its parent's
	// Stays is the host's own sub-interface, by which it reaches the others:
	// up, with these addresses, and deaf to everybody but those that a Route
	// leads to.
	Stays bool
	Addrs []netip.Prefix
	// Down and Open are only ever set by Owned, of one that stays; see Bridge. So is
	// Full: the MTU is the parent's.
	Down, Open, Full bool
}

// Route leads from the host to one address of a container by the host's own
// sub-interface.
type Route struct {
	Link string
	To   netip.Addr
	// MAC is the container's, kept as a permanent neighbour entry so that the
	// host never asks: its question would tell the LAN a second hardware
	// address for the host, and an ipvlan's answer would come out of the parent.
	// Zero is Link's own, which all ipvlans of a parent share.
	MAC MAC
	// Src is the source address of what the host sends; the zero Addr lets
	// Ensure choose one of From's, the parent.
	Src  netip.Addr
	From string
}

// Set names one set or map of the nftables table; see firewall.go for the
// rules that look it up.
type Set string

// The sets, with the fields of Element that they use. A set whose key holds
// an address exists once per family; the address tells which is meant.
const (
	SetBridges    Set = "bridges"    // Link: bridges whose containers are kept apart from all other networks
	SetPass       Set = "pass"       // Link, Out: forwarding from Link to Out is allowed (ICC: the bridge twice)
	SetInternal   Set = "internal"   // Link: nothing is forwarded in or out
	SetOpen       Set = "open"       // Link, Net (0.0.0.0/0 or ::/0, the family): reachable from outside without a published port
	SetRouted     Set = "routed"     // Link, Net (as SetOpen): echo requests from outside are let in
	SetExposed    Set = "exposed"    // Net (host), Proto, Port: a port reachable from outside without translation
	SetTrusted    Set = "trusted"    // Link, Net (host), Proto, Port: as SetExposed, but only for what comes in by Link
	SetMasquerade Set = "masquerade" // Net: source subnet translated to the address of the way out
	SetSNAT       Set = "snat"       // Net, To: source subnet translated to a fixed address
	SetHairpin    Set = "hairpin"    // Net, Link: subnet and its bridge; translated destinations inside get the bridge's source address
	SetBeside     Set = "beside"     // Net, To: subnet of another network of the container with the address To, which would answer it there; translated, it gets the bridge's source address
	SetHome       Set = "home"       // Net, Link: subnet and its bridge that is not ours; what leaves by it keeps its source address
	SetPublished  Set = "published"  // Net (host address, or 0.0.0.0/0, ::/0 for all), Proto, Port, To, ToPort; without ToPort for a range
	SetProxied    Set = "proxied"    // Net (IPv6 host address, or ::/0 for all), Proto, Port: a port whose proxy serves it, not translation; closed to internal networks
	SetAttached   Set = "attached"   // Link, Net (host): an endpoint on a bridge that is not ours, or reached by the host's own sub-interface
	SetSwitched   Set = "switched"   // Link: a bridge that the host neither routes nor has an address on; its frames are not tracked, and none is for the host
	SetTunnels    Set = "tunnels"    // Port: UDP port of tunnels; what comes to the host by it is from a member
	SetMembers    Set = "members"    // Net (host), Port: another host that has a network of ours, and the UDP port of its tunnels; their packets are not tracked
	SetOwn        Set = "own"        // Link: the host's own sub-interface
	SetNear       Set = "near"       // Net (host), To: address of the host and endpoint that knows the way back to it; the source address is kept
)

// Element is one entry of a set of the nftables table. Only the fields named
// at its Set are used; the others are zero, so that elements compare with ==.
type Element struct {
	Set   Set
	Link  string
	Out   string
	Net   netip.Prefix
	Proto Proto
	Port  uint16
	// More is how many ports follow Port: a range in the sets published, proxied,
	// exposed and trusted. Ports that are published as a range keep their numbers.
	More   uint16
	To     netip.Addr
	ToPort uint16
}

// Key is what identifies the element in the kernel: only a map's has data beside it.
func (e Element) Key() Element {
	if e.Set == SetPublished || e.Set == SetSNAT {
		e.To, e.ToPort = netip.Addr{}, 0
	}
	return e
}

// Proto is an IP protocol number.
type Proto uint8

// The protocols whose ports can be published.
const (
	TCP  Proto = 6
	UDP  Proto = 17
	SCTP Proto = 132
)

// String is the name that users type.
func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	}
	return fmt.Sprintf("proto-%d", uint8(p))
}

// Socket is a host port that is held open for as long as it is published, so
// that no other program can take it. What reaches the socket itself, because
// translation cannot carry it (from [::1]; from IPv6 to a container that has
// only IPv4), is passed on to the container by a proxy.
type Socket struct {
	Proto Proto
	Host  netip.AddrPort
	To    netip.AddrPort
	// More is how many ports follow, on both sides in step.
	More uint16
}

// PortRequest asks for one port, the same on every host address.
type PortRequest struct {
	Proto Proto
	Hosts []netip.Addr
	// First and Last bound the choice; both 0 leave it to the kernel.
	First, Last uint16
	// More asks for that many ports after First too; First is Last then.
	More uint16
}

// Add appends everything in o.
func (s *State) Add(o State) {
	s.Bridges = append(s.Bridges, o.Bridges...)
	s.VXLANs = append(s.VXLANs, o.VXLANs...)
	s.Parents = append(s.Parents, o.Parents...)
	s.Children = append(s.Children, o.Children...)
	s.Routes = append(s.Routes, o.Routes...)
	s.Veths = append(s.Veths, o.Veths...)
	s.Forwards = append(s.Forwards, o.Forwards...)
	s.Neighbours = append(s.Neighbours, o.Neighbours...)
	s.Shortcuts = append(s.Shortcuts, o.Shortcuts...)
	s.Elements = append(s.Elements, o.Elements...)
	s.Sockets = append(s.Sockets, o.Sockets...)
	s.Forward4 = s.Forward4 || o.Forward4
	s.Forward6 = s.Forward6 || o.Forward6
	s.Hook = s.Hook || o.Hook
}

// Minus returns what is in s and not, or not equally, in o. Fields that the
// kernel cannot show again (the container's end of a veth) are not compared,
// nor is what would only be left alone (bridges that exist already).
func (s State) Minus(o State) State {
	if o.NoShortcuts {
		s.Shortcuts = nil
	}
	return State{
		Bridges:    minus(s.Bridges, o.Bridges, bridgeKey),
		VXLANs:     minus(s.VXLANs, o.VXLANs, func(v VXLAN) VXLAN { return v }),
		Parents:    minus(s.Parents, o.Parents, func(p Parent) Parent { return p }),
		Children:   minus(following(s.Children, o.Children), following(o.Children, s.Children), childKey),
		Routes:     minus(s.Routes, o.Routes, routeKey),
		Veths:      minus(s.Veths, o.Veths, vethKey),
		Forwards:   minus(s.Forwards, o.Forwards, func(f Forward) Forward { return f }),
		Neighbours: minus(s.Neighbours, o.Neighbours, func(n Neighbour) Neighbour { return n }),
		Shortcuts:  minus(s.Shortcuts, o.Shortcuts, func(x Shortcut) Shortcut { return x }),
		Elements:   minus(s.Elements, o.Elements, func(e Element) Element { return e }),
		Sockets:    minus(s.Sockets, o.Sockets, func(x Socket) Socket { return x }),
		Forward4:   s.Forward4 && !o.Forward4,
		Forward6:   s.Forward6 && !o.Forward6,
		Hook:       s.Hook && !o.Hook,
	}
}

// Empty reports whether the State asks for nothing.
func (s State) Empty() bool {
	return len(s.Bridges) == 0 && len(s.VXLANs) == 0 && len(s.Parents) == 0 && len(s.Children) == 0 && len(s.Routes) == 0 && len(s.Veths) == 0 &&
		len(s.Forwards) == 0 && len(s.Neighbours) == 0 && len(s.Shortcuts) == 0 && len(s.Elements) == 0 && len(s.Sockets) == 0 &&
		!s.Forward4 && !s.Forward6 && !s.Hook
}

// Links is how many links of ours are in s.
func (s State) Links() int {
	n := len(s.VXLANs) + len(s.Children) + len(s.Veths)
	for _, b := range s.Bridges {
		if !b.Existing {
			n++
		}
	}
	for _, p := range s.Parents {
		if !p.Existing {
			n++
		}
	}
	return n
}

func bridgeKey(b Bridge) string {
	if b.Existing {
		return b.Name + " existing"
	}
	return fmt.Sprintf("%s %s %d %t %t %t %v", b.Name, b.MAC, b.MTU, b.Down, b.Open, b.NoSnooping, sortedPrefixes(b.Addrs))
}

func vethKey(v Veth) Veth {
	v.Peer, v.PeerMAC = "", MAC{}
	return v
}

// following gives those of list the MTU 0 that have their parent's and are to have
// that according to other.
func following(list, other []Child) []Child {
	asked := make(map[string]bool)
	for _, c := range other {
		asked[c.Name] = asked[c.Name] || c.MTU == 0
	}
	list = slices.Clone(list)
	for i, c := range list {
		if c.Full && asked[c.Name] {
			list[i].MTU = 0
		}
	}
	return list
}

// childKey leaves out what only the one that stays keeps.
func childKey(c Child) string {
	if !c.Stays {
		return c.Name
	}
	return fmt.Sprintf("%s %s %s %s %s %s %d %t %t %v", c.Name, c.Parent, c.Kind, c.Mode, c.Flag, c.MAC, c.MTU, c.Down, c.Open, sortedPrefixes(c.Addrs))
}

// routeKey leaves out the source: that is the host's affair, and a route goes
// with the address that is its source.
func routeKey(r Route) Route {
	r.Src, r.From = netip.Addr{}, ""
	return r
}

func sortedPrefixes(p []netip.Prefix) []netip.Prefix {
	p = slices.Clone(p)
	slices.SortFunc(p, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), a.Bits()-b.Bits())
	})
	return p
}

func minus[T any, K comparable](have, other []T, key func(T) K) []T {
	known := make(map[K]bool, len(other))
	for _, o := range other {
		known[key(o)] = true
	}
	var out []T
	for _, h := range have {
		if k := key(h); !known[k] {
			known[k] = true // twice in s is once in the answer
			out = append(out, h)
		}
	}
	return out
}

// String prints the State as an operator would type it, one object a line,
// sorted within each kind; it is what golden tests compare.
func (s State) String() string {
	var b strings.Builder
	for _, x := range s.Bridges {
		b.WriteString(x.String() + "\n")
	}
	for _, x := range s.VXLANs {
		b.WriteString(x.String() + "\n")
	}
	for _, x := range s.Parents {
		b.WriteString(x.String() + "\n")
	}
	for _, x := range s.Children {
		b.WriteString(x.String() + "\n")
	}
	for _, x := range s.Routes {
		b.WriteString(x.String() + "\n")
	}
	for _, x := range s.Veths {
		b.WriteString(x.String() + "\n")
	}
	for _, x := range s.Forwards {
		b.WriteString(x.String() + "\n")
	}
	for _, x := range s.Neighbours {
		b.WriteString(x.String() + "\n")
	}
	for _, x := range s.Shortcuts {
		b.WriteString(x.String() + "\n")
	}
	lines := make([]string, 0, len(s.Elements))
	for _, x := range s.Elements {
		lines = append(lines, x.String())
	}
	slices.Sort(lines)
	for _, l := range lines {
		b.WriteString(l + "\n")
	}
	for _, x := range s.Sockets {
		b.WriteString(x.String() + "\n")
	}
	if s.Forward4 {
		b.WriteString("sysctl net.ipv4.ip_forward=1\n")
	}
	if s.Forward6 {
		b.WriteString("sysctl net.ipv6.conf.all.forwarding=1\n")
	}
	if s.Hook {
		b.WriteString("iptables hook\n")
	}
	return b.String()
}

func (b Bridge) String() string {
	if b.Existing {
		return fmt.Sprintf("link show %s type bridge", b.Name)
	}
	lines := []string{fmt.Sprintf("link add %s address %s mtu %d type bridge", b.Name, b.MAC, b.MTU)}
	if b.NoSnooping {
		lines[0] += " mcast_snooping 0"
	}
	for _, a := range sortedPrefixes(b.Addrs) {
		lines = append(lines, fmt.Sprintf("addr add %s dev %s", a, b.Name))
	}
	return strings.Join(lines, "\n")
}

func (v VXLAN) String() string {
	t := fmt.Sprintf("link add %s address %s master %s mtu %d type vxlan id %d local %s dstport %d nolearning",
		v.Name, v.MAC, v.Master, v.MTU, v.VNI, v.Local, v.Port)
	if v.Local.Is6() {
		t += " udp6zerocsumrx"
	}
	return t + fmt.Sprintf("\nbridge link set dev %s neigh_suppress on learning off", v.Name)
}

func (f Forward) String() string {
	if f.MAC == (MAC{}) {
		return fmt.Sprintf("bridge fdb append 00:00:00:00:00:00 dev %s dst %s", f.Link, f.VTEP)
	}
	return fmt.Sprintf("bridge fdb replace %s dev %s dst %s self master static", f.MAC, f.Link, f.VTEP)
}

func (n Neighbour) String() string {
	return fmt.Sprintf("neigh replace %s lladdr %s dev %s nud permanent", n.Addr, n.MAC, n.Link)
}

func (p Parent) String() string {
	switch {
	case p.Existing:
		return "link show " + p.Name
	case p.Lower == "":
		return fmt.Sprintf("link add %s type dummy", p.Name)
	}
	return fmt.Sprintf("link add link %s name %s type vlan id %d", p.Lower, p.Name, p.VLAN)
}

func (c Child) String() string {
	t := fmt.Sprintf("link add link %s name %s", c.Parent, c.Name)
	if c.MAC != (MAC{}) {
		t += " address " + c.MAC.String()
	}
	if c.MTU != 0 {
		t += fmt.Sprintf(" mtu %d", c.MTU)
	}
	t += fmt.Sprintf(" type %s mode %s %s", c.Kind, c.Mode, c.Flag)
	lines := []string{strings.TrimSpace(t)}
	for _, a := range sortedPrefixes(c.Addrs) {
		lines = append(lines, fmt.Sprintf("addr add %s dev %s", a, c.Name))
	}
	return strings.Join(lines, "\n")
}

func (r Route) String() string {
	t := fmt.Sprintf("route add %s dev %s", r.To, r.Link)
	if r.Src.IsValid() {
		t += " src " + r.Src.String()
	} else if r.From != "" {
		t += " src of " + r.From
	}
	mac := r.MAC.String()
	if r.MAC == (MAC{}) {
		mac = "of " + r.Link
	}
	return t + fmt.Sprintf("\nneigh add %s lladdr %s dev %s nud permanent", r.To, mac, r.Link)
}

func (s Shortcut) String() string {
	if s.hook() {
		return fmt.Sprintf("nft add rule netdev weft %s fwd to ether daddr map @%s", s.Link, s.table().name())
	}
	return fmt.Sprintf("nft add element netdev weft %s { %s : %s }", s.table().name(), s.MAC, s.Link)
}

func (v Veth) String() string {
	t := fmt.Sprintf("link add %s master %s mtu %d type veth peer %s address %s", v.Name, v.Master, v.MTU, v.Peer, v.PeerMAC)
	if v.Isolated {
		t += fmt.Sprintf("\nbridge link set dev %s isolated on", v.Name)
	}
	if v.Hairpin {
		t += fmt.Sprintf("\nbridge link set dev %s hairpin on", v.Name)
	}
	return t
}

func (e Element) String() string {
	var key []string
	if e.Link != "" {
		key = append(key, e.Link)
	}
	if e.Out != "" {
		key = append(key, e.Out)
	}
	if e.Net.IsValid() {
		key = append(key, e.Net.String())
	}
	switch {
	case e.Proto != 0:
		key = append(key, fmt.Sprintf("%s . %s", e.Proto, portRange(e.Port, e.More)))
	case e.Port != 0:
		key = append(key, fmt.Sprint(e.Port))
	}
	t := fmt.Sprintf("nft add element inet weft %s { %s", e.Set, strings.Join(key, " . "))
	if e.To.IsValid() {
		t += " : " + e.To.String()
		if e.ToPort != 0 {
			t += fmt.Sprintf(" . %d", e.ToPort)
		}
	}
	return t + " }"
}

func (x Socket) String() string {
	if x.More == 0 {
		return fmt.Sprintf("listen %s %s to %s", x.Proto, x.Host, x.To)
	}
	return fmt.Sprintf("listen %s %s-%d to %s-%d", x.Proto, x.Host, x.Host.Port()+x.More, x.To, x.To.Port()+x.More)
}

// pairedIn reports whether x is a range on all addresses of one family, and list
// has the same range on all of the other.
func (x Socket) pairedIn(list []Socket) bool {
	return x.More > 0 && x.Host.Addr().IsUnspecified() && slices.ContainsFunc(list, func(o Socket) bool {
		return o.Proto == x.Proto && o.More == x.More && o.Host.Port() == x.Host.Port() && o.Host.Addr().IsUnspecified() && o.Host.Addr().Is4() != x.Host.Addr().Is4()
	})
}

func portRange(first, more uint16) string {
	if more == 0 {
		return strconv.Itoa(int(first))
	}
	return fmt.Sprintf("%d-%d", first, int(first)+int(more))
}
