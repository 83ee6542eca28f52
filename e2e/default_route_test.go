//go:build e2e

package e2e

import (
	"slices"
	"strings"
	"testing"
)

// defaults lists the default routes of a container, with names for gateways.
func defaults(w *world, ifs []iface) string {
	var all []string
	for r := range strings.SplitSeq(routes(w, ifs), ", ") {
		if f := strings.Fields(r); len(f) > 2 && f[0] == "default" {
			all = append(all, strings.Join(f[:3], " "))
		}
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// checkDefaultRoutes asks by which of its networks a container leaves. The
// engine chooses; docs/options.md says how.
func checkDefaultRoutes(t *testing.T, e *engine) {
	t.Helper()
	w := newWorld(t, e, ours)
	defer w.close()
	w.network("alpha")
	w.network("beta", "--ipv6", "--subnet", "10.61.0.0/24", "--subnet", "fd61::/64")
	w.network("gamma", "--subnet", "10.62.0.0/24")
	w.network("aaa", "--internal")
	first := []string{"--gw-priority", "1", "gamma"}
	boxes := []struct {
		name, first string
		then        [][]string
		since       int
		want        string
	}{
		{"by-name", "gamma", [][]string{{"alpha"}, {"aaa"}}, 20, "default via gw.alpha"},
		{"both-families", "alpha", [][]string{{"beta"}}, 20, "default via gw.beta, default via gw.beta"},
		{"by-wish", "alpha", [][]string{first}, 28, "default via gw.gamma"},
		// Until 29.4.1 what has both families wins over any wish.
		{"both-families-and-wish", "beta", [][]string{first}, 28, "default via gw.beta, default via gw.beta"},
	}
	var runs []func()
	for _, b := range boxes {
		if suite.version.major < b.since {
			continue
		}
		runs = append(runs, func() {
			w.run(b.name, "--network", b.first)
			for _, c := range b.then {
				e.must(t, slices.Concat([]string{"network", "connect"}, c, []string{b.name})...)
			}
		})
	}
	w.all(runs...)
	w.look()
	for _, b := range boxes {
		if suite.version.major < b.since {
			continue
		}
		if got := fact(b.name, defaults)(w); got != b.want {
			t.Errorf("%s leaves by %q, want %q", b.name, got, b.want)
		}
	}
}
