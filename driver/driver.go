package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
)

// records is what the driver needs of a store.
type records interface {
	List(ctx context.Context, prefix string) ([]store.Record, error)
	Get(ctx context.Context, key string) (store.Record, error)
	Put(ctx context.Context, r store.Record) (store.Record, error)
	Delete(ctx context.Context, key string) error
}

// kernel is what the driver needs of the kernel.
type kernel interface {
	Ensure(ctx context.Context, s datapath.State) ([]string, error)
	Remove(ctx context.Context, s datapath.State) error
	Owned(ctx context.Context) (datapath.State, error)
	Reserve(ctx context.Context, r datapath.PortRequest) (uint16, error)
	LiftGuard(ctx context.Context, needed func() (v4, v6 bool)) error
	Guarded() (v4, v6 bool)
}

// host is what the driver asks of the host's network.
type host interface {
	// PathMTU is the MTU of networks that are given none.
	PathMTU(ctx context.Context) (int, error)
	Link(ctx context.Context, name string) (datapath.LinkFacts, bool, error)
	// Addressed are the host's addresses with their subnets, by interface.
	Addressed(ctx context.Context) (map[string][]netip.Prefix, error)
	// Routers are those of the host's default routes by one link.
	Routers(ctx context.Context, link string) ([]netip.Addr, error)
}

// lan is the stations that a link of the host leads to.
type lan interface {
	Probe(ctx context.Context, link string, a netip.Addr) (holder datapath.MAC, taken bool, err error)
	Announce(link string, a netip.Addr, mac datapath.MAC) error
	// Present reports whether the host has a link, Settle waits until it can be set
	// up.
	Present(link string) (bool, error)
	Settle(ctx context.Context, link string) error
}

// Config is what New needs; all of it.
type Config struct {
	// Networks survives a reboot, Endpoints need not.
	Networks, Endpoints records
	Kernel              kernel
	Backends            map[string]Backend // by the value of -o mode=
	Host                interface {
		host
		lan
	}
	Cluster cluster // nil where no mode spans hosts
	// Swarm is nil where networks are this host's own (scope local).
	Swarm swarm
	// Station returns the MAC address that goes with an address of a subnet, where
	// whoever handed it out knows of one. nil: nobody does.
	Station func(subnet netip.Prefix, a netip.Addr) (datapath.MAC, bool)
	// Restation tells whoever handed an address out which MAC address its user
	// has chosen, if it is not zero, and what a DHCP server is to be told. nil: nobody
	// wants to know.
	Restation func(ctx context.Context, subnet netip.Prefix, a netip.Addr, mac datapath.MAC, told map[string]string) error
	// Learnt returns what a DHCP server has said with an address of a subnet. nil:
	// there is none.
	Learnt func(subnet netip.Prefix, a netip.Addr) (Learnt, bool)
	// Assigned tells whoever handed an address out which endpoint has it, with which
	// MAC address unless it is zero. It does not wait for anything. nil: nobody
	// wants to know.
	Assigned func(subnet netip.Prefix, a netip.Addr, endpointID string, mac datapath.MAC)
	// Chosen reports whether nobody typed a network's subnet, or its gateway. ours is
	// false where an IPAM handed them out that does not say. nil: none says.
	Chosen func(pool netip.Prefix, gateway netip.Addr) (subnet, address, ours bool)
	// Range returns what this host alone chooses addresses of a pool from; false
	// where whoever hands them out does not say, or does so together with other hosts.
	// nil: nobody says.
	Range func(pool netip.Prefix) (netip.Prefix, bool)
	// RecordsLost: endpoints of this boot were recorded and the records are lost, so that
	// an address without an endpoint may be a running container's.
	RecordsLost bool
	// Damaged gets a value when others took something of ours out of the firewall.
	// nil: damage is found by the next pass.
	Damaged <-chan struct{}
	Log     logrus.FieldLogger
}

// Driver is the network driver. See the package's comment for its locks.
type Driver struct {
	nets, eps   records
	kernel      kernel
	backends    map[string]Backend
	host        host
	lan         lan
	cluster     cluster
	swarm       swarm
	station     func(netip.Prefix, netip.Addr) (datapath.MAC, bool)
	restation   func(context.Context, netip.Prefix, netip.Addr, datapath.MAC, map[string]string) error
	learnt      func(netip.Prefix, netip.Addr) (Learnt, bool)
	assigned    func(netip.Prefix, netip.Addr, string, datapath.MAC)
	chosen      func(netip.Prefix, netip.Addr) (subnet, address, ours bool)
	ranges      func(netip.Prefix) (netip.Prefix, bool)
	log         logrus.FieldLogger
	damaged     <-chan struct{}
	recordsLost bool
	now         func() time.Time
	started     time.Time
	news        chan news  // for Announce
	waste       chan waste // for Sweep
	sweeping    atomic.Bool

	hooked     atomic.Bool // see firstEndpoint
	toldIfName atomic.Bool // see tellIfName

	pass   sync.Mutex // one Reconcile at a time
	change sync.Mutex // networks come and go, and repair

	mu       sync.Mutex // over networks, all that hangs on it but the locks, and the rest
	networks map[string]*network
	// fallbacks are the endpoints that serve IPv6 with IPv4, by their sandbox.
	fallbacks map[string]*fallback
	// mates are the endpoints by the sandbox that they have joined; see beside.go.
	mates map[string][]*endpoint
	drift Drift
	// lingers are hardware addresses that the kernel may still have, see linger.
	lingers map[datapath.MAC]time.Time
	// addressed are the host's addresses at addressedAt, see addressedLately.
	addressed   map[string][]netip.Prefix
	addressedAt time.Time
	// unowned is ours by its mark and named by no record.
	unowned datapath.State
}

type network struct {
	mu        sync.RWMutex
	mending   sync.Mutex // after mu; see ensureOn
	rec       Network
	rev       uint64
	endpoints map[string]*endpoint
	// holders has who last claimed an address or a link name.
	holders map[string]*endpoint
	doomed  bool // to be deleted; wanted by nobody
	// vetted has when the LAN was asked for an address and nobody answered.
	vetted map[netip.Addr]time.Time
	// remote is what leads to endpoints on other hosts; over it is Driver.mu.
	remote datapath.State
}

func newNetwork(rec Network) *network {
	return &network{rec: rec, endpoints: map[string]*endpoint{}, holders: map[string]*endpoint{}, vetted: map[netip.Addr]time.Time{}}
}

type endpoint struct {
	mu  sync.Mutex
	rec Endpoint
	rev uint64

	doomed  bool // to be deleted; wanted by nobody
	gone    bool // its link vanished, and with it the container's end
	unsaved bool // the store may not hold rec
	loaded  bool // read from the store by this process, not made by it
	joined  bool // Join was answered by this process

	sandbox string // of the container, from Join
	yields  bool   // another endpoint of the sandbox has its IPv6 ports; see fallback
	// beside are the LANs that the container has a link to besides this one.
	beside []netip.Prefix
}

// New returns a Driver that knows nothing yet; Recover tells it.
func New(c Config) (*Driver, error) {
	switch {
	case c.Networks == nil || c.Endpoints == nil:
		return nil, errors.New("network driver: a store is missing")
	case c.Kernel == nil:
		return nil, errors.New("network driver: the kernel is missing")
	case len(c.Backends) == 0:
		return nil, errors.New("network driver: there is no mode")
	case c.Backends[ModeOverlay] != nil && c.Cluster == nil:
		return nil, errors.New("network driver: mode overlay needs a cluster")
	case c.Host == nil || c.Log == nil:
		return nil, errors.New("network driver: Host and Log must be set")
	}
	if c.Station == nil {
		c.Station = func(netip.Prefix, netip.Addr) (datapath.MAC, bool) { return datapath.MAC{}, false }
	}
	if c.Restation == nil {
		c.Restation = func(context.Context, netip.Prefix, netip.Addr, datapath.MAC, map[string]string) error { return nil }
	}
	if c.Learnt == nil {
		c.Learnt = func(netip.Prefix, netip.Addr) (Learnt, bool) { return Learnt{}, false }
	}
	if c.Assigned == nil {
		c.Assigned = func(netip.Prefix, netip.Addr, string, datapath.MAC) {}
	}
	if c.Chosen == nil {
		c.Chosen = func(netip.Prefix, netip.Addr) (_, _, _ bool) { return false, false, false }
	}
	return &Driver{
		nets: c.Networks, eps: c.Endpoints, kernel: c.Kernel, backends: c.Backends, host: c.Host, lan: c.Host, cluster: c.Cluster, swarm: c.Swarm,
		station: c.Station, restation: c.Restation, learnt: c.Learnt, assigned: c.Assigned, chosen: c.Chosen, ranges: c.Range, log: c.Log,
		damaged: c.Damaged, recordsLost: c.RecordsLost, now: time.Now, started: time.Now(), networks: map[string]*network{}, fallbacks: map[string]*fallback{}, mates: map[string][]*endpoint{}, news: make(chan news, mostNews), waste: make(chan waste, mostWaste),
	}, nil
}

// cleanupTime is what undoing gets after the call that failed ran out of time.
const cleanupTime = 5 * time.Second

// cleanup is a context for work that has to be done although the call ended.
func cleanup(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
}

// join is errors.Join on one line, as the engine shows it.
func join(cause error, more ...error) error {
	for _, err := range more {
		switch {
		case err == nil:
		case cause == nil:
			cause = err
		default:
			cause = fmt.Errorf("%w; then %w", cause, err)
		}
	}
	return cause
}

// put writes a record. Nobody else writes ours, so a revision that is not the
// one expected comes from a write of our own whose outcome was not known.
func put(ctx context.Context, s records, key string, v any, rev uint64) (uint64, error) {
	value, err := json.Marshal(v)
	if err != nil {
		return 0, fmt.Errorf("encode %s: %w", key, err)
	}
	r, err := s.Put(ctx, store.Record{Key: key, Value: value, Rev: rev})
	if errors.Is(err, store.ErrExists) || errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNotFound) {
		found, gerr := s.Get(ctx, key)
		if gerr != nil && !errors.Is(gerr, store.ErrNotFound) {
			return 0, gerr
		}
		r, err = s.Put(ctx, store.Record{Key: key, Value: value, Rev: found.Rev})
	}
	return r.Rev, err
}

// networkState is what a network means in the kernel, endpointState what one of its
// endpoints adds. Neither asks for what is marked as not there.
func (d *Driver) networkState(n *network) datapath.State {
	return d.backends[n.rec.Mode].Network(n.rec)
}

func (d *Driver) endpointState(n *network, e *endpoint) datapath.State {
	if e.gone {
		return datapath.State{}
	}
	s := d.backends[n.rec.Mode].Endpoint(n.rec, e.rec)
	if e.yields {
		s = s.Minus(e.rec.fallbacks())
	}
	s.Elements = append(s.Elements, e.rec.lansBeside(e.beside)...)
	if e.rec.Left {
		// The engine moves a sub-interface back to the host and then asks for
		// its deletion; a veth pair went with Leave.
		return datapath.State{Children: s.Children}
	}
	return s
}

// find returns a network by its ID, or nil, and what unlocks it: it is locked
// for reading.
func (d *Driver) find(id string) (n *network, unlock func()) {
	d.mu.Lock()
	n = d.networks[id]
	d.mu.Unlock()
	if n == nil {
		return nil, func() {}
	}
	n.mu.RLock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.networks[id] != n || n.doomed { // deleted while we waited
		n.mu.RUnlock()
		return nil, func() {}
	}
	return n, n.mu.RUnlock
}

// lock returns an endpoint of a network that is locked for reading, or nil. The
// endpoint is locked.
func (d *Driver) lock(n *network, id string) *endpoint {
	d.mu.Lock()
	e := n.endpoints[id]
	d.mu.Unlock()
	if e == nil {
		return nil
	}
	e.mu.Lock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if n.endpoints[id] != e || e.doomed {
		e.mu.Unlock()
		return nil
	}
	return e
}

// createNetwork makes n, or takes it up again if it is there with the same
// settings: swarm repeats the call after a crash, without having deleted the
// endpoints of before.
func (d *Driver) createNetwork(ctx context.Context, rec Network) error {
	d.change.Lock()
	defer d.change.Unlock()
	old := d.networks[rec.ID] // change is held: the table stands still
	if old != nil && old.doomed {
		if err := d.finishNetwork(ctx, old); err != nil {
			return fmt.Errorf("the network of that id is still being deleted: %w", err)
		}
		old = nil
	}
	if err := d.complete(ctx, &rec, old); err != nil {
		return err
	}
	if old != nil {
		return d.readopt(ctx, old, rec)
	}
	if err := d.checkOthers(ctx, rec); err != nil {
		return err
	}
	if err := checkRoom(rec); err != nil {
		return err
	}
	if err := d.checkHostSubnets(ctx, rec); err != nil {
		return err
	}
	rec.Created, rec.Pending = d.now().UTC(), true
	n := newNetwork(rec)
	n.mu.Lock()
	defer n.mu.Unlock()
	d.mu.Lock()
	d.networks[rec.ID] = n
	d.mu.Unlock()
	if err := d.make(ctx, n); err != nil {
		ctx, cancel := cleanup(ctx)
		defer cancel()
		return join(err, d.removeNetwork(ctx, n))
	}
	return nil
}

// make writes a new network, makes it, and marks it as made.
func (d *Driver) make(ctx context.Context, n *network) error {
	if err := d.saveNetwork(ctx, n, n.rec); err != nil {
		return err
	}
	if _, err := d.kernel.Ensure(ctx, d.networkState(n)); err != nil {
		return err
	}
	if err := d.tryParent(ctx, n); err != nil {
		return err
	}
	rec := n.rec
	rec.Pending = false
	if err := d.saveNetwork(ctx, n, rec); err != nil {
		return err
	}
	d.share(n)
	return ctx.Err() // the engine was told that it failed, and never deletes it
}

func (d *Driver) saveNetwork(ctx context.Context, n *network, rec Network) error {
	rev, err := put(ctx, d.nets, networkKey(rec.ID), rec, n.rev)
	if err != nil {
		return err
	}
	d.mu.Lock()
	n.rec, n.rev = rec, rev
	d.mu.Unlock()
	return nil
}

// complete fills in what the request leaves open. old is the network of the
// same ID, if there is one.
func (d *Driver) complete(ctx context.Context, rec *Network, old *network) error {
	switch {
	case rec.MTU != 0: // the cluster's
	case rec.Options.MTU != 0:
		rec.MTU = rec.Options.MTU
	case old != nil:
		rec.MTU = old.rec.MTU // the path may have changed since
	case rec.onParent(): // the parent's, whatever that is when a container comes
	default:
		mtu, err := d.host.PathMTU(ctx)
		if err != nil {
			return fmt.Errorf("find the MTU of the way out: %w: give one with -o mtu=1500", err)
		}
		rec.MTU = mtu
	}
	if rec.onParent() {
		if err := d.findParent(ctx, rec, old); err != nil {
			return err
		}
		rec.Access = rec.Access || rec.Options.HostAccess
	}
	return d.backends[rec.Mode].Validate(rec)
}

// readopt takes up a network again and sweeps its endpoints.
func (d *Driver) readopt(ctx context.Context, n *network, rec Network) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	rec.Created = n.rec.Created
	if !equal(rec, n.rec) {
		return fmt.Errorf("network %s exists already with other settings: remove it, then create it again", short(rec.ID))
	}
	if err := d.sweep(ctx, n); err != nil {
		return err
	}
	_, err := d.kernel.Ensure(ctx, d.networkState(n))
	d.share(n)
	return err
}

// equal compares records as the store would see them.
func equal(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}

// checkOthers refuses a network that would get in the way of another, or of
// itself.
func (d *Driver) checkOthers(ctx context.Context, rec Network) error {
	for i, s := range rec.Subnets {
		for _, t := range rec.Subnets[:i] {
			if s.Pool.Overlaps(t.Pool) {
				return fmt.Errorf("subnets %s and %s overlap: choose another for one of them", t.Pool, s.Pool)
			}
		}
	}
	for _, o := range slices.Collect(maps.Values(d.networks)) {
		err := d.inTheWay(rec, o)
		if err == nil || o.doomed {
			continue
		}
		if !d.abandoned(o) {
			return err
		}
		d.log.WithField("network", o.rec.ID).Warn("forgotten: the engine never used it, and asks for its place again")
		if err := d.finishNetwork(ctx, o); err != nil {
			return err
		}
	}
	return nil
}

// inTheWay says why rec cannot be beside o, if it cannot.
func (d *Driver) inTheWay(rec Network, o *network) error {
	for _, s := range rec.Subnets {
		for _, t := range o.rec.Subnets {
			// The LAN's subnet may be that of several networks on it: the IPAM,
			// or the LAN's own DHCP server, gives no address twice.
			sameLAN := s.Pool == t.Pool && rec.onLAN() != "" && rec.onLAN() == o.rec.onLAN()
			if s.Pool.Overlaps(t.Pool) && !sameLAN {
				return fmt.Errorf("subnet %s overlaps with one of network %s: choose another --subnet, %s", s.Pool, short(o.rec.ID), forgetHint(o.rec.ID))
			}
		}
	}
	if err := rec.atOdds(o.rec); err != nil {
		return err
	}
	for _, b := range d.backends[rec.Mode].Network(rec).Bridges {
		for _, other := range d.networkState(o).Bridges {
			if b.Name == other.Name && (!b.Existing || !other.Existing) {
				return fmt.Errorf("bridge %s belongs to network %s: choose another name, %s", b.Name, short(o.rec.ID), forgetHint(o.rec.ID))
			}
		}
	}
	return nil
}

// forgetHint is what to do about a network that is in the way, also where it was
// removed while the plugin was not there to be told.
func forgetHint(id string) string {
	return fmt.Sprintf("or remove that network, or, if `docker network ls` does not show it, `weft network forget %s`", short(id))
}

// answerTime bounds a call, and so how long before our start a network was made
// whose maker died before the engine heard of it.
const answerTime = 10 * time.Second

// abandoned reports whether the engine may not know o: the process that made
// it ended about then, and nothing has used it since. After such a call the
// engine takes back only the addresses. That somebody was given o's subnet
// again, or names its bridge again, is what tells that it has no such network.
func (d *Driver) abandoned(o *network) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(o.endpoints) == 0 && o.rec.Created.Before(d.started) && d.started.Sub(o.rec.Created) < answerTime
}

// deleteNetwork forgets a network and all that is left of its endpoints.
func (d *Driver) deleteNetwork(ctx context.Context, id string) error {
	d.change.Lock()
	defer d.change.Unlock()
	n := d.networks[id] // change is held: the table stands still
	if n == nil {
		return d.dropUnclaimed(ctx, bridgeName(id), ownLink(id), dummyName(id))
	}
	return d.finishNetwork(ctx, n)
}

// finishNetwork is removeNetwork with the network's lock. change is held.
func (d *Driver) finishNetwork(ctx context.Context, n *network) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return d.removeNetwork(ctx, n)
}

// removeNetwork needs change and the network's lock.
func (d *Driver) removeNetwork(ctx context.Context, n *network) error {
	d.mu.Lock()
	n.doomed = true
	d.mu.Unlock()
	if err := d.sweep(ctx, n); err != nil {
		return err
	}
	d.mu.Lock()
	others := d.unowned.Minus(datapath.State{}) // a copy
	d.mu.Unlock()
	for _, o := range d.networks {
		if !o.doomed {
			others.Add(d.networkState(o))
		}
	}
	mine := d.networkState(n)
	if n.rec.Pending {
		mine.Children = append(mine.Children, d.trial(n)...)
	}
	d.mu.Lock()
	// The rest of what leads to other hosts goes with the links.
	mine.Elements = append(mine.Elements, n.remote.Elements...)
	others.Elements = append(others.Elements, d.membersLocked(n)...)
	others.Add(d.commonLocked(mine))
	d.mu.Unlock()
	dropped := without(mine, others)
	if err := d.kernel.Remove(ctx, dropped); err != nil {
		return err
	}
	if err := d.wantedMeanwhile(ctx, n, dropped); err != nil {
		return err
	}
	if err := d.nets.Delete(ctx, networkKey(n.rec.ID)); err != nil {
		return err
	}
	if n.rec.VNI != 0 {
		d.cluster.Withdraw(n.rec)
	}
	d.mu.Lock()
	delete(d.networks, n.rec.ID)
	d.mu.Unlock()
	return nil
}

// sweep deletes all endpoints of a network, whose lock is held for writing. The
// links go in one call: the kernel lets each wait, but side by side.
func (d *Driver) sweep(ctx context.Context, n *network) error {
	var all datapath.State
	d.mu.Lock()
	list := slices.Collect(maps.Values(n.endpoints))
	for _, e := range list {
		e.doomed = true
		all.Add(d.endpointState(n, e))
	}
	d.mu.Unlock()
	if len(list) == 0 {
		return nil
	}
	if err := d.kernel.Remove(ctx, without(all, datapath.State{})); err != nil {
		return err
	}
	for _, e := range list {
		if err := d.forget(ctx, n, e); err != nil {
			return err
		}
	}
	return nil
}

// forget deletes the record of an endpoint that has nothing left in the kernel.
func (d *Driver) forget(ctx context.Context, n *network, e *endpoint) error {
	if err := d.eps.Delete(ctx, endpointKey(n.rec.ID, e.rec.ID)); err != nil {
		return err
	}
	d.mu.Lock()
	n.strike(e)
	d.strikeFallback(e)
	d.regroup(e, "")
	d.mu.Unlock()
	d.share(n)
	return nil
}

// Subnet returns a network that has a subnet which overlaps with p.
func (d *Driver) Subnet(p netip.Prefix) (networkID string, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, n := range d.networks {
		if n.doomed {
			continue
		}
		for _, s := range n.rec.Subnets {
			if s.Pool.Overlaps(p) {
				return id, true
			}
		}
	}
	return "", false
}

// Subnets returns how many networks have a subnet that overlaps with p.
func (d *Driver) Subnets(p netip.Prefix) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, o := range d.networks {
		if !o.doomed && slices.ContainsFunc(o.rec.Subnets, func(s Subnet) bool { return s.Pool.Overlaps(p) }) {
			n++
		}
	}
	return n
}

// Used returns which addresses are in use by the networks that have exactly this
// subnet, and what for: endpoints, its gateway, and its auxiliary addresses. An
// endpoint that has lost its link uses none. While there are links of containers
// that no record names, nobody knows.
func (d *Driver) Used(p netip.Prefix) (by func(netip.Addr) string, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	used := map[netip.Addr]string{}
	for _, n := range d.networks {
		for _, s := range n.rec.Subnets {
			if n.doomed || s.Pool != p {
				continue
			}
			ok = true
			used[s.Gateway.Addr()] = "the gateway"
			for name, a := range s.Aux {
				used[a.Addr()] = "auxiliary address " + name
			}
			for _, e := range n.endpoints {
				if e.gone {
					continue
				}
				for _, a := range e.rec.Addrs {
					used[a.Addr()] = "endpoint " + short(e.rec.ID)
				}
			}
		}
	}
	return func(a netip.Addr) string { return used[a] }, ok && len(d.unowned.Veths) == 0 && !d.recordsLost
}

// LinksWith returns the links of LANs on which networks with exactly this subnet are,
// "" for one that is on none.
func (d *Driver) LinksWith(p netip.Prefix) (links []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range d.networks {
		if !n.doomed && slices.ContainsFunc(n.rec.Subnets, func(s Subnet) bool { return s.Pool == p }) {
			links = append(links, n.rec.onLAN())
		}
	}
	return links
}

// Elsewhere returns which host of the cluster, but this one, has an endpoint with
// an address of the network that has exactly this subnet; nil where there is none
// to ask.
func (d *Driver) Elsewhere(p netip.Prefix) func(netip.Addr) (host string, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range d.networks {
		if n.doomed || n.rec.VNI == 0 || isSwarm(n.rec.ID) || !slices.ContainsFunc(n.rec.Subnets, func(s Subnet) bool { return s.Pool == p }) {
			continue
		}
		rec := n.rec
		return func(a netip.Addr) (string, bool) { return d.cluster.Holder(rec, a) }
	}
	return nil
}

// short is an ID as the engine prints it.
func short(id string) string { return id[:min(len(id), 12)] }
