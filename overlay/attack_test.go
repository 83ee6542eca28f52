package overlay

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/store"
)

const end = uint64(math.MaxInt64) // of all time

// believed reports whether another host takes over what a table says next.
func believed(t *testing.T, table *Table, c *clock) {
	t.Helper()
	p := part(0, 5, Endpoint{MAC: mac(99), Claim: table.Claim()})
	table.Set(p)
	other := tableAt("z", c)
	other.Set(later(Part{Host: "z", VNI: 5, VTEP: vtep(20)}, 1))
	if fresh, err := other.Merge(table.Own()[0], 0); err != nil || !fresh {
		t.Errorf("another host no longer believes this one: %v", err)
	}
}

// TestForgedVersions: nothing from the end of all time is believed, whoever it is
// about.
func TestForgedVersions(t *testing.T) {
	for name, p := range map[string]Part{
		"another's part":         later(part(1, 5), end),
		"another's claim":        part(1, 5, Endpoint{MAC: mac(1), Claim: end}),
		"of a network not here":  later(part(1, 6), end),
		"a claim not here":       part(1, 6, Endpoint{MAC: mac(1), Claim: end}),
		"this host's part":       later(part(0, 5), end),
		"this host's claim":      part(0, 5, Endpoint{MAC: mac(1), Claim: end}),
		"this host's withdrawal": {Host: "a", VNI: 5, Version: end, Gone: true},
		"not this host's either": later(part(0, 6), end),
	} {
		c := newClock()
		table := tableAt("a", c)
		table.Set(part(0, 5))
		_, _ = table.Merge(p, 0) // refused, or of no consequence
		if n := len(table.Own()); n != 1 {
			t.Errorf("%s: this host now has %d networks", name, n)
		}
		t.Run(name, func(t *testing.T) { believed(t, table, c) })
	}
}

// TestForeignNetworkChangesNothing: the highest number that is believed does not
// matter either, where the network is not here.
func TestForeignNetworkChangesNothing(t *testing.T) {
	c := newClock()
	table := tableAt("a", c)
	before := table.Claim()
	high := latest(c.t)
	if _, err := table.Merge(later(part(1, 6, Endpoint{MAC: mac(1), Claim: high}), high), 0); err != nil {
		t.Fatal(err)
	}
	if got := table.Claim(); got != before+1 || len(table.Known()) != 0 || len(table.Peers()) != 0 {
		t.Errorf("claim %d after %d, %v, %v", got, before, table.Known(), table.Peers())
	}
	for vni := range uint32(4 * mostWithdrawn) {
		_, _ = table.Merge(later(part(0, 100+vni), 1), 0)
	}
	if n := len(table.Own()); n > mostWithdrawn {
		t.Errorf("this host says of %d networks that it does not have them", n)
	}
}

// TestUnheardHostTakesNothing: a host that others tell of, with a later claim,
// does not take an address from one that is heard, nor from this one.
func TestUnheardHostTakesNothing(t *testing.T) {
	table := tableAt("a", newClock())
	table.Set(part(0, 5, Endpoint{MAC: mac(1), Addrs: []netip.Addr{addr(1)}, Claim: 10}))
	table.Heard("b", "host-1")
	merge(t, table, part(1, 5, Endpoint{MAC: mac(2), Addrs: []netip.Addr{addr(2)}, Claim: 10}), 0)
	forged := part(2, 5, Endpoint{MAC: mac(1), Addrs: []netip.Addr{addr(2)}, Claim: 1000}, Endpoint{MAC: mac(3), Addrs: []netip.Addr{addr(1)}, Claim: 1000})
	merge(t, table, forged, 0)
	v := table.View(5)
	if v.Forwards[mac(1)].IsValid() || v.Neighbours[addr(1)] != (datapath.MAC{}) || v.Neighbours[addr(2)] != mac(2) {
		t.Errorf("a host that was never heard has taken something: %+v", v)
	}
	if p := table.Peers(); len(p) != 2 || p[0].Unheard || !p[1].Unheard {
		t.Errorf("peers %+v", p)
	}
	table.Heard("c", "host-2")
	if v := table.View(5); v.Neighbours[addr(1)] != mac(3) || v.Neighbours[addr(2)] != mac(1) {
		t.Errorf("once it is heard the later claim counts: %+v", v)
	}
}

// TestTableIsBounded: hosts that nobody hears and what they say.
func TestTableIsBounded(t *testing.T) {
	table := tableAt("a", newClock())
	table.Set(part(0, 5))
	var list []Endpoint
	for i := range mostEndpoints {
		list = append(list, Endpoint{MAC: mac(i + 1)})
	}
	refused := 0
	for i := range 4 * mostUnheard {
		p := part(1, 5, list...)
		p.Host = fmt.Sprint("forged-", i)
		if _, err := table.Merge(p, 0); err != nil {
			refused++
		}
	}
	endpoints := 0
	for _, k := range table.Known() {
		endpoints += len(k.Part.Endpoints)
	}
	if n := len(table.Peers()); n > mostUnheard || endpoints > mostHearsay || refused == 0 {
		t.Errorf("%d hosts, %d endpoints, %d refused", n, endpoints, refused)
	}
	table.Heard("b", "host-1")
	merge(t, table, part(1, 5, list...), 0) // there is room for those who are there
	for i := range 2 * mostHosts {
		table.Heard(fmt.Sprint("member-", i), "x")
	}
	if n := len(table.Peers()); n > mostHosts {
		t.Errorf("%d hosts", n)
	}
}

// TestPoisonedDatabase: what an older release believed and kept is not believed
// again, neither of others nor of this host.
func TestPoisonedDatabase(t *testing.T) {
	b := newBench(t)
	p := other("10.44.0.0/16")
	p.Version = end
	claim := other("10.44.0.0/16")
	claim.Host, claim.Endpoints = "they", []Endpoint{{MAC: mac(1), Claim: end}}
	value, err := json.Marshal([]Known{{Part: p}, {Part: claim}})
	if err != nil {
		t.Fatal(err)
	}
	for key, v := range map[string][]byte{partsKey + "4242": value, partsKey + "\x1b[31m": nil} {
		if _, err := b.parts.Put(t.Context(), store.Record{Key: key, Value: v}); err != nil {
			t.Fatal(err)
		}
	}
	b.start(Join{})
	n := blue(4242)
	if err := b.c.Admit(t.Context(), &n); err != nil {
		t.Fatal(err)
	}
	b.c.Publish(n, []driver.Endpoint{{MAC: mac(7), Claim: end + 5}, {MAC: mac(8), Claim: 7}})
	until := latest(time.Now())
	own := b.c.table.Own()
	if len(own) != 1 || own[0].check(until) != nil || own[0].Endpoints[0].Claim != 1 || own[0].Endpoints[1].Claim != 7 {
		t.Errorf("this host says what nobody believes: %+v", own)
	}
	if c := b.c.Claim(); c > until {
		t.Errorf("claim %d", c)
	}
	if peers := b.c.Status().Peers; len(peers) != 0 {
		t.Errorf("believed: %+v", peers)
	}
}

// packetFor is a packet of memberlist without encryption.
func packetFor(m message) []byte {
	return append([]byte{tagLabel, byte(len(label)), 'w', 'e', 'f', 't', tagUser}, m.encode()...)
}

// TestForgedPacket: what anybody on the network can send to hosts without a
// password, and any member to those with one, does not end what they tell each
// other.
func TestForgedPacket(t *testing.T) {
	for name, keys := range map[string][][]byte{"no password": nil, "password": {testKey(1)}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWires()
			nodes := w.cluster(t, 3, func(c *GossipConfig) { c.Keys = keys })
			a, b, bad := nodes[0], nodes[1], nodes[2]
			a.set(5, 1)
			b.set(5, 2)
			within(t, 10*time.Second, "both know each other", func() bool { return a.sees(5, b, 2) && b.sees(5, a, 1) })

			forged := message{From: bad.id, At: bad.bind, Acks: []ack{{5, end}, {6, end}}, Parts: []Known{
				{Part: later(Part{Host: bad.id, VNI: 9, VTEP: bad.addr}, end)}, {Part: later(Part{Host: bad.id, VNI: 5, VTEP: bad.addr}, end)},
				{Part: later(Part{Host: a.id, VNI: 5, VTEP: bad.addr}, end)}, {Part: later(Part{Host: b.id, VNI: 5, VTEP: bad.addr}, end)},
				{Part: Part{Host: a.id, VNI: 5, Version: end, Gone: true}}, {Part: Part{Host: b.id, VNI: 5, Version: end, Gone: true}},
				{Part: Part{Host: bad.id, VNI: 5, VTEP: bad.addr, Version: 3, Endpoints: []Endpoint{{MAC: mac(3), Claim: end}}}},
			}}
			for _, to := range []*node{a, b} {
				if keys != nil {
					to.receive(forged) // as from a member that has the password
					continue
				}
				conn, err := net.Dial("udp", to.bind.String())
				if err != nil {
					t.Fatal(err)
				}
				for range 3 {
					_, _ = conn.Write(packetFor(forged))
				}
				_ = conn.Close()
			}
			within(t, 5*time.Second, "it is told", func() bool { return len(a.Troubles()) > 0 && len(b.Troubles()) > 0 })
			churn(t, []*node{a, b}, 5, 4)
		})
	}
}

// TestForgedChatter: whoever may send anything does not fill the log.
func TestForgedChatter(t *testing.T) {
	w := newWires()
	x := w.run(t, w.host(0))
	x.set(5)
	for i := range 3000 {
		from := fmt.Sprint("forged-", i)
		x.receive(message{From: from, Parts: []Known{{Part: later(Part{Host: from, VNI: 5, VTEP: x.addr}, end)}}})
		_, _ = lines{x.Gossip}.Write(fmt.Appendf(nil, "[ERR] Decrypt packet failed: x from=192.0.2.%d:%d", i%250, i))
	}
	if n := len(x.logged("")); n > mostLines+5 {
		t.Errorf("%d lines", n)
	}
	if n := len(x.Troubles()); n > mostTroubles {
		t.Errorf("%d troubles", n)
	}
}

// TestNamesOfOthers: a name is shown, and logged, without what a terminal obeys.
func TestNamesOfOthers(t *testing.T) {
	evil := "x\x1b[2J\nweft: all is well\u202e\u009b31m" + strings.Repeat("y", 300)
	table := tableAt("a", newClock())
	table.Set(part(0, 5))
	table.Heard("b", evil)
	p := part(2, 5)
	p.Name = evil[:200]
	merge(t, table, p, 0)
	for _, p := range table.Peers() {
		if strings.ContainsAny(p.Name, "\x1b\n\u202e\u009b") || len(p.Name) > mostText || !strings.HasPrefix(p.Name, "x?[2J?weft") {
			t.Errorf("name %q", p.Name)
		}
	}
	for _, id := range []string{"", "a b", "a\nb", "\x1b[2J", "a/b", "ü", strings.Repeat("a", 65)} {
		if _, err := table.Merge(Part{Host: id, VNI: 5, Version: 1, VTEP: vtep(3)}, 0); err == nil {
			t.Errorf("host ID %q is taken", id)
		}
	}
	if _, err := decode(message{From: "\x1b[2J"}.encode()); err == nil {
		t.Error("a message of no host is read")
	}
}

// announce is a stream that says how much will come, and then says nothing.
func announce(t *testing.T, to netip.AddrPort, from string, head []byte) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: time.Second}
	conn, err := d.Dial("tcp", to.String())
	if err != nil {
		return nil
	}
	t.Cleanup(func() { _ = conn.Close() })
	_, _ = conn.Write(append([]byte{tagLabel, byte(len(label)), 'w', 'e', 'f', 't'}, head...))
	return conn
}

func userHeader(size uint32) []byte {
	b := append([]byte{tagUser, 0x81, 0xa0 | 10}, "UserMsgLen"...)
	return binary.BigEndian.AppendUint32(append(b, 0xce), size)
}

// TestStreamsAreBounded: streams that announce much, from one address and from
// many, take little memory, and what hosts say to each other gets through.
func TestStreamsAreBounded(t *testing.T) {
	w := newWires()
	x := w.run(t, w.host(0))
	within(t, 5*time.Second, "listening", func() bool {
		conn, err := net.Dial("tcp", x.bind.String())
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	state := append([]byte{tagPushPull, 0x83, 0xa0 | 5}, "Nodes"...)
	state = append(append(state, 0, 0xa0|12), "UserStateLen"...)
	state = binary.BigEndian.AppendUint32(append(state, 0xce), 19<<20)
	state = append(append(state, 0xa0|4), "Join\xc3"...)
	before := heap()
	for i := range 400 {
		from := fmt.Sprintf("127.250.%d.%d", i/20, i%20/7+1)
		switch i % 4 {
		case 0:
			announce(t, x.bind, from, userHeader(19<<20))
		case 1:
			announce(t, x.bind, from, state)
		case 2: // it begins to come
			if conn := announce(t, x.bind, from, binary.BigEndian.AppendUint32([]byte{tagEncrypt}, 19<<20)); conn != nil {
				_, _ = conn.Write(make([]byte, 1<<20))
			}
		default:
			if conn := announce(t, x.bind, from, userHeader(12<<20)); conn != nil {
				_, _ = conn.Write(make([]byte, 1<<20))
			}
		}
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	if grown := int64(m.HeapAlloc) - int64(before); grown > 4*mostHeld {
		t.Errorf("%d MB of memory for streams of nobody", grown>>20)
	}
	y := w.run(t, w.host(1, x.bind.String()))
	x.set(5, 1)
	y.set(5, 2)
	within(t, 15*time.Second, "hosts talk to each other", func() bool { return x.sees(5, y, 2) && y.sees(5, x, 1) })
}

// TestStreamAnswer: a host that no packet reaches answers on a stream, without
// a password too.
func TestStreamAnswer(t *testing.T) {
	w := newWires()
	x := w.run(t, w.host(0))
	tr, err := listen(t.Context(), netip.AddrPortFrom(w.addr(), GossipPort))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tr.Shutdown() }()
	var conn net.Conn
	within(t, 5*time.Second, "listening", func() bool {
		conn, err = tr.DialAddressTimeout(memberlist.Address{Addr: x.bind.String()}, time.Second)
		return err == nil
	})
	defer func() { _ = conn.Close() }()
	ping := append([]byte{tagLabel, byte(len(label))}, label...)
	ping = append(append(append(ping, tagPing, 0x81, 0xa0|5), "SeqNo"...), 7)
	if _, err := conn.Write(ping); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 1)
	if _, err := io.ReadFull(conn, answer); err != nil || answer[0] != tagAck {
		t.Errorf("answered %d, %v", answer, err)
	}
}

// TestStreamsOfOneSource: one address has no more than its share.
func TestStreamsOfOneSource(t *testing.T) {
	w := newWires()
	tr, err := listen(t.Context(), netip.AddrPortFrom(w.addr(), GossipPort))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tr.Shutdown() }()
	to := tr.(*transport).addr
	for range 40 {
		announce(t, to, "127.251.0.1", userHeader(10))
	}
	got := 0
	for wait := time.After(500 * time.Millisecond); wait != nil; {
		select {
		case <-tr.StreamCh():
			got++
		case <-wait:
			wait = nil
		}
	}
	if got != mostFromOne {
		t.Errorf("%d streams of one address, want %d", got, mostFromOne)
	}
	announce(t, to, "127.251.0.2", userHeader(10))
	select {
	case <-tr.StreamCh():
	case <-time.After(2 * time.Second):
		t.Error("another address is not let in")
	}
}

// FuzzStream: the first bytes of a stream decide how much of it is read, and
// never more than allowed.
func FuzzStream(f *testing.F) {
	f.Add(userHeader(10))
	f.Add(userHeader(math.MaxUint32))
	f.Add([]byte{tagPushPull, 0x83})
	f.Add([]byte{tagLabel, 4, 'w', 'e', 'f', 't', tagPing, 1, 2, 3})
	f.Add([]byte{tagEncrypt, 0, 0, 0, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		tr := &transport{open: map[*stream]bool{}, from: map[netip.Addr]int{}}
		x, y := net.Pipe()
		go func() {
			_, _ = x.Write(b)
			_ = x.Close()
		}()
		conn, err := tr.track(y, func() {})
		if err != nil {
			t.Fatal(err)
		}
		got, _ := io.ReadAll(conn)
		if string(got) != string(b) && len(got) != 0 {
			t.Fatalf("%d bytes were sent, and others read", len(b))
		}
		_ = conn.Close()
		if tr.held != 0 || len(tr.open) != 0 {
			t.Fatalf("%d bytes are held of a stream that ended", tr.held)
		}
	})
}

// FuzzSaved: whatever is in the file, this host goes on saying what others
// believe.
func FuzzSaved(f *testing.F) {
	f.Add([]byte(`[{"part":{"host":"b","name":"x","vni":5,"version":9223372036854775807,"vtep":"192.0.2.2"}}]`))
	f.Add([]byte(`[{"part":{"host":"a","vni":5,"version":7},"silent":-1}]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var list []Known
		if json.Unmarshal(b, &list) != nil {
			return
		}
		c := newClock()
		table := tableAt("a", c)
		table.Set(part(0, 5))
		for _, k := range list {
			_ = table.Restore(k)
		}
		if p := table.Own(); len(p) > 1+mostWithdrawn || table.Claim() > latest(c.t)+mostHosts {
			t.Fatalf("%+v", p)
		}
		table.View(5)
	})
}

// FuzzEtcdRecord: what others write into the store.
func FuzzEtcdRecord(f *testing.F) {
	f.Add(partKeys+"5/b", []byte(`{"host":"b","vni":5,"version":9223372036854775807,"vtep":"192.0.2.2"}`))
	f.Add(aliveKeys+"b", []byte("name\x1b[2J"))
	f.Add(silentKeys+"b", []byte("2026-01-01T00:00:00Z"))
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		c := newClock()
		table := tableAt("a", c)
		table.Set(part(0, 5))
		log := logrus.New()
		log.SetOutput(io.Discard)
		e := NewEtcd(EtcdConfig{Table: table, Log: log})
		e.snapshot([]store.Record{{Key: key, Value: value, Rev: 1}})
		e.event(store.Event{Record: store.Record{Key: key, Rev: 2}, Deleted: true})
		if got := table.Claim(); got > latest(c.t)+2 {
			t.Fatalf("claim %d", got)
		}
		for _, p := range table.Peers() {
			if Plain(p.Name) != p.Name || !isID(p.ID) {
				t.Fatalf("host %q %q", p.ID, p.Name)
			}
		}
	})
}

// TestTroublesOfBefore: what does not show any more leaves its place to what does.
func TestTroublesOfBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Gossip{troubles: map[string]*Trouble{}}
		for i := range mostTroubles {
			g.trouble(fmt.Sprintf("old %d", i), "wrong")
		}
		g.trouble("new", "wrong")
		if g.troubles["new"] != nil {
			t.Error("there is no bound")
		}
		time.Sleep(troubleAge + time.Second)
		g.trouble("new", "wrong")
		if g.troubles["new"] == nil || len(g.troubles) != 1 {
			t.Errorf("%d troubles of before keep a new one out", len(g.troubles))
		}
	})
}

// TestTroubles: peers that are named and no members are shown, each with its
// reason, until they are members.
func TestTroubles(t *testing.T) {
	t.Parallel()
	w := newWires()
	late, dead := w.host(1), w.addr().String()
	other := w.host(2)
	other.Keys = [][]byte{testKey(2)}
	w.run(t, other)
	c := w.host(0, late.Bind.String(), dead, other.Bind.String(), "no.such.name.invalid")
	c.Keys = [][]byte{testKey(1)}
	late.Keys = c.Keys
	x := w.run(t, c)
	reason := func(peer string) string {
		for _, tr := range x.Troubles() {
			if tr.Peer == peer && !tr.Since.IsZero() {
				return tr.Reason
			}
		}
		return ""
	}
	within(t, 20*time.Second, "each has its reason", func() bool {
		return strings.Contains(reason(dead), "does not answer at "+dead+":7947") && strings.Contains(reason(late.Bind.String()), "does not answer") &&
			strings.Contains(reason(other.Bind.String()), "password") && strings.Contains(reason("no.such.name.invalid"), "looked up")
	})
	w.run(t, late)
	within(t, 20*time.Second, "what is mended is gone", func() bool { return reason(late.Bind.String()) == "" })
	if reason(dead) == "" {
		t.Error("what is not mended is gone")
	}
}
