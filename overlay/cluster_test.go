package overlay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
)

// bench is one host's cluster whose other hosts the test speaks for.
type bench struct {
	t           *testing.T
	c           *Cluster
	parts, kept *store.Bolt
	log         *logtest.Hook

	mu        sync.Mutex
	under     datapath.Underlay
	noWay     error
	others    []Part // the answers to Ask
	announced []string
	peers     string // what Underlay was last asked for
	followed  []uint32
	rehomed   []netip.Addr
	shrunk    []string
	engines   []string // "address keys peers" of each that was started
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, under: datapath.Underlay{Addr: netip.MustParseAddr("192.0.2.1"), Link: "eth0", MTU: 1500}}
	dir := t.TempDir()
	for file, s := range map[string]**store.Bolt{"parts.db": &b.parts, "kept.db": &b.kept} {
		var err error
		if *s, err = store.Open(filepath.Join(dir, file), store.Options{NoSync: true}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = (*s).Close() }) // the test is over
	}
	b.start(Join{})
	return b
}

// start is the process of this host starting, again.
func (b *bench) start(j Join) {
	b.t.Helper()
	var log *logrus.Logger
	log, b.log = logtest.NewNullLogger()
	var err error
	b.c, err = New(b.t.Context(), Config{
		Host: "me", Name: "here", Parts: b.parts, Kept: b.kept, Network: b, Join: j, Grace: time.Minute, Log: log,
		Ready: func(j Join) bool { return len(j.Keys) > 0 },
		Engine: func(_ *Table, a netip.Addr, j Join) (Engine, error) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.engines = append(b.engines, fmt.Sprint(a, " ", len(j.Keys), " ", j.Peers))
			return b, nil
		},
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// run runs the cluster until the test ends.
func (b *bench) run() {
	b.t.Helper()
	ctx, cancel := context.WithCancel(b.t.Context())
	done := make(chan error, 1)
	go func() { done <- b.c.Run(ctx, b) }()
	b.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Error(err)
		}
	})
}

func (b *bench) Run(ctx context.Context) error { <-ctx.Done(); return nil }

func (b *bench) Ask(context.Context, uint32) ([]Part, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.others, nil
}

func (b *bench) Underlay(_ context.Context, want string, peers ...netip.Addr) (datapath.Underlay, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	u := b.under
	if b.noWay != nil {
		return u, b.noWay
	}
	b.peers = fmt.Sprint(want, peers)
	if a, err := netip.ParseAddr(want); err == nil {
		u.Addr = a
	}
	return u, nil
}

func (b *bench) Announce(link string, a netip.Addr, mac datapath.MAC) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.announced = append(b.announced, fmt.Sprint(link, " ", a, " ", mac))
	return nil
}

func (b *bench) Heartbeat(ctx context.Context, _ datapath.Heartbeat) error {
	<-ctx.Done()
	return nil
}

func (b *bench) Follow(_ context.Context, vni uint32) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.followed = append(b.followed, vni)
	return nil
}

func (b *bench) Rehome(_ context.Context, a netip.Addr) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rehomed = append(b.rehomed, a)
	return nil
}

func (b *bench) Shrink(_ context.Context, vni uint32, mtu int) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.shrunk = append(b.shrunk, fmt.Sprint(vni, " ", mtu))
	b.c.mu.Lock()
	rec := b.c.networks[vni].rec
	b.c.mu.Unlock()
	if rec.Options.MTU != 0 || rec.MTU <= mtu {
		return 0, nil
	}
	before := rec.MTU
	rec.MTU = mtu
	b.c.Publish(rec, nil)
	return before, nil
}

// soon waits until f is true of what has happened.
func (b *bench) soon(what string, f func() bool) {
	b.t.Helper()
	for range 250 {
		b.mu.Lock()
		ok := f()
		b.mu.Unlock()
		if ok {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	b.t.Fatalf("%s: not within 5 s", what)
}

func (b *bench) logged(text string) bool {
	return slices.ContainsFunc(b.log.AllEntries(), func(e *logrus.Entry) bool { return strings.Contains(e.Message, text) })
}

// blue is a network as the driver has parsed it.
func blue(vni uint32) driver.Network {
	return driver.Network{
		ID: strings.Repeat("ab", 32), Mode: driver.ModeOverlay, Options: driver.Options{VNI: vni, ICC: true},
		Subnets: []driver.Subnet{{Pool: netip.MustParsePrefix("10.44.0.0/16")}},
	}
}

func other(subnet string) Part {
	return Part{Host: "you", Name: "there", VNI: 4242, Version: 1, VTEP: netip.MustParseAddr("192.0.2.2"), Port: Port, MTU: 1450,
		Subnets: []netip.Prefix{netip.MustParsePrefix(subnet)}}
}

func TestAdmitFits(t *testing.T) {
	for name, x := range map[string]struct {
		others []Part
		mtu    int // asked for
		under  int
		want   int    // the network's MTU
		err    string // or the refusal
	}{
		"alone":             {under: 1500, want: 1450},
		"small underlay":    {under: 1400, want: 1350},
		"asked for":         {under: 1500, mtu: 1400, want: 1400},
		"too much":          {under: 1500, mtu: 1500, err: "at most 1450"},
		"as the other":      {under: 9000, others: []Part{other("10.44.0.0/16")}, want: 1450},
		"less than another": {under: 1400, others: []Part{other("10.44.0.0/16")}, err: "host there has it with mtu 1450, and here 1350"},
		"another subnet":    {under: 1500, others: []Part{other("10.45.0.0/16")}, err: "host there has it with subnet 10.45.0.0/16, and here 10.44.0.0/16"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.start(Join{Keys: [][]byte{make([]byte, keyLen)}})
			b.run()
			b.soon("engine", func() bool { return len(b.engines) == 1 })
			b.mu.Lock()
			b.under.MTU, b.others = x.under, x.others
			b.mu.Unlock()
			n := blue(4242)
			n.Options.MTU = x.mtu
			err := b.c.Admit(t.Context(), &n)
			switch {
			case x.err != "" && (err == nil || !strings.Contains(err.Error(), x.err)):
				t.Errorf("error %v, want %q", err, x.err)
			case x.err == "" && (err != nil || n.MTU != x.want || n.VNI != 4242 || n.Port != Port || n.Underlay != b.under.Addr):
				t.Errorf("admitted as VNI %d port %d mtu %d from %s, error %v", n.VNI, n.Port, n.MTU, n.Underlay, err)
			}
		})
	}
}

func TestAdmitChooses(t *testing.T) {
	b := newBench(t)
	n := blue(0)
	if err := b.c.Admit(t.Context(), &n); err != nil || n.VNI < firstVNI || n.VNI > lastVNI {
		t.Errorf("chose VNI %d, error %v", n.VNI, err)
	}
}

// TestPartsOutliveTheProcess is what keeps the traffic going while a plugin that
// was restarted has not heard from anybody yet.
func TestPartsOutliveTheProcess(t *testing.T) {
	b := newBench(t)
	b.run()
	n := blue(4242)
	if err := b.c.Admit(t.Context(), &n); err != nil {
		t.Fatal(err)
	}
	b.c.Publish(n, nil)
	p := other("10.44.0.0/16")
	p.Endpoints = []Endpoint{{MAC: datapath.MAC{2, 1}, Addrs: []netip.Addr{netip.MustParseAddr("10.44.2.2")}, Claim: 5}}
	if _, err := b.c.table.Merge(p, 0); err != nil {
		t.Fatal(err)
	}
	want := b.c.Remote(n).String()
	if strings.Count(want, "192.0.2.2") != 3 || !strings.Contains(want, "10.44.2.2") {
		t.Fatalf("what leads to the other host:\n%s", want)
	}
	b.soon("parts are kept", func() bool {
		list, err := b.parts.List(t.Context(), partsKey)
		return err == nil && len(list) == 1 && strings.Contains(string(list[0].Value), "10.44.2.2")
	})
	b.start(Join{})
	b.c.Publish(n, nil)
	if got := b.c.Remote(n).String(); got != want {
		t.Errorf("after a restart:\n%s\nwant\n%s", got, want)
	}
	if peers := b.c.Status().Peers; len(peers) != 1 || peers[0].Name != "there" || peers[0].Silent.IsZero() {
		t.Errorf("peers %+v, want one that is silent", peers)
	}
	b.run()
	b.c.Withdraw(n)
	b.soon("parts are forgotten", func() bool {
		list, err := b.parts.List(t.Context(), partsKey)
		return err == nil && len(list) == 0
	})
}

// TestMovedAddress tells containers here that an address has another MAC.
func TestMovedAddress(t *testing.T) {
	b := newBench(t)
	b.run()
	n := blue(4242)
	if err := b.c.Admit(t.Context(), &n); err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr("10.44.2.2")
	b.c.Publish(n, []driver.Endpoint{{MAC: datapath.MAC{2, 1}, Claim: 1, Addrs: []netip.Prefix{netip.PrefixFrom(a, 16)}}})
	b.soon("noticed", func() bool {
		b.c.mu.Lock()
		defer b.c.mu.Unlock()
		return len(b.c.networks[4242].macs) == 1
	})
	b.c.Publish(n, nil)
	p := other("10.44.0.0/16")
	p.Endpoints = []Endpoint{{MAC: datapath.MAC{2, 2}, Addrs: []netip.Addr{a}, Claim: 5}}
	if _, err := b.c.table.Merge(p, 0); err != nil {
		t.Fatal(err)
	}
	b.soon("announced", func() bool { return slices.Contains(b.announced, "wfbabababababab 10.44.2.2 02:02:00:00:00:00") })
}

// TestConflict is told once, and is over when it is over.
func TestConflict(t *testing.T) {
	b := newBench(t)
	b.run()
	n := blue(4242)
	if err := b.c.Admit(t.Context(), &n); err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr("10.44.2.2")
	b.c.Publish(n, []driver.Endpoint{{MAC: datapath.MAC{2, 1}, Claim: 1, Addrs: []netip.Prefix{netip.PrefixFrom(a, 16)}}})
	p := other("10.44.0.0/16")
	p.Endpoints = []Endpoint{{MAC: datapath.MAC{2, 2}, Addrs: []netip.Addr{a}, Claim: 5}}
	b.c.table.Heard("you", "there")
	if _, err := b.c.table.Merge(p, 0); err != nil {
		t.Fatal(err)
	}
	if host, ok := b.c.Holder(n, a); !ok || host != "there" {
		t.Errorf("the holder is %q, %t", host, ok)
	}
	const line = "10.44.2.2 is claimed by host here and by host there"
	b.soon("the conflict is told", func() bool { return b.logged(line) })
	if c := b.c.Status().Conflicts; len(c) != 1 || !strings.Contains(c[0], line) {
		t.Errorf("conflicts %q", c)
	}
	b.c.Publish(n, nil)
	b.soon("it is over", func() bool { return len(b.c.Status().Conflicts) == 0 })
}

// TestUnderlayMoves starts another engine on the other address.
// TestUnderlayLeadsToPeers, unless the settings or the swarm name another.
func TestUnderlayLeadsToPeers(t *testing.T) {
	b := newBench(t)
	b.start(Join{Peers: []string{"192.0.2.7", "[2001:db8::7]:99", "192.0.2.8:7950", "localhost"}})
	if _, err := b.c.where(t.Context()); err != nil || !strings.HasPrefix(b.peers, "[192.0.2.7 2001:db8::7 192.0.2.8 ") || !strings.Contains(b.peers, "127.0.0.1") {
		t.Errorf("asked for %s, %v", b.peers, err)
	}
	if err := b.c.Discover(t.Context(), netip.MustParseAddr("192.0.2.1"), true); err != nil {
		t.Fatal(err)
	}
	if _, err := b.c.where(t.Context()); err != nil || b.peers != "192.0.2.1[]" {
		t.Errorf("in a swarm asked for %s, %v", b.peers, err)
	}
	b.c.c.Underlay = "eth7"
	if _, err := b.c.where(t.Context()); err != nil || b.peers != "eth7[]" {
		t.Errorf("with UNDERLAY asked for %s, %v", b.peers, err)
	}
}

// TestUnderlayBack: a trouble is over when the address is the one of before, and
// told again when it comes again.
func TestUnderlayBack(t *testing.T) {
	b := newBench(t)
	b.start(Join{Keys: [][]byte{make([]byte, keyLen)}})
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- b.c.watchUnderlay(ctx, b) }()
		for range 2 {
			for _, err := range []error{nil, errors.New("eth0 has no address")} {
				b.mu.Lock()
				b.noWay = err
				b.mu.Unlock()
				time.Sleep(lookTime + time.Second)
				if got := b.c.Status().Troubles; len(got) > 0 != (err != nil) {
					t.Errorf("with error %v the troubles are %v", err, got)
				}
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if len(b.rehomed) != 1 {
		t.Errorf("rehomed to %v", b.rehomed)
	}
}

// TestPastAddressesAreBounded: a host that names other addresses all the time
// does not fill the memory.
func TestPastAddressesAreBounded(t *testing.T) {
	n := &network{rec: blue(4242), macs: map[netip.Addr]datapath.MAC{}}
	stays := netip.MustParseAddr("10.44.2.2")
	a := netip.MustParseAddr("fd00::1")
	for range 3 * mostPast {
		n.moves(Backend{}, map[netip.Addr]datapath.MAC{stays: {2, 1}, a: {2, 2}})
		a = a.Next()
	}
	if len(n.macs) > mostPast+2 || n.macs[stays] != (datapath.MAC{2, 1}) {
		t.Errorf("%d addresses are remembered, and %s at %s", len(n.macs), stays, n.macs[stays])
	}
	if got := n.moves(Backend{}, map[netip.Addr]datapath.MAC{stays: {2, 3}}); len(got) != 1 {
		t.Errorf("moved: %v", got)
	}
}

func TestUnderlayMoves(t *testing.T) {
	b := newBench(t)
	b.start(Join{Keys: [][]byte{make([]byte, keyLen)}})
	b.run()
	b.soon("engine", func() bool { return len(b.engines) == 1 })
	b.mu.Lock()
	b.under.Addr = netip.MustParseAddr("192.0.2.9")
	b.mu.Unlock()
	time.Sleep(lookTime)
	b.soon("engine on the other address", func() bool { return len(b.engines) == 2 && strings.HasPrefix(b.engines[1], "192.0.2.9") })
	if len(b.rehomed) != 2 || b.rehomed[1] != b.under.Addr {
		t.Errorf("rehomed to %v", b.rehomed)
	}
}

// TestAllocate is a leader, its successor, and a node.
func TestAllocate(t *testing.T) {
	leader := newBench(t)
	if err := leader.c.Discover(t.Context(), netip.MustParseAddr("198.51.100.1"), true); err != nil {
		t.Fatal(err)
	}
	if err := leader.c.Discover(t.Context(), netip.MustParseAddr("198.51.100.2"), false); err != nil {
		t.Fatal(err)
	}
	leader.run()
	n := blue(0)
	n.ID = "n1"
	vni, join, err := leader.c.Allocate(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	j, err := ParseJoin(join)
	if err != nil || len(j.Keys) != 1 || !slices.Contains(j.Peers, "198.51.100.1") || !slices.Contains(j.Peers, "198.51.100.2") {
		t.Errorf("the answer says %d keys, peers %v, error %v", len(j.Keys), j.Peers, err)
	}
	leader.soon("engine on the address that the swarm names", func() bool {
		return len(leader.engines) == 1 && strings.HasPrefix(leader.engines[0], "198.51.100.1 1")
	})
	same, again, err := leader.c.Allocate(t.Context(), n)
	if err != nil || same != vni || again != join {
		t.Errorf("asked again: VNI %d, then %d %v", vni, same, err)
	}
	other := blue(vni)
	other.ID = "n2"
	if _, _, err := leader.c.Allocate(t.Context(), other); err == nil || !strings.Contains(err.Error(), "network n1") {
		t.Errorf("a VNI that another network has: %v", err)
	}

	next := newBench(t)
	mine := n
	mine.Options.VNI, mine.Options.Join = vni, join
	if same, again, err = next.c.Allocate(t.Context(), mine); err != nil || same != vni {
		t.Errorf("the next leader: VNI %d, error %v", same, err)
	}
	if k, err := ParseJoin(again); err != nil || !slices.Equal(k.Keys[0], j.Keys[0]) {
		t.Errorf("the next leader has another key, error %v", err)
	}
	fresh := blue(0)
	fresh.ID = "n3"
	if v, again, err := next.c.Allocate(t.Context(), fresh); err != nil || v == vni || !strings.HasPrefix(again, join[:64]) {
		t.Errorf("another network: VNI %d, error %v", v, err)
	}

	// What a process was told, the next one knows.
	next.start(Join{})
	if v, _, err := next.c.Allocate(t.Context(), n); err != nil || v != vni {
		t.Errorf("after a restart: VNI %d, error %v", v, err)
	}
	for _, id := range []string{"n1", "n3", "never was"} {
		if err := next.c.Free(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if _, again, err := next.c.Allocate(t.Context(), fresh); err != nil || strings.HasPrefix(again, join[:64]) {
		t.Errorf("after the last network the key is the same, error %v", err)
	}
}

// TestElected is a leader that is replaced and comes back: of the networks that
// it made, some were removed meanwhile.
func TestElected(t *testing.T) {
	b := newBench(t)
	allocate := func(id string, vni uint32) error {
		n := blue(vni)
		n.ID = id
		_, _, err := b.c.Allocate(t.Context(), n)
		return err
	}
	refused := func(id string, vni uint32, by string) {
		t.Helper()
		if err := allocate(id, vni); err == nil || !strings.Contains(err.Error(), "network "+by) {
			t.Errorf("VNI %d for %s, that of %s: %v", vni, id, by, err)
		}
	}
	must := func(id string, vni uint32) {
		t.Helper()
		if err := allocate(id, vni); err != nil {
			t.Error(err)
		}
	}
	must("kept", 4001)
	must("gone", 4002)
	must("gone too", 4003)
	refused("new", 4002, "gone")
	b.c.Elected()
	must("kept", 4001)
	refused("new", 4001, "kept")
	must("new", 4002)
	refused("another", 4002, "new")
	refused("gone", 4002, "new") // late, if it was there after all
	if list, err := b.kept.List(t.Context(), vniKey); err != nil || len(list) != 3 {
		t.Errorf("records %v, error %v", list, err)
	}

	// Another process does not know what was unconfirmed, and keeps it.
	b.start(Join{})
	refused("another", 4003, "gone too")
	b.c.Elected()
	must("kept", 4001)
	must("another", 4003)
	refused("another", 4001, "kept")
}

// TestVNIRace: of several networks that want one VNI at once, one has it.
func TestVNIRace(t *testing.T) {
	b := newBench(t)
	old := blue(4001)
	old.ID = "old"
	if _, _, err := b.c.Allocate(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	b.c.Elected()
	var got [8]error
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() { got[i] = b.c.claim(t.Context(), fmt.Sprintf("n%d", i), 4001) })
	}
	wg.Wait()
	granted := 0
	for _, err := range got {
		if err == nil {
			granted++
		}
	}
	if granted != 1 {
		t.Errorf("%d networks have the VNI: %v", granted, got)
	}
}

func TestAllocateWithSecret(t *testing.T) {
	b := newBench(t)
	b.start(Join{Keys: [][]byte{Key("password")}})
	n := blue(0)
	_, join, err := b.c.Allocate(t.Context(), n)
	if err != nil || !strings.HasPrefix(join, "@") {
		t.Errorf("the answer %q passes a key on, error %v", join, err)
	}
}

func FuzzParseJoin(f *testing.F) {
	f.Add(Join{Keys: [][]byte{make([]byte, keyLen)}, Peers: []string{"192.0.2.1", "[2001:db8::1]:7947", "2001:db8::2", "host:1"}}.String())
	f.Add("@")
	f.Add("00@,,")
	f.Fuzz(func(t *testing.T, s string) {
		j, err := ParseJoin(s)
		if err != nil {
			return
		}
		again, err := ParseJoin(j.String())
		if err != nil || again.String() != j.String() {
			t.Errorf("%q is read as %q and that as %q, %v", s, j, again, err)
		}
	})
}

// keyring is an engine that can be told of keys.
type keyring struct {
	*bench
	mu    sync.Mutex
	peers []string
	keys  [][]byte
}

func (k *keyring) AddPeers(addrs ...string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.peers = addrs
}

func (k *keyring) AddKey(key []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys = append(k.keys, key)
	return nil
}

func (k *keyring) UseKey(key []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := slices.IndexFunc(k.keys, func(have []byte) bool { return slices.Equal(have, key) })
	k.keys = append([][]byte{key}, slices.Delete(k.keys, i, i+1)...)
	return nil
}

func (k *keyring) RemoveKey(key []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys = slices.DeleteFunc(k.keys, func(have []byte) bool { return slices.Equal(have, key) })
	return nil
}

// holds waits until the engine has the keys of these passwords, in this order.
func (k *keyring) holds(t *testing.T, passwords ...string) {
	t.Helper()
	want := make([][]byte, len(passwords))
	for i, p := range passwords {
		want[i] = Key(p)
	}
	k.soon(fmt.Sprint("keys of ", passwords), func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return slices.EqualFunc(k.keys, want, slices.Equal[[]byte])
	})
}

// TestSecret exchanges a password while the engine runs.
func TestSecret(t *testing.T) {
	b := newBench(t)
	if err := b.c.Secret(t.Context(), SecretAdd, "new"); err == nil || !strings.Contains(err.Error(), "SECRET") {
		t.Errorf("without a password: %v", err)
	}
	b.start(Join{Keys: [][]byte{Key("old")}})
	ring := &keyring{bench: b}
	b.c.c.Engine = func(_ *Table, _ netip.Addr, j Join) (Engine, error) {
		ring.mu.Lock()
		defer ring.mu.Unlock()
		ring.keys = slices.Clone(j.Keys)
		return ring, nil
	}
	b.run()
	ring.holds(t, "old")
	step := func(step, password, refusal string) {
		t.Helper()
		err := b.c.Secret(t.Context(), step, password)
		if refusal == "" && err != nil || refusal != "" && (err == nil || !strings.Contains(err.Error(), refusal)) {
			t.Errorf("%s %s: %v, want %q", step, password, err, refusal)
		}
	}
	step(SecretUse, "new", "not added")
	step(SecretAdd, "", "empty")
	step("change", "old", "add, use or remove")
	step(SecretAdd, "new", "")
	step(SecretAdd, "new", "")
	ring.holds(t, "old", "new")
	step(SecretRemove, "old", "in use")
	step(SecretUse, "new", "")
	ring.holds(t, "new", "old")
	step(SecretRemove, "old", "")
	step(SecretRemove, "old", "")
	ring.holds(t, "new")

	b.start(Join{Keys: [][]byte{Key("old")}, Peers: []string{"a"}})
	if j := b.c.join; len(j.Keys) != 1 || !slices.Equal(j.Keys[0], Key("new")) || !slices.Equal(j.Peers, []string{"a"}) {
		t.Errorf("after a restart with the setting as it was: %d keys, peers %v", len(j.Keys), j.Peers)
	}
	b.start(Join{Keys: [][]byte{Key("third")}})
	if j := b.c.join; len(j.Keys) != 1 || !slices.Equal(j.Keys[0], Key("third")) {
		t.Errorf("after a restart with another setting: %d keys", len(j.Keys))
	}
}
