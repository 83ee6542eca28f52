package overlay

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"
)

// GossipPort is used on TCP and UDP. It is not 7946, where the engine's own
// clusters gossip.
const GossipPort = 7947

const (
	// label keeps off what else gossips on the same port.
	label = "weft"
	// packet is what passes every path that IPv6 does.
	packet = 1200 // bytes
	// packetSpace is what memberlist leaves of it: its encryption, checksum,
	// type and label take the rest.
	packetSpace = packet - 29 - 5 - 1 - (2 + len(label))

	mostID   = 64
	mostName = 255

	// firstPause is between two attempts to say something, at first. It is more
	// than a round trip in one place and far less than people notice.
	firstPause = 50 * time.Millisecond
	lastPause  = 3 * time.Second
	// batchPause is between two looks at all peers, while messages come in.
	batchPause = time.Millisecond
)

// GossipConfig is what a Gossip needs. Store may be nil.
type GossipConfig struct {
	Table *Table
	ID    string     // this host's, the Table's self
	Name  string     // its host name, for people
	Bind  netip.Addr // its address on the underlay, which the others are told
	Port  uint16     // 0 is GossipPort
	// Peers are other hosts, name or address, each with a port where it is not
	// the usual one. Any one that is reachable is enough.
	Peers []string
	// Keys encrypt what is sent with the first and accept the others too, see
	// [Key]. Without one, hosts talk in clear text.
	Keys  [][]byte
	Store peerStore
	Log   logrus.FieldLogger
}

// Gossip is an Engine that needs nothing but the hosts themselves.
//
// memberlist says who is there. Parts do not travel by its broadcasts: those
// reach some of the members, some of the time, and every member. A part is for
// the hosts that have its network, and its writer knows them, because they told
// it theirs. So it sends the part to them directly, until each has said which
// version it has. Nobody passes parts on: that would bring them to hosts that
// have nothing to do with the network, and its writer could not know when all
// have it. The exceptions are the exchange of everything with one member now and
// then, by which a host learns of those that it has never heard, and what two hosts
// say to each other that do not reach each other: a third one passes it on.
//
// A host asks each member once about each of its networks: when the network is
// new, and when the member is. The answer is the other's part of it, which makes
// the other one of those that parts are sent to.
type Gossip struct {
	table *Table
	id    string
	name  string
	bind  netip.AddrPort
	ring  *memberlist.Keyring
	store peerStore
	log   logrus.FieldLogger

	listen func(context.Context, netip.AddrPort) (memberlist.NodeAwareTransport, error)

	chatter chatter // over lines that others can cause

	wake chan struct{} // capacity 1: there may be something to send
	more chan struct{} // capacity 1: there are more seeds

	// mu is over what follows. memberlist calls with its own lock held, so it is
	// never called with this one held. Table's methods are.
	mu        sync.Mutex
	ended     bool
	peers     map[string]*peer // by host ID
	twins     map[string]twin  // other members with this host's ID, by their name
	questions map[*question]bool
	said      map[string]time.Time // when a line that is not repeated was logged
	news      []string             // to be logged when no lock is held
	troubles  map[string]*Trouble  // by what they are about
	passing   []letter             // of others, to others
	seeds     map[string]*seed
	strangers map[netip.AddrPort]time.Time // who is no member and talks to us; when it was last tried
}

// question is a call of Ask.
type question struct {
	vni     uint32
	waiting map[string]bool // host IDs
	parts   map[string]Part
	done    chan struct{} // closed when nobody is waited for
}

// NewGossip returns an engine that does nothing before Run.
func NewGossip(c GossipConfig) (*Gossip, error) {
	if c.ID == "" || len(c.ID) > mostID || len(c.Name) > mostName {
		return nil, fmt.Errorf("host ID %q and name %q are not a host's", c.ID, c.Name)
	}
	if !c.Bind.IsValid() || c.Bind.IsUnspecified() || c.Bind.IsMulticast() || c.Bind.Zone() != "" || c.Bind.Is4In6() {
		return nil, fmt.Errorf("%q is not an address that other hosts can reach", c.Bind)
	}
	if c.Port == 0 {
		c.Port = GossipPort
	}
	for _, k := range c.Keys {
		if len(k) != keyLen {
			return nil, fmt.Errorf("key of %d bytes: want %d", len(k), keyLen)
		}
	}
	g := &Gossip{
		table: c.Table, id: c.ID, name: c.Name, bind: netip.AddrPortFrom(c.Bind, c.Port), store: c.Store, log: c.Log,
		listen: listen, wake: make(chan struct{}, 1), more: make(chan struct{}, 1),
		peers: map[string]*peer{}, twins: map[string]twin{}, questions: map[*question]bool{},
		said: map[string]time.Time{}, seeds: map[string]*seed{}, strangers: map[netip.AddrPort]time.Time{}, troubles: map[string]*Trouble{},
	}
	if b := (delegate{g}).NodeMeta(0); len(b) > memberlist.MetaMaxSize {
		return nil, fmt.Errorf("host name %q is too long", c.Name)
	}
	var err error
	if g.ring, err = newRing(c.Keys); err != nil {
		return nil, fmt.Errorf("make keyring: %w", err)
	}
	g.AddPeers(c.Peers...)
	return g, nil
}

// Run is called once. When ctx ends it does not say goodbye: the containers of
// a host whose plugin was stopped go on working. Timers of memberlist end within
// a second after it.
func (g *Gossip) Run(ctx context.Context) error {
	if len(g.ring.GetKeys()) == 0 {
		g.log.Warn("hosts talk in clear text and believe whoever talks to them: set the same password on all of them")
	}
	list := g.start(ctx)
	if list == nil {
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return g.exchange(ctx, list) })
	group.Go(func() error { return g.stayJoined(ctx, list) })
	group.Go(func() error {
		<-ctx.Done()
		g.mu.Lock()
		g.ended = true // timers of memberlist may still fire
		g.mu.Unlock()
		return list.Shutdown() // ends streams that the others wait for
	})
	if err := group.Wait(); err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	return nil
}

// start waits until the address is there; it returns nil when ctx ends first.
func (g *Gossip) start(ctx context.Context) *memberlist.Memberlist {
	for {
		list, err := g.create(ctx)
		if err == nil {
			return list
		}
		if g.once("start") {
			g.log.Warnf("cannot talk to other hosts yet: %v; trying again every second", err)
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil
		}
	}
}

func (g *Gossip) create(ctx context.Context) (*memberlist.Memberlist, error) {
	t, err := g.listen(ctx, g.bind)
	if err != nil {
		return nil, err
	}
	c := memberlist.DefaultLANConfig()
	// A host that gets another address is another member to memberlist, which
	// would refuse a known name with a new address.
	c.Name = memberName(g.id, g.bind.Addr())
	c.DeadNodeReclaimTime = time.Second // the same for the port
	c.Transport, c.Label, c.UDPBufferSize = t, label, packet
	c.BindPort = int(g.bind.Port())
	c.TCPTimeout = streamTime
	c.Keyring = g.ring
	c.EnableCompression = false // it allocates 64 kB for each packet, to save little of ours
	c.Delegate, c.Events, c.Alive, c.Ping = delegate{g}, delegate{g}, delegate{g}, delegate{g}
	c.LogOutput = lines{g}
	// Its news reach most members but not surely all; more repetitions, and the
	// exchange of everything, see to the rest. With more than 32 hosts memberlist
	// makes the exchange rarer itself.
	c.RetransmitMult, c.PushPullInterval = 6, 15*time.Second
	// Whoever is silent has to show within 10 s, and none of that is to be given
	// away, or a busy host is taken for silent. In a cluster of n hosts each is
	// probed about once in an interval, whatever n is, and suspected after one
	// or, if the prober is not well either, two more. It then has 4 * log10(n)
	// intervals to object, up to twice that until two others confirm the
	// suspicion: 2.4 s for up to 10 hosts, 5.5 s for 200. That somebody is silent
	// for no reason has no consequence for containers.
	c.ProbeInterval, c.ProbeTimeout = probeInterval, probeInterval/2
	c.AwarenessMaxMultiplier = 2
	c.SuspicionMult, c.SuspicionMaxTimeoutMult = 4, 2
	list, err := memberlist.Create(c)
	if err != nil {
		_ = t.Shutdown()
		return nil, err
	}
	return list, nil
}

func memberName(id string, a netip.Addr) string { return id + "@" + a.String() }

func (q *question) take(m message) {
	until := latest(time.Now())
	for _, k := range m.Parts {
		known, ok := q.parts[k.Part.Host]
		if k.Part.VNI == q.vni && !k.Part.Gone && k.Part.check(until) == nil && k.Part.Version >= known.Version && (ok || len(q.parts) < mostHosts) {
			k.Part.Name = Plain(k.Part.Name)
			q.parts[k.Part.Host] = k.Part
		}
	}
	q.leave(m.From)
}

// leave stops waiting for a host.
func (q *question) leave(id string) {
	if q.waiting[id] {
		delete(q.waiting, id)
		if len(q.waiting) == 0 {
			close(q.done)
		}
	}
}

// Ask is part of Engine. If ctx ends first it returns what has come, and an
// error.
func (g *Gossip) Ask(ctx context.Context, vni uint32) ([]Part, error) {
	q := &question{vni: vni, waiting: map[string]bool{}, parts: map[string]Part{}, done: make(chan struct{})}
	g.mu.Lock()
	for id, p := range g.peers {
		if len(p.nodes) > 0 {
			q.waiting[id], p.dirty = true, true
		}
	}
	if len(q.waiting) == 0 {
		close(q.done)
	}
	g.questions[q] = true
	g.mu.Unlock()
	wake(g.wake)

	var err error
	select {
	case <-q.done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.questions, q)
	delete(q.parts, g.id)
	var list []Part
	for _, id := range slices.Sorted(maps.Keys(q.parts)) {
		list = append(list, q.parts[id])
	}
	if err != nil {
		err = fmt.Errorf("ask about VNI %d: %d hosts have not answered: %w", vni, len(q.waiting), err)
	}
	return list, err
}

// once reports whether a line was not logged during the last hour, and may be.
func (g *Gossip) once(line string) bool {
	g.mu.Lock()
	if t, ok := g.said[line]; ok && time.Since(t) < time.Hour {
		g.mu.Unlock()
		return false
	}
	if len(g.said) >= 256 { // whoever can send packets can invent addresses
		clear(g.said)
	}
	g.said[line] = time.Now()
	g.mu.Unlock()
	return g.may()
}

// may bounds the lines that others can cause. mu is not held.
func (g *Gossip) may() bool { return g.chatter.allows(g.log) }
