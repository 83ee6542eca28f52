//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// post sends one request over a unix socket; a docker process per call would
// cost more than what is measured.
func post(socket, path, body string) error {
	c := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	r, err := c.Post("http://plugin"+path, "application/json", strings.NewReader(body))
	if err != nil {
		return err
	}
	defer func() { _ = r.Body.Close() }() // read to its end
	b, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode >= 300 {
		err = fmt.Errorf("%s: %s %s", path, r.Status, bytes.TrimSpace(b))
	}
	return err
}

// BenchmarkConnect connects a running container to a network and disconnects
// it, in turn with the built-in bridge and with ours, on one engine.
func BenchmarkConnect(b *testing.B) {
	e := newEngine(b, nil)
	e.installPlugin(b)
	e.must(b, "network", "create", "-d", builtin, "theirs")
	e.oursNetwork(b, "ours")
	e.compareConnect(b)
}

// compareConnect connects a running container to the networks theirs and ours
// in turn, and disconnects it.
func (e *engine) compareConnect(b *testing.B) {
	b.Helper()
	e.run(b, "beta")
	const pairs = 40
	connect, disconnect := map[string][]time.Duration{}, map[string][]time.Duration{}
	for b.Loop() {
		for range pairs {
			for _, n := range []string{"theirs", "ours"} {
				start := time.Now()
				if err := post(e.socket(), "/networks/"+n+"/connect", `{"Container":"beta"}`); err != nil {
					b.Fatal(err)
				}
				middle := time.Now()
				if err := post(e.socket(), "/networks/"+n+"/disconnect", `{"Container":"beta"}`); err != nil {
					b.Fatal(err)
				}
				connect[n] = append(connect[n], middle.Sub(start))
				disconnect[n] = append(disconnect[n], time.Since(middle))
			}
		}
	}
	pair := map[string]time.Duration{}
	for _, n := range []string{"theirs", "ours"} {
		pair[n] = median(connect[n]) + median(disconnect[n])
		note("%s: connect/disconnect, %s: %v / %v (median of %d)", b.Name(), n, median(connect[n]).Round(10*time.Microsecond), median(disconnect[n]).Round(10*time.Microsecond), len(connect[n]))
		b.ReportMetric(float64(pair[n].Microseconds())/1000, n+"-ms")
	}
	b.ReportMetric(pair["ours"].Seconds()/pair["theirs"].Seconds(), "ours/builtin")
	b.ReportMetric(median(connect["ours"]).Seconds()/median(connect["theirs"]).Seconds(), "connect-ours/builtin")
	e.removeAll(b)
	e.checkClean(b)
}

// BenchmarkCompose brings 50 containers up and down, on a network of each
// driver in turn.
func BenchmarkCompose(b *testing.B) {
	e := newEngine(b, nil)
	e.installPlugin(b)
	drivers := []string{builtin, ours}
	files := map[string]string{}
	for i, d := range drivers {
		ipam := "default"
		if d == ours {
			ipam = ours
		}
		f := filepath.Join(e.dir, fmt.Sprintf("compose%d.yaml", i))
		text := fmt.Sprintf("services:\n  c:\n    image: %s\n    stop_signal: SIGKILL\n    networks: [n]\nnetworks:\n  n:\n    driver: %s\n    ipam: {driver: %s}\n", image, d, ipam)
		if err := os.WriteFile(f, []byte(text), 0o644); err != nil {
			b.Fatal(err)
		}
		files[d] = f
	}
	const rounds = 3
	miscounted := 0
	took := map[string][]time.Duration{}
	for b.Loop() {
		for r := range rounds {
			order := slices.Clone(drivers)
			if r%2 == 1 {
				slices.Reverse(order)
			}
			for _, d := range order {
				// A network that the engine lost count of stays: names are used once.
				project := fmt.Sprintf("round%d%d", r, slices.Index(drivers, d))
				start := time.Now()
				if err := e.compose(nil, files[d], project, "up", "-d", "--scale", "c=50"); err != nil {
					b.Fatal(err)
				}
				up := time.Since(start)
				switch err := e.compose(nil, files[d], project, "down"); {
				case err != nil && strings.Contains(err.Error(), "has active endpoints"):
					// Engine 20.10 miscounts endpoints that go at the same moment,
					// with its own driver too; a restart counts them again.
					miscounted++
					note("50 containers by Compose, %s: the engine lost count of the network's endpoints", d)
				case err != nil:
					b.Fatal(err)
				}
				took[d] = append(took[d], time.Since(start))
				note("50 containers by Compose, %s: up %v, up and down %v", d, up.Round(10*time.Millisecond), time.Since(start).Round(10*time.Millisecond))
			}
		}
	}
	b.ReportMetric(median(took[builtin]).Seconds(), "builtin-s")
	b.ReportMetric(median(took[ours]).Seconds(), "ours-s")
	b.ReportMetric(median(took[ours]).Seconds()/median(took[builtin]).Seconds(), "ours/builtin")
	if miscounted == 0 {
		e.checkClean(b)
	}
}
