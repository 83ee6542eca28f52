package overlay

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/driver"
)

// TestTunnelsOfMany: with more hosts than a heartbeat names, each is named in its turn,
// and none is told of before that.
func TestTunnelsOfMany(t *testing.T) {
	rec := blue(42)
	rec.VNI, rec.Port = 42, Port
	nets := map[uint32]driver.Network{42: rec}
	var all []Peer
	for n := range 2*mostBeatHosts + 50 {
		all = append(all, Peer{ID: fmt.Sprint("h", n), Name: fmt.Sprint("h", n), VTEP: vtep(1), Networks: []uint32{42}})
	}
	x, now := newTunnels("a", time.Minute), time.Now()
	var named []string
	for range 3 {
		links := x.look(all, nets, now)
		for _, p := range all {
			x.hosts[p.ID].heard = now
		}
		said := x.say(links[0])
		if len(said) > 1200 {
			t.Errorf("a heartbeat of %d bytes", len(said))
		}
		for _, p := range all {
			y := newTunnels(p.ID, time.Minute)
			y.look([]Peer{{ID: "a", Name: "a", VTEP: vtep(0), Networks: []uint32{42}}}, nets, now)
			if y.hear(links[0], said); y.of("a").Answered > 0 {
				named = append(named, p.ID)
			}
		}
	}
	slices.Sort(named)
	if named = slices.Compact(named); len(named) != len(all) {
		t.Errorf("%d of %d hosts are named in three heartbeats", len(named), len(all))
	}
	for after, want := range map[time.Duration]int{beatLimit*time.Minute + time.Second: 0, 3*beatLimit*time.Minute + time.Second: len(all)} {
		for _, h := range x.hosts {
			h.heard = now.Add(after)
		}
		if list := x.troubles(now.Add(after)); len(list) != want {
			t.Errorf("after %s %d hosts are told of, want %d", after, len(list), want)
		}
	}
}

// TestTunnelsOfOld: a host that never said anything through a tunnel may be of a release
// that does not.
func TestTunnelsOfOld(t *testing.T) {
	rec := blue(42)
	rec.VNI, rec.Port = 42, Port
	x, now := newTunnels("a", time.Second), time.Now()
	x.look([]Peer{{ID: "b", Name: "b", VTEP: vtep(1), Networks: []uint32{42}}}, map[uint32]driver.Network{42: rec}, now)
	const word = "older release"
	if list := x.troubles(now.Add(time.Minute)); len(list) != 1 || !strings.Contains(list[0].Reason, word) {
		t.Errorf("troubles %+v, want a word of an %s", list, word)
	}
	x.hosts["b"].Received = 1
	if list := x.troubles(now.Add(time.Minute)); len(list) != 1 || strings.Contains(list[0].Reason, word) {
		t.Errorf("troubles %+v, want no word of an %s", list, word)
	}
}

// TestTunnelsUsed: tunnels that nothing is said through are not listened to: there is
// room for some hundred.
func TestTunnelsUsed(t *testing.T) {
	nets, peer := map[uint32]driver.Network{}, Peer{ID: "b", Name: "b", VTEP: vtep(1)}
	for vni := uint32(1); vni <= 300; vni++ {
		rec := blue(vni)
		rec.ID, rec.VNI, rec.Port = fmt.Sprintf("%064x", uint64(vni)<<32), vni, Port
		nets[vni] = rec
		if vni > 7 {
			peer.Networks = append(peer.Networks, vni)
		}
	}
	x := newTunnels("a", time.Second)
	links := x.look([]Peer{peer}, nets, time.Now())
	if len(links) != 1 || x.say(links[0]) == nil {
		t.Errorf("%d tunnels, want one that something is said through", len(links))
	}
}
