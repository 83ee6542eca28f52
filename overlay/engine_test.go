package overlay

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
	"github.com/weftnet/weft/internal/store/etcdtest"
)

// TestEngines puts what every Engine has to do to each of them.
func TestEngines(t *testing.T) {
	t.Run("gossip", func(t *testing.T) {
		w, key := newWires(), Key("password")
		var first netip.Addr
		testEngine(t, func(t *testing.T, table *Table, n int) func() Engine {
			t.Helper()
			a := w.addr()
			var peers []string
			if first.IsValid() {
				peers = []string{first.String()}
			} else {
				first = a
			}
			return func() Engine {
				g, err := NewGossip(GossipConfig{Table: table, ID: table.self, Name: fmt.Sprint("host", n), Bind: a, Peers: peers, Keys: [][]byte{key}, Log: quietly()})
				if err != nil {
					t.Fatal(err)
				}
				return g
			}
		})
	})
	t.Run("etcd", func(t *testing.T) {
		c := etcdtest.Start(t, etcdtest.Config{Members: 1})
		testEngine(t, func(t *testing.T, table *Table, n int) func() Engine {
			t.Helper()
			s, err := store.OpenEtcd(store.EtcdConfig{Endpoints: c.Endpoints, Log: quietly()})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = s.Close() }) // the test is over
			return func() Engine {
				return NewEtcd(EtcdConfig{Store: s, Table: table, Name: fmt.Sprint("host", n), Log: quietly()})
			}
		})
	})
}

func quietly() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

// member is a host whose engine runs, or not.
type member struct {
	t      *testing.T
	n      byte
	table  *Table
	engine Engine
	make   func() Engine
	stop   func()
}

func (m *member) start() {
	m.engine = m.make()
	ctx, cancel := context.WithCancel(m.t.Context())
	done := make(chan error, 1)
	go func(e Engine) { done <- e.Run(ctx) }(m.engine)
	m.stop = func() {
		cancel()
		if err := <-done; err != nil {
			m.t.Error(err)
		}
		m.stop = func() {}
	}
}

// has gives the host network 7 with these endpoints.
func (m *member) has(list ...Endpoint) {
	m.table.Set(Part{Name: fmt.Sprint("host", m.n), VNI: 7, VTEP: netip.AddrFrom4([4]byte{192, 0, 2, m.n}), Port: Port, MTU: 1450,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.7.0.0/16")}, Endpoints: list})
}

// endpoint is one with the address 10.7.0.n.
func (m *member) endpoint(n byte) Endpoint {
	return Endpoint{MAC: datapath.MAC{2, 0, 10, 7, 0, n}, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 7, 0, n})}, Claim: m.table.Claim()}
}

// leads waits until the host's entries lead to exactly these others, by the last
// byte of the address.
func (m *member) leads(limit time.Duration, what string, to map[byte]byte) {
	m.t.Helper()
	var got map[byte]byte
	for start := time.Now(); time.Since(start) < limit; time.Sleep(5 * time.Millisecond) {
		got = map[byte]byte{}
		for mac, vtep := range m.table.View(7).Forwards {
			got[mac[5]] = vtep.As4()[3]
		}
		if maps.Equal(got, to) {
			return
		}
	}
	m.t.Fatalf("%s: host %d leads to %v after %v, want %v", what, m.n, got, limit, to)
}

func (m *member) silent(o *member) bool {
	return slices.ContainsFunc(m.table.Peers(), func(p Peer) bool { return p.ID == o.table.self && !p.Silent.IsZero() })
}

// testEngine is four hosts, three of which have network 7. The limits are those
// that users are promised, and wider where only the machine decides.
func testEngine(t *testing.T, engine func(t *testing.T, table *Table, n int) func() Engine) {
	t.Helper()
	var all []*member
	for n := range 4 {
		m := &member{t: t, n: byte(n + 1), table: NewTable(fmt.Sprint("id", n+1), time.Minute), stop: func() {}}
		m.make = engine(t, m.table, n+1)
		all = append(all, m)
		t.Cleanup(func() { m.stop() })
	}
	one, two, three, four := all[0], all[1], all[2], all[3]
	one.has(one.endpoint(1))
	two.has(two.endpoint(2))
	three.has()
	for _, m := range all {
		m.start()
	}
	const soon = 15 * time.Second
	one.leads(soon, "at first", map[byte]byte{2: 2})
	two.leads(soon, "at first", map[byte]byte{1: 1})
	three.leads(soon, "at first", map[byte]byte{1: 1, 2: 2})
	if len(four.table.Holders(7)) > 0 {
		t.Error("a host without the network knows who has it")
	}
	until(t, soon, "all are heard", func() bool { return len(four.table.Peers()) == 3 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if parts, err := four.engine.Ask(ctx, 7); err != nil || len(parts) != 3 {
		t.Errorf("asked for the network: %d parts, error %v, want 3", len(parts), err)
	}
	if parts, err := four.engine.Ask(ctx, 8); err != nil || len(parts) != 0 {
		t.Errorf("asked for a network that nobody has: %v, error %v", parts, err)
	}

	e := three.endpoint(3)
	three.has(e)
	one.leads(soon, "a new endpoint", map[byte]byte{2: 2, 3: 3})

	// Address 2 is claimed by host 3 later: it has it on all hosts alike.
	three.has(e, three.endpoint(2))
	one.leads(soon, "a later claim", map[byte]byte{2: 3, 3: 3})
	two.leads(soon, "a later claim", map[byte]byte{1: 1, 2: 3, 3: 3})
	three.has(e)
	one.leads(soon, "the claim given up", map[byte]byte{2: 2, 3: 3})

	two.stop()
	silent := until(t, soon, "a stopped host is silent", func() bool { return one.silent(two) && three.silent(two) })
	t.Logf("silent after %v", silent.Round(10*time.Millisecond))
	one.leads(time.Second, "what leads to a silent host stays", map[byte]byte{2: 2, 3: 3})
	one.has(one.endpoint(1), one.endpoint(2))
	three.leads(soon, "another takes its address", map[byte]byte{1: 1, 2: 1})
	one.has(one.endpoint(1))
	two.has(two.endpoint(2), two.endpoint(4)) // what it does while nobody hears it
	two.start()
	one.leads(soon, "back", map[byte]byte{2: 2, 3: 3, 4: 2})
	three.leads(soon, "back", map[byte]byte{1: 1, 2: 2, 4: 2})
	until(t, soon, "heard again", func() bool { return !one.silent(two) })

	three.table.Set(Part{Name: "host3", VNI: 7, Gone: true})
	one.leads(soon, "gone", map[byte]byte{2: 2, 4: 2})
	if v := one.table.View(7); len(v.VTEPs) != 1 {
		t.Errorf("flooded to %v", v.VTEPs)
	}
}
