package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"

	wire "github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/plugin"
)

// Capabilities is the answer to plugin.PathNetworkCapabilities, for networks of
// this host alone or of the whole swarm. It is given before there is a Driver.
// Connectivity has the same scope: the engine would otherwise answer names on
// other nodes with addresses that cannot be reached from there, or not answer
// those of other nodes.
func Capabilities(global bool) plugin.NetworkCapabilities {
	scope := wire.LocalScope
	if global {
		scope = wire.GlobalScope
	}
	return plugin.NetworkCapabilities{
		CapabilitiesResponse: wire.CapabilitiesResponse{Scope: scope, ConnectivityScope: scope},
		GwAllocChecker:       true,
	}
}

// Register makes m answer the calls of a network driver, but for its
// capabilities.
func (d *Driver) Register(m *plugin.Mux) {
	plugin.Handle(m, plugin.PathGwAllocCheck, d.gwAllocCheck)
	plugin.Handle(m, plugin.PathAllocateNetwork, d.allocateNetwork)
	plugin.Handle(m, plugin.PathFreeNetwork, d.freeNetwork)
	plugin.Handle(m, plugin.PathCreateNetwork, d.handleCreateNetwork)
	plugin.Handle(m, plugin.PathDeleteNetwork, d.handleDeleteNetwork)
	plugin.Handle(m, plugin.PathCreateEndpoint, d.handleCreateEndpoint)
	plugin.Handle(m, plugin.PathDeleteEndpoint, d.handleDeleteEndpoint)
	plugin.Handle(m, plugin.PathEndpointOperInfo, d.endpointInfo)
	plugin.Handle(m, plugin.PathJoin, d.handleJoin)
	plugin.Handle(m, plugin.PathLeave, d.handleLeave)
	plugin.Handle(m, plugin.PathProgramExternal, d.handleProgram)
	plugin.Handle(m, plugin.PathRevokeExternal, d.handleRevoke)
	plugin.Handle(m, plugin.PathDiscoverNew, d.discoverNew)
	plugin.Handle(m, plugin.PathDiscoverDelete, accept[plugin.DiscoveryNotification])
}

// accept answers calls that nothing has to be done for.
func accept[Req any](context.Context, Req) (plugin.Empty, error) { return plugin.Empty{}, nil }

func (d *Driver) modes() []string { return slices.Collect(maps.Keys(d.backends)) }

func (d *Driver) gwAllocCheck(ctx context.Context, req plugin.GwAllocCheckRequest) (plugin.GwAllocCheckResponse, error) {
	n, err := d.parseNetwork(ctx, "", req.Options)
	if err != nil {
		return plugin.GwAllocCheckResponse{}, err
	}
	var l surroundingLAN
	if n.shares() != "" {
		if l, err = d.lanOf(ctx, n); err != nil {
			return plugin.GwAllocCheckResponse{}, err
		}
	}
	return plugin.GwAllocCheckResponse{SkipIPv4: d.skip(n, ipv4, l), SkipIPv6: d.skip(n, ipv6, l)}, nil
}

// skipGateway reports whether nobody would use a gateway address: neither the
// bridge, by which the host reaches its containers, nor the containers.
func (n Network) skipGateway(f family) bool {
	o := n.Options
	if n.onParent() && (o.Parent == "" || o.layer3()) {
		return true
	}
	noRoute := n.Internal || o.Egress == EgressNone || o.Egress == EgressEngine || o.Egress == "" && n.Mode == ModeOverlay
	noAddress := n.onParent() || n.Mode == ModeOverlay || o.Bridge != "" || f == ipv4 && o.InhibitIPv4
	return o.gateway(f) == GatewayIsolated || noRoute && noAddress
}

func (d *Driver) handleCreateNetwork(ctx context.Context, req wire.CreateNetworkRequest) (plugin.Empty, error) {
	if err := checkID("network", req.NetworkID); err != nil {
		return plugin.Empty{}, err
	}
	n, err := d.parseNetwork(ctx, req.NetworkID, req.Options)
	if err != nil {
		return plugin.Empty{}, err
	}
	if err := d.checkScope(n); err != nil {
		return plugin.Empty{}, err
	}
	n.ID = req.NetworkID
	for _, data := range slices.Concat(req.IPv4Data, req.IPv6Data) {
		s, ok, err := parseSubnet(data)
		if err != nil {
			return plugin.Empty{}, err
		}
		if ok {
			n.Subnets = append(n.Subnets, s)
		}
	}
	_, modern := req.Options[plugin.OptionEnableIPv4] // these send GwAllocCheck as well
	if err := d.settleGateways(ctx, &n, modern); err != nil {
		return plugin.Empty{}, err
	}
	if err := d.vetHost(ctx, n); err != nil {
		return plugin.Empty{}, err
	}
	if n.Mode == ModeOverlay {
		if err := d.admit(ctx, &n); err != nil {
			return plugin.Empty{}, err
		}
	}
	return plugin.Empty{}, d.createNetwork(ctx, n)
}

// parseSubnet reads one pool. ok is false for the pool 0.0.0.0/0 of the null
// IPAM driver, which means that nobody hands out addresses.
func parseSubnet(data *wire.IPAMData) (s Subnet, ok bool, err error) {
	if data == nil {
		return s, false, nil
	}
	if s.Pool, err = netip.ParsePrefix(data.Pool); err != nil || s.Pool != s.Pool.Masked() || s.Pool.Addr().Is4In6() {
		return s, false, fmt.Errorf("subnet %q is not one: write it as 10.0.0.0/24", clip(data.Pool))
	}
	if s.Pool.Bits() == 0 {
		// Our IPAM half answers this for a subnet that the engine would refuse
		// as the host's own; the gateway's mask says which it is. Where there is
		// none it is the subnet's own address.
		if gateway, err := netip.ParsePrefix(data.Gateway); err == nil {
			if s.Pool = gateway.Masked(); s.Pool == gateway {
				data.Gateway = ""
			}
		}
	}
	if s.Pool.Bits() == 0 {
		return s, false, nil
	}
	if gateway, err := netip.ParsePrefix(data.Gateway); err == nil && gateway.Addr().IsUnspecified() {
		data.Gateway = "" // our IPAM half has said that there is none
	}
	if data.Gateway != "" {
		if s.Gateway, err = netip.ParsePrefix(data.Gateway); err != nil || !s.Pool.Contains(s.Gateway.Addr()) {
			return s, false, fmt.Errorf("gateway %q is not an address, with its mask, of subnet %s: give one that is with --gateway", clip(data.Gateway), s.Pool)
		}
	}
	for name, v := range data.AuxAddresses {
		text, _ := v.(string)
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return s, false, fmt.Errorf("auxiliary address %s: %q is not an address with its mask: write it as 10.0.0.5", clip(name), clip(text))
		}
		if s.Aux == nil {
			s.Aux = map[string]netip.Prefix{}
		}
		s.Aux[name] = p
	}
	return s, true, nil
}

func (d *Driver) handleDeleteNetwork(ctx context.Context, req wire.DeleteNetworkRequest) (plugin.Empty, error) {
	if err := checkID("network", req.NetworkID); err != nil {
		return plugin.Empty{}, err
	}
	return plugin.Empty{}, d.deleteNetwork(ctx, req.NetworkID)
}

func (d *Driver) handleCreateEndpoint(ctx context.Context, req plugin.CreateEndpointRequest) (wire.CreateEndpointResponse, error) {
	var resp wire.CreateEndpointResponse
	if err := checkIDs(req.NetworkID, req.EndpointID); err != nil {
		return resp, err
	}
	addrs, err := parseAddresses(req.Interface)
	if err != nil {
		return resp, err
	}
	if err := d.vetEndpoint(ctx, req.NetworkID, req.EndpointID, addrs); err != nil {
		return resp, err
	}
	if err := d.chooseStation(ctx, req); err != nil {
		return resp, err
	}
	said, err := d.learnFor(ctx, req.NetworkID, addrs)
	if err != nil {
		return resp, err
	}
	n, unlock := d.find(req.NetworkID)
	defer unlock()
	if n == nil {
		return resp, unknownNetwork(req.NetworkID)
	}
	ifName, _, err := parseEndpointOptions(n.rec.Mode, req.Options)
	if err != nil {
		return resp, err
	}
	rec, err := parseInterface(n.rec, req)
	if err != nil {
		return resp, err
	}
	rec.IfName = ifName
	rec.MTU, rec.Routes, rec.LeftOut = said.MTU, said.Routes, said.LeftOut
	d.tellIfName(rec)
	resp.Interface = &wire.EndpointInterface{}
	if mac, ok := d.stationMAC(n.rec, rec); ok {
		rec.MAC = mac
		resp.Interface.MacAddress = mac.String()
	}
	if err := d.unclaimed(n.rec, rec); err != nil {
		return resp, err
	}
	switch {
	case n.rec.Mode == modeIPvlan && rec.MAC != (datapath.MAC{}):
		return resp, fmt.Errorf("MAC address %s: mode ipvlan has its parent's for all containers: take it away, or use mode=macvlan", rec.MAC)
	case n.rec.Mode == modeIPvlan, n.rec.Options.SubMode == "passthru":
		// There is none to choose: it is the parent's.
	case rec.MAC == (datapath.MAC{}):
		// What the engine sent filled must come back empty.
		rec.MAC = endpointMAC(rec.ID, rec.Addrs)
		resp.Interface.MacAddress = rec.MAC.String()
	}
	return resp, d.createEndpoint(ctx, n, rec)
}

// chooseStation has the addresses of an endpoint that is about to be made be those of
// the MAC address that its user has chosen, and of what a DHCP server is to be told. The
// server may be asked: no lock is held.
func (d *Driver) chooseStation(ctx context.Context, req plugin.CreateEndpointRequest) error {
	d.mu.Lock()
	n := d.networks[req.NetworkID]
	if n == nil || n.doomed || n.endpoints[req.EndpointID] != nil {
		d.mu.Unlock()
		return nil
	}
	rec := n.rec
	d.mu.Unlock()
	_, told, err := parseEndpointOptions(rec.Mode, req.Options)
	if err != nil {
		return err
	}
	e, err := parseInterface(rec, req)
	if err != nil {
		return err
	}
	if rec.Mode == modeIPvlan || rec.Options.SubMode == "passthru" {
		e.MAC = datapath.MAC{} // not the endpoint's to choose
	}
	if e.MAC == (datapath.MAC{}) && told == nil {
		return nil
	}
	for _, a := range e.Addrs {
		s, _ := rec.subnet(a.Addr())
		if err := d.restation(ctx, s.Pool, a.Addr(), e.MAC, told); err != nil {
			return err
		}
	}
	return nil
}

// stationMAC is the MAC address that was handed out together with an address of
// the endpoint, where the engine has none and the mode takes one.
func (d *Driver) stationMAC(n Network, e Endpoint) (datapath.MAC, bool) {
	if e.MAC != (datapath.MAC{}) || n.Mode == modeIPvlan || n.Options.SubMode == "passthru" {
		return datapath.MAC{}, false
	}
	for _, a := range e.Addrs {
		s, _ := n.subnet(a.Addr())
		if mac, ok := d.station(s.Pool, a.Addr()); ok {
			return mac, true
		}
	}
	return datapath.MAC{}, false
}

// parseInterface reads what the engine has decided about an endpoint. The MAC
// stays zero where that is left to us.
func parseInterface(n Network, req plugin.CreateEndpointRequest) (Endpoint, error) {
	e := Endpoint{Version: recordVersion, ID: req.EndpointID, Network: n.ID}
	if req.Interface == nil {
		return e, nil
	}
	var err error
	if e.Addrs, err = parseAddresses(req.Interface); err != nil {
		return e, err
	}
	for _, p := range e.Addrs {
		s, ok := n.subnet(p.Addr())
		if !ok {
			return e, fmt.Errorf("address %s is in none of the network's subnets (%s): %s", p.Addr(), pools(n), n.oneOf(p.Addr()))
		}
		if p.Addr() == s.Gateway.Addr() && n.shares() != "" {
			return e, gatewayTaken(p.Addr())
		}
	}
	if text := req.Interface.MacAddress; text != "" {
		hw, err := net.ParseMAC(text)
		if err != nil || len(hw) != len(e.MAC) || hw[0]&1 != 0 || datapath.MAC(hw) == (datapath.MAC{}) {
			return e, fmt.Errorf("%q is not the MAC address of one interface: write it as 02:42:c0:a8:01:14", clip(text))
		}
		e.MAC = datapath.MAC(hw)
	}
	return e, nil
}

// parseAddresses reads at most one address per family.
func parseAddresses(in *wire.EndpointInterface) (addrs []netip.Prefix, err error) {
	if in == nil {
		return nil, nil
	}
	for i, text := range []string{in.Address, in.AddressIPv6} {
		if text == "" {
			continue
		}
		p, err := netip.ParsePrefix(text)
		if err != nil || !families[i].of(p.Addr()) || p.Addr().Is4In6() {
			return nil, fmt.Errorf("%q is not an IPv%d address with its mask", clip(text), families[i])
		}
		addrs = append(addrs, p)
	}
	return addrs, nil
}

func (d *Driver) handleDeleteEndpoint(ctx context.Context, req wire.DeleteEndpointRequest) (plugin.Empty, error) {
	if err := checkIDs(req.NetworkID, req.EndpointID); err != nil {
		return plugin.Empty{}, err
	}
	sandbox := d.sandboxOf(req.NetworkID, req.EndpointID)
	defer func() { // without the network's lock
		d.giveBack(ctx, req.EndpointID, sandbox)
		d.tellMates(ctx, sandbox)
	}()
	known, err := d.deleteEndpoint(ctx, req.NetworkID, req.EndpointID)
	if !known {
		err = d.deleteUnclaimed(ctx, req.EndpointID)
	}
	return plugin.Empty{}, err
}

// deleteEndpoint deletes one that has a record.
func (d *Driver) deleteEndpoint(ctx context.Context, networkID, endpointID string) (known bool, err error) {
	n, unlock := d.find(networkID)
	defer unlock()
	if n == nil {
		return false, nil
	}
	d.mu.Lock()
	e := n.endpoints[endpointID]
	d.mu.Unlock()
	if e == nil {
		return false, nil
	}
	d.linger(n, endpointID)
	if d.later(n, endpointID) {
		return true, nil
	}
	return true, d.finish(ctx, n, e)
}

// endpointInfo is answered at once: the engine asks once for every endpoint of
// a container while that starts, and does nothing with the answer.
func (d *Driver) endpointInfo(_ context.Context, req wire.InfoRequest) (plugin.EndpointInfoResponse, error) {
	return plugin.EndpointInfoResponse{Value: map[string]any{}}, checkIDs(req.NetworkID, req.EndpointID)
}

func (d *Driver) handleJoin(ctx context.Context, req plugin.JoinRequest) (plugin.JoinResponse, error) {
	var resp plugin.JoinResponse
	ports, err := plugin.ParsePortMap(req.Options)
	if err != nil {
		return resp, err
	}
	if err := checkIDs(req.NetworkID, req.EndpointID); err != nil {
		return resp, err
	}
	if len(ports) > 0 {
		if err := d.openAccess(ctx, req.NetworkID); err != nil {
			return resp, err
		}
	}
	err = d.use(req.NetworkID, req.EndpointID, func(n *network, e *endpoint) error {
		if e.rec.Left || e.gone {
			if err := d.revive(ctx, n, e); err != nil {
				return err
			}
		}
		if err := d.arrive(ctx, n, e, req.SandboxKey); err != nil {
			return err
		}
		if err := d.expose(ctx, n, e, req.Options); err != nil {
			return err
		}
		d.mu.Lock()
		e.joined = true
		d.regroup(e, req.SandboxKey)
		d.mu.Unlock()
		d.tell(n, e)
		at := d.backends[n.rec.Mode].Attach(n.rec, e.rec).named(e.rec.IfName)
		at.Routes = append(at.Routes, d.learntRoutes(e)...)
		resp = joinResponse(at)
		return nil
	})
	if err == nil {
		d.tellMates(ctx, req.SandboxKey)
	}
	return resp, err
}

func joinResponse(at Attachment) plugin.JoinResponse {
	var resp plugin.JoinResponse
	if at.Link != "" {
		resp.InterfaceName = &plugin.InterfaceName{InterfaceName: wire.InterfaceName{SrcName: at.Link, DstPrefix: at.Prefix}, DstName: at.Name}
	}
	for _, g := range at.Gateways {
		if g.Is4() {
			resp.Gateway = g.String()
		} else {
			resp.GatewayIPv6 = g.String()
		}
	}
	for _, r := range at.Routes {
		route := &wire.StaticRoute{Destination: r.Destination.String(), RouteType: plugin.RouteConnected}
		if r.NextHop.IsValid() {
			route.RouteType, route.NextHop = plugin.RouteNextHop, r.NextHop.String()
		}
		resp.StaticRoutes = append(resp.StaticRoutes, route)
	}
	resp.DisableGatewayService = at.NoGateway
	return resp
}

func (d *Driver) handleLeave(ctx context.Context, req wire.LeaveRequest) (plugin.Empty, error) {
	sandbox := d.sandboxOf(req.NetworkID, req.EndpointID)
	err := d.end(req.NetworkID, req.EndpointID, func(n *network, e *endpoint) error {
		return d.leave(ctx, n, e)
	})
	d.giveBack(ctx, req.EndpointID, sandbox)
	d.tellMates(ctx, sandbox)
	return plugin.Empty{}, join(err, d.leaveUnclaimed(ctx, req.EndpointID))
}

func (d *Driver) handleProgram(ctx context.Context, req plugin.ProgramExternalRequest) (plugin.Empty, error) {
	took, err := d.takeOver(ctx, req.NetworkID, req.EndpointID)
	if err == nil {
		err = d.use(req.NetworkID, req.EndpointID, func(n *network, e *endpoint) error {
			return d.program(ctx, n, e, req.Options)
		})
	}
	if err != nil && took {
		ctx, cancel := cleanup(ctx)
		defer cancel()
		d.giveBack(ctx, req.EndpointID, d.sandboxOf(req.NetworkID, req.EndpointID))
	}
	if err == nil {
		d.tellMates(ctx, d.sandboxOf(req.NetworkID, req.EndpointID))
	}
	return plugin.Empty{}, err
}

func (d *Driver) handleRevoke(ctx context.Context, req wire.RevokeExternalConnectivityRequest) (plugin.Empty, error) {
	sandbox := d.sandboxOf(req.NetworkID, req.EndpointID)
	err := d.end(req.NetworkID, req.EndpointID, func(n *network, e *endpoint) error {
		return d.revoke(ctx, n, e)
	})
	d.giveBack(ctx, req.EndpointID, sandbox)
	return plugin.Empty{}, err
}

// errUnknown is wrapped where a call needs a network or endpoint that is not
// there.
var errUnknown = errors.New("is not known")

func unknownNetwork(id string) error {
	return fmt.Errorf("network %s %w to this plugin: stop its containers, remove it with docker network rm and create it again", short(id), errUnknown)
}

// use runs f with an endpoint locked; it has to be there.
func (d *Driver) use(networkID, endpointID string, f func(*network, *endpoint) error) error {
	if err := checkIDs(networkID, endpointID); err != nil {
		return err
	}
	n, unlock := d.find(networkID)
	defer unlock()
	if n == nil {
		return unknownNetwork(networkID)
	}
	e := d.lock(n, endpointID)
	if e == nil {
		return fmt.Errorf("endpoint %s %w on network %s: connect the container again", short(endpointID), errUnknown, short(networkID))
	}
	defer e.mu.Unlock()
	return f(n, e)
}

// end is use for calls that undo something: what is not there needs no undoing.
func (d *Driver) end(networkID, endpointID string, f func(*network, *endpoint) error) error {
	err := d.use(networkID, endpointID, f)
	if errors.Is(err, errUnknown) {
		return nil
	}
	return err
}

func checkIDs(networkID, endpointID string) error {
	if err := checkID("network", networkID); err != nil {
		return err
	}
	return checkID("endpoint", endpointID)
}
