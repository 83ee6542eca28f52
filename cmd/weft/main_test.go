package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/internal/admin"
	"github.com/weftnet/weft/internal/plugin"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/overlay"
)

// weft runs the command in this process.
func weft(t *testing.T, dataRoot string, args ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(t.Context(), args, program{out: &o, err: &e, env: func(string) string { return "" }, dataRoot: dataRoot, now: func() time.Time { return at.Add(3 * time.Minute) }})
	return code, o.String(), e.String()
}

func TestArguments(t *testing.T) {
	for _, c := range []struct {
		args      string
		code      int
		out, errs string // parts
	}{
		{"", 2, "", "usage: weft COMMAND"},
		{"help", 0, "usage: weft COMMAND", ""},
		{"stauts", 2, "", `no command "stauts"`},
		{"version", 0, "weft dev (commit unknown, go1", ""},
		{"version --json", 0, `{"Version":"dev","Commit":"unknown","Go":"go1`, ""},
		{"version now", 2, "", `no argument "now"`},
		{"version --yaml", 2, "", "yaml"},
		{"status neighbours", 2, "", "choose from networks, endpoints, pools, peers"},
		{"status -h", 0, "", "-socket"},
		{"serve -h", 0, "", "-pools"},
		{"address keep web", 2, "", "reserve NAME ADDRESS"},
		{"address release here", 2, "", `"here"`},
		{"secret change", 2, "", "add, use, remove"},
		{"serve now", 2, "", `no argument "now"`},
	} {
		code, out, errs := weft(t, t.TempDir(), strings.Fields(c.args)...)
		if code != c.code || !strings.Contains(out, c.out) || !strings.Contains(errs, c.errs) || c.out == "" && out != "" {
			t.Errorf("weft %s: exit %d, out %q, errors %q; want %d, %q, %q", c.args, code, out, errs, c.code, c.out, c.errs)
		}
	}
}

// answers serves a document on a socket.
func answers(t *testing.T, socket string, doc document) {
	t.Helper()
	l, err := plugin.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- admin.Serve(ctx, l, map[string]admin.Call{admin.PathStatus: func(context.Context, []byte) (any, error) { return doc, nil }}, log)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

var at = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

func example() document {
	id := strings.Repeat("ab", 32)
	return document{
		Version: "1.0", Commit: "c", Phase: serving, now: at.Add(3 * time.Minute),
		Status: driver.Status{
			Networks: []driver.NetworkStatus{{
				ID: id, Mode: "bridge", Link: "wfababababab", Egress: "driver", MTU: 1500, Endpoints: 1, Created: at,
				Subnets: []driver.SubnetStatus{{Pool: netip.MustParsePrefix("10.1.0.0/24"), Gateway: "10.1.0.1"}, {Pool: netip.MustParsePrefix("fd00::/64")}},
				Options: map[string]string{"host_access": "true", "gateway_mode_ipv4": "routed"},
			}},
			Endpoints: []driver.EndpointStatus{{
				ID: "cd" + id, Network: id, Link: "wfv1", State: "up", Created: at,
				Addrs: []netip.Prefix{netip.MustParsePrefix("10.1.0.2/24"), netip.MustParsePrefix("fd00::2/64")},
				MAC:   [6]byte{2, 0, 0, 0, 0, 1},
				Ports: []driver.PortStatus{
					{Proto: "tcp", Host: "0.0.0.0:8080", Container: netip.MustParseAddrPort("10.1.0.2:80")},
					{Proto: "udp", Container: netip.MustParseAddrPort("[fd00::2]:53")},
				},
			}},
			Drift: driver.Drift{Checked: at, Error: "bridge wfx: busy", Repaired: []string{"made bridge wfababababab"}, RepairedAt: at},
		},
		Pools: []ipam.PoolStatus{
			{ID: "x", Space: "weft-local", Pool: "10.1.0.0/24", SubPool: "10.1.0.128/25", MoreSubPools: []string{"10.1.0.0/26", "10.1.0.64/26"}, Gateway: "10.1.0.1", Used: 2, Size: "254"},
			{ID: "y", Space: "weft-local", Pool: "fd00::/64", Used: 1, Size: "18446744073709551615"},
			{ID: "z", Space: "blue", Pool: "10.44.0.0/16", Gateway: "10.44.0.1", Used: 1, UsedByAll: 4, Size: "65534"},
		},
	}
}

// TestStatusTwins: two hosts with one ID undo each other's work, which is wrong on
// every host that sees it.
func TestStatusTwins(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	doc := document{Version: "1.0", Phase: serving, now: at.Add(3 * time.Minute)}
	doc.Cluster.Troubles = []overlay.Trouble{{Peer: "hosts a at 192.0.2.1 and a at 192.0.2.2", Reason: "they have one ID", Since: at}}
	answers(t, socket, doc)
	if code, out, errs := weft(t, "", "status", "--socket", socket); code != 0 || !strings.Contains(out, "a at 192.0.2.2") {
		t.Errorf("another trouble: exit %d, %s%s", code, out, errs)
	}
	socket += "2"
	doc.Cluster.Troubles[0].Twin = true
	answers(t, socket, doc)
	if code, out, errs := weft(t, "", "status", "--socket", socket); code != 1 || !strings.Contains(out, "a at 192.0.2.2") || !strings.Contains(errs, "two hosts have one ID") {
		t.Errorf("twins: exit %d, %s%s", code, out, errs)
	}
}

// TestStatusPeers shows other hosts, and what is wrong between them.
func TestStatusPeers(t *testing.T) {
	doc := example()
	doc.Cluster = overlay.Status{
		Peers: []overlay.Peer{
			{Name: "one", VTEP: netip.MustParseAddr("192.0.2.1"), Networks: []uint32{7, 42}, Tunnel: &overlay.Tunnel{Sent: 12, Received: 11, Answered: 10}},
			{Name: "far", Indirect: at},
			{Name: "two", Silent: at},
			{Name: "th\x1b[2J\u009bree\u00a0x", Silent: at, Unheard: true},
		},
		Troubles:  []overlay.Trouble{{Peer: "host9", Reason: "it has another password", Since: at.Add(-26 * time.Hour)}},
		Conflicts: []string{"10.1.0.2 is claimed twice"},
	}
	var out strings.Builder
	if err := doc.print(&out, []string{"peers"}); err != nil {
		t.Fatal(err)
	}
	const want = `PEER          ADDRESS    STATE                                    TUNNEL                             NETWORKS
one           192.0.2.1  heard                                    sent 12, received 11, answered 10  7,42
far           -          heard only through others or TCP for 3m  -                                  -
two           -          silent for 3m                            -                                  -
th?[2J?ree?x  -          silent, others told of it 3m ago         -                                  -
! host9, for 26h: it has another password
! 10.1.0.2 is claimed twice
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", &out, want)
	}
	doc.Cluster.Deaf = overlay.Deafness{Since: at, Error: "etcd does not answer"}
	out.Reset()
	if err := doc.print(&out, []string{"peers"}); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"192.0.2.1  unknown for 3m", "silent for 3m", "! other hosts are not heard: etcd does not answer",
	} {
		if !strings.Contains(out.String(), line) {
			t.Errorf("got\n%swant a line %s", &out, line)
		}
	}
}

const wantNetworks = `NETWORK       MODE    VNI  LINK          SUBNETS                GATEWAYS    MTU   EGRESS  INTERNAL  ENDPOINTS  OPTIONS
abababababab  bridge  -    wfababababab  10.1.0.0/24,fd00::/64  10.1.0.1,-  1500  driver  no        1          gateway_mode_ipv4=routed,host_access=true
`

const wantEndpoints = `ENDPOINT      NAME  NETWORK       ADDRESSES         MAC                LINK  STATE  PORTS
cdababababab  -     abababababab  10.1.0.2,fd00::2  02:00:00:00:00:01  wfv1  up     0.0.0.0:8080->80/tcp,[fd00::2]:53/udp
`

const wantPools = `POOL          SPACE       RANGE          GATEWAY    USED  ALL HOSTS  SIZE
10.1.0.0/24   weft-local  10.1.0.128/25  10.1.0.1   2     -          254
fd00::/64     weft-local  -              -          1     -          18446744073709551615
10.44.0.0/16  blue        -              10.44.0.1  1     4          65534
3 networks share pool 10.1.0.0/24, each with a range of its own: 10.1.0.128/25, 10.1.0.0/26, 10.1.0.64/26
`

const wantDrift = `the kernel was compared with the records 3m ago
not everything could be repaired: bridge wfx: busy
repaired 3m ago:
  made bridge wfababababab
`

func TestStatusText(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	answers(t, socket, example())
	for _, c := range []struct{ words, want string }{
		{"networks", wantNetworks},
		{"endpoints", wantEndpoints},
		{"pools", wantPools},
		{"endpoints networks", wantNetworks + wantEndpoints},
	} {
		args := append([]string{"status", "--socket", socket}, strings.Fields(c.words)...)
		code, out, errs := weft(t, "", args...)
		if diff := cmp.Diff(c.want, out); code != 1 || !strings.Contains(errs, "repaired") || diff != "" {
			t.Errorf("status %s: exit %d, %s(-want +got):\n%s", c.words, code, errs, diff)
		}
	}
	code, out, errs := weft(t, "", "status", "--socket", socket)
	for _, part := range []string{"weft 1.0: serving\n\n" + wantNetworks + "\n" + wantEndpoints + "\n" + wantPools + "\n" + wantDrift} {
		if code != 1 || !strings.Contains(out, part) {
			t.Errorf("status: exit %d, %s got:\n%s\nwithout:\n%s", code, errs, out, part)
		}
	}
}

// A container's name is beside its endpoint where an engine told it.
func TestStatusContainerNames(t *testing.T) {
	a4, a6 := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00::2")
	for want, names := range map[string][]ipam.NameStatus{
		"web":  {{Name: "web", Address: a4, Held: true}, {Name: "db", Address: netip.MustParseAddr("10.1.0.3"), Held: true}},
		"shop": {{Name: "shop", Address: a4, Held: true}, {Name: "shop", Address: a6, Held: true}},
		"a,b":  {{Name: "a", Address: a4, Held: true}, {Name: "b", Address: a6, Held: true}},
		"- ":   {{Name: "gone", Address: a4}, {Name: "--ip", Address: a6, Held: true}},
		"-  ":  {{Name: "far", Address: a4, Held: true, Host: "beta"}},
		"-   ": {{Name: "one", Address: a4, Held: true}, {Name: "two", Address: a4, Held: true}},
	} {
		doc := example()
		doc.Pools[0].Names = names
		if got := doc.endpoints()[1][1]; got != strings.TrimSpace(want) {
			t.Errorf("%+v: %s, want %s", names, got, want)
		}
	}
}

func TestStatusOfFailedPlugin(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	answers(t, socket, document{Version: "1.0", Phase: failed, Error: "open store weft.db: damaged"})
	code, out, _ := weft(t, "", "status", "networks", "--socket", socket)
	if want := "weft 1.0: failed\nopen store weft.db: damaged\n"; code != 1 || out != want {
		t.Errorf("exit %d, got %q, want %q", code, out, want)
	}
}

func TestStatusJSON(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	doc := example()
	doc.Networks[0].Link = "x\u009b31m"
	answers(t, socket, doc)
	code, out, errs := weft(t, "", "status", "--json", "--socket", socket)
	if code != 1 || strings.Contains(out, "\u009b") { // not everything could be repaired
		t.Fatalf("exit %d, %s", code, errs)
	}
	var got document
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(doc.Networks, got.Networks, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})); diff != "" {
		t.Errorf("networks (-want +got):\n%s", diff)
	}
	var keys map[string]any
	if err := json.Unmarshal([]byte(out), &keys); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"version", "commit", "phase", "networks", "endpoints", "pools", "drift"} {
		if _, ok := keys[k]; !ok {
			t.Errorf("no %q in the document:\n%s", k, out)
		}
	}
}

// TestStatusLeases shows what a DHCP server granted, and the trouble with it.
func TestStatusLeases(t *testing.T) {
	dhcp := ipam.DHCPStatus{Link: "eth0", Leases: []ipam.LeaseStatus{
		{Address: netip.MustParseAddr("192.168.1.9"), Name: "nas", MAC: "02:00:00:00:00:01", Expires: at.Add(time.Hour), Trouble: "it says no\x1b[2J"},
		{Address: netip.MustParseAddr("192.168.1.8"), MAC: "02:00:00:00:00:02", Expires: at},
		{Address: netip.MustParseAddr("192.168.1.7"), MAC: "02:00:00:00:00:03", Expires: at.Add(forEver)},
	}}
	dhcp.Leases[2].Lease.Valid = forEver
	dhcp.Counts.Extended, dhcp.Counts.Silent = 3, 2
	doc := document{Phase: serving, now: at.Add(time.Minute), Pools: []ipam.PoolStatus{{Space: "dhcp=eth0", Pool: "192.168.1.0/24", Size: "254", DHCP: &dhcp}}}
	var out strings.Builder
	if err := doc.print(&out, []string{"pools"}); err != nil {
		t.Fatal(err)
	}
	const want = `
LEASE        NAME  MAC                INTERFACE  ENDS     TROUBLE
192.168.1.9  nas   02:00:00:00:00:01  eth0       in 59m   it says no?[2J
192.168.1.8  -     02:00:00:00:00:02  eth0       60s ago  -
192.168.1.7  -     02:00:00:00:00:03  eth0       never    -
! the DHCP server on eth0, since the plugin started: 3 extensions, 2 not answered, 0 refused; 0 leases ended in use
`
	if !strings.HasSuffix(out.String(), want) {
		t.Errorf("got\n%swant at the end\n%s", &out, want)
	}
}

// TestEngineRoots: where engines keep their data, by the file and by the command
// line of those that run.
func TestEngineRoots(t *testing.T) {
	dir := t.TempDir()
	for path, text := range map[string]string{
		"daemon.json": `{"data-root": "/srv/docker/"}`, "proc/7/cmdline": "/usr/bin/dockerd\x00-H\x00fd://\x00--data-root\x00/mnt/a\x00",
		"proc/5/cmdline": "dockerd\x00--data-root=/tmp/user\x00", "proc/5/status": "Name:\tdockerd\nUid:\t1000\t0\t0\t0\n",
		"proc/6/cmdline": "dockerd\x00--data-root=/tmp/container\x00", "proc/8/cmdline": "dockerd\x00--data-root=/mnt/b\x00", "proc/9/cmdline": "vi\x00--data-root=/mnt/c\x00", "proc/10/cmdline": "", "proc/11/cmdline": "dockerd\x00--data-root\x00",
	} {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for pid, ns := range map[string]string{"self": "mnt:[1]", "5": "mnt:[1]", "6": "mnt:[2]", "7": "mnt:[1]", "8": "mnt:[1]", "9": "mnt:[1]", "11": "mnt:[1]"} {
		proc := filepath.Join(dir, "proc", pid)
		if err := os.MkdirAll(filepath.Join(proc, "ns"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(ns, filepath.Join(proc, "ns", "mnt")); err != nil {
			t.Fatal(err)
		}
		if pid == "5" {
			continue
		}
		if err := os.WriteFile(filepath.Join(proc, "status"), []byte("Name:\tdockerd\nUid:\t0\t0\t0\t0\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got := engineRoots(filepath.Join(dir, "daemon.json"), filepath.Join(dir, "proc"))
	slices.Sort(got)
	if want := []string{"/mnt/a", "/mnt/b", "/srv/docker"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestStatusFindsPlugins(t *testing.T) {
	root, state := t.TempDir(), filepath.Join(t.TempDir(), "state")
	code, _, errs := weft(t, root, "status")
	if code != 1 || !strings.Contains(errs, "no plugin found") || strings.Count(errs, "\n") != 1 {
		t.Errorf("none: exit %d, %q", code, errs)
	}
	// As long as the engine's own paths are: more than an address can hold.
	for _, c := range []string{"a", "b"} {
		dir := filepath.Join(root, "plugins", strings.Repeat(c, 64), "propagated-mount")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		short := filepath.Join(t.TempDir(), "s")
		answers(t, short, document{Version: c, Phase: recovering})
		if err := os.Rename(short, filepath.Join(dir, adminSocket)); err != nil {
			t.Fatal(err)
		}
	}
	code, out, errs := weft(t, root, "status")
	if code != 0 || !strings.Contains(out, "weft a: recovering\n\n") || !strings.Contains(out, "weft b: recovering\n") || strings.Count(out, adminSocket+":\n") != 2 {
		t.Errorf("two: exit %d, %s got:\n%s", code, errs, out)
	}
	code, out, errs = weft(t, root, "status", "--json")
	var docs []document
	if err := json.Unmarshal([]byte(out), &docs); code != 0 || err != nil || len(docs) != 2 || docs[1].Version != "b" {
		t.Errorf("two as JSON: exit %d, %s %v got:\n%s", code, errs, err, out)
	}
	forged := filepath.Join(root, "plugins", strings.Repeat("a", 64), "propagated-mount", adminSocket)
	if err := os.Chown(forged, 12345, -1); err != nil {
		t.Fatal(err)
	}
	code, out, errs = weft(t, root, "status")
	if code != 0 || strings.Contains(out, "weft a") || !strings.Contains(out, "weft b: recovering\n") || !strings.Contains(errs, "aaa/propagated-mount/"+adminSocket+" is left out") {
		t.Errorf("a socket of a user: exit %d, %s got:\n%s", code, errs, out)
	}
	// What was named is what is asked.
	if code, out, errs := weft(t, root, "status", "--state", state); code != 1 || out != "" || !strings.Contains(errs, filepath.Join(state, adminSocket)) || strings.Count(errs, "\n") != 1 {
		t.Errorf("nobody there: exit %d, %q, %q", code, out, errs)
	}
	answers(t, filepath.Join(state, adminSocket), document{Version: "own", Phase: recovering})
	code, out, errs = weft(t, root, "status", "--state", state)
	if want := "weft own: recovering\n"; code != 0 || out != want {
		t.Errorf("beside the state: exit %d, %s got %q, want %q", code, errs, out, want)
	}
	code, _, errs = weft(t, root, "status", "--socket", filepath.Join(state, "gone.sock"))
	if code != 1 || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "gone.sock") {
		t.Errorf("unreachable: exit %d, %q", code, errs)
	}
}
