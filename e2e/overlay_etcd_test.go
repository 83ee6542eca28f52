//go:build e2e

package e2e

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// etcdOn starts etcd on the client of a LAN; the process ends with the test.
func etcdOn(tb testing.TB, m *machine) *exec.Cmd {
	tb.Helper()
	binary, err := exec.LookPath("etcd")
	if err != nil {
		tb.Fatalf("needs etcd (Debian: etcd-server): %v", err)
	}
	url := "http://" + client4 + ":2379"
	c := m.inNet(binary, "--data-dir", filepath.Join(m.dir, "etcd"), "--log-level", "error", "--logger", "zap",
		"--listen-client-urls", url, "--advertise-client-urls", url,
		"--listen-peer-urls", "http://127.0.0.1:2380", "--initial-advertise-peer-urls", "http://127.0.0.1:2380",
		"--initial-cluster", "default=http://127.0.0.1:2380")
	if runtime.GOARCH != "amd64" { // else 3.4 refuses to start
		c.Env = append(os.Environ(), "ETCD_UNSUPPORTED_ARCH="+runtime.GOARCH)
	}
	if err := c.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { end(c) })
	eventually(tb, 10*time.Second, "etcd answers", func() error {
		_, err := etcdKeys(m)
		return err
	})
	return c
}

// etcdKeys are all keys that weft has in etcd.
func etcdKeys(m *machine) ([]string, error) {
	enc := base64.StdEncoding.EncodeToString
	ask := fmt.Sprintf(`{"key":%q,"range_end":%q,"keys_only":true}`, enc([]byte("/weft/")), enc([]byte("/weft0")))
	out, err := output(m.inNet("curl", "-sS", "--max-time", "2", "-d", ask, "http://"+client4+":2379/v3/kv/range"))
	if err != nil {
		return nil, err
	}
	var answer struct{ Kvs []struct{ Key []byte } }
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return nil, fmt.Errorf("%s: %w", out, err)
	}
	var keys []string
	for _, kv := range answer.Kvs {
		keys = append(keys, string(kv.Key))
	}
	return keys, nil
}

// TestOverlayEtcd is three hosts that keep what they share in etcd, addresses
// included: the same network on each, without a range of its own.
func TestOverlayEtcd(t *testing.T) {
	t.Parallel()
	all := newMembers(t, 3)
	client := all[0].lan.client
	etcd := etcdOn(t, client)
	for _, e := range all {
		e.installPlugin(t, "STORE=etcd://"+client4+":2379", "UNDERLAY=lan0")
		e.must(t, "network", "create", "-d", ours, "--ipam-driver", ours, "--ipam-opt", "space=blue", "-o", "mode=overlay", "-o", "vni="+blueVNI,
			"--subnet", blue4, "blue")
	}
	containers := []string{"alpha", "beta", "gamma"}
	var addrs []string
	for i, e := range all {
		e.run(t, containers[i], "--network", "blue", "--hostname", e.name)
		addrs = append(addrs, e.addresses(t, containers[i], "blue")...)
	}
	slices.Sort(addrs)
	if len(slices.Compact(addrs)) != 3 {
		t.Fatalf("addresses of three containers: %v", addrs)
	}
	all.reach(t, containers)
	has := all[0].addresses(t, "alpha", "blue")[0]
	if out, err := all[1].docker("run", "--rm", "--network", "blue", "--ip", has, image); err == nil || !strings.Contains(out+err.Error(), "is held by host host1") {
		t.Errorf("--ip %s, which a container on %s has: %v %s", has, all[0].name, err, out)
	}
	var pools strings.Builder
	for _, e := range all {
		pools.WriteString(e.net(t, suite.weft, "status", "--socket", filepath.Join(e.state(t), "admin.sock"), "pools"))
	}
	if n := strings.Count(pools.String(), "blue"); n != 3 {
		t.Errorf("weft status pools:\n%s", pools.String())
	}

	end(etcd)
	all.reach(t, containers)
	start := time.Now()
	out, err := all[2].docker("run", "-d", "--name", "late", "--network", "blue", image)
	if err == nil || !strings.Contains(out+err.Error(), "etcd at etcd://"+client4) {
		t.Errorf("a container while etcd is away: %v %s", err, out)
	}
	t.Logf("a container while etcd is away is refused after %v", time.Since(start))
	all[2].must(t, "rm", "-f", "late")
	all[1].must(t, "rm", "-f", "beta") // released when etcd is back
	etcdOn(t, client)
	eventually(t, 20*time.Second, "a container after etcd is back", func() error {
		out, err := all[1].docker("run", "-d", "--name", "beta", "--hostname", all[1].name, "--network", "blue", image)
		if err != nil {
			_, _ = all[1].docker("rm", "-f", "beta")
			return fmt.Errorf("%w %s", err, out)
		}
		return nil
	})
	all.reach(t, containers)
	for i, e := range slices.Backward(all) {
		e.must(t, "rm", "-f", containers[i])
		e.must(t, "network", "rm", "blue")
	}
	for _, e := range all {
		e.checkCleanIn(t, 40*time.Second)
	}
	eventually(t, 20*time.Second, "nothing is left in etcd", func() error {
		keys, err := etcdKeys(client)
		left := slices.DeleteFunc(keys, func(k string) bool { return strings.Contains(k, "/overlay/alive/") })
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("left: %v", left)
		}
		return err
	})
}
