//go:build e2e

package e2e

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"
)

// group is a set-up of networks and containers and what is asked of it.
type group struct {
	name string
	// engine is the first engine whose client can say it at all.
	engine int
	// builtinSince is the first engine whose built-in driver has the option;
	// before it only ours is asked.
	builtinSince int
	// twin is the built-in driver; "" is bridge.
	twin string
	// kind of links that the kernel must have, as ip link add takes it; "" is
	// one that every kernel here has.
	kind   string
	setup  func(w *world)
	probes []probe
	// steps change the set-up; they run one after the other, after the
	// probes, which run side by side.
	steps []probe
}

// probe is one question and its answer.
type probe struct {
	name string
	ask  func(w *world) string
	want string
	// differs lists an intended difference: the built-in driver's answers by
	// engine version (0: every version) and the reason. An entry that is no
	// longer true fails, so that the list stays honest.
	differs map[int]string
	why     string
}

// never is an engine that has not come: its built-in driver has no such
// option.
const never = 1 << 10

// builtin is the driver that ours is compared with.
func (g group) builtin() string { return cmp.Or(g.twin, builtin) }

// builtinWant is the answer expected of the built-in driver, and whether it
// is a listed difference.
func (p probe) builtinWant(major int) (string, bool) {
	if a, ok := p.differs[major]; ok {
		return a, true
	}
	if a, ok := p.differs[0]; ok {
		return a, true
	}
	return p.want, false
}

// world is one group set up with one driver.
type world struct {
	testing.TB
	e      *engine
	driver string

	mu      sync.Mutex
	address map[string]string // symbol -> address
	symbol  map[string]string // address -> symbol
	pids    map[string]string // container -> process
	names   map[string]string // host name -> what to call it
	// stations are further machines on the LAN, written before the probes.
	stations map[string]*machine
	nets     []string
	boxes    []string
}

func newWorld(tb testing.TB, e *engine, driver string) *world {
	tb.Helper()
	w := &world{TB: tb, e: e, driver: driver, address: map[string]string{}, symbol: map[string]string{}, pids: map[string]string{}, names: map[string]string{}}
	for s, a := range map[string]string{"host": host4, "host6": host6, "second": second4, "second6": second6,
		"client": client4, "client6": client6, "lo": "127.0.0.1", "lo6": "::1"} {
		w.learn(s, a)
	}
	return w
}

// learn makes an address known by a name; both families of one thing are
// written alike in answers.
func (w *world) learn(symbol, addr string) {
	if addr == "" {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.address[symbol] = addr
	w.symbol[addr] = strings.TrimSuffix(symbol, "6")
}

// network makes a network of the driver under test.
func (w *world) network(name string, args ...string) {
	w.Helper()
	all := []string{"network", "create", "-d", w.driver}
	if w.driver == ours {
		all = append(all, "--ipam-driver", ours)
	}
	w.create(name, append(all, args...))
}

// foreign makes a network of the built-in driver, whatever is under test.
func (w *world) foreign(name string, args ...string) {
	w.Helper()
	w.create(name, append([]string{"network", "create", "-d", builtin}, args...))
}

func (w *world) create(name string, args []string) {
	w.Helper()
	w.e.must(w, append(args, name)...)
	w.mu.Lock()
	w.nets = append(w.nets, name)
	w.mu.Unlock()
	w.inspectNetwork(name)
}

// inspectNetwork learns the gateways; where inspect shows none (built-in
// networks of 20.10 before their first container), it is the first address.
func (w *world) inspectNetwork(name string) {
	w.Helper()
	var n []struct {
		IPAM struct {
			Config []struct{ Subnet, Gateway string }
		}
	}
	if err := json.Unmarshal([]byte(w.e.must(w, "network", "inspect", name)), &n); err != nil {
		w.Fatal(err)
	}
	for _, c := range n[0].IPAM.Config {
		// A remote IPAM's gateway is stored with its mask.
		gw, _, _ := strings.Cut(c.Gateway, "/")
		if gw == "" {
			gw = netip.MustParsePrefix(c.Subnet).Addr().Next().String()
		}
		symbol := "gw." + name
		if strings.Contains(gw, ":") {
			symbol += "6"
		}
		w.learn(symbol, gw)
	}
}

// run starts a container; run it from several goroutines to save time.
func (w *world) run(name string, args ...string) {
	w.Helper()
	w.mu.Lock()
	w.boxes = append(w.boxes, name)
	w.mu.Unlock()
	w.e.run(w, name, args...)
}

// all runs functions side by side.
func (w *world) all(fs ...func()) {
	var wg sync.WaitGroup
	for _, f := range fs {
		wg.Go(f)
	}
	wg.Wait()
	if w.Failed() {
		w.FailNow()
	}
}

// look reads the containers' addresses and processes.
func (w *world) look() {
	w.Helper()
	var boxes []struct {
		Name            string
		State           struct{ Pid int }
		NetworkSettings struct {
			Networks map[string]struct{ IPAddress, GlobalIPv6Address string }
		}
	}
	if err := json.Unmarshal([]byte(w.e.must(w, append([]string{"inspect"}, w.boxes...)...)), &boxes); err != nil {
		w.Fatal(err)
	}
	for _, b := range boxes {
		name := strings.TrimPrefix(b.Name, "/")
		w.mu.Lock()
		w.pids[name] = strconv.Itoa(b.State.Pid)
		w.mu.Unlock()
		for net, x := range b.NetworkSettings.Networks {
			s := name
			if len(b.NetworkSettings.Networks) > 1 {
				s += "@" + net
			}
			w.learn(s, x.IPAddress)
			w.learn(s+"6", x.GlobalIPv6Address)
		}
	}
}

// settle waits until the containers' servers listen, which is after the
// engine says they run, and until no address of the host is tentative: until
// then the kernel takes another one as source.
func (w *world) settle() {
	w.Helper()
	for _, b := range w.boxes {
		if a := w.dialFrom(b, "tcp", "lo:80", "-wait", "5s"); !strings.HasSuffix(a, "sees lo") {
			w.Errorf("%s does not serve: %s", b, a)
		}
	}
	eventually(w, 5*time.Second, "addresses", func() error {
		out, err := output(w.e.inNet("ip", "-6", "-o", "addr", "show", "scope", "global", "tentative"))
		if err == nil && out != "" {
			err = fmt.Errorf("tentative: %s", out)
		}
		return err
	})
}

// close removes everything of the group.
func (w *world) close() {
	if len(w.boxes) > 0 {
		if out, err := w.e.docker(append([]string{"rm", "-f", "-v"}, w.boxes...)...); err != nil {
			w.Errorf("remove containers: %v %s", err, out)
		}
	}
	if len(w.nets) > 0 {
		if err := w.e.removeNetworks(w, w.nets); err != nil {
			w.Errorf("remove networks: %v", err)
		}
	}
}

// row is one line of the printed table.
type row struct {
	probe, builtin, ours, why string
}

// TestParity asks the built-in bridge driver and ours the same questions, on
// the same engine, and prints both answers.
func TestParity(t *testing.T) {
	parity(t, newEngine(t, nil), parityTable())
}

// parity puts a table to both drivers on one engine.
func parity(t *testing.T, e *engine, table []group) {
	t.Helper()
	e.installPlugin(t)
	e.lan.client.serve(t, "tcp:7000", "udp:7000")
	e.serve(t, "tcp:7000", "udp:7000")
	var rows []row
	for _, g := range table {
		if suite.version.major < g.engine {
			note("not on this engine: parity group %q needs %d", g.name, g.engine)
			continue
		}
		answers := map[string]map[string]string{}
		for _, d := range []string{g.builtin(), ours} {
			if d != ours && suite.version.major < g.builtinSince {
				continue
			}
			name := "weft"
			if d != ours {
				name = "builtin"
			}
			t.Run(g.name+"/"+name, func(t *testing.T) {
				if g.kind != "" {
					needKind(t, e.machine, g.kind)
				}
				answers[d] = g.ask(newWorld(t, e, d))
				if d == ours {
					e.checkClean(t)
				}
			})
		}
		rows = append(rows, g.judge(t, answers)...)
	}
	printRows(t, rows)
}

// ask sets the group up and returns the answers by probe.
func (g group) ask(w *world) map[string]string {
	w.Helper()
	defer w.close()
	g.setup(w)
	w.look()
	w.settle()
	got := w.answers(g.probes)
	for _, p := range g.steps {
		got[p.name] = w.askAgain(p)
	}
	return got
}

// answers asks side by side.
func (w *world) answers(probes []probe) map[string]string {
	w.Helper()
	got := map[string]string{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, p := range probes {
		wg.Go(func() {
			a := w.askAgain(p)
			mu.Lock()
			defer mu.Unlock()
			got[p.name] = a
		})
	}
	wg.Wait()
	return got
}

// check asks ours alone.
func (w *world) check(when string, probes ...probe) {
	w.Helper()
	got := w.answers(probes)
	for _, p := range probes {
		if got[p.name] != p.want {
			w.Errorf("%s%s: weft answers %q, want %q", when, p.name, got[p.name], p.want)
		}
	}
}

// askAgain asks a second time where the first answer was an unexpected
// timeout, which a busy machine gives too. It is told in the summary.
func (w *world) askAgain(p probe) string {
	a := p.ask(w)
	want := p.want
	if w.driver != ours {
		want, _ = p.builtinWant(suite.version.major)
	}
	if a != "timeout" && a != "no answer" || a == want {
		return a
	}
	note("asked twice: %s, %s: the first answer was %q", w.Name(), p.name, a)
	return p.ask(w)
}

// judge compares the answers with what the table says.
func (g group) judge(t *testing.T, answers map[string]map[string]string) []row {
	t.Helper()
	if len(answers) == 0 {
		return nil // skipped
	}
	var rows []row
	for _, p := range slices.Concat(g.probes, g.steps) {
		r := row{probe: g.name + ": " + p.name, builtin: "-", ours: "-"}
		want, listed := p.builtinWant(suite.version.major)
		if a, ok := answers[g.builtin()]; ok {
			r.builtin = a[p.name]
			if r.builtin != want {
				t.Errorf("%s: the built-in driver answers %q, the table says %q", r.probe, r.builtin, want)
			}
			if listed {
				r.why = p.why
				if want == p.want || p.why == "" {
					t.Errorf("%s: the listed difference is none, or has no reason", r.probe)
				}
			}
		}
		if a, ok := answers[ours]; ok {
			r.ours = a[p.name]
			if r.ours != p.want {
				t.Errorf("%s: weft answers %q, want %q", r.probe, r.ours, p.want)
			}
		}
		rows = append(rows, r)
	}
	return rows
}

func printRows(t *testing.T, rows []row) {
	t.Helper()
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 1, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "PROBE\tBUILT-IN\tWEFT\tWHY DIFFERENT")
	var same, differ, alone int
	for _, r := range rows {
		mark := "="
		switch {
		case r.builtin == "-" || r.ours == "-":
			alone++
		case r.builtin == r.ours:
			same++
		default:
			differ++
			mark = r.ours
		}
		if mark == "=" && r.builtin != r.ours {
			mark = r.ours
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", r.probe, r.builtin, mark, r.why)
	}
	if err := w.Flush(); err != nil {
		t.Error(err)
	}
	t.Logf("parity on engine %s\n%s", suite.version.name, b.String())
	note("parity, %s: %d probes answered alike, %d differ on purpose, %d asked of one driver only", t.Name(), same, differ, alone)
}
