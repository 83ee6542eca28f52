package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/overlay"
)

// The values of SCOPE.
const (
	scopeLocal  = "local"
	scopeGlobal = "global"
)

// defaultGrace is how long what leads to a silent host stays.
const defaultGrace = 10 * time.Minute

// swarmPort is the default of GOSSIP_PORT with SCOPE=global, so that a plugin for
// a swarm's networks and one for local networks with PEERS run side by side.
const swarmPort = overlay.GossipPort + 1

// identity is what other hosts know this one by, and its name for people.
func identity(ctx context.Context, p *parts) (id, name string, err error) {
	if id, err = overlay.Identity(ctx, p.weft); err != nil {
		return "", "", fmt.Errorf("find out which host this is: %w", err)
	}
	if name, err = os.Hostname(); err != nil {
		return "", "", fmt.Errorf("find out the host's name: %w", err)
	}
	return id, name, nil
}

// newCluster makes what joins this host with others, as the settings say.
func newCluster(ctx context.Context, s settings, p *parts, log *logrus.Logger) (*overlay.Cluster, error) {
	id, name, err := identity(ctx, p)
	if err != nil {
		return nil, err
	}
	join := overlay.Join{}
	if join.Peers, err = overlay.ParsePeers(s.peers); err != nil {
		return nil, fmt.Errorf("setting PEERS: %w", err)
	}
	if s.secret != "" {
		join.Keys = [][]byte{overlay.Key(s.secret)}
	}
	grace, port := defaultGrace, uint64(overlay.GossipPort)
	if s.scope == scopeGlobal {
		port = swarmPort
	}
	if s.grace != "" {
		if grace, err = time.ParseDuration(s.grace); err != nil || grace < time.Second {
			return nil, fmt.Errorf("setting GRACE: %q is not a time: write it as 10m", s.grace)
		}
	}
	if s.gossipPort != "" {
		if port, err = strconv.ParseUint(s.gossipPort, 10, 16); err != nil || port == 0 {
			return nil, fmt.Errorf("setting GOSSIP_PORT: %q is not a port: valid are 1 to 65535", s.gossipPort)
		}
	}
	c := overlay.Config{
		Host: id, Name: name, Parts: p.run, Kept: p.weft, Network: p.kernel, Underlay: s.underlay, Join: join, Grace: grace, Log: log,
	}
	if p.shared != nil {
		if len(join.Peers) > 0 {
			return nil, errors.New("settings PEERS and STORE: hosts find each other by one of the two")
		}
		c.Ready = func(overlay.Join) bool { return true }
		c.Engine = func(t *overlay.Table, _ netip.Addr, _ overlay.Join) (overlay.Engine, error) {
			return overlay.NewEtcd(overlay.EtcdConfig{Store: p.shared, Table: t, Name: name, Log: log}), nil
		}
		return overlay.New(ctx, c)
	}
	// A swarm's nodes wait for the key that comes with the first network.
	c.Ready = func(j overlay.Join) bool { return len(j.Keys) > 0 || s.scope != scopeGlobal && len(j.Peers) > 0 }
	c.Engine = func(t *overlay.Table, underlay netip.Addr, j overlay.Join) (overlay.Engine, error) {
		return overlay.NewGossip(overlay.GossipConfig{
			Table: t, ID: id, Name: name, Bind: underlay, Port: uint16(port), Peers: j.Peers, Keys: j.Keys, Store: p.weft, Log: log,
		})
	}
	return overlay.New(ctx, c)
}
