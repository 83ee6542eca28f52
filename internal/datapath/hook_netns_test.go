package datapath

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus/hooks/test"

	"github.com/weftnet/weft/internal/netnstest"
)

const hookLine = "-A FORWARD -m mark --mark 0x10000000/0x10000000 -m comment --comment weft -j ACCEPT"

// forwardOf lists the rules of a FORWARD chain.
func forwardOf(ns *netnstest.NS, program string) []string {
	return strings.Split(strings.TrimSpace(ns.Exec(program, "-S", "FORWARD")), "\n")
}

func TestHookPlace(t *testing.T) {
	const ours = hookLine
	engine := []string{
		"-P FORWARD DROP", "-A FORWARD -j DOCKER-USER", "-A FORWARD -j DOCKER-ISOLATION-STAGE-1",
		"-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A FORWARD -o docker0 -j DOCKER",
	}
	with := func(lines []string, at int) []string { return slices.Insert(slices.Clone(lines), at, ours) }
	for _, tt := range []struct {
		name  string
		lines []string
		place int
		right bool
	}{
		{"empty, open", []string{"-P FORWARD ACCEPT"}, 0, true},
		{"empty, open, ours", []string{"-P FORWARD ACCEPT", ours}, 0, false},
		{"closed", []string{"-P FORWARD DROP"}, 1, false},
		{"closed, ours", []string{"-P FORWARD DROP", ours}, 1, true},
		{"closed, ours twice", []string{"-P FORWARD DROP", ours, ours}, 1, false},
		{"nothing that drops", []string{"-P FORWARD ACCEPT", "-A FORWARD -i eth0 -j ACCEPT", "-A FORWARD -j LOG", "-A FORWARD -s 10.0.0.0/8"}, 0, true},
		{"a drop", []string{"-P FORWARD ACCEPT", "-A FORWARD -i eth0 -j DROP"}, 1, false},
		{"a chain", []string{"-P FORWARD ACCEPT", "-A FORWARD -g ufw-before-forward"}, 1, false},
		{"ours after a drop", []string{"-P FORWARD ACCEPT", "-A FORWARD -i eth0 -j REJECT", ours}, 1, false},
		{"engine", engine, 3, false},
		{"engine, ours before", with(engine, 1), 3, false},
		{"engine, ours before it keeps its networks apart", with(engine, 2), 3, false},
		{"engine, ours after", with(engine, 3), 3, true},
		{"engine, ours further down", with(engine, 4), 3, true},
		{"engine, ours last", with(engine, 5), 3, true},
		{"engine, ours behind a stranger", with(append(slices.Clone(engine), "-A FORWARD -j REJECT"), 6), 3, false},
		{"engine behind a stranger", slices.Insert(slices.Clone(engine), 2, "-A FORWARD -j REJECT"), 2, false},
		{"engine 28", []string{"-P FORWARD DROP", "-A FORWARD -j DOCKER-USER", "-A FORWARD -j DOCKER-FORWARD"}, 3, false},
		{"user chain by condition", []string{"-P FORWARD DROP", "-A FORWARD -i eth0 -j DOCKER-USER"}, 1, false},
		{"quoted", []string{"-P FORWARD DROP", strings.Replace(ours, "weft", `"weft"`, 1)}, 1, true},
		{"not ours", []string{"-P FORWARD DROP", ours + " -s 10.0.0.0/8"}, 1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var c forwardChain
			c.read(tt.lines, hookRule("weft"))
			if c.place != tt.place || c.right() != tt.right {
				t.Errorf("place %d, right %t; want %d, %t (%+v)", c.place, c.right(), tt.place, tt.right, c)
			}
		})
	}
}

// wantHook calls ensure, and then everything must be at rest.
func wantHook(t *testing.T, h *hook, wantChanged int, wantPresent bool) {
	t.Helper()
	changed, err := h.ensure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(changed) != wantChanged {
		t.Errorf("changed %q, want %d lines", changed, wantChanged)
	}
	if changed, err = h.ensure(t.Context()); err != nil || len(changed) != 0 {
		t.Errorf("the second time: changed %q, error %v", changed, err)
	}
	if got, err := h.present(t.Context()); err != nil || got != wantPresent {
		t.Errorf("present: %t, %v, want %t", got, err, wantPresent)
	}
}

func TestHook(t *testing.T) {
	ns := netnstest.Enter(t)
	h := newHook(quiet(), "weft")

	// Nobody filters: nothing to do, and no table of iptables comes to be.
	wantHook(t, h, 0, false)
	if out := ns.Exec("nft", "list", "ruleset"); out != "" {
		t.Errorf("looking made a table:\n%s", out)
	}
	for _, f := range []string{"/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"} {
		if out := ns.Exec("cat", f); out != "" {
			t.Errorf("%s: %q", f, out)
		}
	}

	// All four chains, one after the other; then all are there at once.
	programs := []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"}
	for _, p := range programs {
		ns.Exec(p, "-P", "FORWARD", "DROP")
		if ok, err := h.present(t.Context()); err != nil || ok {
			t.Errorf("%s closed: present %t, %v", p, ok, err)
		}
		wantHook(t, h, 1, true)
		if d := cmp.Diff([]string{"-P FORWARD DROP", hookLine}, forwardOf(ns, p)); d != "" {
			t.Errorf("%s:\n%s", p, d)
		}
	}
	// Somebody flushes one.
	for _, p := range programs {
		ns.Exec(p, "-F", "FORWARD")
		wantHook(t, h, 1, true)
	}
	// No longer needed.
	ns.Exec("iptables-legacy", "-P", "FORWARD", "ACCEPT")
	wantHook(t, h, 1, true)
	if d := cmp.Diff([]string{"-P FORWARD ACCEPT"}, forwardOf(ns, "iptables-legacy")); d != "" {
		t.Error(d)
	}
	// Ours go, and only ours.
	ns.Exec("iptables-nft", "-A", "FORWARD", "-m", "comment", "--comment", "weft", "-j", "ACCEPT")
	ns.Exec("ip6tables-nft", append([]string{"-A", "FORWARD"}, hookRule("weft")...)...) // twice there
	for range 2 {
		if _, err := h.remove(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range programs {
		if got := strings.Join(forwardOf(ns, p), "\n"); strings.Contains(got, "mark") || (p == "iptables-nft") != strings.Contains(got, "weft") {
			t.Errorf("%s after remove:\n%s", p, got)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.ensure(ctx); err == nil {
		t.Error("a cancelled call succeeded")
	}
}

// What users put into DOCKER-USER binds our containers; a RETURN there does
// not lead them into the engine's DROP.
func TestHookAndDockerUser(t *testing.T) {
	for _, variant := range []string{"nft", "legacy"} {
		t.Run(variant, func(t *testing.T) {
			w := newWorld(t, true)
			ipt := "iptables-" + variant
			w.host.Exec(ipt, "-P", "FORWARD", "DROP")
			wantHook(t, w.hook, 1, true) // before the engine is there
			w.engine(variant)
			if _, err := w.fw.add(t.Context(), w.elements()); err != nil {
				t.Fatal(err)
			}
			wantHook(t, w.hook, 2, true) // moved, and IPv6
			if got := forwardOf(w.host, ipt); got[1] != "-A FORWARD -j DOCKER-USER" || got[3] != hookLine {
				t.Errorf("FORWARD is %q", got)
			}
			open := []probe{{"out", "host:80", "a1:8080 out"}, {"far", "host:80", "a1:8080 far"}, {"a1", "out:8080", "out:8080 gw200"}}
			w.run(0, open)
			w.host.Exec(ipt, "-I", "DOCKER-USER", "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "RETURN")
			w.host.Exec(ipt, "-I", "DOCKER-USER", "-s", "10.0.0.0/8", "-j", "RETURN")
			w.run(0, open)
			w.host.Exec(ipt, "-I", "DOCKER-USER", "-s", w.addr["out"][0].String(), "-p", "tcp", "-m", "conntrack", "--ctstate", "NEW", "-j", "DROP")
			w.host.Exec(ipt, "-I", "DOCKER-USER", "-s", w.addr["out"][0].String(), "-p", "udp", "-m", "conntrack", "--ctstate", "NEW", "-j", "DROP")
			w.run(0, []probe{{"out", "host:80", ""}, {"far", "host:80", "a1:8080 far"}, {"a1", "out:8080", "out:8080 gw200"}})

			// The engine starts again: its jumps go to the top once more.
			for _, chain := range []string{"DOCKER-ISOLATION-STAGE-1", "DOCKER-USER"} {
				w.host.Exec(ipt, "-D", "FORWARD", "-j", chain)
				w.host.Exec(ipt, "-I", "FORWARD", "-j", chain)
			}
			wantHook(t, w.hook, 0, true)
			w.run(0, open[1:])
		})
	}
}

// Programs that are not there are a warning, once.
func TestHookWithoutIptables(t *testing.T) {
	netnstest.Enter(t)
	log, logged := test.NewNullLogger()
	h := newHook(log, "weft")
	h.dirs = []string{t.TempDir()}
	t.Setenv("PATH", h.dirs[0])
	wantHook(t, h, 0, false)
	if _, err := h.remove(t.Context()); err != nil {
		t.Error(err)
	}
	if n := len(logged.AllEntries()); n != 2 || logged.LastEntry().Level.String() != "warning" {
		t.Errorf("%d log entries, want a warning for each family", n)
	}
}

// Where there is one program without a variant in its name, what it links to
// tells.
func TestHookPlainProgram(t *testing.T) {
	for _, tt := range []struct{ target, variant string }{{"xtables-nft-multi", "nft"}, {"xtables-legacy-multi", "legacy"}} {
		t.Run(tt.variant, func(t *testing.T) {
			ns := netnstest.Enter(t)
			dir := t.TempDir()
			for _, p := range []string{"iptables", "ip6tables"} {
				if err := os.Symlink(filepath.Join("/usr/sbin", tt.target), filepath.Join(dir, p)); err != nil {
					t.Fatal(err)
				}
			}
			h := newHook(quiet(), "weft")
			h.dirs = []string{dir}
			t.Setenv("PATH", dir)
			wantHook(t, h, 0, false)
			ns.Exec("/usr/sbin/iptables-"+tt.variant, "-P", "FORWARD", "DROP")
			wantHook(t, h, 1, true)
			ns.Exec("/usr/sbin/iptables-"+tt.variant, append([]string{"-C", "FORWARD"}, hookRule("weft")...)...)
		})
	}
}

// BenchmarkHook is what a reconciliation pays where nothing is to be done.
func BenchmarkHook(b *testing.B) {
	ns := netnstest.Enter(b)
	h := newHook(quiet(), "weft")
	ns.Exec("iptables-nft", "-P", "FORWARD", "DROP")
	for range b.N {
		if _, err := h.ensure(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
