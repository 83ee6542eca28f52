//go:build e2e

package e2e

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// moves lets a container go from one host to the next, with its addresses, while
// a peer on the third pings it.
func (all members) moves(t *testing.T) {
	t.Helper()
	const a4, a6 = "10.44.9.9", "fd44::9:9"
	peer := box{e: all[2], name: "peer"}
	peer.e.run(t, peer.name, "--network", "blue")
	mover := func(e *engine, args ...string) box {
		e.run(t, "mover", append([]string{"--network", "blue", "--ip", a4, "--ip6", a6}, args...)...)
		return box{e: e, name: "mover"}
	}
	at := mover(all[0])
	for i, args := range [][]string{nil, {"--mac-address", "02:00:00:00:99:01"}, nil} {
		beats := map[string]*talker{a4: peer.start(t, "beat", a4), a6: peer.start(t, "beat", a6)}
		for a, b := range beats {
			eventually(t, 3*time.Second, "answers of "+a, func() error {
				if b.out.String() == "" {
					return fmt.Errorf("none yet: %s", b.err.String())
				}
				return nil
			})
		}
		to := all[(i+1)%2]
		at.e.must(t, "rm", "-f", at.name)
		at = mover(to, args...)
		started := time.Now()
		limit := time.Second * suite.slow
		time.Sleep(limit + 300*time.Millisecond)
		mac := to.must(t, "inspect", "-f", "{{.NetworkSettings.Networks.blue.MacAddress}}", at.name)
		if len(args) > 0 && mac != args[1] {
			t.Errorf("the mover has MAC %s, want %s", mac, args[1])
		}
		neigh, err := peer.ip("neigh")
		if err != nil {
			t.Fatal(err)
		}
		for a, b := range beats {
			first := time.Duration(-1)
			for _, l := range b.stop(t) {
				ms, err := strconv.ParseInt(l, 10, 64)
				if err != nil {
					t.Fatalf("beat printed %q", l)
				}
				if d := time.UnixMilli(ms).Sub(started); d >= 0 && first < 0 {
					first = d
				}
			}
			if first < 0 || first > limit {
				t.Errorf("move %d to %s: first answer of %s after %v, want within %v", i+1, to.name, a, first, limit)
			}
			if !strings.Contains(neigh, a+" dev eth0 lladdr "+mac) {
				t.Errorf("move %d to %s: the peer does not have %s at %s:\n%s", i+1, to.name, a, mac, neigh)
			}
		}
		all.agree(t, "blue")
	}
	at.e.must(t, "rm", "-f", at.name)
	peer.e.must(t, "rm", "-f", peer.name)
}

// ip is busybox's, in the container.
func (b box) ip(args ...string) (string, error) {
	c, err := b.e.in(b.name, append([]string{"/bin/busybox", "ip"}, args...)...)
	if err != nil {
		return "", err
	}
	return output(c)
}
