package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/dhcp"
	"github.com/weftnet/weft/internal/store"
)

// records is what ipam needs of a store. Writes have to be carried out in the
// order in which they were handed over, also those whose context ended.
type records interface {
	List(ctx context.Context, prefix string) ([]store.Record, error)
	Put(ctx context.Context, r store.Record) (store.Record, error)
	Delete(ctx context.Context, key string) error
	DeletePrefix(ctx context.Context, prefix string) error
	Write(ctx context.Context, b store.Batch) (store.Record, error)
}

// Config is what New needs.
type Config struct {
	Store records
	// Host returns the host's routes, its addresses, not masked, and its resolvers as
	// prefixes of one address. Automatic pools overlap none of them.
	Host func(context.Context) ([]netip.Prefix, error)
	// Holder returns the ID of the network of our own driver that uses
	// exactly this subnet. nil: there is no such driver.
	Holder func(netip.Prefix) (networkID string, ok bool)
	// Holders returns how many such networks there are. nil: one at most.
	Holders func(netip.Prefix) int
	// Vet asks the LAN of the network that has this subnet whether somebody
	// holds the address; the error says who. nil: nobody is asked.
	Vet func(ctx context.Context, pool netip.Prefix, a netip.Addr) error
	// Probe asks the LAN on a link whether a station has an address, for the networks of
	// other drivers, for whose addresses Vet asks nobody. nil: nobody is asked.
	Probe func(ctx context.Context, link string, a netip.Addr) (station string, taken bool, err error)
	// Used returns what the network of our own driver that has exactly this subnet
	// uses an address for: an endpoint, or what it was made with; "" for nothing.
	// nil, or false: nobody knows.
	Used func(netip.Prefix) (by func(netip.Addr) string, ok bool)
	// Elsewhere returns which other host has a container with an address of the
	// network that has exactly this subnet. The function is called for many addresses
	// with a pool locked: it waits for nobody. nil, or a nil function: none.
	Elsewhere func(netip.Prefix) func(netip.Addr) (host string, ok bool)
	// DHCP asks the DHCP servers of LANs. nil: there is none to ask.
	DHCP interface {
		leaser
		lessee
	}
	// Pools is where automatic pools come from. A family without a range in
	// it has the default ones.
	Pools []PoolRange
	// Shared is the store of the cluster, for address spaces that its hosts
	// share. HostID is what this host is known by there, HostName is for
	// people. nil: there is no cluster.
	Shared interface {
		claims
		feed
	}
	HostID, HostName string
	// History is how long it is known who had an address; 0: it is not.
	History time.Duration
	Log     logrus.FieldLogger
}

// IPAM hands out pools and addresses. Its methods may be called from any
// goroutine.
type IPAM struct {
	store  records
	host   func(context.Context) ([]netip.Prefix, error)
	holder func(netip.Prefix) (string, bool)
	count  func(netip.Prefix) int
	vet    func(context.Context, netip.Prefix, netip.Addr) error
	probe  func(context.Context, string, netip.Addr) (string, bool, error)
	used   func(netip.Prefix) (func(netip.Addr) string, bool)
	far    func(netip.Prefix) func(netip.Addr) (string, bool)
	log    logrus.FieldLogger
	shared *shared
	feed   feed // nil without a cluster
	now    func() time.Time
	asleep func() time.Duration // since the machine started
	dhcp   interface {
		leaser
		lessee
	}
	duid   []byte                // of this host, once it was needed; guarded by changes
	stray  map[poolKey][]*leased // of pools that are gone, to be given back; guarded by changes
	leases chan struct{}         // holds one token: when the next lease is due may have changed
	// Since when this process has the pools, and what was given back just before.
	started time.Time
	left    map[string]map[netip.Addr]string

	history *history

	nameless sync.Once // that the engine tells no names was logged

	changes chan struct{} // holds one token: making and dropping pools
	ranges4 []PoolRange
	ranges6 []PoolRange // empty until our own prefix is known; guarded by changes

	mu     sync.RWMutex
	pools  map[poolKey]*pool
	loaded bool

	epoch epoch

	queueMu sync.Mutex
	queue   []cleanup
	wake    chan struct{}
}

// pool is one subnet of one space.
type pool struct {
	poolKey

	mu     sync.Mutex
	parts  []part      // never none
	opts   poolOptions // of the last request; those of all where networks share the pool
	rev    uint64      // of the record; 0 when a write of it had an unknown outcome
	taken  occupancy
	cursor netip.Addr // where the search for the next free address starts, with nextFit
	// backs are the addresses that were given back last, in the order of that.
	backs   []back
	started time.Time // when this process began
	before  addrSet   // what was taken then, and not given back since
	chosen  addrSet   // of what is taken, what we chose
	// gateways has the addresses that were requested as gateway, with the
	// revisions of their records. One is usual; the newest counts.
	gateways map[netip.Addr]uint64
	// busy has the addresses, all of them taken, that are being written.
	busy map[netip.Addr]*busy
	// adopted: a network took over what none had. stale: the addresses that the
	// pool had then, each of which is granted once more.
	stale   addrSet
	adopted bool
	// Names that keep an address, by name and by address, and what is reserved:
	// beside what the options say, what was added later.
	byName      map[string]*binding
	byAddr      map[netip.Addr]*binding
	added       map[string]reservation
	reservedFor map[netip.Addr]string
	// since has when addresses that rest were released; with a name they are
	// in kept, without in quarantined.
	since             map[netip.Addr]time.Time
	kept, quarantined queue
	// With DHCP: the leases, which stations have one or are asking for one, and
	// what has happened.
	leased map[netip.Addr]*leased
	keys   map[string]bool
	counts leaseCounts
	// declined is when addresses were offered that a station of the LAN has.
	declined map[netip.Addr]time.Time
	// silent is why the server did not answer at silentAt, see leaseOr.
	silent   error
	silentAt time.Time
	asks     chan struct{} // holds a token for each lease that is being extended
	// unconfirmed: this host's swarm allocator has not named the pool since it
	// began. Then and later, stale has the addresses that it has not named.
	unconfirmed bool
	// In a shared space: mine has the addresses of this host as it wrote them,
	// others all else that is taken, gateways included.
	mine   map[netip.Addr]ownClaim
	others map[netip.Addr]heldClaim
	// granted is when this process handed out what is taken, but in a shared space.
	granted map[netip.Addr]time.Time
	// awaited is since when addresses that were handed out wait for their endpoint.
	awaited map[netip.Addr]time.Time
	// automatic: nobody typed the subnet. guess is the gateway that nobody typed.
	automatic bool
	guess     netip.Addr
	releasing bool // all of it will go
	closed    bool // no address is handed out any more; the pool will go
}

func newPool(id poolID) *pool {
	return &pool{
		poolKey: id.poolKey, parts: []part{{sub: id.sub}}, busy: map[netip.Addr]*busy{}, gateways: map[netip.Addr]uint64{},
		byName: map[string]*binding{}, byAddr: map[netip.Addr]*binding{}, added: map[string]reservation{},
		reservedFor: map[netip.Addr]string{}, since: map[netip.Addr]time.Time{}, leased: map[netip.Addr]*leased{}, keys: map[string]bool{},
		asks: make(chan struct{}, extendAtOnce), declined: map[netip.Addr]time.Time{},
		mine: map[netip.Addr]ownClaim{}, others: map[netip.Addr]heldClaim{}, granted: map[netip.Addr]time.Time{}, awaited: map[netip.Addr]time.Time{},
	}
}

// busy is an address between its mark in memory and the end of its write.
type busy struct {
	done   chan struct{} // closed when the write ends
	queued bool          // it ended badly: the record has to go, see Run
	news   func()        // what was heard of it last meanwhile, in a shared space
}

// kind is what an address was requested as.
type kind string

const (
	kindGateway  kind = "gateway"
	kindAuto     kind = "auto"     // chosen by us
	kindExplicit kind = "explicit" // --ip, --aux-address, or the engine repeating itself
	kindNamed    kind = "named"    // what a name has a right to
	kindKept     kind = "kept"     // nobody's: in a shared space, for a name
)

// New returns an IPAM without pools; Load reads them.
func New(c Config) (*IPAM, error) {
	if c.Store == nil || c.Host == nil || c.Log == nil || c.Shared != nil && c.HostID == "" {
		return nil, errors.New("ipam: store, host and log are required, and with a cluster the host's ID")
	}
	i := &IPAM{
		store: c.Store, host: c.Host, holder: c.Holder, count: c.Holders, vet: c.Vet, probe: c.Probe, used: c.Used, far: c.Elsewhere, log: c.Log, now: time.Now, asleep: dhcp.Asleep, dhcp: c.DHCP, leases: make(chan struct{}, 1),
		history: newHistory(c.History), changes: make(chan struct{}, 1), pools: map[poolKey]*pool{}, wake: make(chan struct{}, 1),
		shared: &shared{disk: c.Store, host: c.HostID, name: c.HostName, doubt: map[string]uint64{}, owed: map[string]bool{}},
	}
	if c.Shared != nil {
		i.shared.claims, i.feed = c.Shared, c.Shared
	}
	if i.holder == nil {
		i.holder = func(netip.Prefix) (string, bool) { return "", false }
	}
	if i.count == nil {
		i.count = func(p netip.Prefix) int {
			if _, held := i.holder(p); held {
				return 1
			}
			return 0
		}
	}
	if i.used == nil {
		i.used = func(netip.Prefix) (func(netip.Addr) string, bool) { return nil, false }
	}
	if i.far == nil {
		i.far = func(netip.Prefix) func(netip.Addr) (string, bool) { return nil }
	}
	for _, r := range c.Pools {
		if r.Prefix.Addr().Is4() {
			i.ranges4 = append(i.ranges4, r)
		} else {
			i.ranges6 = append(i.ranges6, r)
		}
	}
	if i.ranges4 == nil {
		i.ranges4 = defaultPools4
	}
	return i, nil
}

// change takes the right to make and drop pools. The caller gives it back by
// calling the function.
func (i *IPAM) change(ctx context.Context) (func(), error) {
	select {
	case i.changes <- struct{}{}:
		return func() { <-i.changes }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("another pool is still being written: %w", ctx.Err())
	}
}

func (i *IPAM) pool(k poolKey) *pool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.pools[k]
}

// poolRequest is RequestPool in parsed form.
type poolRequest struct {
	poolID     // without prefix: choose one
	bits   int // wanted prefix length of a chosen one; 0 is the range's
	v6     bool
	opts   poolOptions
}

func (i *IPAM) requestPool(ctx context.Context, r poolRequest) (poolID, error) {
	i.confirm(r.poolKey)
	ctx, cancel := r.within(ctx)
	defer cancel()
	if r.shared() {
		if err := i.loadShared(ctx); err != nil {
			return poolID{}, fmt.Errorf("subnet %s in space %s: %w", r.prefix, r.spaceName(), err)
		}
	}
	release, err := i.change(ctx)
	if err != nil {
		return poolID{}, err
	}
	defer release()
	if !r.prefix.IsValid() {
		if r.prefix, err = i.choosePool(ctx, r); err != nil {
			return poolID{}, err
		}
		if err := i.addPool(ctx, r.poolID, r.opts); err != nil {
			return r.poolID, err
		}
		p := i.pool(r.poolKey)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.automatic = true
		return r.poolID, nil
	}
	if p := i.pool(r.poolKey); p != nil {
		// A release that failed or is just coming is finished first.
		if err := i.leave(ctx, p); err != nil {
			return poolID{}, err
		}
		if i.pool(r.poolKey) == p {
			return r.poolID, i.again(ctx, p, r)
		}
	}
	if err := i.displace(ctx, r.poolKey); err != nil {
		return poolID{}, err
	}
	return r.poolID, i.addPool(ctx, r.poolID, r.opts)
}

// choosePool returns a pool that overlaps nothing that we know of: pools of
// both spaces, since a manager's tasks use the subnets of the global one too,
// and what the host has.
func (i *IPAM) choosePool(ctx context.Context, r poolRequest) (netip.Prefix, error) {
	host, err := i.host(ctx)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("look at the host's routes: %w", err)
	}
	var avoid []netip.Prefix
	for _, p := range host {
		if p.Bits() > 0 { // the default route overlaps everything
			avoid = append(avoid, p.Masked())
		}
	}
	i.mu.RLock()
	for k := range i.pools {
		avoid = append(avoid, k.prefix)
	}
	i.mu.RUnlock()
	ranges := i.ranges4
	if r.v6 {
		if err := i.loadULA(ctx); err != nil {
			return netip.Prefix{}, err
		}
		ranges = i.ranges6
	}
	return choose(ranges, r.bits, avoid)
}

// loadULA makes sure that there are IPv6 ranges: our own prefix, made once.
func (i *IPAM) loadULA(ctx context.Context) error {
	if i.ranges6 != nil {
		return nil
	}
	have, err := i.store.List(ctx, ulaKey)
	if err != nil {
		return err
	}
	ula := newULA()
	if len(have) > 0 {
		if ula, err = netip.ParsePrefix(string(have[0].Value)); err != nil {
			return fmt.Errorf("record %s: %w", ulaKey, err)
		}
	} else if _, err := i.store.Put(ctx, store.Record{Key: ulaKey, Value: []byte(ula.String())}); err != nil {
		return err
	}
	i.ranges6 = []PoolRange{{ula, ulaSize}}
	return nil
}

// overlaps returns the other pools of the same space that k overlaps.
func (i *IPAM) overlaps(k poolKey) (list []*pool) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	for o, p := range i.pools {
		if o.space == k.space && o.prefix != k.prefix && o.prefix.Overlaps(k.prefix) {
			list = append(list, p)
		}
	}
	return list
}

// short is the form of an ID that docker network ls prints.
func short(id string) string { return id[:min(len(id), 12)] }

// swarm reports whether a network ID is one of swarm's: 25 characters, where
// the engine's own have 64.
func swarm(id string) bool { return len(id) == 25 }

// addPool writes the record of a new pool. The caller holds changes.
func (i *IPAM) addPool(ctx context.Context, id poolID, o poolOptions) error {
	if id.dhcp() != "" {
		if err := i.loadDUID(ctx); err != nil {
			return err
		}
		i.returnStrays(ctx, id.poolKey)
	}
	p := newPool(id)
	p.opts, p.started, p.parts[0].gave = o, i.started, len(o.raw) > 0
	p.reserve()
	err := i.home(id.poolKey).putPool(ctx, p, store.Batch{})
	switch {
	case errors.Is(err, store.ErrUncertain):
		// The engine takes it for refused and will not release it.
		p.releasing, p.closed = true, true
		i.later(cleanup{pool: p})
	case err != nil:
		return err
	}
	i.mu.Lock()
	i.pools[id.poolKey] = p
	i.mu.Unlock()
	if err == nil && id.shared() {
		p.mu.Lock()
		p.reserve() // what the other hosts have reserved, too
		p.mu.Unlock()
		i.fill(ctx, p)
	}
	return err
}

// drop deletes a pool with all its addresses: the engine does not release
// those that are left. The caller holds changes. It may be repeated. p may be one
// that this host has not, in a shared space: what it has there all the same goes.
func (i *IPAM) drop(ctx context.Context, p *pool) error {
	if have := i.pool(p.poolKey); have != p && (have != nil || !p.shared()) {
		return nil
	}
	p.mu.Lock()
	p.closed = true
	var wait []*busy
	for _, b := range p.busy {
		if !b.queued {
			wait = append(wait, b)
		}
	}
	p.mu.Unlock()
	for _, b := range wait {
		select {
		case <-b.done:
		case <-ctx.Done():
			return fmt.Errorf("release pool %s: an address is still being written: %w", p.prefix, ctx.Err())
		}
	}
	if err := i.home(p.poolKey).dropPool(ctx, p.poolKey); err != nil {
		return err
	}
	i.history.endPool(p.poolKey, i.now())
	if p.dhcp() != "" { // after the pool, which else nobody would release again
		if err := i.dropLeases(ctx, p); err != nil {
			return err
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.pools, p.poolKey)
	return nil
}

// find returns the pool of an ID. One that is unknown, because its record was
// lost or the plugin installed again, is taken up again if nothing is in the
// way: the engine never repeats RequestPool for the networks it has, and would
// not be able to start their containers.
func (i *IPAM) find(ctx context.Context, id poolID) (*pool, error) {
	if p := i.pool(id.poolKey); p.open() && !p.lacks(id) {
		return p, nil
	}
	release, err := i.change(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	p := i.pool(id.poolKey)
	if p.open() {
		return p, i.join(ctx, p, id)
	}
	if p != nil {
		if err := i.drop(ctx, p); err != nil {
			return nil, err
		}
	}
	if o := i.overlaps(id.poolKey); o != nil {
		return nil, fmt.Errorf("unknown pool %s: %w", id, i.inUse(id.prefix, o[0]))
	}
	if err := i.addPool(ctx, id, defaultOptions()); err != nil {
		return nil, err
	}
	i.log.WithField("pool", id.String()).Warn("unknown pool taken up again; addresses that its containers had before, and its options, are not known")
	return i.pool(id.poolKey), nil
}

func (p *pool) open() bool {
	if p == nil {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.closed
}
