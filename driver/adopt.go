package driver

import (
	"context"
	"fmt"
	"maps"

	"github.com/weftnet/weft/internal/plugin"
)

// optionBridgeName is the built-in driver's option for a bridge that is to be made,
// or is there.
const optionBridgeName = "com.docker.network.bridge.name"

// parseNetwork reads the options of the network with the ID, "" if it has none yet.
// A name that somebody else's bridge has is taken for bridge=, before anything is
// concluded from the options: what is there is a LAN of its own.
func (d *Driver) parseNetwork(ctx context.Context, id string, raw map[string]any) (Network, error) {
	n, err := parseNetworkOptions(raw, d.modes(), d.defaultMode())
	name := n.Options.BridgeName
	if err != nil || name == "" || n.Options.Bridge != "" {
		return n, err
	}
	if adopted, err := d.adopts(ctx, id, name); err != nil || !adopted {
		return n, err
	}
	typed, _ := raw[plugin.OptionGeneric].(map[string]any)
	generic := maps.Clone(typed)
	delete(generic, optionBridgeName)
	generic["bridge"] = name
	raw = maps.Clone(raw)
	raw[plugin.OptionGeneric] = generic
	return parseNetworkOptions(raw, d.modes(), d.defaultMode())
}

// adopts reports whether somebody else has made the bridge.
func (d *Driver) adopts(ctx context.Context, id, name string) (bool, error) {
	d.mu.Lock()
	old := d.networks[id]
	known := old != nil && !old.doomed
	adopted := known && old.rec.Options.Bridge == name
	d.mu.Unlock()
	if known {
		return adopted, nil
	}
	link, there, err := d.host.Link(ctx, name)
	switch {
	case err != nil || !there || link.Ours:
		return false, err
	case link.Kind != modeBridge:
		return false, fmt.Errorf("option %s=%s: there is a link of that name which is no bridge: choose another name", optionBridgeName, name)
	}
	if id != "" {
		d.log.WithField("network", id).Infof("bridge %s exists already: used as it is", name)
	}
	return true, nil
}
