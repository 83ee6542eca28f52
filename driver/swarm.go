package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strconv"

	wire "github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/internal/plugin"
)

// swarm is what the driver needs where its networks are those of a whole swarm.
type swarm interface {
	// Allocate gives a network, of which ID and Options are known, a VNI that no
	// other has, and what the nodes need to find each other. It is asked again
	// with its own answer after a change of leader.
	Allocate(ctx context.Context, n Network) (vni uint32, join string, err error)
	// Free forgets a network; one that is not known is success.
	Free(ctx context.Context, networkID string) error
	// Discover says that a node is in the swarm. self is this node, with the
	// address that carries its data.
	Discover(ctx context.Context, address netip.Addr, self bool) error
}

// defaultMode is that of networks that name none.
func (d *Driver) defaultMode() string {
	if d.swarm != nil {
		return ModeOverlay
	}
	return modeBridge
}

// nodeLocal is how a swarm gets networks of the other modes.
const nodeLocal = "make it on each node with --config-only and then once with --scope swarm --config-from, with the plugin's local alias as driver"

// allocateNetwork runs on the swarm's leader. The answer replaces the user's
// options on all nodes, so it repeats them.
func (d *Driver) allocateNetwork(ctx context.Context, req wire.AllocateNetworkRequest) (wire.AllocateNetworkResponse, error) {
	var resp wire.AllocateNetworkResponse
	if d.swarm == nil {
		return resp, errors.New("this driver's networks are local to a node: make them with --scope swarm from a --config-only network on each node")
	}
	if err := checkID("network", req.NetworkID); err != nil {
		return resp, err
	}
	generic := make(map[string]any, len(req.Options))
	for k, v := range req.Options {
		generic[k] = v
	}
	n, err := parseNetworkOptions(map[string]any{plugin.OptionGeneric: generic}, d.modes(), d.defaultMode())
	if err != nil {
		return resp, err
	}
	if err := d.checkScope(n); err != nil {
		return resp, err
	}
	n.ID = req.NetworkID
	vni, join, err := d.swarm.Allocate(ctx, n)
	if err != nil {
		return resp, err
	}
	resp.Options = maps.Clone(req.Options)
	if resp.Options == nil {
		resp.Options = map[string]string{}
	}
	resp.Options[optionMode] = n.Mode
	resp.Options[optionVNI] = strconv.FormatUint(uint64(vni), 10)
	resp.Options[optionJoin] = join
	return resp, nil
}

// checkScope refuses modes whose networks cannot be a whole swarm's.
func (d *Driver) checkScope(n Network) error {
	if d.swarm != nil && n.Mode != ModeOverlay {
		return fmt.Errorf("mode %s under SCOPE=global: only mode overlay spans a swarm: %s", n.Mode, nodeLocal)
	}
	return nil
}

func (d *Driver) freeNetwork(ctx context.Context, req wire.FreeNetworkRequest) (plugin.Empty, error) {
	if d.swarm == nil {
		return plugin.Empty{}, nil
	}
	if err := checkID("network", req.NetworkID); err != nil {
		return plugin.Empty{}, err
	}
	return plugin.Empty{}, d.swarm.Free(ctx, req.NetworkID)
}

// discoverNew learns of the swarm's nodes.
func (d *Driver) discoverNew(ctx context.Context, req plugin.DiscoveryNotification) (plugin.Empty, error) {
	if d.swarm == nil || req.DiscoveryType != plugin.DiscoverNode {
		return plugin.Empty{}, nil
	}
	a, err := netip.ParseAddr(req.DiscoveryData.Address)
	if err != nil {
		return plugin.Empty{}, fmt.Errorf("address of a node: %q is not one", clip(req.DiscoveryData.Address))
	}
	return plugin.Empty{}, d.swarm.Discover(ctx, a.Unmap(), req.DiscoveryData.Self)
}
