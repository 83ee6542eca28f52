//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Marks of links and routes of ours: the letters weft, and w.
const (
	linkGroup     = "2003134068"
	routeProtocol = "119"
)

// link is one interface as "ip -d -j" prints it, as far as tests look.
type link struct {
	Name        string `json:"ifname"`
	Group       string `json:"group"`
	Master      string `json:"master"`
	Promiscuity int    `json:"promiscuity"`
	Addrs       []struct {
		Local string `json:"local"`
	} `json:"addr_info"`
	Info struct {
		Kind string `json:"info_kind"`
	} `json:"linkinfo"`
}

func (e *engine) links(tb testing.TB) []link {
	tb.Helper()
	var all []link
	if err := json.Unmarshal([]byte(e.net(tb, "ip", "-d", "-j", "addr", "show")), &all); err != nil {
		tb.Fatal(err)
	}
	return all
}

// bridge is the host's link that has the address known as symbol.
func (w *world) bridge(symbol string) (link, error) {
	for _, l := range w.e.links(w) {
		for _, a := range l.Addrs {
			if a.Local == w.address[symbol] {
				return l, nil
			}
		}
	}
	return link{}, fmt.Errorf("no link has the address of %s", symbol)
}

// publishedPort is the host port that was chosen for a container's port. The
// engine shows its own driver's; ours are in the plugin's status.
func (w *world) publishedPort(container string, port uint16) (uint16, error) {
	if w.driver != ours {
		out, err := w.e.docker("port", container, fmt.Sprint(port))
		if err != nil {
			return 0, err
		}
		first, _, _ := strings.Cut(out, "\n")
		n, err := strconv.ParseUint(first[strings.LastIndex(first, ":")+1:], 10, 16)
		return uint16(n), err
	}
	return w.e.oursPort(w, w.address[container], port)
}

// oursPort reads from the plugin's status which host port leads to a
// container's port.
func (e *engine) oursPort(tb testing.TB, addr string, port uint16) (uint16, error) {
	tb.Helper()
	want := netip.AddrPortFrom(netip.MustParseAddr(addr), port).String()
	s, err := e.status(tb)
	if err != nil {
		return 0, err
	}
	for _, ep := range s.Endpoints {
		for _, p := range ep.Ports {
			if p.Container != want {
				continue
			}
			if h, err := netip.ParseAddrPort(p.Host); err == nil {
				return h.Port(), nil
			}
		}
	}
	return 0, fmt.Errorf("status has no port that leads to %s", want)
}

// status is what tests read of "weft status --json".
type status struct {
	Phase    string
	Error    string
	Networks []struct {
		ID, Link, Mode string
		Subnets        []struct{ Pool string }
	}
	Endpoints []struct {
		ID, Network, Link, State string
		Addresses                []string
		Ports                    []struct {
			Proto, Host, Container string
			More                   int
		}
	}
	Pools     []pool
	Unclaimed []string
	Drift     struct {
		Error    string
		Repaired []string
	}
}

// pool is what tests read of one pool.
type pool struct {
	ID   string
	DHCP *struct {
		Leases []struct{ Address string }
	}
}

// status asks the running plugin.
func (e *engine) status(tb testing.TB) (status, error) {
	tb.Helper()
	var s status
	out, err := output(e.inside(suite.weft, "status", "--json", "--socket", filepath.Join(e.state(tb), "admin.sock")))
	if err != nil && out == "" { // it also says by its exit code that something is wrong
		return s, err
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("%w in %s", err, out)
	}
	return s, nil
}

// checkClean waits until nothing is left of networks that were removed: the
// last of the engine's calls may still be on its way.
func (e *engine) checkClean(tb testing.TB) {
	tb.Helper()
	e.checkCleanIn(tb, 5*time.Second)
}

func (e *engine) checkCleanIn(tb testing.TB, limit time.Duration) {
	tb.Helper()
	var left []string
	for stop := time.Now().Add(limit * suite.slow); ; time.Sleep(100 * time.Millisecond) {
		if left = e.remains(tb); len(left) == 0 {
			return
		}
		if time.Now().After(stop) {
			tb.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
			return
		}
	}
}

// remains lists what there is of the plugin besides what it always keeps: an
// empty table and the hook.
func (e *engine) remains(tb testing.TB) []string {
	tb.Helper()
	var left []string
	for _, l := range e.links(tb) {
		// A VLAN sub-interface of ours has the name that its user chose.
		if strings.HasPrefix(l.Name, "wf") || l.Group == linkGroup {
			left = append(left, "link "+l.Name)
		}
	}
	for _, family := range []string{"-4", "-6"} {
		for r := range strings.Lines(e.net(tb, "ip", family, "route", "show", "table", "all", "proto", routeProtocol)) {
			left = append(left, "route "+strings.TrimSpace(r))
		}
	}
	left = append(left, e.elements(tb)...)
	for l := range strings.Lines(e.net(tb, "nft", "list", "tables", "netdev")) {
		if strings.Contains(l, "weft") {
			left = append(left, strings.TrimSpace(l))
		}
	}
	for _, program := range []string{"iptables", "ip6tables"} {
		var rules []string
		for _, table := range []string{"filter", "nat", "mangle", "raw"} {
			for l := range strings.SplitSeq(e.net(tb, program, "-t", table, "-S"), "\n") {
				if strings.Contains(l, "weft") {
					rules = append(rules, table+" "+l)
				}
			}
		}
		if slices.Sort(rules); len(slices.Compact(slices.Clone(rules))) != len(rules) {
			left = append(left, fmt.Sprintf("%s: more than one rule of an instance: %q", program, rules))
		}
	}
	s, err := e.status(tb)
	if err != nil {
		return append(left, err.Error())
	}
	for _, n := range s.Networks {
		left = append(left, "record of network "+n.ID)
	}
	for _, x := range s.Endpoints {
		left = append(left, fmt.Sprintf("record of endpoint %s, %s", x.ID, x.State))
	}
	for _, p := range s.Pools {
		left = append(left, "pool "+p.ID)
	}
	if s.Drift.Error != "" {
		left = append(left, "drift: "+s.Drift.Error)
	}
	return left
}

// elements lists what is in the sets and maps of the nftables tables of all
// instances.
func (e *engine) elements(tb testing.TB) (all []string) {
	tb.Helper()
	for l := range strings.Lines(e.net(tb, "nft", "list", "tables", "inet")) {
		if _, name, ok := strings.Cut(strings.TrimSpace(l), "table inet "); ok && strings.HasPrefix(name, "weft") {
			all = append(all, e.elementsOf(tb, name)...)
		}
	}
	return all
}

func (e *engine) elementsOf(tb testing.TB, table string) []string {
	tb.Helper()
	out, err := output(e.inNet("nft", "-j", "list", "table", "inet", table))
	if err != nil {
		if strings.Contains(err.Error(), "No such file") {
			return nil
		}
		tb.Fatal(err)
	}
	type set struct {
		Name string
		Elem []json.RawMessage
	}
	var doc struct {
		Nftables []struct{ Set, Map *set }
	}
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		tb.Fatal(err)
	}
	var all []string
	for _, x := range doc.Nftables {
		for _, s := range []*set{x.Set, x.Map} {
			// The guard keeps a host whose forwarding we switched on from
			// routing for others; nobody switches forwarding off again, and so
			// what lifts it stays, too. The uplinks are bridges of the host, and
			// there as long as these.
			if s == nil || s.Name == "guard" || s.Name == "lifted" || s.Name == "uplinks" {
				continue
			}
			for _, el := range s.Elem {
				all = append(all, fmt.Sprintf("element %s %s", s.Name, el))
			}
		}
	}
	return all
}

// checkAgrees compares the status with the kernel's links, both ways.
func (e *engine) checkAgrees(tb testing.TB) {
	tb.Helper()
	var wrong []string
	eventually(tb, 5*time.Second, "status agrees with the kernel", func() error {
		wrong = e.disagreements(tb)
		if len(wrong) > 0 {
			return errors.New(strings.Join(wrong, "; "))
		}
		return nil
	})
}

func (e *engine) disagreements(tb testing.TB) []string {
	tb.Helper()
	s, err := e.status(tb)
	if err != nil {
		return []string{err.Error()}
	}
	var wrong []string
	have := map[string]link{}
	for _, l := range e.links(tb) {
		have[l.Name] = l
	}
	want := map[string]string{} // link -> master
	bridges := map[string]string{}
	for _, n := range s.Networks {
		want[n.Link] = ""
		if n.Mode == "bridge" || n.Mode == "overlay" { // on a parent the links are in the containers
			bridges[n.ID] = n.Link
		}
		if n.Mode == "overlay" {
			want["wfx"+strings.TrimPrefix(n.Link, "wfb")] = n.Link
		}
		// The host's own sub-interface is there from the first need on.
		if own := "wfs" + n.ID[:12]; have[own].Name != "" {
			want[own] = ""
		}
	}
	for _, x := range s.Endpoints {
		if x.State == "up" && bridges[x.Network] != "" {
			want[x.Link] = bridges[x.Network]
		}
	}
	for name, master := range want {
		if l, ok := have[name]; !ok {
			wrong = append(wrong, "no link "+name)
		} else if l.Master != master {
			wrong = append(wrong, fmt.Sprintf("%s is in %q, not in %q", name, l.Master, master))
		}
	}
	for name := range have {
		if _, ok := want[name]; !ok && strings.HasPrefix(name, "wf") {
			wrong = append(wrong, "unknown link "+name)
		}
	}
	if s.Drift.Error != "" {
		wrong = append(wrong, "drift: "+s.Drift.Error)
	}
	return wrong
}
