package overlay

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
	"github.com/weftnet/weft/internal/store/etcdtest"
)

// etcdHost is a host: its table, and its engine while it runs.
type etcdHost struct {
	n      int
	id     string
	table  *Table
	engine *Etcd
	store  *store.Etcd
	cancel context.CancelFunc
	done   chan error
}

func newEtcdHost(t *testing.T, endpoints string, n int, grace time.Duration) *etcdHost {
	t.Helper()
	h := &etcdHost{n: n, id: fmt.Sprintf("id-%d", n)}
	h.table = NewTable(h.id, grace)
	h.open(t, endpoints)
	return h
}

func (h *etcdHost) open(t *testing.T, endpoints string) {
	t.Helper()
	log := logrus.New()
	log.SetOutput(t.Output())
	var err error
	if h.store, err = store.OpenEtcd(store.EtcdConfig{Endpoints: endpoints, Log: log.WithField("on", h.id)}); err != nil {
		t.Fatal(err)
	}
	opened := h.store // it may be opened again
	t.Cleanup(func() { _ = opened.Close() })
	h.engine = NewEtcd(EtcdConfig{Store: h.store, Table: h.table, Name: "name-" + h.id, Log: log.WithField("on", h.id)})
}

func (h *etcdHost) run(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	h.cancel, h.done = cancel, make(chan error, 1)
	go func(e *Etcd, done chan error) { done <- e.Run(ctx) }(h.engine, h.done)
	t.Cleanup(func() { h.stop(t) })
}

// stop is what is left of a plugin that was killed: a lease that runs out.
func (h *etcdHost) stop(t *testing.T) {
	t.Helper()
	if h.cancel == nil {
		return
	}
	h.cancel()
	h.cancel = nil
	if err := <-h.done; err != nil {
		t.Errorf("run: %v", err)
	}
}

// set gives the host a network with endpoints 1 to count.
func (h *etcdHost) set(vni uint32, count int) {
	p := Part{
		Name: "name-" + h.id, VNI: vni, VTEP: netip.AddrFrom4([4]byte{192, 0, 2, byte(h.n)}), Port: 4789, MTU: 1450,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")},
	}
	for i := 1; i <= count; i++ {
		p.Endpoints = append(p.Endpoints, Endpoint{MAC: h.mac(i), Addrs: []netip.Addr{h.addr(i)}, Claim: uint64(i)})
	}
	h.table.Set(p)
}

func (h *etcdHost) leave(vni uint32) {
	h.table.Set(Part{Name: "name-" + h.id, VNI: vni, Gone: true})
}

func (h *etcdHost) mac(i int) datapath.MAC {
	return datapath.MAC{2, 0, 0, byte(h.n), byte(i >> 8), byte(i)}
}
func (h *etcdHost) addr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(h.n), byte(i)}) }

// sees is whether the host has exactly the parts that others have of a network.
func (h *etcdHost) sees(vni uint32, others ...*etcdHost) bool {
	var want, got []Part
	for _, o := range others {
		if i := slices.IndexFunc(o.table.Own(), func(p Part) bool { return p.VNI == vni && !p.Gone }); i >= 0 && o != h {
			want = append(want, o.table.Own()[i])
		}
	}
	for _, k := range h.table.Known() {
		if k.Part.Host != h.id && k.Part.VNI == vni && !k.Part.Gone {
			got = append(got, k.Part)
		}
	}
	slices.SortFunc(want, func(a, b Part) int { return strings.Compare(a.Host, b.Host) })
	return cmp.Equal(want, got, cmpopts.EquateEmpty(), cmpopts.IgnoreFields(Part{}, "Version"), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }))
}

// silent is whether the host takes the other one for silent; ok is whether it
// knows it.
func (h *etcdHost) silent(o *etcdHost) (silent, ok bool) {
	for _, p := range h.table.Peers() {
		if p.ID == o.id {
			return !p.Silent.IsZero(), true
		}
	}
	return false, false
}

func until(t *testing.T, d time.Duration, what string, f func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !f() {
		if time.Since(start) > d {
			t.Fatalf("%s: not within %v", what, d)
		}
		time.Sleep(time.Millisecond)
	}
	return time.Since(start)
}

// etcdHosts are hosts that all have network 7 and know each other.
func etcdHosts(t *testing.T, c *etcdtest.Cluster, n int, grace time.Duration) []*etcdHost {
	t.Helper()
	var hosts []*etcdHost
	for i := range n {
		h := newEtcdHost(t, c.Endpoints, i+1, grace)
		h.set(7, 2)
		h.run(t)
		hosts = append(hosts, h)
	}
	for _, h := range hosts {
		until(t, 20*time.Second, h.id+" sees the others", func() bool {
			for _, o := range hosts {
				if s, ok := h.silent(o); o != h && (s || !ok) {
					return false
				}
			}
			return h.sees(7, hosts...)
		})
	}
	return hosts
}

func TestEtcdConverges(t *testing.T) {
	hosts := etcdHosts(t, etcdtest.Start(t, etcdtest.Config{}), 5, time.Minute)
	a, b, last := hosts[0], hosts[1], hosts[4]

	// A network is known where it is, and at once where it comes to be.
	for _, h := range hosts[:3] {
		h.set(8, 3)
	}
	until(t, 5*time.Second, "network 8", func() bool { return a.sees(8, hosts...) && b.sees(8, hosts...) })
	if !last.sees(8) {
		t.Error("a host has parts of a network that it does not have")
	}
	parts, err := last.engine.Ask(t.Context(), 8)
	if err != nil || len(parts) != 3 {
		t.Errorf("asked for network 8: %d parts, error %v", len(parts), err)
	}
	last.set(8, 1)
	t.Logf("parts of a new network after %v", until(t, time.Second, "new network", func() bool { return last.sees(8, hosts...) }))

	var took []time.Duration
	for i := 3; i <= 202; i++ {
		a.set(7, i)
		took = append(took, until(t, 5*time.Second, "new endpoint", func() bool { _, ok := b.table.View(7).Forwards[a.mac(i)]; return ok }))
	}
	slices.Sort(took)
	t.Logf("new endpoint: p50 %v, p99 %v, max %v", took[100], took[198], took[199])
	if took[198] > time.Second {
		t.Errorf("p99 is %v", took[198])
	}

	// Two hosts give one address away.
	p := b.table.Own()[0]
	p.Endpoints = append(slices.Clone(p.Endpoints), Endpoint{MAC: b.mac(99), Addrs: []netip.Addr{a.addr(1)}, Claim: a.table.Claim()})
	b.table.Set(p)
	for _, h := range hosts {
		until(t, 5*time.Second, "conflict on "+h.id, func() bool { return len(h.table.View(7).Conflicts) == 1 })
		if got := h.table.View(7).Neighbours[a.addr(1)]; h != b && got != b.mac(99) {
			t.Errorf("on %s the address is at %s, not with the later claim", h.id, got)
		}
	}

	took = nil
	for _, h := range hosts[1:] {
		start := time.Now()
		h.leave(7)
		until(t, time.Second, "withdrawal", func() bool { return !slices.Contains(a.table.Holders(7), h.id) })
		took = append(took, time.Since(start))
	}
	t.Logf("withdrawals took %v", took)
	b.set(7, 1) // and comes back
	until(t, 5*time.Second, "return", func() bool { return a.sees(7, a, b) })
	list, err := a.store.List(t.Context(), partKeys+"7/")
	if err != nil || len(list) != 2 {
		t.Errorf("%d parts of network 7 in the store, error %v", len(list), err)
	}
}

// TestEtcdSilence: a host that stops is silent, then forgotten, on every host and
// for good; and there again when it is.
func TestEtcdSilence(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	const grace = 12 * time.Second
	hosts := etcdHosts(t, c, 3, grace)
	a, b, gone := hosts[0], hosts[1], hosts[2]
	gone.stop(t)
	took := until(t, 10*time.Second, "silence", func() bool { s, _ := a.silent(gone); return s })
	t.Logf("silent after %v", took)
	if !a.sees(7, hosts...) {
		t.Error("what leads to a silent host is gone at once")
	}
	until(t, 5*time.Second, "note of the silence", func() bool {
		_, err := a.store.Get(t.Context(), silentKeys+gone.id)
		return err == nil
	})
	gone.run(t)
	took = until(t, 5*time.Second, "return", func() bool { s, ok := a.silent(gone); return ok && !s && a.sees(7, hosts...) })
	t.Logf("back after %v", took)
	until(t, 5*time.Second, "note of the silence deleted", func() bool {
		_, err := a.store.Get(t.Context(), silentKeys+gone.id)
		return errors.Is(err, store.ErrNotFound)
	})

	gone.stop(t)
	until(t, 10*time.Second, "silence", func() bool { s, _ := b.silent(gone); return s })
	// A plugin that starts half way does not begin to wait again.
	time.Sleep(grace / 2)
	late := newEtcdHost(t, c.Endpoints, 4, grace)
	late.set(7, 1)
	start := time.Now()
	late.run(t)
	until(t, 5*time.Second, "parts", func() bool { return late.sees(7, hosts...) })
	until(t, grace, "forgotten by the late host", func() bool { return late.sees(7, a, b) })
	if took = time.Since(start); took > grace/2+3*time.Second {
		t.Errorf("the late host waited for %v", took)
	}
	until(t, 3*time.Second, "forgotten by the others", func() bool { return a.sees(7, a, b, late) && b.sees(7, a, b, late) })
	// One that starts later still never hears of it.
	later := newEtcdHost(t, c.Endpoints, 5, grace)
	later.set(7, 1)
	later.run(t)
	until(t, 5*time.Second, "parts", func() bool { return later.sees(7, a, b, late) })
	time.Sleep(2 * time.Second)
	if !later.sees(7, a, b, late) {
		t.Error("a dead host comes back on one that starts")
	}
	if parts, err := later.engine.Ask(t.Context(), 7); err != nil || len(parts) != 3 {
		t.Errorf("asked for network 7: %d parts, error %v", len(parts), err)
	}
	// The dead host was not dead after all.
	gone.run(t)
	all := append(slices.Clone(hosts), late, later)
	for _, h := range all {
		until(t, 5*time.Second, "all on "+h.id, func() bool { return h.sees(7, all...) })
	}
}

// TestEtcdStoreAway: that the store is gone says nothing about any host, and what
// changes meanwhile is told later.
func TestEtcdStoreAway(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{Members: 3})
	hosts := etcdHosts(t, c, 3, time.Minute)
	silences := func() (n int) {
		for _, h := range hosts {
			for _, o := range hosts {
				if s, _ := h.silent(o); s {
					n++
				}
			}
		}
		return n
	}
	c.StopAll()
	hosts[0].set(7, 5)
	hosts[1].set(9, 1)
	hosts[2].set(9, 1)
	hosts[2].leave(7)
	for end := time.Now().Add(8 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if n := silences(); n > 0 {
			t.Fatalf("%d hosts are taken for silent", n)
		}
	}
	c.StartAll()
	start := time.Now()
	most := 0
	until(t, 20*time.Second, "all is told", func() bool {
		most = max(most, silences())
		return hosts[1].sees(7, hosts...) && hosts[0].sees(7, hosts...) && hosts[1].sees(9, hosts...) && hosts[2].sees(9, hosts...)
	})
	t.Logf("all is told %v after the start", time.Since(start))
	for end := time.Now().Add(8 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		most = max(most, silences())
	}
	if most > 0 {
		t.Errorf("%d hosts are taken for silent after the return", most)
	}
}

// TestEtcdCutOff: a leader is killed, and with it the one member that a host
// uses; what that host missed etcd has forgotten when it is back.
func TestEtcdCutOff(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{Members: 3})
	members := strings.Split(strings.TrimPrefix(c.Endpoints, "etcd://"), ",")
	leader := c.Leader()
	hosts := etcdHosts(t, c, 3, time.Minute)
	cut := newEtcdHost(t, "etcd://"+members[leader], 4, time.Minute)
	cut.set(7, 1)
	cut.run(t)
	hosts = append(hosts, cut)
	until(t, 10*time.Second, "parts", func() bool { return cut.sees(7, hosts...) && hosts[0].sees(7, hosts...) })
	c.Kill(leader)
	hosts[0].set(7, 9)
	hosts[1].leave(7)
	start := time.Now()
	until(t, 20*time.Second, "changes without the leader", func() bool { return hosts[2].sees(7, hosts...) })
	t.Logf("changes known %v after the leader was killed", time.Since(start))
	until(t, 20*time.Second, "silence of the host that is cut off", func() bool { s, _ := hosts[2].silent(cut); return s })
	c.Compact()
	cut.set(7, 3)
	c.Start(leader)
	c.Wait()
	start = time.Now()
	for _, h := range []*etcdHost{hosts[0], hosts[2], cut} {
		until(t, 20*time.Second, "all on "+h.id, func() bool { s, _ := h.silent(cut); return !s && h.sees(7, hosts...) })
	}
	t.Logf("all know all %v after its return", time.Since(start))
}

// TestEtcdRefused: what is not believed for the clock, or has no room, is taken
// over when there is no such reason any more, without a word of its host.
func TestEtcdRefused(t *testing.T) {
	clock := newClock()
	table := tableAt("a", clock)
	table.Set(part(0, 1))
	log, logs := logtest.NewNullLogger()
	e := NewEtcd(EtcdConfig{Table: table, Log: log})
	record := func(p Part, rev uint64) store.Record {
		value, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		return store.Record{Key: partKey(p), Value: value, Rev: rev}
	}
	right := clock.t.Add(2 * time.Hour)
	ahead := later(part(1, 1, Endpoint{MAC: mac(1), Addrs: []netip.Addr{addr(1)}, Claim: uint64(right.UnixNano())}), uint64(right.UnixNano()))
	gone := later(part(2, 1), uint64(right.UnixNano()))
	e.snapshot([]store.Record{{Key: aliveKeys + "b", Rev: 1}, {Key: aliveKeys + "c", Rev: 1}, record(ahead, 2), record(gone, 3)})
	for range 3 {
		e.again()
	}
	if got := table.View(1); len(got.VTEPs) != 0 || len(logs.AllEntries()) != 2 {
		t.Fatalf("takes over %v, logs %d lines", got.VTEPs, len(logs.AllEntries()))
	}
	e.event(store.Event{Record: store.Record{Key: partKey(gone), Rev: 4}, Deleted: true})
	clock.t = right
	e.again()
	if got := table.View(1); !slices.Equal(got.VTEPs, []netip.Addr{vtep(1)}) || got.Forwards[mac(1)] != vtep(1) {
		t.Fatalf("after the clock was set: %v", got)
	}

	// A clock that was ahead too is put back, and its host goes on from there.
	clock.t = right.Add(-24 * time.Hour)
	e.event(store.Event{Record: record(later(part(1, 1, Endpoint{MAC: mac(2), Claim: 5}), uint64(clock.t.UnixNano())), 5)})
	if got := table.View(1); got.Forwards[mac(2)] != vtep(1) {
		t.Fatalf("after the clock was put back: %v", got)
	}

	// A network that is full has room again.
	for i := range mostHosts {
		table.Heard(fmt.Sprintf("other-%d", i), "")
	}
	e.event(store.Event{Record: record(later(part(3, 1), 6), 6)})
	if got := table.View(1); slices.Contains(got.VTEPs, vtep(3)) {
		t.Fatal("there is no bound")
	}
	for i := range mostHosts {
		table.Silent(fmt.Sprintf("other-%d", i))
	}
	clock.pass(testGrace)
	e.since["d"] = clock.t
	table.Expire()
	e.again()
	if got := table.View(1); !slices.Contains(got.VTEPs, vtep(3)) {
		t.Fatalf("is not taken over when there is room: %v", got.VTEPs)
	}
}

// TestEtcdStateLost: a host that lost what it had takes back what it said.
func TestEtcdStateLost(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	hosts := etcdHosts(t, c, 2, time.Minute)
	a, b := hosts[0], hosts[1]
	b.set(8, 1)
	a.set(8, 1)
	until(t, 5*time.Second, "network 8", func() bool { return a.sees(8, a, b) })
	b.stop(t)
	before := b.table.Own()
	b.table = NewTable(b.id, time.Minute)
	b.open(t, c.Endpoints)
	b.set(7, 1) // what it still knows, with the claims of before
	b.run(t)
	until(t, 5*time.Second, "what is left", func() bool { return a.sees(8) && a.sees(7, b) })
	for _, p := range b.table.Own() {
		for _, old := range before {
			if p.VNI == old.VNI && p.Version <= old.Version {
				t.Errorf("network %d has version %d after %d", p.VNI, p.Version, old.Version)
			}
		}
	}
	// All that is in the store is deleted by hand.
	if err := a.store.DeletePrefix(t.Context(), keys); err != nil {
		t.Fatal(err)
	}
	until(t, 10*time.Second, "all is back", func() bool {
		list, err := a.store.List(t.Context(), keys)
		sa, _ := b.silent(a)
		sb, _ := a.silent(b)
		return err == nil && len(list) == 5 && !sa && !sb && a.sees(7, b) && b.sees(7, a)
	})
}
