package overlay

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
)

const (
	// askTime is how long other hosts may take to say what they have of a
	// network that is being made.
	askTime = time.Second
	// lookTime is how often the underlay's address is looked at.
	lookTime = 5 * time.Second
	partsKey = "parts/"
)

// disk is what the cluster keeps things in.
type disk interface {
	List(ctx context.Context, prefix string) ([]store.Record, error)
	Get(ctx context.Context, key string) (store.Record, error)
	Put(ctx context.Context, r store.Record) (store.Record, error)
	Delete(ctx context.Context, key string) error
}

// host is what the cluster asks of the host's network.
type hostNetwork interface {
	Underlay(ctx context.Context, want string, peers ...netip.Addr) (datapath.Underlay, error)
	Announce(link string, a netip.Addr, mac datapath.MAC) error
	Heartbeat(ctx context.Context, h datapath.Heartbeat) error
}

// follower is what makes the kernel equal to the Table: the driver.
type follower interface {
	Follow(ctx context.Context, vni uint32) error
	Rehome(ctx context.Context, underlay netip.Addr) error
	Shrink(ctx context.Context, vni uint32, mtu int) (before int, err error)
}

// Config is what New needs.
type Config struct {
	Host string // this host's ID; see Identity
	Name string // its host name, for people
	// Parts survives a restart and need not survive a reboot.
	Parts   disk
	Network hostNetwork
	// Kept survives a reboot.
	Kept disk
	// Underlay is an interface, an address, or "": the way out.
	Underlay string
	// Join is what the settings say; a swarm adds to it.
	Join  Join
	Grace time.Duration
	// Engine makes what carries parts, for an address of this host.
	Engine func(t *Table, underlay netip.Addr, j Join) (Engine, error)
	// Ready says whether an engine can run with what is known.
	Ready func(Join) bool
	Log   logrus.FieldLogger
}

// Cluster ties the network driver to the other hosts.
type Cluster struct {
	c       Config
	table   *Table
	backend Backend
	tunnels *tunnels

	wake chan struct{} // capacity 1: underlay or join changed

	chatter chatter // over lines that others can cause

	mu       sync.Mutex // over what follows
	engine   Engine     // nil until it runs
	underlay netip.Addr
	blocked  Trouble   // why this host has no underlay
	tight    []Trouble // networks whose MTU the underlay does not carry
	// most is what the underlay carries in a tunnel, in bytes, and since when.
	most      int
	mostSince time.Time
	join      Join
	looking   sync.Mutex        // over looked
	looked    map[string]lookup // peers' names
	joining   sync.Mutex        // one change of join at a time; before mu
	self      netip.Addr        // this node's data address, by the swarm
	vnis      map[string]uint32 // of the swarm's networks, on its leader
	// unconfirmed has those of vnis that the swarm's allocator on this node has not
	// named since it began.
	unconfirmed map[string]bool
	networks    map[uint32]*network
	saved       map[uint32]store.Record // what others had when this process started
}

// network is what is remembered of a network between two looks at it.
type network struct {
	rec       driver.Network
	macs      map[netip.Addr]datapath.MAC // as containers here may remember them
	conflicts []string
	disputed  map[string]time.Time // since when there are conflicts, also those that may pass
	rev       uint64               // of its record
}

// New returns a cluster that knows what was known when the process before it
// ended.
func New(ctx context.Context, c Config) (*Cluster, error) {
	x := &Cluster{
		c: c, table: NewTable(c.Host, c.Grace), tunnels: newTunnels(c.Host, beatTime), wake: make(chan struct{}, 1), join: c.Join,
		vnis: map[string]uint32{}, networks: map[uint32]*network{}, saved: map[uint32]store.Record{}, looked: map[string]lookup{},
	}
	if err := x.loadSwarm(ctx); err != nil {
		return nil, err
	}
	list, err := c.Parts.List(ctx, partsKey)
	if err != nil {
		return nil, err
	}
	for _, r := range list {
		var vni uint32
		if _, err := fmt.Sscanf(r.Key, partsKey+"%d", &vni); err != nil {
			c.Log.Warnf("record %q is not that of a network, and not used", r.Key)
			continue
		}
		x.saved[vni] = r
	}
	return x, nil
}

// Admit implements the driver's cluster.
func (c *Cluster) Admit(ctx context.Context, n *driver.Network) error {
	if n.Options.Join != "" {
		if err := c.learn(ctx, n.Options.Join); err != nil {
			return err
		}
	}
	u, err := c.where(ctx)
	if err != nil {
		return fmt.Errorf("mode overlay: where this host reaches others from: %w", err)
	}
	n.Underlay, n.Port, n.VNI = u.Addr, cmp.Or(n.Options.Port, uint16(Port)), n.Options.VNI
	var others []Part
	if n.VNI != 0 {
		others = c.ask(ctx, n.VNI)
	} else if n.VNI, err = c.choose(ctx); err != nil {
		return err
	}
	most := u.MTU - overhead(u.Addr)
	n.MTU = n.Options.MTU
	if n.MTU == 0 {
		n.MTU = most
		for _, p := range others {
			n.MTU = min(n.MTU, p.MTU)
		}
	}
	if n.MTU > most {
		return fmt.Errorf("mtu %d does not fit: %s carries %d and the tunnel adds %d: at most %d", n.MTU, u.Link, u.MTU, overhead(u.Addr), most)
	}
	mine := partOf(*n, nil)
	for _, p := range others {
		if p.Host == c.c.Host || p.Gone {
			continue
		}
		if err := mine.fits(p); err != nil {
			return fmt.Errorf("VNI %d: host %s has it with %w: make it alike on both, or give another vni", n.VNI, p.Name, err)
		}
	}
	return nil
}

// ask is what others have of a network.
func (c *Cluster) ask(ctx context.Context, vni uint32) []Part {
	engine := c.running(ctx)
	if engine == nil {
		c.c.Log.WithField("vni", vni).Warn("no other host can be asked about the network: it is on this host alone until one is heard; see PEERS and STORE")
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	parts, err := engine.Ask(ctx, vni)
	if err != nil {
		// Who cannot be asked is not a reason to refuse: what contradicts is
		// told when it is heard of.
		c.c.Log.WithField("vni", vni).WithError(err).Warn("not all other hosts could be asked about the network")
	}
	return parts
}

// running is the engine. One that was just given its key is waited for.
func (c *Cluster) running(ctx context.Context) Engine {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 25 {
		c.mu.Lock()
		engine, ready := c.engine, c.underlay.IsValid() && c.c.Ready(c.join)
		c.mu.Unlock()
		if engine != nil || !ready {
			return engine
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
	return nil
}

// The range that VNIs are chosen from; people choose low ones.
const (
	firstVNI = 1 << 20
	lastVNI  = maxVNI
)

// choose picks a VNI that no other host has.
func (c *Cluster) choose(ctx context.Context) (uint32, error) {
	for range 8 {
		vni := firstVNI + rand.Uint32N(lastVNI-firstVNI+1)
		if !c.taken(vni) && c.allocated(vni) == "" && len(c.ask(ctx, vni)) == 0 {
			return vni, nil
		}
	}
	return 0, errors.New("no free VNI was found: give one with -o vni=")
}

func (c *Cluster) taken(vni uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.networks[vni] != nil
}

// Claim implements the driver's cluster.
func (c *Cluster) Claim() uint64 { return c.table.Claim() }

// Holder implements the driver's cluster.
func (c *Cluster) Holder(n driver.Network, a netip.Addr) (string, bool) {
	return c.table.Holder(n.VNI, a)
}

// partOf is what a host with these records has of a network.
func partOf(n driver.Network, endpoints []driver.Endpoint) Part {
	p := Part{VNI: n.VNI, VTEP: n.Underlay, Port: n.Port, MTU: n.MTU}
	for _, s := range n.Subnets {
		p.Subnets = append(p.Subnets, s.Pool)
		if s.Range.IsValid() {
			p.Ranges = append(p.Ranges, s.Range)
		}
	}
	order := func(a, b netip.Prefix) int { return cmp.Or(a.Addr().Compare(b.Addr()), a.Bits()-b.Bits()) }
	slices.SortFunc(p.Subnets, order)
	slices.SortFunc(p.Ranges, order)
	for _, e := range endpoints {
		x := Endpoint{MAC: e.MAC, Claim: e.Claim}
		for _, a := range e.Addrs {
			x.Addrs = append(x.Addrs, a.Addr())
		}
		p.Endpoints = append(p.Endpoints, x)
	}
	return p
}

// Publish implements the driver's cluster.
func (c *Cluster) Publish(n driver.Network, endpoints []driver.Endpoint) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := partOf(n, endpoints)
	p.Name = c.c.Name
	c.table.Set(p)
	if x := c.networks[n.VNI]; x != nil {
		x.rec = n
		return
	}
	x := &network{rec: n, macs: map[netip.Addr]datapath.MAC{}}
	c.networks[n.VNI] = x
	r, ok := c.saved[n.VNI]
	if !ok {
		return
	}
	delete(c.saved, n.VNI)
	x.rev = r.Rev
	var list []Known
	if err := json.Unmarshal(r.Value, &list); err != nil {
		c.c.Log.WithField("vni", n.VNI).WithError(err).Warn("what was known of other hosts cannot be read: it is learnt anew")
		return
	}
	for _, k := range list {
		if err := c.table.Restore(k); err != nil {
			c.c.Log.WithError(err).Warn("what was kept of another host is not believed")
		}
	}
}

// Withdraw implements the driver's cluster.
func (c *Cluster) Withdraw(n driver.Network) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.networks, n.VNI)
	c.table.Set(Part{Name: c.c.Name, VNI: n.VNI, Gone: true})
}

// Remote implements the driver's cluster.
func (c *Cluster) Remote(n driver.Network) datapath.State {
	return c.backend.remote(n, c.table.View(n.VNI))
}

// where is the address of this host that other hosts reach it at: what the
// settings or the swarm name, else that toward the peers.
func (c *Cluster) where(ctx context.Context) (datapath.Underlay, error) {
	want := c.c.Underlay
	c.mu.Lock()
	if want == "" && c.self.IsValid() {
		want = c.self.String()
	}
	c.mu.Unlock()
	if want != "" {
		return c.c.Network.Underlay(ctx, want)
	}
	return c.c.Network.Underlay(ctx, "", c.peerAddrs(ctx)...)
}

// peerAddrs are the addresses of the peers of the settings, in their order. A name
// that cannot be looked up has those that it had.
func (c *Cluster) peerAddrs(ctx context.Context) (list []netip.Addr) {
	c.looking.Lock()
	defer c.looking.Unlock()
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	for _, text := range c.c.Join.Peers {
		host := text
		if h, _, err := net.SplitHostPort(text); err == nil {
			host = h
		}
		if a, err := netip.ParseAddr(host); err == nil {
			list = append(list, a.Unmap())
			continue
		}
		if found := c.looked[host]; time.Since(found.at) > resolveAge {
			if addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host); err == nil {
				c.looked[host] = lookup{addrs: addrs, at: time.Now()}
			} else { // tried again soon, but not by whoever asks next
				c.looked[host] = lookup{addrs: found.addrs, at: time.Now().Add(lookTime - resolveAge)}
			}
		}
		for _, a := range c.looked[host].addrs {
			list = append(list, a.Unmap())
		}
	}
	return list
}

// lookup is what a name of a peer meant.
type lookup struct {
	addrs []netip.Addr
	at    time.Time
}

// Run keeps this host in touch with the others, and the kernel with what they
// say, until ctx ends.
func (c *Cluster) Run(ctx context.Context, f follower) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.runEngine(ctx) })
	g.Go(func() error { return c.watchUnderlay(ctx, f) })
	g.Go(func() error { return c.follow(ctx, f) })
	g.Go(func() error { return c.watchTunnels(ctx) })
	return g.Wait()
}

// watchUnderlay moves everything when the host's address changes, as it does
// where a DHCP server gives it out.
func (c *Cluster) watchUnderlay(ctx context.Context, f follower) error {
	last, trouble := netip.Addr{}, ""
	for {
		switch u, err := c.where(ctx); {
		case err != nil && err.Error() != trouble && ctx.Err() == nil:
			if !c.wanted() {
				break // most hosts are alone, and some have no way out
			}
			trouble = err.Error()
			c.block(trouble)
			c.c.Log.WithError(err).Warn("overlay networks: where this host reaches others from")
		case err == nil:
			trouble = ""
			c.block("")
			c.fitUnderlay(ctx, f, u, time.Now())
			if u.Addr == last {
				break
			}
			if last.IsValid() {
				c.c.Log.Warnf("overlay networks: the underlay moved from %s to %s", last, u.Addr)
			}
			if err := f.Rehome(ctx, u.Addr); err != nil {
				c.c.Log.WithError(err).Warn("overlay networks: move to another underlay")
				break
			}
			last = u.Addr
			c.mu.Lock()
			c.underlay = u.Addr
			c.mu.Unlock()
			wake(c.wake)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(lookTime):
		}
	}
}

// block notes why this host reaches no other, or that it does.
func (c *Cluster) block(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.blocked = Trouble{Peer: "this host", Reason: reason, Since: time.Now().UTC()}
}

// wanted reports whether this host has to do with others at all.
func (c *Cluster) wanted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.networks) > 0 || c.c.Ready(c.join)
}

// runEngine runs one engine at a time, each on the underlay's last address.
func (c *Cluster) runEngine(ctx context.Context) error {
	var running netip.Addr
	var given Join
	stop := func() {}
	defer func() { stop() }()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		}
		c.mu.Lock()
		addr, join, engine := c.underlay, c.join, c.engine
		c.mu.Unlock()
		switch {
		case !addr.IsValid(), !c.c.Ready(join):
			continue
		case addr == running:
			if j, ok := engine.(joiner); ok {
				if err := given.become(join, j); err != nil {
					c.c.Log.WithError(err).Error("overlay networks: the keys of the cluster")
				}
			}
			given = join
			continue
		}
		stop()
		engine, err := c.c.Engine(c.table, addr, join)
		if err != nil {
			return fmt.Errorf("overlay networks: %w", err)
		}
		run, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := engine.Run(run); err != nil {
				c.c.Log.WithError(err).Error("overlay networks: what hosts tell each other has ended")
			}
		}()
		stop = func() { cancel(); <-done }
		running, given = addr, join
		c.mu.Lock()
		c.engine = engine
		c.mu.Unlock()
	}
}

// follow hands on what changes.
func (c *Cluster) follow(ctx context.Context, f follower) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.table.Changed():
		}
		for _, vni := range c.table.Dirty() {
			if err := f.Follow(ctx, vni); err != nil && ctx.Err() == nil {
				c.c.Log.WithError(err).Warn("not complete; repair tries again")
			}
			c.fitOthers(ctx, f, vni)
			c.after(ctx, vni)
		}
	}
}

// after tells containers and people what changed, and keeps it for the next
// start.
func (c *Cluster) after(ctx context.Context, vni uint32) {
	view := c.table.View(vni)
	c.mu.Lock()
	n := c.networks[vni]
	var news []string
	var moved []move
	if n != nil {
		var more bool
		if news, more = n.dispute(view.Conflicts, time.Now()); more {
			time.AfterFunc(conflictPause, func() { c.table.lookAgain(vni) })
		}
		moved = n.moves(c.backend, c.table.Addresses(vni))
	}
	c.mu.Unlock()
	for _, line := range news {
		if c.chatter.allows(c.c.Log) {
			c.c.Log.WithField("vni", vni).Warn(line)
		}
	}
	for _, m := range moved {
		if err := c.c.Network.Announce(m.link, m.addr, m.mac); err != nil {
			c.c.Log.WithField("vni", vni).WithError(err).Warnf("containers here may remember another station at %s", m.addr)
		}
	}
	if err := c.save(ctx, vni, n); err != nil && ctx.Err() == nil {
		c.c.Log.WithField("vni", vni).WithError(err).Warn("what is known of other hosts is not kept")
	}
}

// mostPast is how many addresses that nobody has are remembered, for each network:
// hosts may name new ones for ever.
const mostPast = 4096

// move is an address that has another MAC than containers may remember.
type move struct {
	link string
	addr netip.Addr
	mac  datapath.MAC
}

func (n *network) moves(b Backend, now map[netip.Addr]datapath.MAC) (list []move) {
	link := b.Network(n.rec).Bridges[0].Name
	for a, mac := range now {
		if old, ok := n.macs[a]; ok && old != mac {
			list = append(list, move{link, a, mac})
		}
		n.macs[a] = mac
	}
	if len(n.macs) > len(now)+mostPast {
		maps.DeleteFunc(n.macs, func(a netip.Addr, _ datapath.MAC) bool {
			_, ok := now[a]
			return !ok
		})
	}
	return list
}

// save keeps the parts of other hosts for the next process, so that it can tell
// what leads to them from what is stray before it has heard from anybody.
func (c *Cluster) save(ctx context.Context, vni uint32, n *network) error {
	key := fmt.Sprintf("%s%d", partsKey, vni)
	if n == nil {
		return c.c.Parts.Delete(ctx, key)
	}
	var others []Known
	now := time.Now().UTC()
	for _, k := range c.table.Known() {
		if k.Part.VNI == vni && k.Part.Host != c.c.Host {
			k.Saved = now
			others = append(others, k)
		}
	}
	value, err := json.Marshal(others)
	if err != nil {
		return fmt.Errorf("encode %s: %w", key, err)
	}
	r, err := c.c.Parts.Put(ctx, store.Record{Key: key, Value: value, Rev: n.rev})
	if errors.Is(err, store.ErrExists) || errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNotFound) {
		found, gerr := c.c.Parts.Get(ctx, key)
		if gerr != nil && !errors.Is(gerr, store.ErrNotFound) {
			return gerr
		}
		r, err = c.c.Parts.Put(ctx, store.Record{Key: key, Value: value, Rev: found.Rev})
	}
	n.rev = r.Rev
	return err
}
