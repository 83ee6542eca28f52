package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
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
		return nil, err
	}
	if s.secret != "" {
		join.Keys = [][]byte{overlay.Key(s.secret)}
	}
	grace, err := s.graceTime()
	if err != nil {
		return nil, err
	}
	port, err := s.port()
	if err != nil {
		return nil, err
	}
	c := overlay.Config{
		Host: id, Name: name, Parts: p.run, Kept: p.weft, Network: p.kernel, Underlay: s.underlay, Join: join, Grace: grace, Log: log,
	}
	if p.shared != nil {
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
			Table: t, ID: id, Name: name, Bind: underlay, Port: port, Peers: j.Peers, Keys: j.Keys, Store: p.weft, Log: log,
		})
	}
	return overlay.New(ctx, c)
}
