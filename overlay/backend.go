package overlay

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/datapath"
)

// Port is the default UDP port of the tunnels. It is not 4789, VXLAN's own (RFC
// 7348): the engine's built-in overlay listens there, and one port has each VNI
// once.
const Port = 4793

// Backend is the driver.Backend of -o mode=overlay: a bridge as in mode bridge,
// without an address, and a VXLAN device in it. The zero value is ready to use.
type Backend struct{ bridge driver.Bridge }

// Validate implements driver.Backend.
func (b Backend) Validate(n *driver.Network) error {
	if n.Options.Egress == "" && !n.Internal {
		n.Options.Egress = driver.EgressEngine
	}
	return b.bridge.Validate(n)
}

// Network implements driver.Backend. With egress=driver every host is the
// gateway of its own containers, at one address and MAC: what a container that
// moves remembers of its gateway stays true.
func (b Backend) Network(n driver.Network) datapath.State {
	s := b.bridge.Network(n)
	br := &s.Bridges[0]
	br.MAC, br.NoSnooping = hashMAC(fmt.Sprintf("gateway of VNI %d", n.VNI)), true
	if n.Options.Egress != driver.EgressDriver {
		br.Addrs = nil
		if silent := (datapath.Element{Set: datapath.SetSwitched, Link: br.Name}); !slices.Contains(s.Elements, silent) {
			s.Elements = append(s.Elements, silent)
		}
	}
	s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetTunnels, Port: n.Port})
	s.VXLANs = []datapath.VXLAN{{
		Name: tunnel(br.Name), Master: br.Name, VNI: n.VNI, Port: n.Port, Local: n.Underlay, MTU: n.FirstMTU(),
		MAC: hashMAC(fmt.Sprintf("tunnel of VNI %d at %s", n.VNI, n.Underlay)),
	}}
	if switched(n) {
		s.Shortcuts = []datapath.Shortcut{{Tunnel: s.VXLANs[0].Name, Link: s.VXLANs[0].Name}}
	}
	return s
}

// switched reports whether the host passes all frames on as they are: it is no
// gateway, and keeps none of the containers apart.
func switched(n driver.Network) bool {
	return n.Options.Egress != driver.EgressDriver && n.Options.ICC
}

// Endpoint implements driver.Backend.
func (b Backend) Endpoint(n driver.Network, e driver.Endpoint) datapath.State {
	s := b.bridge.Endpoint(n, e)
	if v := s.Veths[0]; switched(n) && v.PeerMAC != (datapath.MAC{}) {
		vx := tunnel(v.Master)
		s.Shortcuts = []datapath.Shortcut{{Tunnel: vx, Link: v.Name}, {Tunnel: vx, Link: v.Name, MAC: v.PeerMAC}}
	}
	return s
}

// Attach implements driver.Backend.
func (b Backend) Attach(n driver.Network, e driver.Endpoint) driver.Attachment {
	return b.bridge.Attach(n, e)
}

// remote is what leads to what others have of a network.
func (b Backend) remote(n driver.Network, v View) datapath.State {
	net := b.Network(n)
	br, vx := net.Bridges[0].Name, net.VXLANs[0].Name
	var s datapath.State
	for _, vtep := range v.VTEPs {
		s.Forwards = append(s.Forwards, datapath.Forward{Link: vx, VTEP: vtep})
		s.Elements = append(s.Elements, datapath.Element{Set: datapath.SetMembers, Net: netip.PrefixFrom(vtep, vtep.BitLen()), Port: n.Port})
	}
	for mac, vtep := range v.Forwards {
		s.Forwards = append(s.Forwards, datapath.Forward{Link: vx, MAC: mac, VTEP: vtep})
		if switched(n) {
			s.Shortcuts = append(s.Shortcuts, datapath.Shortcut{Tunnel: vx, Link: vx, MAC: mac})
		}
	}
	for a, mac := range v.Neighbours {
		s.Neighbours = append(s.Neighbours, datapath.Neighbour{Link: br, Addr: a, MAC: mac})
	}
	return s
}

// tunnel is the VXLAN device of a bridge of ours.
func tunnel(bridge string) string { return "wfx" + strings.TrimPrefix(bridge, "wfb") }

// overhead is what a tunnel adds to a packet, in bytes: Ethernet, VXLAN (RFC
// 7348 §5), UDP and IP.
func overhead(underlay netip.Addr) int {
	if underlay.Is4() {
		return 14 + 8 + 8 + 20
	}
	return 14 + 8 + 8 + 40
}

// hashMAC is a unicast address from the range that anybody may use.
func hashMAC(s string) datapath.MAC {
	sum := sha256.Sum256([]byte(s))
	m := datapath.MAC(sum[:6])
	m[0] = m[0]&^0x01 | 0x02
	return m
}
