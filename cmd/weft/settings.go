package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/overlay"
)

// settings are what `weft serve` can be told.
type settings struct {
	logLevel, pools, scope, instance                           string
	peers, secret, underlay, grace, gossipPort, history, guard string
	store                                                      store.EtcdConfig // none without Endpoints
	state, socket                                              string
}

// complete fills in what follows from others. A managed plugin is told its paths:
// each has a file system of its own. Whatever is wrong, calls are answered, so
// there is a socket in any case.
func (s *settings) complete() {
	if s.scope == "" {
		s.scope = scopeLocal
	}
	if s.instance == "" {
		s.instance = s.scope
	}
	at := s.instance
	if datapath.CheckInstance(at) != nil {
		at = datapath.DefaultInstance
	}
	if s.state == "" {
		s.state = beside(defaultState, at)
	}
	if s.socket == "" {
		s.socket = beside(strings.TrimSuffix(defaultSocket, ".sock"), at) + ".sock"
	}
}

// beside is path for the default instance, and a neighbour of it for another.
func beside(path, instance string) string {
	if instance == datapath.DefaultInstance {
		return path
	}
	return path + "-" + instance
}

// check says all that is wrong with the settings, at once. They can only be
// changed while the plugin is disabled, and each attempt takes its networks away
// from the engine for a while.
func (s settings) check() error {
	var bad []string
	note := func(name, value string, err error) {
		if err != nil {
			bad = append(bad, fmt.Sprintf("%s=%.60q: %s", name, value, strings.TrimPrefix(err.Error(), "pools: ")))
		}
	}
	_, err := ipam.ParsePools(s.pools)
	note("POOLS", s.pools, err)
	if s.scope != scopeLocal && s.scope != scopeGlobal {
		note("SCOPE", s.scope, errors.New("choose local, or global for networks of a whole swarm"))
	} else {
		note("INSTANCE", s.instance, datapath.CheckInstance(s.instance))
	}
	peers, err := overlay.ParsePeers(s.peers)
	note("PEERS", s.peers, err)
	note("UNDERLAY", s.underlay, checkUnderlay(s.underlay))
	_, err = s.graceTime()
	note("GRACE", s.grace, err)
	_, err = s.historyTime()
	note("HISTORY", s.history, err)
	_, err = s.port()
	note("GOSSIP_PORT", s.gossipPort, err)
	if s.guard != "" && s.guard != "on" && s.guard != "off" {
		note("FORWARD_GUARD", s.guard, errors.New("choose on or off"))
	}
	if s.store.Endpoints != "" {
		note("STORE", s.store.Endpoints, s.store.Check())
	} else if s.store.CA+s.store.Cert+s.store.Key+s.store.User+s.store.Password != "" {
		note("STORE", "", errors.New("there are settings STORE_… and no store: write etcd://host:2379, or take them away"))
	}
	if s.store.Endpoints != "" && len(peers) > 0 {
		note("PEERS", s.peers, errors.New("hosts find each other by PEERS or by STORE: take one of the two away"))
	}
	if len(bad) == 0 {
		return nil // networks work at any level of the log
	}
	note("LOG_LEVEL", s.logLevel, s.checkLogLevel())
	return fmt.Errorf("settings: %s (docker plugin disable -f, docker plugin set, docker plugin enable)", strings.Join(bad, "; "))
}

// checkLogLevel is apart from check: what is wrong here keeps nothing from working.
func (s settings) checkLogLevel() error {
	if _, err := logrus.ParseLevel(s.logLevel); s.logLevel != "" && err != nil {
		return errors.New("choose from trace, debug, info, warn, error")
	}
	return nil
}

// graceTime is for how long what leads to a silent host stays.
func (s settings) graceTime() (time.Duration, error) {
	if s.grace == "" {
		return defaultGrace, nil
	}
	d, err := time.ParseDuration(s.grace)
	if err != nil || d < time.Second {
		return 0, errors.New("write a time of 1s or more, as 10m")
	}
	return d, nil
}

// historyTime is for how long it is known who had an address; 0 is not at all.
func (s settings) historyTime() (time.Duration, error) {
	if s.history == "" {
		return defaultHistory, nil
	}
	d, err := time.ParseDuration(s.history)
	if err != nil || d < 0 || 0 < d && d < time.Minute {
		return 0, errors.New("write a time of 1m or more, as 720h, or 0 for no history")
	}
	return d, nil
}

const defaultHistory = 30 * 24 * time.Hour

// port is the one on which hosts talk to each other.
func (s settings) port() (uint16, error) {
	if s.gossipPort == "" {
		if s.scope == scopeGlobal {
			return swarmPort, nil
		}
		return overlay.GossipPort, nil
	}
	n, err := strconv.ParseUint(s.gossipPort, 10, 16)
	if err != nil || n == 0 {
		return 0, errors.New("write a port of 1 to 65535")
	}
	return uint16(n), nil
}

// checkUnderlay refuses what can be neither an interface, which may come later, nor
// an address of one.
func checkUnderlay(s string) error {
	a, err := netip.ParseAddr(s)
	switch {
	case s == "":
		return nil
	case err == nil && (a.IsUnspecified() || a.IsMulticast()):
		return errors.New("no host has that address")
	case err != nil && (len(s) > 15 || strings.ContainsAny(s, "/: \t\n")):
		return errors.New("write the name of an interface, or an address of this host without a mask")
	}
	return nil
}
