package driver

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/internal/datapath"
)

// recordVersion is the version written into every record.
const recordVersion = 1

// Keys of the stores.
const (
	networkPrefix  = "network/"
	endpointPrefix = "endpoint/"
)

// Network is the record of one network: what should be, in parsed form.
type Network struct {
	Version  int
	ID       string
	Mode     string // which Backend
	Internal bool
	MTU      int // bytes, inside containers; not used where there are Parents
	Subnets  []Subnet
	Options  Options
	// Parents are the links that the network hangs on, the lowest first; for the
	// modes macvlan and ipvlan.
	Parents []datapath.Parent `json:",omitempty"`
	// Access is set once the host has a sub-interface of its own on the parent,
	// with OwnMAC, and Hop4 and Hop6 as the addresses that containers send to.
	Access bool         `json:",omitempty"`
	OwnMAC datapath.MAC `json:",omitzero"`
	Hop4   netip.Addr   `json:",omitzero"`
	Hop6   netip.Addr   `json:",omitzero"`
	// VNI identifies an overlay network across hosts; Port is the UDP port and
	// Underlay the host's address that carry it between them.
	VNI      uint32     `json:",omitempty"`
	Port     uint16     `json:",omitempty"`
	Underlay netip.Addr `json:",omitzero"`
	// TunnelMTU is that of the tunnel where MTU has been lowered since; else 0. The
	// tunnel carries what older containers send, or tells them that it does not pass.
	TunnelMTU int `json:",omitempty"`
	// Pending is set until the network is made and about to be answered. One
	// that a start finds was never known to the engine.
	Pending bool `json:",omitempty"`
	Created time.Time
}

// Subnet is one IPv4 or IPv6 subnet of a network.
type Subnet struct {
	Pool netip.Prefix
	// Gateway is the address that containers use as gateway, with the mask
	// that the IPAM returned; the zero Prefix where there is none.
	Gateway netip.Prefix
	// Range is what this host alone chooses addresses from, on an overlay network:
	// --ip-range or all of Pool. Zero where our IPAM does not hand them out.
	Range netip.Prefix            `json:",omitzero"`
	Aux   map[string]netip.Prefix `json:",omitempty"`
}

// Endpoint is the record of one endpoint: a container's place on a network.
type Endpoint struct {
	Version int
	ID      string
	Network string
	Addrs   []netip.Prefix // at most one per family, with the subnet's mask
	MAC     datapath.MAC
	// MTU is the network's when the endpoint was made, for overlay networks: the
	// container keeps it; else the lesser one of the DHCP server, where that is heeded.
	// 0 is the first that the network had.
	MTU int `json:",omitempty"`
	// Left is set when Leave took the links away and DeleteEndpoint has yet
	// to come.
	Left bool `json:",omitempty"`
	// Ports are the container's published ports with the host ports that
	// were chosen for them, present between Program- and
	// RevokeExternalConnectivity.
	Ports []PublishedPort `json:",omitempty"`
	// Sandbox is the container's network namespace as the engine names it, from
	// the first published port on, on a LAN from Join on, and once the container is on
	// a LAN: ports can pass between endpoints of one, and those with ports have to know
	// its LANs.
	Sandbox string `json:",omitempty"`
	// Programmed is set while the endpoint is its container's way out.
	Programmed bool `json:",omitempty"`
	// Hairpin is set with the first published port and stays until Leave:
	// clearing it in every Revoke, just before the link goes, would cost a
	// change of the link for nothing.
	Hairpin bool `json:",omitempty"`
	// Joined is set from Join to Leave, on a parent: the sub-interface is the
	// container's and cannot be seen.
	Joined bool `json:",omitempty"`
	// Reach is set while the host has a route to the container and the container
	// one back. Host are the host's addresses that the container knows the way to.
	Reach bool         `json:",omitempty"`
	Host  []netip.Addr `json:",omitempty"`
	// IfName is what the interface is to be called in the container; "" leaves it
	// to the network's prefix.
	IfName string `json:",omitempty"`
	// Routes are those of the DHCP server of the address, where they are heeded;
	// LeftOut is what of that server is not, and why.
	Routes  []Route  `json:",omitempty"`
	LeftOut []string `json:",omitempty"`
	// Claim orders endpoints of several hosts that claim one address.
	Claim   uint64 `json:",omitempty"`
	Created time.Time
}

// PublishedPort is one port of a container and one host address and port
// that lead to it. Host is the zero AddrPort where the container's own address
// is reached from outside, without translation.
type PublishedPort struct {
	Proto     datapath.Proto
	Host      netip.AddrPort
	Container netip.AddrPort
	// More is how many ports follow, on both sides in step.
	More uint16 `json:",omitempty"`
}

// keeps reports whether the ports have the same numbers on both sides.
func (p PublishedPort) keeps() bool { return p.Host.Port() == p.Container.Port() }

// has reports whether the network has a subnet of the family.
func (n Network) has(f family) bool {
	return slices.ContainsFunc(n.Subnets, func(s Subnet) bool { return f.of(s.Pool.Addr()) })
}

// subnet is the one that holds a.
func (n Network) subnet(a netip.Addr) (Subnet, bool) {
	i := slices.IndexFunc(n.Subnets, func(s Subnet) bool { return s.Pool.Contains(a) })
	if i < 0 {
		return Subnet{}, false
	}
	return n.Subnets[i], true
}

// addr is the endpoint's address of the family, or the zero Addr.
func (e Endpoint) addr(f family) netip.Addr {
	for _, a := range e.Addrs {
		if f.of(a.Addr()) {
			return a.Addr()
		}
	}
	return netip.Addr{}
}

// family is an IP version; code that differs by it ranges over families.
type family int

const (
	ipv4 family = 4
	ipv6 family = 6
)

var families = [...]family{ipv4, ipv6}

// example is an address of the family.
func (f family) example() string {
	if f == ipv4 {
		return "192.0.2.1"
	}
	return "2001:db8::1"
}

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return ipv4
	}
	return ipv6
}

func (f family) of(a netip.Addr) bool { return a.IsValid() && familyOf(a) == f }

// unspecified is 0.0.0.0 or [::].
func (f family) unspecified() netip.Addr {
	if f == ipv4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// all is 0.0.0.0/0 or ::/0.
func (f family) all() netip.Prefix { return netip.PrefixFrom(f.unspecified(), 0) }

// errDamaged tells a record that cannot be read from one that is not there.
var errDamaged = errors.New("record is damaged")

// decode refuses what it does not understand: a record that was read wrongly
// would be written back wrongly.
func decode[T any](key string, value []byte, version func(T) int) (T, error) {
	var v T
	if err := json.Unmarshal(value, &v); err != nil {
		return v, fmt.Errorf("%s: %w: %w", key, errDamaged, err)
	}
	if got := version(v); got != recordVersion {
		return v, fmt.Errorf("%s: record has version %d, this program reads %d", key, got, recordVersion)
	}
	return v, nil
}

func decodeNetwork(key string, value []byte) (Network, error) {
	n, err := decode(key, value, func(n Network) int { return n.Version })
	if err == nil && networkKey(n.ID) != key {
		err = fmt.Errorf("%s: %w: it is about network %q", key, errDamaged, n.ID)
	}
	return n, err
}

func decodeEndpoint(key string, value []byte) (Endpoint, error) {
	e, err := decode(key, value, func(e Endpoint) int { return e.Version })
	if err == nil && endpointKey(e.Network, e.ID) != key {
		err = fmt.Errorf("%s: %w: it is about endpoint %q of network %q", key, errDamaged, e.ID, e.Network)
	}
	return e, err
}

func networkKey(id string) string { return networkPrefix + id }

func endpointKey(network, id string) string { return endpointPrefix + network + "/" + id }

// checkID refuses what cannot be part of a key; the engine's IDs are hex or
// base 36.
func checkID(what, id string) error {
	switch {
	case id == "":
		return fmt.Errorf("%s id is empty", what)
	case len(id) > 128 || strings.ContainsAny(id, "/\x00"):
		return fmt.Errorf("%s id %q is not one", what, id[:min(len(id), 32)])
	}
	return nil
}
