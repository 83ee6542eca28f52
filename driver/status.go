package driver

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/internal/datapath"
)

// Status is what the driver knows and did. Its JSON form is stable: fields are
// added, never renamed.
type Status struct {
	Networks  []NetworkStatus  `json:"networks"`
	Endpoints []EndpointStatus `json:"endpoints"`
	Drift     Drift            `json:"drift"`
	// Guard has the families, ipv4 and ipv6, in which the host forwards for containers
	// alone: weft switched forwarding on.
	Guard []string `json:"guard"`
	// Unclaimed are objects of ours in the kernel that no record names, each as
	// somebody would type it. They are left as they are.
	Unclaimed []string `json:"unclaimed"`
}

// NetworkStatus is one network.
type NetworkStatus struct {
	ID       string `json:"id"`
	Mode     string `json:"mode"`
	Link     string `json:"link,omitempty"` // its bridge or parent
	Internal bool   `json:"internal"`
	Egress   Egress `json:"egress"`
	MTU      int    `json:"mtu"`
	// VNI, Port and Underlay are those of an overlay network.
	VNI      uint32     `json:"vni,omitempty"`
	Port     uint16     `json:"port,omitempty"`
	Underlay netip.Addr `json:"underlay,omitzero"`
	// Options are those chosen whose default is another, by their short names.
	Options   map[string]string `json:"options"`
	Subnets   []SubnetStatus    `json:"subnets"`
	Endpoints int               `json:"endpoints"`
	Created   time.Time         `json:"created"`
	// Warning says why containers cannot be reached although all is as recorded.
	Warning string `json:"warning,omitempty"`
}

// SubnetStatus is one subnet of a network.
type SubnetStatus struct {
	Pool    netip.Prefix `json:"pool"`
	Gateway string       `json:"gateway,omitempty"`
}

// EndpointStatus is one endpoint.
type EndpointStatus struct {
	ID      string         `json:"id"`
	Network string         `json:"network"`
	Link    string         `json:"link"` // the host's end; on a parent, the sub-interface
	Addrs   []netip.Prefix `json:"addresses"`
	MAC     datapath.MAC   `json:"mac"`
	// State is up, left (the container stopped), or lost (its link was
	// deleted by somebody).
	State   string       `json:"state"`
	Gateway bool         `json:"gateway"` // the container's way out
	Ports   []PortStatus `json:"ports"`
	Created time.Time    `json:"created"`
	// MTU and Routes are those of the DHCP server, where it says some and they are
	// heeded; LeftOut is what is not heeded, and why.
	MTU     int           `json:"mtu,omitempty"`
	Routes  []RouteStatus `json:"routes,omitempty"`
	LeftOut []string      `json:"leftOut,omitempty"`
}

// RouteStatus is a route in a container; without Via it is on the link.
type RouteStatus struct {
	To  netip.Prefix `json:"to"`
	Via netip.Addr   `json:"via,omitzero"`
}

// PortStatus is one published port. Host is empty where the container's own
// address is reached.
type PortStatus struct {
	Proto     string         `json:"proto"`
	Host      string         `json:"host,omitempty"`
	Container netip.AddrPort `json:"container"`
	// More is how many ports follow, on both sides in step.
	More uint16 `json:"more,omitempty"`
}

// Drift is what repair last found.
type Drift struct {
	Checked    time.Time `json:"checked"`             // when the last pass ended
	Error      string    `json:"error,omitempty"`     // why it could not repair all
	Repaired   []string  `json:"repaired"`            // by the last pass that repaired something
	RepairedAt time.Time `json:"repairedAt,omitzero"` // when that was
}

// Status reports all networks and endpoints, sorted by ID.
func (d *Driver) Status(ctx context.Context) (Status, error) {
	s := d.tables()
	for i, n := range s.Networks {
		if n.Mode != modeMacvlan && n.Mode != modeIPvlan {
			continue
		}
		f, ok, err := d.host.Link(ctx, n.Link)
		switch {
		case err != nil:
			s.Networks[i].Warning = err.Error()
		case !ok:
			s.Networks[i].Warning = fmt.Sprintf("parent %s does not exist", n.Link)
		case n.Mode == modeIPvlan && f.Strict && d.hasAccess(n.ID):
			s.Networks[i].Warning = fmt.Sprintf("reverse path filtering on %s is strict and drops what its containers send to the host: run sysctl -w net.ipv4.conf.%s.rp_filter=2", n.Link, n.Link)
		case !f.Up:
			s.Networks[i].Warning = fmt.Sprintf("parent %s is down: run ip link set %s up", n.Link, n.Link)
		}
	}
	return s, nil
}

func (d *Driver) hasAccess(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.networks[id]
	return n != nil && n.rec.Options.HostAccess && !n.rec.Options.layer3()
}

// tables is what the driver knows by itself.
func (d *Driver) tables() Status {
	s := Status{Networks: []NetworkStatus{}, Endpoints: []EndpointStatus{}, Unclaimed: []string{}, Guard: []string{}}
	v4, v6 := d.kernel.Guarded()
	if v4 {
		s.Guard = append(s.Guard, "ipv4")
	}
	if v6 {
		s.Guard = append(s.Guard, "ipv6")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if text := strings.TrimSpace(d.unowned.String()); text != "" {
		s.Unclaimed = strings.Split(text, "\n")
	}
	s.Drift = d.drift
	if s.Drift.Repaired == nil {
		s.Drift.Repaired = []string{}
	}
	for _, n := range d.networks {
		if n.doomed {
			continue
		}
		ns := n.status()
		ns.Link = n.rec.parent()
		if b := d.networkState(n).Bridges; len(b) > 0 {
			ns.Link = b[0].Name
		}
		for _, e := range n.endpoints {
			if !e.doomed {
				ns.Endpoints++
				s.Endpoints = append(s.Endpoints, e.status(n.rec))
			}
		}
		s.Networks = append(s.Networks, ns)
	}
	slices.SortFunc(s.Networks, func(a, b NetworkStatus) int { return strings.Compare(a.ID, b.ID) })
	slices.SortFunc(s.Endpoints, func(a, b EndpointStatus) int { return strings.Compare(a.ID, b.ID) })
	return s
}

func (n *network) status() NetworkStatus {
	s := NetworkStatus{
		ID: n.rec.ID, Mode: n.rec.Mode, Internal: n.rec.Internal, Egress: n.rec.Options.Egress, MTU: n.rec.MTU,
		VNI: n.rec.VNI, Port: n.rec.Port, Underlay: n.rec.Underlay, Subnets: []SubnetStatus{}, Created: n.rec.Created,
		Options: n.rec.Options.chosen(),
	}
	if n.rec.onParent() {
		s.MTU = n.rec.Options.MTU
	}
	for _, sub := range n.rec.Subnets {
		ss := SubnetStatus{Pool: sub.Pool}
		if sub.Gateway.IsValid() {
			ss.Gateway = sub.Gateway.Addr().String()
		}
		s.Subnets = append(s.Subnets, ss)
	}
	return s
}

// chosen are the options that a person looks for who asks why something is or is
// not reached.
func (o Options) chosen() map[string]string {
	m := map[string]string{}
	for name, v := range map[string]GatewayMode{"gateway_mode_ipv4": o.Gateway4, "gateway_mode_ipv6": o.Gateway6} {
		if v != "" && v != GatewayNAT {
			m[name] = string(v)
		}
	}
	if o.HostAccess {
		m["host_access"] = "true"
	}
	if o.SubMode != "" {
		m["submode"] = o.SubMode
	}
	return m
}

func (e *endpoint) status(n Network) EndpointStatus {
	s := EndpointStatus{
		ID: e.rec.ID, Network: e.rec.Network, Link: hostEnd(e.rec.ID), Addrs: slices.Clone(e.rec.Addrs), MAC: e.rec.MAC,
		State: "up", Gateway: e.rec.Programmed, Ports: []PortStatus{}, Created: e.rec.Created,
		MTU: e.rec.MTU, LeftOut: slices.Clone(e.rec.LeftOut),
	}
	for _, r := range e.rec.Routes {
		s.Routes = append(s.Routes, RouteStatus{r.Destination, r.NextHop})
	}
	if n.onParent() {
		s.Link = peerEnd(e.rec.ID)
	}
	if s.Addrs == nil {
		s.Addrs = []netip.Prefix{}
	}
	switch {
	case e.rec.Left:
		s.State = "left"
	case e.gone:
		s.State = "lost"
	}
	for _, p := range e.rec.Ports {
		if e.yields && p.isFallback() {
			continue
		}
		ps := PortStatus{Proto: p.Proto.String(), Container: p.Container, More: p.More}
		if p.Host.IsValid() {
			ps.Host = p.Host.String()
		}
		s.Ports = append(s.Ports, ps)
	}
	return s
}
