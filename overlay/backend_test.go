package overlay

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/datapath"
)

// TestBackendShortcuts: only where the host does nothing with frames but pass
// them on may they pass by its bridge.
func TestBackendShortcuts(t *testing.T) {
	t.Parallel()
	here, away := datapath.MAC{2, 0, 0, 0, 0, 1}, datapath.MAC{2, 0, 0, 0, 0, 2}
	for name, c := range map[string]struct {
		egress driver.Egress
		apart  bool
		want   bool
	}{
		"the engine's way out":    {egress: driver.EgressEngine, want: true},
		"no way out":              {egress: driver.EgressNone, want: true},
		"the host is the gateway": {egress: driver.EgressDriver},
		"kept apart":              {egress: driver.EgressEngine, apart: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := driver.Network{ID: strings.Repeat("0a", 32), VNI: 7, Internal: c.egress == driver.EgressNone}
			n.Options.Egress, n.Options.ICC = c.egress, !c.apart
			var b Backend
			s := b.Network(n)
			e := b.Endpoint(n, driver.Endpoint{ID: strings.Repeat("0b", 32), MAC: here})
			vx, port := s.VXLANs[0].Name, e.Veths[0].Name
			got := [][]datapath.Shortcut{s.Shortcuts, e.Shortcuts,
				b.remote(n, View{Forwards: map[datapath.MAC]netip.Addr{away: netip.MustParseAddr("192.0.2.2")}}).Shortcuts}
			want := [][]datapath.Shortcut{nil, nil, nil}
			if c.want {
				want = [][]datapath.Shortcut{
					{{Tunnel: vx, Link: vx}},
					{{Tunnel: vx, Link: port}, {Tunnel: vx, Link: port, MAC: here}},
					{{Tunnel: vx, Link: vx, MAC: away}},
				}
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

// TestBackendMembers: packets of the tunnels are taken from the hosts that have the
// network, and nothing is taken from a bridge that only switches.
func TestBackendMembers(t *testing.T) {
	t.Parallel()
	n := driver.Network{ID: strings.Repeat("0a", 32), VNI: 7, Port: 4793}
	n.Options.Egress = driver.EgressEngine
	var b Backend
	s := b.Network(n)
	for _, want := range []datapath.Element{{Set: datapath.SetSwitched, Link: s.Bridges[0].Name}, {Set: datapath.SetTunnels, Port: 4793}} {
		if !slices.Contains(s.Elements, want) {
			t.Errorf("not wanted: %s", want)
		}
	}
	host := netip.MustParseAddr("2001:db8::2")
	want := []datapath.Element{{Set: datapath.SetMembers, Net: netip.PrefixFrom(host, 128), Port: 4793}}
	if d := cmp.Diff(want, b.remote(n, View{VTEPs: []netip.Addr{host}}).Elements, cmp.Comparer(func(a, b datapath.Element) bool { return a == b })); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
