package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/internal/plugin"
)

// Capabilities is the answer to GetCapabilities. We ask for no replay, since
// our records survive, and for no MAC address: with one the engine would set it
// on the link, which ipvlan does not allow.
var Capabilities = ipam.CapabilitiesResponse{}

// Spaces is the answer to GetDefaultAddressSpaces.
var Spaces = ipam.AddressSpacesResponse{
	LocalDefaultAddressSpace:  LocalSpace,
	GlobalDefaultAddressSpace: GlobalSpace,
}

// Register puts the calls that are not constant on m.
func (i *IPAM) Register(m *plugin.Mux) {
	plugin.Handle(m, plugin.PathRequestPool, i.RequestPool)
	plugin.Handle(m, plugin.PathReleasePool, i.ReleasePool)
	plugin.Handle(m, plugin.PathRequestAddress, i.RequestAddress)
	plugin.Handle(m, plugin.PathReleaseAddress, i.ReleaseAddress)
}

var errNotLoaded = errors.New("the pools have not been read from disk yet")

func (i *IPAM) ready() error {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if !i.loaded {
		return errNotLoaded
	}
	return nil
}

// RequestPool makes a pool, chosen or given.
func (i *IPAM) RequestPool(ctx context.Context, req ipam.RequestPoolRequest) (ipam.RequestPoolResponse, error) {
	r, err := parsePoolRequest(req)
	if err == nil {
		err = i.ready()
	}
	if err != nil {
		return ipam.RequestPoolResponse{}, err
	}
	if r.opts.dhcp != "" {
		return i.answerLeased(ctx, r)
	}
	id, err := i.requestPool(ctx, r)
	if err != nil {
		return ipam.RequestPoolResponse{}, err
	}
	return ipam.RequestPoolResponse{PoolID: id.String(), Pool: id.prefix.String(), Data: map[string]string{}}, nil
}

// anyPool is the one subnet that the engine does not compare with the host's
// routes. Where it asked for none itself, it asks again for ever if it is answered
// one that overlaps them, and a LAN that the host is on does.
const anyPool = "0.0.0.0/0"

// answerLeased makes a pool with DHCP. The network half learns a subnet that
// cannot be said from the gateway's mask.
func (i *IPAM) answerLeased(ctx context.Context, r poolRequest) (ipam.RequestPoolResponse, error) {
	resp := ipam.RequestPoolResponse{Data: map[string]string{}}
	if i.dhcp == nil {
		return resp, errors.New("ipam option dhcp: this plugin was built without")
	}
	id, router, err := i.requestLeased(ctx, r)
	if err != nil {
		return resp, err
	}
	resp.PoolID, resp.Pool = id.String(), id.prefix.String()
	if router.IsValid() {
		resp.Data[plugin.RequestAddressGateway] = router.String()
	}
	if r.prefix.IsValid() {
		return resp, nil
	}
	host, err := i.host(ctx)
	if err == nil && slices.ContainsFunc(host, func(p netip.Prefix) bool { return p.Bits() > 0 && p.Overlaps(id.prefix) }) {
		resp.Pool = anyPool
		if !router.IsValid() || router.Addr().IsUnspecified() { // it is to say which subnet it is all the same
			resp.Data[plugin.RequestAddressGateway] = id.prefix.String()
		}
	}
	if err != nil {
		_ = i.releasePool(ctx, id) // what fails Run does
		return ipam.RequestPoolResponse{}, err
	}
	return resp, nil
}

// clip bounds what a user's typing adds to an error, and keeps it on one line.
func clip(s string) string {
	return strings.ToValidUTF8(strings.ReplaceAll(s[:min(len(s), 80)], "\n", " "), "?")
}

func parsePoolRequest(req ipam.RequestPoolRequest) (poolRequest, error) {
	r := poolRequest{v6: req.V6}
	r.space = req.AddressSpace
	if r.space != LocalSpace && r.space != GlobalSpace {
		return r, fmt.Errorf("there is no address space %q, only %s and %s", r.space, LocalSpace, GlobalSpace)
	}
	p, err := netip.ParsePrefix(req.Pool)
	if err != nil && req.Pool != "" {
		return r, fmt.Errorf("subnet %q is not one: write it as 10.0.0.0/24 or fd00:1::/64", clip(req.Pool))
	}
	given := err == nil && !p.Addr().IsUnspecified()
	if given {
		r.prefix = p.Masked()
	}
	if r.opts, err = parseOptions(req.Options, r.prefix); err != nil {
		return r, err
	}
	if name := r.opts.space; name != "" {
		switch {
		case r.space == GlobalSpace:
			return r, fmt.Errorf("ipam option space=%s: the leader of a swarm hands out addresses for all nodes already: leave it out", name)
		case !given:
			return r, fmt.Errorf("ipam option space=%s: give the subnet that all hosts share with --subnet, the same on every host", name)
		}
		r.space = spaceOption + name
	}
	if req.Pool == "" {
		if req.SubPool != "" {
			return r, fmt.Errorf("ip-range %s needs a subnet that it is a part of: add --subnet", clip(req.SubPool))
		}
		return r, nil
	}
	// From 29.0 on the engine passes "--subnet 0.0.0.0/26" on: a /26 from
	// the pools, whichever.
	if p.Addr().IsUnspecified() && p.Bits() > 0 {
		r.prefix = netip.Prefix{}
		if most := p.Addr().BitLen() - 2; p.Bits() > most || req.SubPool != "" {
			return r, fmt.Errorf("subnet %s asks for any subnet of that size: at most /%d, and without ip-range", p, most)
		}
		r.bits, r.v6 = p.Bits(), p.Addr().Is6()
		return r, nil
	}
	r.prefix = p.Masked() // 0.0.0.0/0, too, which is refused
	if req.SubPool != "" {
		if r.sub, err = netip.ParsePrefix(req.SubPool); err != nil {
			return r, fmt.Errorf("ip-range %q is not one: write it as 10.0.0.128/25", clip(req.SubPool))
		}
		if r.sub = r.sub.Masked(); r.sub == r.prefix {
			r.sub = netip.Prefix{}
		}
	}
	return r, r.validate()
}

// ReleasePool drops a pool and every address left in it.
func (i *IPAM) ReleasePool(ctx context.Context, req ipam.ReleasePoolRequest) (plugin.Empty, error) {
	if err := i.ready(); err != nil {
		return plugin.Empty{}, err
	}
	id, err := parsePoolID(req.PoolID)
	if err != nil {
		return plugin.Empty{}, nil //nolint:nilerr // we never handed it out, so it is released
	}
	return plugin.Empty{}, i.releasePool(ctx, id)
}

// RequestAddress hands out an address, chosen or given.
func (i *IPAM) RequestAddress(ctx context.Context, req ipam.RequestAddressRequest) (ipam.RequestAddressResponse, error) {
	r, err := parseAddressRequest(req)
	if err == nil {
		err = i.ready()
	}
	if err != nil {
		return ipam.RequestAddressResponse{}, err
	}
	asked := i.now()
	a, err := i.requestAddress(ctx, r)
	if err == nil && ctx.Err() != nil && r.kind != kindGateway && r.id.named() {
		// That there is none was answered meanwhile, and nobody will release it. A swarm
		// and a gateway ask again for what they have.
		err = errors.Join(ctx.Err(), i.takeBack(ctx, r.id, a.Addr()))
	}
	if err != nil {
		i.abandon(ctx, r, asked)
		return ipam.RequestAddressResponse{}, err
	}
	i.await(r, a.Addr())
	return ipam.RequestAddressResponse{Address: a.String(), Data: map[string]string{}}, nil
}

func parseAddressRequest(req ipam.RequestAddressRequest) (addressRequest, error) {
	id, err := parsePoolID(req.PoolID)
	if err != nil {
		return addressRequest{}, err
	}
	r := addressRequest{id: id, kind: kindAuto}
	if req.Address != "" {
		if r.want, err = netip.ParseAddr(req.Address); err != nil {
			return r, fmt.Errorf("address %q is not one: write it as 10.0.0.5 or fd00:1::5", clip(req.Address))
		}
		r.kind = kindExplicit
	}
	if req.Options[plugin.OptionRequestAddressType] == plugin.RequestAddressGateway {
		r.kind = kindGateway
	} else if id.named() {
		r.name = lasting(req.Options[plugin.OptionEndpointName])
		if r.who = strings.TrimPrefix(req.Options[plugin.OptionEndpointName], "/"); checkName(r.who) != nil {
			r.who = ""
		}
	}
	return r, nil
}

// ReleaseAddress frees an address.
func (i *IPAM) ReleaseAddress(ctx context.Context, req ipam.ReleaseAddressRequest) (plugin.Empty, error) {
	if err := i.ready(); err != nil {
		return plugin.Empty{}, err
	}
	id, err := parsePoolID(req.PoolID)
	if err != nil {
		return plugin.Empty{}, nil //nolint:nilerr // we never handed it out, so it is free
	}
	a, err := netip.ParseAddr(req.Address)
	if err != nil {
		return plugin.Empty{}, nil //nolint:nilerr // as above
	}
	return plugin.Empty{}, i.releaseAddress(ctx, id, a)
}
