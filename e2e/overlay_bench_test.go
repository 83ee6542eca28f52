//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// newOverlays is two hosts with the built-in overlay, "theirs", and ours.
func newOverlays(b *testing.B) members {
	b.Helper()
	all := newMembers(b, 2)
	all[0].must(b, "swarm", "init", "--advertise-addr", underlayAddr(1))
	token := all[0].must(b, "swarm", "join-token", "-q", "worker")
	all[1].must(b, "swarm", "join", "--advertise-addr", underlayAddr(2), "--token", token, underlayAddr(1)+":2377")
	all.join(b)
	all[0].must(b, "network", "create", "-d", "overlay", "--attachable", "--subnet", "10.46.0.0/24", "theirs")
	all.network(b, "ours")
	return all
}

func (all members) dissolve(b *testing.B) {
	b.Helper()
	for _, e := range slices.Backward(all) {
		e.removeAll(b)
		e.must(b, "swarm", "leave", "--force")
		e.checkCleanIn(b, 40*time.Second)
	}
}

// BenchmarkConnectOverlay is BenchmarkConnect with the built-in overlay and
// ours. With the latter the container also gets docker_gwbridge in both.
func BenchmarkConnectOverlay(b *testing.B) {
	all := newOverlays(b)
	all[0].compareConnect(b)
	all.dissolve(b)
}

// BenchmarkOverlayThroughput sends from a container on one host to one on the
// other, by the built-in overlay and by ours in turn, and between the hosts. What
// else the machine does changes by the second, so the turns are short and each is
// compared with its neighbour.
func BenchmarkOverlayThroughput(b *testing.B) {
	all := newOverlays(b)
	at := map[string]string{"underlay": underlayAddr(2) + ":7000"}
	all[1].serve(b, "tcp:7000")
	for _, n := range []string{"theirs", "ours"} {
		all[0].run(b, "from-"+n, "--network", n)
		all[1].run(b, "to-"+n, "--network", n)
		at[n] = all[1].addresses(b, "to-"+n, n)[0] + ":80"
		all[0].dials(b, "from-"+n, strings.TrimSuffix(at[n], ":80"), "to-"+n)
	}
	rate := map[string][]float64{}
	turns := []string{"theirs", "ours", "underlay"}
	for b.Loop() {
		for i := range 45 {
			for j := range turns {
				n := turns[(i+j)%len(turns)]
				c := all[0].inNet(suite.probe, "send", at[n], "400ms")
				if n != "underlay" {
					var err error
					if c, err = all[0].in("from-"+n, "/probe", "send", at[n], "400ms"); err != nil {
						b.Fatal(err)
					}
				}
				out, err := output(c)
				if err != nil {
					b.Fatal(err)
				}
				r, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
				if err != nil {
					b.Fatal(err)
				}
				rate[n] = append(rate[n], r*8/1e9)
			}
		}
	}
	mid := func(list []float64) float64 {
		slices.Sort(list)
		return list[len(list)/2]
	}
	beside := func(name string) float64 {
		var list []float64
		for i, r := range rate["ours"] {
			list = append(list, r/rate[name][i])
		}
		return mid(list)
	}
	b.ReportMetric(beside("theirs"), "ours/builtin")
	b.ReportMetric(beside("underlay"), "ours/underlay")
	for name, list := range rate {
		b.ReportMetric(mid(list), name+"-Gbit/s")
	}
	all.dissolve(b)
}

// lonely is `weft serve` on a machine without an engine.
type lonely struct {
	*machine
	client *http.Client
}

// newLonely starts one on each of n machines of a LAN; settings are flags and
// variables of all.
func newLonely(b *testing.B, l *lan, n int, settings func(i int) (flags, env []string)) []*lonely {
	b.Helper()
	all := make([]*lonely, n)
	for i := range n {
		m := l.station(b, fmt.Sprintf("host%d", i+1), underlayAddr(i+1)+"/24", fmt.Sprintf("2001:db8:1::%d/64", 10+i+1))
		flags, env := settings(i)
		socket := filepath.Join(m.dir, "weft.sock")
		c := m.inNet(append([]string{suite.weft, "serve", "--state", filepath.Join(m.dir, "state"), "--socket", socket, "--log-level", "error", "--underlay", "lan0"}, flags...)...)
		c.Env = append(c.Environ(), env...)
		var stderr bytes.Buffer
		c.Stdout, c.Stderr = &stderr, &stderr
		if err := c.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			end(c)
			if b.Failed() {
				b.Logf("%s: %s", m.name, &stderr)
			}
		})
		all[i] = &lonely{m, &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}}
		eventually(b, 10*time.Second, "weft serve", func() error { return all[i].call("NetworkDriver.EndpointOperInfo", ids("a", "b")) })
	}
	return all
}

func ids(network, endpoint string) map[string]any {
	return map[string]any{"NetworkID": network, "EndpointID": endpoint}
}

func (x *lonely) call(method string, body any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	r, err := x.client.Post("http://weft/"+method, "", bytes.NewReader(data))
	if err != nil {
		return err
	}
	defer func() { _ = r.Body.Close() }() // decoded or of no use
	var answer struct{ Err string }
	if err := json.NewDecoder(r.Body).Decode(&answer); err != nil || r.StatusCode != http.StatusOK {
		return errors.Join(err, fmt.Errorf("%s: %s %s", method, r.Status, answer.Err))
	}
	return nil
}

// news are the forwarding entries that a machine's kernel tells of.
func (m *machine) news(b *testing.B) <-chan netlink.NeighUpdate {
	b.Helper()
	pid, err := strconv.Atoi(m.pid())
	if err != nil {
		b.Fatal(err)
	}
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		b.Fatal(err)
	}
	ch, done := make(chan netlink.NeighUpdate, 4096), make(chan struct{})
	if err := netlink.NeighSubscribeAt(ns, ch, done); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { close(done); _ = ns.Close() }) // the test is over
	return ch
}

// BenchmarkOverlayPropagation is the time from the answer to CreateEndpoint on
// one host until every other one of five has the forwarding entry.
func BenchmarkOverlayPropagation(b *testing.B) {
	b.Run("gossip", func(b *testing.B) {
		benchPropagation(b, newLonely(b, newLAN(b), 5, func(i int) ([]string, []string) {
			return []string{"--peers", underlayAddr((i+1)%5 + 1)}, []string{"SECRET=" + secret}
		}))
	})
	b.Run("etcd", func(b *testing.B) {
		l := newLAN(b)
		c := l.client.inNet("etcd", "--data-dir", filepath.Join(l.client.dir, "etcd"), "--log-level", "error",
			"--listen-client-urls", "http://"+client4+":2379", "--advertise-client-urls", "http://"+client4+":2379", "--listen-peer-urls", "http://127.0.0.1:2380")
		if err := c.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { end(c) })
		benchPropagation(b, newLonely(b, l, 5, func(int) ([]string, []string) {
			return []string{"--store", "etcd://" + client4 + ":2379"}, nil
		}))
	})
}

func benchPropagation(b *testing.B, all []*lonely) {
	b.Helper()
	network := strings.Repeat("b1", 32)
	for _, x := range all {
		if err := x.call("NetworkDriver.CreateNetwork", map[string]any{
			"NetworkID": network, "Options": map[string]any{"com.docker.network.generic": map[string]string{"mode": "overlay", "vni": blueVNI}},
			"IPv4Data": []map[string]string{{"Pool": blue4}},
		}); err != nil {
			b.Fatal(err)
		}
	}
	var channels []<-chan netlink.NeighUpdate
	for _, x := range all[1:] {
		channels = append(channels, x.news(b))
	}
	eventually(b, 10*time.Second, "the hosts know each other", func() error {
		for _, x := range all {
			out, err := output(x.inNet("bridge", "fdb", "show"))
			if n := strings.Count(out, "00:00:00:00:00:00 dev wfx"); err != nil || n != len(all)-1 {
				return errors.Join(err, fmt.Errorf("%s floods to %d hosts", x.name, n))
			}
		}
		return nil
	})
	var took []time.Duration
	for b.Loop() {
		for i := range 200 {
			endpoint := benchEndpoint(i)
			addr := fmt.Sprintf("10.44.%d.%d", 1+i/200, 2+i%200)
			mac := fmt.Sprintf("02:42:0a:2c:%02x:%02x", 1+i/200, 2+i%200)
			if err := all[0].call("NetworkDriver.CreateEndpoint", map[string]any{
				"NetworkID": network, "EndpointID": endpoint, "Interface": map[string]string{"Address": addr + "/16", "AddressIPv6": "", "MacAddress": ""}, "Options": map[string]any{},
			}); err != nil {
				b.Fatal(err)
			}
			start := time.Now()
			for j, ch := range channels {
				limit := time.After(10 * time.Second)
				for found := false; !found; {
					select {
					case u := <-ch:
						found = u.HardwareAddr.String() == mac && u.Flags&netlink.NTF_SELF != 0
					case <-limit:
						b.Fatalf("%s has no entry for %s", all[j+1].name, mac)
					}
				}
				took = append(took, time.Since(start))
			}
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
	b.ReportMetric(float64(took[len(took)-1].Microseconds())/1000, "max-ms")
}
