package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/memberlist"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"go.uber.org/goleak"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
)

var _ Engine = (*Gossip)(nil)

// soak reports whether tests may take their time.
func soak() bool { return os.Getenv("WEFT_SOAK") != "" }

func TestMain(m *testing.M) {
	if os.Getenv("WEFT_MIRROR") != "" {
		mirror()
		return
	}
	code := m.Run()
	var err error
	for range 10 { // timers of memberlist end within a second or two
		if err = goleak.Find(); err == nil {
			break
		}
	}
	if err != nil && code == 0 {
		fmt.Println(err)
		code = 1
	}
	os.Exit(code)
}

// wires is what the hosts of a test are connected by.
type wires struct {
	memory bool // no sockets
	loss   atomic.Int32

	mu    sync.Mutex
	cut   map[[2]netip.Addr]bool
	mute  map[[2]netip.Addr]bool // packets do not arrive, streams do
	tap   func([]byte)
	ends  map[string]*memory
	bytes map[netip.Addr]int // sent by each
}

func newWires() *wires {
	return &wires{cut: map[[2]netip.Addr]bool{}, mute: map[[2]netip.Addr]bool{}, ends: map[string]*memory{}, bytes: map[netip.Addr]int{}}
}

var lastAddr atomic.Uint32

// addr is an address that no other test has, and no other run of them.
func (w *wires) addr() netip.Addr {
	n := lastAddr.Add(1)
	return netip.AddrFrom4([4]byte{127, byte(10 + os.Getpid()%200), byte(n >> 8), byte(n)})
}

// separate cuts all wires between two sets of hosts, or joins them again.
func (w *wires) separate(cut bool, a, b []*node) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, x := range a {
		for _, y := range b {
			w.cut[[2]netip.Addr{x.addr, y.addr}] = cut
			w.cut[[2]netip.Addr{y.addr, x.addr}] = cut
		}
	}
}

func (w *wires) pass(from netip.Addr, to string, b []byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bytes[from] += len(b)
	if w.tap != nil {
		w.tap(b)
	}
	a, err := netip.ParseAddrPort(to)
	return err == nil && !w.cut[[2]netip.Addr{from, a.Addr()}]
}

func (w *wires) listen(ctx context.Context, a netip.AddrPort) (memberlist.NodeAwareTransport, error) {
	if w.memory {
		m := &memory{wires: w, addr: a, packets: make(chan *memberlist.Packet, 4096), streams: make(chan net.Conn, 256)}
		w.mu.Lock()
		w.ends[a.String()] = m
		w.mu.Unlock()
		return &wire{m, w, a.Addr()}, nil
	}
	t, err := listen(ctx, a)
	if err != nil {
		return nil, err
	}
	return &wire{t, w, a.Addr()}, nil
}

func (w *wires) muted(from netip.Addr, to string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	a, err := netip.ParseAddrPort(to)
	return err == nil && w.mute[[2]netip.Addr{from, a.Addr()}]
}

// wire is one host's end.
type wire struct {
	memberlist.NodeAwareTransport
	w    *wires
	addr netip.Addr
}

func (t *wire) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	if !t.w.pass(t.addr, a.Addr, b) || t.w.muted(t.addr, a.Addr) || rand.Int32N(100) < t.w.loss.Load() {
		return time.Now(), nil
	}
	return t.NodeAwareTransport.WriteToAddress(b, a)
}

func (t *wire) DialAddressTimeout(a memberlist.Address, d time.Duration) (net.Conn, error) {
	if !t.w.pass(t.addr, a.Addr, nil) {
		return nil, errors.New("no route to host")
	}
	c, err := t.NodeAwareTransport.DialAddressTimeout(a, d)
	if err != nil {
		return nil, err
	}
	return &tapped{c, t, a.Addr}, nil
}

// tapped is a stream that is listened to.
type tapped struct {
	net.Conn
	t  *wire
	to string
}

func (c *tapped) Write(b []byte) (int, error) {
	if !c.t.w.pass(c.t.addr, c.to, b) {
		return 0, errors.New("no route to host")
	}
	return c.Conn.Write(b)
}

// memory is a transport without sockets.
type memory struct {
	wires   *wires
	addr    netip.AddrPort
	packets chan *memberlist.Packet
	streams chan net.Conn
}

func (m *memory) end(addr string) *memory {
	m.wires.mu.Lock()
	defer m.wires.mu.Unlock()
	return m.wires.ends[addr]
}

func (m *memory) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	if to := m.end(a.Addr); to != nil {
		select {
		case to.packets <- &memberlist.Packet{Buf: bytes.Clone(b), From: net.UDPAddrFromAddrPort(m.addr), Timestamp: time.Now()}:
		default:
		}
	}
	return time.Now(), nil
}

func (m *memory) DialAddressTimeout(a memberlist.Address, _ time.Duration) (net.Conn, error) {
	to := m.end(a.Addr)
	if to == nil {
		return nil, errors.New("connection refused")
	}
	x, y := net.Pipe()
	_ = x.SetDeadline(time.Now().Add(streamTime))
	select {
	case to.streams <- y:
		return x, nil
	default:
		return nil, errors.New("connection refused")
	}
}

func (m *memory) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return m.addr.Addr().AsSlice(), int(m.addr.Port()), nil
}

func (m *memory) WriteTo(b []byte, a string) (time.Time, error) {
	return m.WriteToAddress(b, memberlist.Address{Addr: a})
}

func (m *memory) DialTimeout(a string, d time.Duration) (net.Conn, error) {
	return m.DialAddressTimeout(memberlist.Address{Addr: a}, d)
}
func (m *memory) PacketCh() <-chan *memberlist.Packet { return m.packets }
func (m *memory) StreamCh() <-chan net.Conn           { return m.streams }
func (m *memory) Shutdown() error {
	m.wires.mu.Lock()
	defer m.wires.mu.Unlock()
	delete(m.wires.ends, m.addr.String())
	return nil
}

// node is a host of a test.
type node struct {
	*Gossip
	addr  netip.Addr
	table *Table
	logs  *logtest.Hook
	stop  func()
}

// host makes the configuration of host i.
func (w *wires) host(i int, peers ...string) GossipConfig {
	return GossipConfig{
		Table: NewTable(fmt.Sprintf("id-%d", i), testGrace), ID: fmt.Sprintf("id-%d", i), Name: fmt.Sprintf("host-%d", i),
		Bind: w.addr(), Peers: peers,
	}
}

// run starts a host, which ends with the test.
func (w *wires) run(t *testing.T, c GossipConfig) *node {
	t.Helper()
	log, logs := logtest.NewNullLogger()
	if os.Getenv("WEFT_DEBUG") != "" {
		log.SetOutput(os.Stderr)
		level, _ := logrus.ParseLevel("debug")
		log.SetLevel(level)
	}
	c.Log = log.WithField("host", c.Name)
	g, err := NewGossip(c)
	if err != nil {
		t.Fatal(err)
	}
	g.listen = w.listen
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("Run does not end with its context")
		}
	})
	t.Cleanup(stop)
	return &node{Gossip: g, addr: c.Bind, table: c.Table, logs: logs, stop: stop}
}

// cluster starts hosts of which all but the first know only the first.
func (w *wires) cluster(t *testing.T, n int, change ...func(*GossipConfig)) []*node {
	t.Helper()
	var nodes []*node
	for i := range n {
		var peers []string
		if i > 0 {
			peers = []string{nodes[0].addr.String()}
		}
		c := w.host(i, peers...)
		for _, f := range change {
			f(&c)
		}
		nodes = append(nodes, w.run(t, c))
	}
	within(t, 10*time.Second, "all hosts are members", func() bool {
		return !slices.ContainsFunc(nodes, func(x *node) bool { return x.members() < n-1 })
	})
	return nodes
}

func (x *node) members() int { return len(x.there()) - 1 }

// set gives the host a network with endpoints, each one number.
func (x *node) set(vni uint32, endpoints ...int) {
	p := part(0, vni)
	p.Name, p.VTEP = x.name, x.addr
	for _, e := range endpoints {
		p.Endpoints = append(p.Endpoints, Endpoint{MAC: mac(e), Addrs: []netip.Addr{addr(e)}, Claim: x.table.Claim()})
	}
	x.table.Set(p)
}

func (x *node) gone(vni uint32) { x.table.Set(Part{Name: x.name, VNI: vni, Gone: true}) }

// sees reports whether a host is on the way to exactly these endpoints.
func (x *node) sees(vni uint32, at *node, endpoints ...int) bool {
	var got []datapath.MAC
	for m, a := range x.table.View(vni).Forwards {
		if a == at.addr {
			got = append(got, m)
		}
	}
	want := []datapath.MAC{}
	for _, e := range endpoints {
		want = append(want, mac(e))
	}
	byBytes := func(a, b datapath.MAC) int { return bytes.Compare(a[:], b[:]) }
	slices.SortFunc(got, byBytes)
	slices.SortFunc(want, byBytes)
	return slices.Equal(got, want) && slices.Contains(x.table.View(vni).VTEPs, at.addr)
}

// silent reports whether a host takes another for silent.
func (x *node) silent(y *node) bool {
	return slices.ContainsFunc(x.table.Peers(), func(p Peer) bool { return p.ID == y.id && !p.Silent.IsZero() })
}

// logged are the lines of a host that contain a text.
func (x *node) logged(text string) (lines []string) {
	for _, e := range x.logs.AllEntries() {
		if strings.Contains(e.Message, text) && e.Level.String() != "debug" {
			lines = append(lines, e.Message)
		}
	}
	return lines
}

// within waits for something and returns how long it took.
func within(t *testing.T, limit time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > limit {
			t.Fatalf("not within %s: %s", limit, what)
		}
		time.Sleep(time.Millisecond)
	}
	return time.Since(start)
}

// churn makes changes on all hosts in turn and returns how long each took to be
// everywhere, in order.
func churn(t *testing.T, nodes []*node, vni uint32, n int) []time.Duration {
	t.Helper()
	var took []time.Duration
	for i := range n {
		x := nodes[i%len(nodes)]
		x.set(vni, 1000+i)
		took = append(took, within(t, 15*time.Second, "a change is everywhere", func() bool {
			return !slices.ContainsFunc(nodes, func(y *node) bool { return y != x && !y.sees(vni, x, 1000+i) })
		}))
	}
	slices.Sort(took)
	return took
}

func logTimes(t *testing.T, what string, took []time.Duration) {
	t.Helper()
	t.Logf("%s: p50 %s, p99 %s, longest %s", what, took[len(took)/2], took[len(took)*99/100], took[len(took)-1])
}

func TestGossip(t *testing.T) {
	t.Parallel()
	w := newWires()
	nodes := w.cluster(t, 5)
	for i, x := range nodes {
		x.set(1, i+1)
	}
	nodes[0].set(2, 100)
	nodes[1].set(2, 101)
	within(t, 5*time.Second, "all see all", func() bool {
		for i, x := range nodes {
			for j, y := range nodes {
				if i != j && !x.sees(1, y, j+1) {
					return false
				}
			}
		}
		return nodes[0].sees(2, nodes[1], 101) && nodes[1].sees(2, nodes[0], 100)
	})
	took := churn(t, nodes, 1, 100)
	logTimes(t, "a new endpoint on all of 5 hosts", took)
	if p99 := took[98]; p99 > time.Second {
		t.Errorf("p99 is %s", p99)
	}
	for _, x := range nodes[2:] {
		for _, k := range x.table.Known() {
			if k.Part.VNI != 1 {
				t.Errorf("%s keeps a part of a network that it does not have: %v", x.name, k.Part)
			}
		}
	}
	// Withdrawn.
	nodes[1].gone(2)
	took = []time.Duration{within(t, time.Second, "a network is gone", func() bool { return len(nodes[0].table.View(2).VTEPs) == 0 })}
	// And back, before anyone has looked.
	nodes[1].set(2, 101)
	nodes[1].gone(2)
	nodes[1].set(2, 102)
	took = append(took, within(t, 2*time.Second, "it is back", func() bool {
		return nodes[0].sees(2, nodes[1], 102) && nodes[1].sees(2, nodes[0], 100)
	}))
	t.Logf("gone %s, back %s", took[0], took[1])
}

// TestGossipScope: what a network has is told only to those that have it.
func TestGossipScope(t *testing.T) {
	t.Parallel()
	w := newWires()
	nodes := w.cluster(t, 3)
	for _, x := range nodes { // the first exchange of everything is over
		x.set(1)
	}
	nodes[0].set(2)
	nodes[1].set(2)
	within(t, 5*time.Second, "joined", func() bool {
		return len(nodes[2].table.View(1).VTEPs) == 2 && nodes[0].sees(2, nodes[1]) && nodes[1].sees(2, nodes[0])
	})
	time.Sleep(200 * time.Millisecond)
	w.mu.Lock()
	secret := mac(100)
	var told int
	w.tap = func(b []byte) {
		if bytes.Contains(b, secret[:]) {
			told++
		}
	}
	w.mu.Unlock()
	nodes[0].set(2, 100)
	within(t, time.Second, "told", func() bool { return nodes[1].sees(2, nodes[0], 100) })
	time.Sleep(300 * time.Millisecond)
	w.mu.Lock()
	defer w.mu.Unlock()
	if told != 1 {
		t.Errorf("said %d times, want once", told)
	}
}

func TestGossipAsk(t *testing.T) {
	t.Parallel()
	w := newWires()
	nodes := w.cluster(t, 4)
	nodes[1].set(7, 1)
	nodes[2].set(7, 2)
	ask := func(vni uint32, limit time.Duration) ([]string, time.Duration, error) {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		start := time.Now()
		parts, err := nodes[0].Ask(ctx, vni)
		var hosts []string
		for _, p := range parts {
			hosts = append(hosts, p.Host)
		}
		return hosts, time.Since(start), err
	}
	hosts, took, err := ask(7, 10*time.Second)
	if diff := cmp.Diff([]string{"id-1", "id-2"}, hosts); diff != "" || err != nil || took > 2*time.Second {
		t.Errorf("after %s: %v %s", took, err, diff)
	}
	t.Logf("asked 3 hosts in %s", took)
	if hosts, _, err = ask(8, 10*time.Second); len(hosts) != 0 || err != nil {
		t.Errorf("a network that nobody has: %v %v", hosts, err)
	}
	w.separate(true, nodes[:1], nodes[2:3])
	if hosts, took, err = ask(7, 5*time.Second); !slices.Equal(hosts, []string{"id-1", "id-2"}) || err != nil {
		t.Errorf("one that answers by others, after %s: %v %v", took, hosts, err)
	}
	others := []*node{nodes[1], nodes[3]}
	w.separate(true, others, nodes[2:3])
	hosts, took, err = ask(7, 500*time.Millisecond)
	w.separate(false, others, nodes[2:3])
	if diff := cmp.Diff([]string{"id-1"}, hosts); diff != "" || !errors.Is(err, context.DeadlineExceeded) || took > time.Second {
		t.Errorf("with one that does not answer, after %s: %v %s", took, err, diff)
	}
	// Whoever is silent cannot answer; those who know its part can.
	nodes[1].set(7, 1)
	nodes[2].stop()
	within(t, 15*time.Second, "silent", func() bool { return nodes[1].silent(nodes[2]) && nodes[0].members() == 2 })
	if hosts, _, err = ask(7, 5*time.Second); !slices.Equal(hosts, []string{"id-1", "id-2"}) || err != nil {
		t.Errorf("a silent host's part: %v %v", hosts, err)
	}
	w.separate(true, nodes[:1], nodes[1:])
	within(t, 15*time.Second, "alone", func() bool { return nodes[0].members() == 0 })
	if hosts, took, err = ask(7, 5*time.Second); len(hosts) != 0 || err != nil || took > time.Second {
		t.Errorf("alone, after %s: %v %v", took, hosts, err)
	}
}

func openStore(t *testing.T) *store.Bolt {
	t.Helper()
	s, err := store.Open(filepath.Join(t.TempDir(), "weft.db"), store.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// TestGossipRestart: a host whose plugin stopped is silent within 10 s, and what
// leads to it stays. It comes back knowing only the peers that it had stored,
// and without a network that it had.
func TestGossipRestart(t *testing.T) {
	t.Parallel()
	w := newWires()
	s := openStore(t)
	nodes := w.cluster(t, 3, func(c *GossipConfig) {
		if c.ID == "id-2" {
			c.Store = s
		}
	})
	for i, x := range nodes {
		x.set(1, i+1)
		x.set(2, i+11)
	}
	ok := func() bool { return nodes[0].sees(1, nodes[2], 3) && nodes[1].sees(2, nodes[2], 13) }
	within(t, 5*time.Second, "all see all", ok)
	within(t, 5*time.Second, "peers are stored", func() bool {
		list, err := s.List(t.Context(), peerPrefix)
		return err == nil && len(list) == 2
	})
	nodes[2].stop()
	took := within(t, 10*time.Second, "silent", func() bool { return nodes[0].silent(nodes[2]) && nodes[1].silent(nodes[2]) })
	t.Logf("silent after %s", took)
	if !ok() {
		t.Error("what leads to a silent host is gone")
	}
	nodes[0].set(1, 1, 21)

	c := w.host(2)
	c.Bind, c.Store = nodes[2].addr, s
	nodes[2] = w.run(t, c)
	nodes[2].set(1, 3, 33)
	took = within(t, 5*time.Second, "back", func() bool {
		for _, x := range nodes[:2] {
			if x.silent(nodes[2]) || !x.sees(1, nodes[2], 3, 33) || len(x.table.View(2).VTEPs) != 1 {
				return false
			}
		}
		return nodes[2].sees(1, nodes[0], 1, 21) && nodes[2].sees(1, nodes[1], 2)
	})
	t.Logf("back after %s", took)
}

// TestGossipNextLeader: a node was told of the leader of the time alone, and is
// not told of the next one, which makes itself known to that leader. When all
// that it was told of is gone, the two have each other, also after a restart of
// both: who was a member once is kept.
func TestGossipNextLeader(t *testing.T) {
	t.Parallel()
	w := newWires()
	leader := w.run(t, w.host(0))
	told := leader.addr.String()
	configs := []GossipConfig{w.host(1, told), w.host(2, told)} // the node, and the next leader
	start := func() (node, next *node) {
		for i := range configs {
			configs[i].Table = NewTable(configs[i].ID, testGrace)
		}
		node, next = w.run(t, configs[0]), w.run(t, configs[1])
		node.set(1, 11)
		next.set(1, 12)
		return node, next
	}
	stores := make([]*store.Bolt, len(configs))
	for i := range configs {
		stores[i] = openStore(t)
		configs[i].Store = stores[i]
	}
	one, two := start()
	met := func() bool { return one.sees(1, two, 12) && two.sees(1, one, 11) }
	within(t, 5*time.Second, "the node hears the next leader", met)
	leader.stop()
	for _, s := range stores {
		within(t, 5*time.Second, "both keep each other", func() bool {
			list, err := s.List(t.Context(), peerPrefix)
			return err == nil && len(list) == 2
		})
	}
	one.stop()
	two.stop()
	one, two = start()
	within(t, 5*time.Second, "after a restart, without the old leader", met)
}

// TestGossipRestartAtOnce: nobody has noticed that the host was away.
func TestGossipRestartAtOnce(t *testing.T) {
	t.Parallel()
	w := newWires()
	nodes := w.cluster(t, 3)
	for i, x := range nodes {
		x.set(1, i+1)
		x.set(2, i+11)
	}
	within(t, 5*time.Second, "all see all", func() bool {
		return nodes[0].sees(1, nodes[2], 3) && nodes[1].sees(2, nodes[2], 13) && nodes[2].sees(1, nodes[0], 1)
	})
	nodes[2].stop()
	c := w.host(2, nodes[1].addr.String())
	c.Bind = nodes[2].addr
	c.Table.now = func() time.Time { return time.Now().Add(-time.Hour) } // and its clock is wrong
	nodes[2] = w.run(t, c)
	nodes[2].set(1, 4)
	took := within(t, 5*time.Second, "back", func() bool {
		for _, x := range nodes[:2] {
			if !x.sees(1, nodes[2], 4) || len(x.table.View(2).VTEPs) != 1 {
				return false
			}
		}
		return nodes[2].sees(1, nodes[0], 1) && nodes[2].sees(1, nodes[1], 2)
	})
	t.Logf("back after %s", took)
}

func TestGossipNewAddress(t *testing.T) {
	t.Parallel()
	w := newWires()
	nodes := w.cluster(t, 3)
	for i, x := range nodes {
		x.set(1, i+1)
	}
	within(t, 5*time.Second, "seen", func() bool { return nodes[0].sees(1, nodes[2], 3) && nodes[1].sees(1, nodes[2], 3) })
	nodes[2].stop()
	nodes[2] = w.run(t, w.host(2, nodes[0].addr.String()))
	nodes[2].set(1, 3)
	took := within(t, 5*time.Second, "seen at its new address", func() bool {
		return nodes[0].sees(1, nodes[2], 3) && nodes[1].sees(1, nodes[2], 3) && nodes[2].sees(1, nodes[1], 2)
	})
	t.Logf("seen at its new address after %s", took)
	// The member at the old address dies, and the host is heard all the same.
	within(t, 15*time.Second, "the old member is gone", func() bool { return nodes[0].members() == 2 && nodes[1].members() == 2 })
	if nodes[0].silent(nodes[2]) || nodes[1].silent(nodes[2]) || nodes[2].logged("same ID") != nil {
		t.Error("silent, or taken for another")
	}
}

func TestGossipPartition(t *testing.T) {
	t.Parallel()
	for _, away := range []time.Duration{0, 40 * time.Second} { // memberlist forgets who was dead for 30 s
		t.Run(away.String(), func(t *testing.T) {
			t.Parallel()
			w := newWires()
			nodes := w.cluster(t, 4)
			for i, x := range nodes {
				x.set(1, i+1)
			}
			a, b := nodes[:2], nodes[2:]
			w.separate(true, a, b)
			within(t, 15*time.Second, "silent", func() bool {
				for _, x := range a {
					for _, y := range b {
						if !x.silent(y) || !y.silent(x) {
							return false
						}
					}
				}
				return true
			})
			time.Sleep(away)
			for i, x := range nodes {
				x.set(1, i+21)
			}
			nodes[0].set(2, 50)
			nodes[3].set(2, 53)
			w.separate(false, a, b)
			took := within(t, 5*time.Second, "one cluster", func() bool {
				for i, x := range nodes {
					for j, y := range nodes {
						if i != j && (x.silent(y) || !x.sees(1, y, j+21)) {
							return false
						}
					}
				}
				return nodes[0].sees(2, nodes[3], 53) && nodes[3].sees(2, nodes[0], 50)
			})
			t.Logf("one cluster again after %s", took)
		})
	}
}

func TestGossipLoss(t *testing.T) {
	t.Parallel()
	w := newWires()
	nodes := w.cluster(t, 4)
	for _, x := range nodes {
		x.set(1, 0)
	}
	w.loss.Store(30)
	took := churn(t, nodes, 1, 60)
	logTimes(t, "a new endpoint on all of 4 hosts, 30 % of packets lost", took)
	if p50 := took[30]; p50 > time.Second {
		t.Errorf("p50 is %s", p50)
	}
	// A new network has to be asked about first.
	nodes[0].set(2, 1)
	nodes[1].set(2, 2)
	t.Logf("a new network after %s", within(t, 5*time.Second, "a new network", func() bool {
		return nodes[0].sees(2, nodes[1], 2) && nodes[1].sees(2, nodes[0], 1)
	}))
}

// TestGossipLarge: what does not fit into a packet takes a stream.
func TestGossipLarge(t *testing.T) {
	t.Parallel()
	w := newWires()
	nodes := w.cluster(t, 2)
	var list []int
	for i := range 1000 {
		list = append(list, i+1)
	}
	nodes[1].set(1)
	nodes[0].set(1, list...)
	t.Logf("1000 endpoints after %s", within(t, 2*time.Second, "1000 endpoints", func() bool { return nodes[1].sees(1, nodes[0], list...) }))
	for i := range 50 {
		nodes[0].set(1, list[i:]...)
	}
	t.Logf("50 changes of it after %s", within(t, 2*time.Second, "the last change", func() bool { return nodes[1].sees(1, nodes[0], list[49:]...) }))
}

func testKey(n byte) []byte { return bytes.Repeat([]byte{n}, keyLen) }

func TestGossipWrongKey(t *testing.T) {
	t.Parallel()
	for name, keys := range map[string][2][][]byte{
		"different": {{testKey(1)}, {testKey(2)}},
		"one only":  {{testKey(1)}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWires()
			nodes := w.cluster(t, 2, func(c *GossipConfig) { c.Keys = keys[0] })
			c := w.host(2, nodes[0].addr.String())
			c.Keys = keys[1]
			stranger := w.run(t, c)
			nodes[0].AddPeers(stranger.addr.String())
			for i, x := range append(slices.Clone(nodes), stranger) {
				x.set(1, i+1)
			}
			within(t, 5*time.Second, "warned", func() bool {
				return len(nodes[0].logged("another password")) > 0 && len(stranger.logged("another password")) > 0
			})
			time.Sleep(4 * time.Second) // some more rounds
			if n := len(stranger.table.Peers()); n != 0 || stranger.members() != 0 || nodes[0].members() != 1 {
				t.Errorf("strangers know each other: %d peers, %d and %d members", n, stranger.members(), nodes[0].members())
			}
			for _, x := range nodes {
				if slices.ContainsFunc(x.table.Known(), func(k Known) bool { return k.Part.Host == "id-2" }) {
					t.Errorf("%s has learnt something of a stranger", x.name)
				}
			}
			for _, x := range []*node{nodes[0], stranger} {
				if lines := x.logged("another password"); len(lines) != 1 {
					t.Errorf("%s was warned %d times: %q", x.name, len(lines), lines)
				}
			}
			t.Log(nodes[0].logged("another password")[0])
			if n := len(stranger.logged("clear text")); n != 1-len(keys[1]) {
				t.Errorf("%d warnings of clear text with %d keys", n, len(keys[1]))
			}
		})
	}
}

// TestGossipNewKey changes the key of a cluster while it works.
func TestGossipNewKey(t *testing.T) {
	t.Parallel()
	w := newWires()
	old, third, fresh := testKey(1), testKey(3), testKey(2)
	nodes := w.cluster(t, 3, func(c *GossipConfig) { c.Keys = [][]byte{old, third} })
	for _, x := range nodes {
		x.set(1, 1)
	}
	stop := make(chan struct{})
	var took []time.Duration
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			x := nodes[i%3]
			x.set(1, 100+i)
			took = append(took, within(t, 2*time.Second, "a change is everywhere", func() bool {
				return !slices.ContainsFunc(nodes, func(y *node) bool { return y != x && !y.sees(1, x, 100+i) })
			}))
			time.Sleep(10 * time.Millisecond)
		}
	})
	step := func(f func(*node) error) {
		t.Helper()
		for _, x := range nodes {
			if err := f(x); err != nil {
				t.Error(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	step(func(x *node) error { return x.AddKey(fresh) })
	step(func(x *node) error { return x.UseKey(fresh) })
	step(func(x *node) error { return x.RemoveKey(old) })
	step(func(x *node) error { return x.RemoveKey(third) })
	time.Sleep(300 * time.Millisecond)
	close(stop)
	wg.Wait()
	slices.Sort(took)
	logTimes(t, "changes meanwhile", took)
	for _, x := range nodes {
		if lines := x.logged("is silent"); lines != nil {
			t.Error(lines)
		}
		if diff := cmp.Diff([][]byte{fresh}, x.ring.GetKeys()); diff != "" {
			t.Error(diff)
		}
		if x.RemoveKey(fresh) == nil || x.UseKey(old) == nil || x.AddKey([]byte("short")) == nil {
			t.Error("the last key goes, or an unknown one comes")
		}
	}
}

func TestRemoveKeyFromTheMiddle(t *testing.T) {
	w := newWires()
	c := w.host(0)
	c.Keys = [][]byte{testKey(1), testKey(2), testKey(3)}
	g, err := NewGossip(c)
	if err != nil {
		t.Fatal(err)
	}
	before := g.ring.GetKeys()
	if err := g.RemoveKey(testKey(2)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([][]byte{testKey(1), testKey(3)}, g.ring.GetKeys()); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(c.Keys, before); diff != "" {
		t.Errorf("what another goroutine may be reading was changed: %s", diff)
	}
	c.Keys = nil
	if g, err = NewGossip(c); err != nil {
		t.Fatal(err)
	}
	if g.AddKey(testKey(1)) == nil || g.RemoveKey(testKey(1)) == nil {
		t.Error("a host without a key takes one")
	}
}

// TestGossipSecret: with a key, nothing that hosts say can be read on the way.
func TestGossipSecret(t *testing.T) {
	t.Parallel()
	for name, keys := range map[string][][]byte{"key": {testKey(1)}, "clear": nil} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWires()
			secret := mac(4321)
			ip := addr(4321).As4()
			found := map[string]bool{}
			w.tap = func(b []byte) {
				for what, text := range map[string][]byte{"name": []byte("host-1"), "ID": []byte("id-1"), "MAC": secret[:], "address": ip[:]} {
					if bytes.Contains(b, text) {
						found[what] = true
					}
				}
			}
			nodes := w.cluster(t, 3, func(c *GossipConfig) { c.Keys = keys })
			for _, x := range nodes {
				x.set(1, 1)
			}
			nodes[1].set(1, 4321)
			var list []int
			for i := range 200 {
				list = append(list, i+4321)
			}
			within(t, 5*time.Second, "seen", func() bool { return nodes[2].sees(1, nodes[1], 4321) })
			nodes[1].set(1, list...) // by a stream
			within(t, 5*time.Second, "seen", func() bool { return nodes[2].sees(1, nodes[1], list...) })
			w.mu.Lock()
			defer w.mu.Unlock()
			if keys == nil && len(found) != 4 {
				t.Errorf("the test finds only %v in clear text", found)
			}
			if keys != nil && len(found) != 0 {
				t.Errorf("on the wire: %v", found)
			}
		})
	}
}

// TestKey: hosts of two releases have to get the same key out of a password.
func TestKey(t *testing.T) {
	start := time.Now()
	k := Key("correct horse")
	t.Logf("made in %s", time.Since(start))
	if got := fmt.Sprintf("%x", k[:4]); len(k) != keyLen || got != "50390a77" {
		t.Errorf("%d bytes, %s", len(k), got)
	}
}

// TestGossipTwin: two hosts have one ID, as when a machine was copied.
// TestGossipLateAddress: the underlay may come up after the plugin.
func TestGossipLateAddress(t *testing.T) {
	t.Parallel()
	w := newWires()
	c := w.host(0)
	log, logs := logtest.NewNullLogger()
	c.Log = log
	g, err := NewGossip(c)
	if err != nil {
		t.Fatal(err)
	}
	var tries atomic.Int32
	g.listen = func(ctx context.Context, a netip.AddrPort) (memberlist.NodeAwareTransport, error) {
		if tries.Add(1) < 3 {
			return nil, errors.New("cannot assign requested address")
		}
		return w.listen(ctx, a)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	peer := w.run(t, w.host(1, c.Bind.String()))
	within(t, 10*time.Second, "joined", func() bool { return peer.members() == 1 })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	n := 0
	for _, e := range logs.AllEntries() {
		if strings.Contains(e.Message, "cannot assign") {
			n++
		}
	}
	if n != 1 {
		t.Errorf("said %d times that the address is not there", n)
	}
	// One that never comes.
	g, err = NewGossip(GossipConfig{Table: c.Table, ID: "x", Name: "x", Bind: netip.MustParseAddr("192.0.2.1"), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := g.Run(ctx); err != nil {
		t.Error(err)
	}
}

// TestGossipStranger: memberlist's news of a host were lost, but it talks.
func TestGossipStranger(t *testing.T) {
	t.Parallel()
	w := newWires()
	x, y := w.run(t, w.host(0)), w.run(t, w.host(1))
	within(t, 5*time.Second, "joined", func() bool {
		x.receive(message{From: y.id, At: y.bind, Query: 1})
		x.receive(message{From: "id-9", At: netip.AddrPortFrom(w.addr(), GossipPort), Query: 1}) // nobody is there
		return x.members() == 1 && y.members() == 1
	})
	for range 2 * mostPeers {
		x.receive(message{From: "id-9", At: netip.AddrPortFrom(w.addr(), GossipPort)})
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if n := len(x.strangers); n > mostPeers {
		t.Errorf("%d strangers", n)
	}
}

// mirror is a host in a process of its own. What it sees on VNI 1 at endpoint n
// it has at n + 5000.
func mirror() {
	log := logrus.New()
	table := NewTable("id-1", testGrace)
	g, err := NewGossip(GossipConfig{
		Table: table, ID: "id-1", Name: "host-1", Log: log,
		Bind: netip.MustParseAddr(os.Getenv("WEFT_MIRROR")), Peers: []string{os.Getenv("WEFT_PEER")},
	})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	x := &node{Gossip: g, addr: g.bind.Addr(), table: table}
	x.set(1)
	go func() {
		for range table.Changed() {
			var list []int
			for m := range table.View(1).Forwards {
				list = append(list, int(m[4])<<8+int(m[5])+5000)
			}
			if slices.Sort(list); table.Dirty() != nil {
				x.set(1, list...)
			}
		}
	}()
	_ = g.Run(context.Background())
}

// TestGossipFreeze: a host that stands still for a while, longer than it takes
// to be silent, is back within 5 s, and knows what happened meanwhile.
func TestGossipFreeze(t *testing.T) {
	t.Parallel()
	w := newWires()
	c := w.host(0)
	x := w.run(t, c)
	y := w.run(t, w.host(2, c.Bind.String()))
	other := &node{Gossip: &Gossip{id: "id-1"}, addr: w.addr()}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "WEFT_MIRROR="+other.addr.String(), "WEFT_PEER="+c.Bind.String())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	x.set(1, 7)
	y.set(1, 8)
	within(t, 10*time.Second, "reflected", func() bool { return x.sees(1, other, 5007, 5008) && y.sees(1, other, 5007, 5008) })
	freeze := 10 * time.Second
	if soak() {
		freeze = time.Minute
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(freeze)
	if !x.silent(other) || !y.silent(other) || !x.sees(1, other, 5007, 5008) {
		t.Error("a host that stands still is not silent, or nothing leads to it")
	}
	x.set(1, 17)
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	took := within(t, 5*time.Second, "back", func() bool {
		return x.sees(1, other, 5008, 5017) && y.sees(1, other, 5008, 5017) && !x.silent(other) && !y.silent(other)
	})
	t.Logf("back after %s", took)
	time.Sleep(5 * time.Second)
	if x.silent(y) || y.silent(x) || x.silent(other) || y.silent(other) {
		t.Error("somebody is silent for no reason")
	}
}

// TestGossipClock: clocks that jump within an hour harm nothing. What one
// that is further ahead says is not believed, and all is as before when it is set
// right.
func TestGossipClock(t *testing.T) {
	t.Parallel()
	w := newWires()
	var offset atomic.Int64
	nodes := w.cluster(t, 3, func(c *GossipConfig) {
		if c.ID == "id-1" {
			c.Table.now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
		}
	})
	for _, x := range nodes {
		x.set(1, 1)
	}
	for _, jump := range []time.Duration{-25 * time.Minute, 50 * time.Minute, -50 * time.Minute} {
		offset.Add(int64(jump))
		logTimes(t, fmt.Sprintf("after a jump of %s", jump), churn(t, nodes, 1, 9))
	}
	offset.Store(int64(24 * time.Hour))
	nodes[1].set(1, 4077)
	within(t, 10*time.Second, "the others say that a clock is wrong", func() bool {
		return len(nodes[0].logged("clock")) == 1 && len(nodes[0].Troubles()) == 1
	})
	offset.Store(0)
	within(t, 10*time.Second, "what was said meanwhile is believed", func() bool { return nodes[0].sees(1, nodes[1], 4077) })
	logTimes(t, "after the clock was set", churn(t, nodes, 1, 9))
}

func TestGossipOtherRelease(t *testing.T) {
	w := newWires()
	c := w.host(0)
	log, logs := logtest.NewNullLogger()
	c.Log = log
	g, err := NewGossip(c)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		delegate{g}.NotifyMsg([]byte{wireVersion + 1, 1, 'x'})
		delegate{g}.NotifyMsg(nil)
		delegate{g}.MergeRemoteState([]byte{wireVersion, 200}, true)
	}
	if e := logs.AllEntries(); len(e) != 1 || !strings.Contains(e[0].Message, "another release") {
		t.Errorf("logged %v", e)
	}
}

func TestNewGossipRefuses(t *testing.T) {
	w := newWires()
	for name, change := range map[string]func(*GossipConfig){
		"no ID":       func(c *GossipConfig) { c.ID = "" },
		"long ID":     func(c *GossipConfig) { c.ID = strings.Repeat("x", 65) },
		"long name":   func(c *GossipConfig) { c.Name = strings.Repeat("\x01", 200) },
		"no address":  func(c *GossipConfig) { c.Bind = netip.Addr{} },
		"any address": func(c *GossipConfig) { c.Bind = netip.IPv4Unspecified() },
		"short key":   func(c *GossipConfig) { c.Keys = [][]byte{{1, 2, 3}} },
	} {
		c := w.host(0)
		change(&c)
		if _, err := NewGossip(c); err == nil {
			t.Errorf("%s: not refused", name)
		}
	}
}

// TestGossipPeersAreBounded: hosts that were not there for long are forgotten,
// but not by a host that is alone, whose clock may be wrong.
func TestGossipPeersAreBounded(t *testing.T) {
	t.Parallel()
	w := newWires()
	s := openStore(t)
	put := func(id string, age time.Duration) {
		k := known{Addr: netip.AddrPortFrom(w.addr(), GossipPort), Name: id, Seen: time.Now().Add(-age)}
		if err := (&Gossip{store: s}).save(t.Context(), id, &k); err != nil {
			t.Fatal(err)
		}
	}
	for i := range mostPeers + 10 {
		put(fmt.Sprintf("old-%d", i), time.Duration(i)*time.Hour)
	}
	put("ancient", peerAge+time.Hour)
	if _, err := s.Put(t.Context(), store.Record{Key: peerPrefix + "damaged", Value: []byte("{")}); err != nil {
		t.Fatal(err)
	}
	count := func() int {
		list, err := s.List(t.Context(), peerPrefix)
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	c := w.host(0)
	c.Store = s
	x := w.run(t, c)
	time.Sleep(2 * time.Second)
	if n := count(); n != mostPeers+11 {
		t.Errorf("alone: %d records", n)
	}
	w.run(t, w.host(1, x.addr.String()))
	within(t, 15*time.Second, "the oldest are forgotten", func() bool { return count() == mostPeers })
	list, _ := s.List(t.Context(), peerPrefix+"ancient")
	if len(list) != 0 {
		t.Error("one that was not there for 30 days is still known")
	}
}

func TestAddPeers(t *testing.T) {
	w := newWires()
	c := w.host(0, "localhost", "192.0.2.1:1", "192.0.2.2", "[2001:db8::1]:5", "2001:db8::2", "192.0.2.2")
	log, logs := logtest.NewNullLogger()
	c.Log = log
	g, err := NewGossip(c)
	if err != nil {
		t.Fatal(err)
	}
	g.AddPeers("192.0.2.3:x", "")
	if len(logs.AllEntries()) != 1 || len(g.seeds) != 5 {
		t.Errorf("%d seeds, %v", len(g.seeds), logs.AllEntries())
	}
	got := g.resolve(t.Context(), nil)
	for _, a := range []string{"127.0.0.1:7947", "192.0.2.1:1", "192.0.2.2:7947"} {
		if !got[netip.MustParseAddrPort(a)] {
			t.Errorf("%s is missing from %v", a, got)
		}
	}
	if len(got) != 3 {
		t.Errorf("of another family: %v", got)
	}
}
