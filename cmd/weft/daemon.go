package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/dhcp"
	"github.com/weftnet/weft/internal/plugin"
	"github.com/weftnet/weft/internal/store"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/overlay"
)

// mostWait bounds the pause between two attempts to recover.
const mostWait = 30 * time.Second

// registering is for how long after it serves calls a process may still be asked
// for its capabilities because it started. The engine asks at once; a machine
// that has too much to do may take long over it.
const registering = 30 * time.Second

// daemon is everything behind the two sockets.
type daemon struct {
	settings settings
	log      *logrus.Logger
	mux      *plugin.Mux

	mu    sync.Mutex // over what follows
	parts *parts     // nil until recovered
	err   error      // of the last attempt to recover
}

// parts are what a recovered daemon consists of.
type parts struct {
	lock      *datapath.Lock
	weft, run *store.Bolt
	kernel    *datapath.Kernel
	driver    *driver.Driver
	ipam      *ipam.IPAM
	cluster   *overlay.Cluster
	shared    *store.Etcd // nil without STORE
}

func newDaemon(s settings, log *logrus.Logger) *daemon {
	d := &daemon{settings: s, log: log, mux: plugin.New(plugin.Config{Log: log})}
	d.mux.Constant(plugin.PathNetworkCapabilities, driver.Capabilities(s.scope == scopeGlobal))
	d.mux.Constant(plugin.PathIpamCapabilities, ipam.Capabilities)
	d.mux.Constant(plugin.PathAddressSpaces, ipam.Spaces)
	return d
}

// run recovers, lets the calls in, and does what is done from time to time
// until ctx ends. While it cannot recover, calls are answered with the reason;
// it goes on trying, because what is wrong may be mended (a full disk) or pass
// (the process before this one still holds the files).
func (d *daemon) run(ctx context.Context) {
	start := time.Now()
	for wait := time.Second; ; wait = min(2*wait, mostWait) {
		p, err := recoverParts(ctx, d.settings, d.log)
		if err == nil {
			d.recovered(p)
			d.log.WithField("duration", time.Since(start)).Info("recovered, serving")
			break
		}
		d.mux.Ready(err)
		if d.failed(err) {
			d.log.WithError(err).Error("recovery failed; every call is answered with this until it is mended")
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.parts.driver.Run(ctx) })
	g.Go(func() error { return d.parts.kernel.Watch(ctx) })
	g.Go(func() error { return d.parts.driver.Announce(ctx) })
	g.Go(func() error { return d.parts.driver.Sweep(ctx) })
	g.Go(func() error { return d.parts.ipam.Run(ctx) })
	g.Go(func() error { return d.parts.cluster.Run(ctx, d.parts.driver) })
	if err := g.Wait(); err != nil {
		d.log.WithError(err).Error("repair has ended")
	}
}

func (d *daemon) recovered(p *parts) {
	d.mu.Lock()
	d.parts, d.err = p, nil
	d.mu.Unlock()
	p.driver.Register(d.mux)
	p.ipam.Register(d.mux)
	d.mux.Notice(plugin.PathIpamCapabilities, later(p.ipam.Elected))
	d.mux.Notice(plugin.PathNetworkCapabilities, later(p.cluster.Elected))
	d.mux.Ready(nil)
}

// later returns a function that calls f, but not while the engine registers this
// process. Nothing tells the two reasons for which it asks for capabilities
// apart, except that a swarm allocator is usually started long after the
// plugin. An allocator that was in office when the plugin crashed goes on without
// repeating anything, so that a registration must never be taken for an
// election; the other way round nothing is lost but what the election would have
// freed.
func later(f func()) func() {
	start := time.Now()
	return func() {
		if time.Since(start) > registering {
			f()
		}
	}
}

// failed reports whether err is not the error of the attempt before.
func (d *daemon) failed(err error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	fresh := d.err == nil || d.err.Error() != err.Error()
	d.err = err
	return fresh
}

// recoverParts opens the stores and reads back what they and the kernel hold.
func recoverParts(ctx context.Context, s settings, log *logrus.Logger) (p *parts, err error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	pools, err := ipam.ParsePools(s.pools)
	if err != nil {
		return nil, err
	}
	if s.scope == scopeGlobal {
		pools = ipam.ForSwarm(pools)
	}
	history, err := s.historyTime()
	if err != nil {
		return nil, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("find out which boot this is: %w", err)
	}
	p = &parts{}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
			p = nil
		}
	}()
	about := fmt.Sprintf("socket %s, state %s", s.socket, s.state)
	if p.lock, err = datapath.Acquire(ctx, log, s.instance, about); err != nil {
		return p, err
	}
	if err := os.MkdirAll(s.state, 0o700); err != nil {
		return p, fmt.Errorf("make the directory of the state: %w", err)
	}
	if p.weft, err = store.Open(filepath.Join(s.state, "weft.db"), store.Options{}); err != nil {
		return p, err
	}
	if p.run, err = store.OpenBoot(filepath.Join(s.state, "run.db"), strings.TrimSpace(string(boot))); err != nil {
		return p, err
	}
	if err := ownState(ctx, p.weft, s, log); err != nil {
		return p, err
	}
	lost, err := ownBoot(ctx, p.weft, p.run, strings.TrimSpace(string(boot)), log)
	if err != nil {
		return p, err
	}
	if err := ownMachine(ctx, p.weft, datapath.Machine(), log); err != nil {
		return p, err
	}
	if p.kernel, err = datapath.New(datapath.Config{Instance: s.instance, Unguarded: s.guard == "off", Log: log}); err != nil {
		return p, err
	}
	if s.store.Endpoints != "" {
		s.store.Log = log
		if p.shared, err = store.OpenEtcd(s.store); err != nil {
			return p, fmt.Errorf("setting STORE: %w", err)
		}
	}
	if p.cluster, err = newCluster(ctx, s, p, log); err != nil {
		return p, err
	}
	c := driver.Config{
		Networks: p.weft, Endpoints: p.run, RecordsLost: lost, Kernel: p.kernel, Damaged: p.kernel.Damaged(), Host: p.kernel, Cluster: p.cluster, Log: log,
		Station: func(subnet netip.Prefix, a netip.Addr) (datapath.MAC, bool) {
			mac, ok := p.ipam.Station(subnet, a) // made below, and there before the first call
			return mac, ok
		},
		Learnt: func(subnet netip.Prefix, a netip.Addr) (driver.Learnt, bool) {
			return learnt(p.ipam.Lease(subnet, a))
		},
		Assigned: func(subnet netip.Prefix, a netip.Addr, endpoint string, mac datapath.MAC) {
			p.ipam.Assigned(subnet, a, endpoint, mac)
		},
		Chosen: func(subnet netip.Prefix, gateway netip.Addr) (bool, bool, bool) {
			return p.ipam.Chosen(subnet, gateway)
		},
		Range: func(pool netip.Prefix) (netip.Prefix, bool) { return p.ipam.Range(pool) },
		Restation: func(ctx context.Context, subnet netip.Prefix, a netip.Addr, mac datapath.MAC, told map[string]string) error {
			return p.ipam.Restation(ctx, subnet, a, mac, told)
		},
		Backends: map[string]driver.Backend{
			"bridge": driver.Bridge{}, "macvlan": driver.Parent{Kind: "macvlan"}, "ipvlan": driver.Parent{Kind: "ipvlan"},
			driver.ModeOverlay: overlay.Backend{},
		},
	}
	if s.scope == scopeGlobal {
		c.Swarm = p.cluster
	}
	if p.driver, err = driver.New(c); err != nil {
		return p, err
	}
	a := ipam.Config{
		Store: p.weft, Host: p.kernel.InUse, Holder: p.driver.Subnet, Holders: p.driver.Subnets, Vet: p.driver.Vet, Used: p.driver.Used, Elsewhere: p.driver.Elsewhere, DHCP: new(dhcp.Client), Pools: pools, Log: log, History: history,
		Probe: func(ctx context.Context, link string, a netip.Addr) (string, bool, error) {
			mac, taken, err := p.kernel.Probe(ctx, link, a)
			return mac.String(), taken, err
		},
	}
	if p.shared != nil {
		a.Shared = p.shared
		if a.HostID, a.HostName, err = identity(ctx, p); err != nil {
			return p, err
		}
	}
	if p.ipam, err = ipam.New(a); err != nil {
		return p, err
	}
	if err := p.driver.Recover(ctx); err != nil {
		return p, err
	}
	if err := p.ipam.Load(ctx); err != nil {
		return p, err
	}
	p.driver.AssignAll()
	return p, nil
}

// instanceKey is the record that says whose a state is.
const instanceKey = "instance"

// ownState refuses a state that is another instance's as long as something of
// that is in the kernel: nobody would look after it any more.
func ownState(ctx context.Context, db *store.Bolt, s settings, log *logrus.Logger) error {
	r, err := db.Get(ctx, instanceKey)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	before := string(r.Value)
	if err != nil { // nobody has said yet whose it is
		if before, err = unnamed(ctx, db); err != nil {
			return err
		}
	}
	if before == s.instance && r.Rev != 0 {
		return nil
	}
	if before != "" && before != s.instance {
		k, err := datapath.New(datapath.Config{Instance: before, Log: log})
		if err != nil {
			return err
		}
		defer k.Close()
		have, err := k.Owned(ctx)
		if err != nil {
			return err
		}
		if n := have.Links(); n > 0 {
			return fmt.Errorf("setting INSTANCE=%s: the state in %s is that of instance %s, which has %d links on this host: set INSTANCE=%s again, or remove them with `weft uninstall -instance %s`",
				s.instance, s.state, before, n, before, before)
		}
	}
	_, err = db.Put(ctx, store.Record{Key: instanceKey, Value: []byte(s.instance), Rev: r.Rev})
	return err
}

// unnamed is whose a state without a name is: what releases before instances kept is
// that of the default one, and a new state is nobody's.
func unnamed(ctx context.Context, db *store.Bolt) (string, error) {
	list, err := db.List(ctx, "")
	if err != nil || len(list) == 0 {
		return "", err
	}
	return datapath.DefaultInstance, nil
}

// close lets go of files and sockets; nothing in the kernel changes.
func (p *parts) close() error {
	var errs []error
	if p.kernel != nil {
		p.kernel.Close()
	}
	if p.shared != nil {
		errs = append(errs, p.shared.Close())
	}
	for _, s := range []*store.Bolt{p.run, p.weft} {
		if s != nil {
			errs = append(errs, s.Close())
		}
	}
	if p.lock != nil {
		p.lock.Close()
	}
	return errors.Join(errs...)
}

// close comes after the last call and the last repair.
func (d *daemon) close() {
	if d.parts == nil {
		return
	}
	if err := d.parts.close(); err != nil {
		d.log.WithError(err).Error("close")
	}
}

// status is the answer to `weft status`.
func (d *daemon) status(ctx context.Context, _ []byte) (any, error) {
	d.mu.Lock()
	p, err := d.parts, d.err
	d.mu.Unlock()
	doc := document{Version: version, Commit: commit, Instance: d.settings.instance, Phase: recovering}
	doc.Networks, doc.Endpoints, doc.Drift.Repaired = []driver.NetworkStatus{}, []driver.EndpointStatus{}, []string{}
	doc.Unclaimed = []string{}
	doc.Pools = []ipam.PoolStatus{}
	doc.Cluster = overlay.Status{Peers: []overlay.Peer{}, Conflicts: []string{}, Troubles: []overlay.Trouble{}}
	switch {
	case p == nil && err != nil:
		doc.Phase, doc.Error = failed, err.Error()
	case p != nil:
		doc.Phase = serving
		if doc.Status, err = p.driver.Status(ctx); err != nil {
			return nil, err
		}
		doc.Pools = p.ipam.Status(ctx).Pools
		doc.Cluster = p.cluster.Status()
	}
	return doc, nil
}
