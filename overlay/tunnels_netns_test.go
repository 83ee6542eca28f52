package overlay

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/datapath"
	"github.com/weftnet/weft/internal/netnstest"
)

// burrow is one of some hosts with tunnels to each other.
type burrow struct {
	n    int
	ns   *netnstest.NS
	x    *tunnels
	list []Peer // the others
}

func (b *burrow) id() string { return id(b.n) }

// burrows are three hosts on one underlay.
func burrows(t *testing.T, every time.Duration) (all []*burrow) {
	t.Helper()
	ns := netnstest.Enter(t)
	ns.Exec("sh", "-ec", "ip link add lan type bridge; ip link set lan up")
	const vni = 42
	for n := range 3 {
		b := &burrow{n: n, ns: netnstest.New(t)}
		ns.Exec("sh", "-ec", fmt.Sprintf("ip link add p%d type veth peer name q%[1]d; ip link set p%[1]d master lan up", n))
		b.ns.Take(fmt.Sprint("q", n), "eth0", netip.PrefixFrom(vtep(n), 24))
		all = append(all, b)
	}
	for _, b := range all {
		rec := blue(vni)
		rec.Underlay, rec.Port, rec.MTU, rec.VNI = vtep(b.n), Port, 1450, vni
		table := NewTable(b.id(), time.Minute)
		table.Set(partOf(rec, nil))
		for _, o := range all {
			if o == b {
				continue
			}
			other := rec
			other.Underlay = vtep(o.n)
			p := partOf(other, nil)
			p.Host, p.Name, p.Version = o.id(), fmt.Sprint("host-", o.n), 1
			table.Heard(o.id(), fmt.Sprint("host-", o.n))
			if _, err := table.Merge(p, 0); err != nil {
				t.Fatal(err)
			}
		}
		b.x, b.list = newTunnels(b.id(), every), table.Peers()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		var k *datapath.Kernel
		var err error
		b.ns.Do(func() {
			log := logrus.New()
			log.SetOutput(t.Output())
			if k, err = datapath.New(datapath.Config{Log: log}); err != nil {
				return
			}
			s := Backend{}.Network(rec)
			s.Add(Backend{}.remote(rec, table.View(vni)))
			_, err = k.Ensure(ctx, s)
		})
		if err != nil {
			t.Fatal(err)
		}
		go b.ns.Do(func() {
			done <- k.Heartbeat(ctx, datapath.Heartbeat{Every: every, Say: b.x.say, Hear: b.x.hear, Tunnels: func() []string {
				return b.x.look(b.list, map[uint32]driver.Network{vni: rec}, time.Now())
			}})
		})
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
			k.Close()
		})
	}
	return all
}

// says is what a host tells of its tunnels, a word each.
func (b *burrow) says() string {
	var words []string
	for _, t := range b.x.troubles(time.Now()) {
		word := t.Peer + " deaf"
		if strings.Contains(t.Reason, "our packets do not arrive there") {
			word = t.Peer + " mute"
		}
		words = append(words, word)
	}
	return strings.Join(words, ", ")
}

// TestTunnels: a host behind a closed port, and one dead pair among three, are told of
// on the hosts that it is about, and no others.
func TestTunnels(t *testing.T) {
	const every = 50 * time.Millisecond
	all := burrows(t, every)
	expect := func(what string, want ...string) {
		t.Helper()
		var got []string
		for stop := time.Now().Add(10 * time.Second); ; time.Sleep(every / 5) {
			got = nil
			for _, b := range all {
				got = append(got, b.says())
			}
			if slices.Equal(got, want) {
				return
			}
			if time.Now().After(stop) {
				t.Fatalf("%s: %q, want %q", what, got, want)
			}
		}
	}
	// enough has passed when all heartbeats of before would be missed.
	enough := func() { time.Sleep((beatLimit + 2) * every) }
	enough()
	expect("all open", "", "", "")
	for _, b := range all {
		for _, p := range b.list {
			if n := b.x.of(p.ID); n == nil || n.Sent == 0 || n.Received == 0 || n.Answered == 0 {
				t.Errorf("host %d to %s: %+v", b.n, p.Name, n)
			}
		}
	}

	closed := func(b *burrow, match string) {
		b.ns.Exec("nft", "add table inet closed; add chain inet closed in { type filter hook input priority -10; }; add rule inet closed in "+match+" udp dport 4793 drop")
	}
	closed(all[2], "")
	enough()
	expect("the port of one is closed", "host-2 mute", "host-2 mute", "host-0 deaf, host-1 deaf")
	all[2].ns.Exec("nft", "delete table inet closed")
	enough()
	expect("open again", "", "", "")

	closed(all[0], "ip saddr "+vtep(1).String())
	closed(all[1], "ip saddr "+vtep(0).String())
	enough()
	expect("one dead pair", "host-1 deaf", "host-0 deaf", "")
	for _, b := range all[:2] {
		b.ns.Exec("nft", "delete table inet closed")
	}
	enough()
	expect("open again", "", "", "")
}

// TestTunnelsAnew: a host that was silent is not blamed for what it did not say then,
// and what strangers say counts for nothing.
func TestTunnelsAnew(t *testing.T) {
	rec := blue(42)
	rec.VNI, rec.Port = 42, Port
	nets := map[uint32]driver.Network{42: rec}
	x, now := newTunnels("a", time.Second), time.Now()
	peer := Peer{ID: "b", Name: "b", VTEP: vtep(1), Networks: []uint32{42}}
	links := x.look([]Peer{peer}, nets, now)
	if len(links) != 1 || x.say(links[0]) == nil {
		t.Fatalf("links %v", links)
	}
	if list := x.troubles(now.Add(time.Minute)); len(list) != 1 {
		t.Errorf("troubles %+v, want one", list)
	}
	silent := peer
	silent.Silent = now
	x.look([]Peer{silent}, nets, now)
	if list := x.troubles(now.Add(time.Minute)); len(list) != 0 || x.of("b") != nil || x.say(links[0]) != nil {
		t.Errorf("a silent host has troubles %+v", list)
	}
	x.look([]Peer{peer}, nets, now.Add(time.Minute))
	if list := x.troubles(now.Add(time.Minute)); len(list) != 0 {
		t.Errorf("a host that is back has troubles %+v", list)
	}
	other := newTunnels("c", time.Second)
	other.look([]Peer{{ID: "a", Name: "a", VTEP: vtep(0), Networks: []uint32{42}}}, nets, now)
	said := other.say(links[0])
	x.hear(links[0], said)
	for n := range said { // what is cut off, too
		x.hear(links[0], said[:n])
	}
	if n := x.of("b"); n == nil || n.Received != 0 || x.of("c") != nil {
		t.Errorf("a stranger was heard: %+v", n)
	}
}
