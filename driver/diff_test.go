package driver

import (
	"net/netip"
	"testing"

	"github.com/weftnet/weft/internal/datapath"
)

// tunnelState is what one overlay network could want.
func tunnelState() datapath.State {
	vtep := netip.MustParseAddr("192.0.2.2")
	m := datapath.MAC{2, 0x42, 0, 0, 0, 2}
	return datapath.State{
		Bridges: []datapath.Bridge{{Name: "wfb0", NoSnooping: true}},
		VXLANs:  []datapath.VXLAN{{Name: "wfx0", Master: "wfb0", VNI: 7, Port: 4789, Local: netip.MustParseAddr("192.0.2.1")}},
		Forwards: []datapath.Forward{
			{Link: "wfx0", VTEP: vtep},
			{Link: "wfx0", MAC: m, VTEP: vtep},
		},
		Neighbours: []datapath.Neighbour{{Link: "wfb0", Addr: netip.MustParseAddr("10.7.0.2"), MAC: m}},
		Shortcuts:  []datapath.Shortcut{{Tunnel: "wfx0", Link: "wfx0"}, {Tunnel: "wfx0", Link: "wfx0", MAC: m}},
	}
}

// TestCompareTunnels: what is missing and what is stray of an overlay network.
// An entry with another value is mended by Ensure, and so not removed.
func TestCompareTunnels(t *testing.T) {
	other := netip.MustParseAddr("192.0.2.9")
	s := tunnelState()
	for name, c := range map[string]struct {
		damage         func(*datapath.State)
		missing, stray datapath.State
	}{
		"nothing":           {damage: func(*datapath.State) {}},
		"device gone":       {func(h *datapath.State) { h.VXLANs, h.Forwards = nil, nil }, datapath.State{VXLANs: s.VXLANs, Forwards: s.Forwards, Shortcuts: s.Shortcuts}, datapath.State{}},
		"device otherwise":  {func(h *datapath.State) { h.VXLANs[0].Local = other }, datapath.State{VXLANs: s.VXLANs, Forwards: s.Forwards, Shortcuts: s.Shortcuts}, datapath.State{}},
		"entry gone":        {func(h *datapath.State) { h.Forwards = h.Forwards[:1] }, datapath.State{Forwards: s.Forwards[1:]}, datapath.State{}},
		"half an entry":     {func(h *datapath.State) { h.Forwards[1].Altered = true }, datapath.State{Forwards: s.Forwards[1:]}, datapath.State{}},
		"entry elsewhere":   {func(h *datapath.State) { h.Forwards[1].VTEP = other }, datapath.State{Forwards: s.Forwards[1:]}, datapath.State{}},
		"flood elsewhere":   {func(h *datapath.State) { h.Forwards[0].VTEP = other }, datapath.State{Forwards: s.Forwards[:1]}, datapath.State{Forwards: []datapath.Forward{{Link: "wfx0", VTEP: other}}}},
		"neighbour's MAC":   {func(h *datapath.State) { h.Neighbours[0].MAC[5]++ }, datapath.State{Neighbours: s.Neighbours}, datapath.State{}},
		"neighbour unknown": {func(h *datapath.State) { h.Neighbours[0].Addr = other }, datapath.State{Neighbours: s.Neighbours}, datapath.State{Neighbours: []datapath.Neighbour{{Link: "wfb0", Addr: other, MAC: s.Neighbours[0].MAC}}}},
		"no shortcut":       {func(h *datapath.State) { h.Shortcuts = h.Shortcuts[:1] }, datapath.State{Shortcuts: s.Shortcuts[1:]}, datapath.State{}},
		"hook spoiled":      {func(h *datapath.State) { h.Shortcuts[0].Altered = true }, datapath.State{Shortcuts: s.Shortcuts[:1]}, datapath.State{}},
		"shortcut unknown": {func(h *datapath.State) {
			h.Shortcuts = append(h.Shortcuts, datapath.Shortcut{Tunnel: "wfx0", MAC: s.Shortcuts[1].MAC})
		}, datapath.State{}, datapath.State{Shortcuts: []datapath.Shortcut{{Tunnel: "wfx0", MAC: s.Shortcuts[1].MAC}}}},
		"none to be had": {func(h *datapath.State) { h.Shortcuts, h.NoShortcuts, h.VXLANs = nil, true, nil }, datapath.State{VXLANs: s.VXLANs, Forwards: s.Forwards}, datapath.State{}},
		"another device": {func(h *datapath.State) { h.VXLANs = append(h.VXLANs, datapath.VXLAN{Name: "wfx1"}) }, datapath.State{}, datapath.State{VXLANs: []datapath.VXLAN{{Name: "wfx1"}}}},
	} {
		t.Run(name, func(t *testing.T) {
			have := tunnelState()
			c.damage(&have)
			x := (&pass{}).compare(have, []wanted{{n: &network{}, state: tunnelState()}})
			var missing datapath.State
			for _, w := range x.missing {
				missing.Add(w.state)
			}
			if missing.String() != c.missing.String() {
				t.Errorf("missing:\n%swant:\n%s", missing, c.missing)
			}
			if x.stray.String() != c.stray.String() {
				t.Errorf("stray:\n%swant:\n%s", x.stray, c.stray)
			}
		})
	}
}

// TestCompareOneElement: of elements that differ in the address that they lead to,
// one that is missing is the only thing to mend.
func TestCompareOneElement(t *testing.T) {
	host := netip.MustParsePrefix("192.0.2.1/32")
	for _, set := range []datapath.Set{datapath.SetNear, datapath.SetBeside} {
		all := datapath.State{Elements: []datapath.Element{
			{Set: set, Net: host, To: netip.MustParseAddr("192.0.2.7")},
			{Set: set, Net: host, To: netip.MustParseAddr("192.0.2.8")},
		}}
		x := (&pass{}).compare(datapath.State{Elements: all.Elements[:1]}, []wanted{{n: &network{}, state: all}})
		if len(x.missing) != 1 || len(x.missing[0].state.Elements) != 1 || x.missing[0].state.Elements[0] != all.Elements[1] {
			t.Errorf("%s: missing %v", set, x.missing)
		}
		if !x.stale.Empty() || !x.stray.Empty() {
			t.Errorf("%s: stale %s, stray %s", set, x.stale, x.stray)
		}
	}
}
