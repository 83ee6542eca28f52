package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// crowd are containers that ask without a name, as the engines before 29 have
// them do.
type crowd struct {
	*house
	pool string
	has  map[string]string
}

// do runs what happens to containers: "start a b", "stop a", "restart a", "pass 61s",
// "reboot", which stops all and starts those again that ran, in a bad order.
func (c *crowd) do(line string) {
	c.tb.Helper()
	f := strings.Fields(line)
	switch f[0] {
	case "pass":
		d, err := time.ParseDuration(f[1])
		if err != nil {
			c.tb.Fatal(err)
		}
		c.clock = c.clock.Add(d)
		return
	case "end": // of the plugin's process
		if err := c.saveBack(c.tb.Context()); err != nil {
			c.tb.Fatal(err)
		}
		c.restart()
		return
	case "kill":
		c.restart()
		return
	}
	for _, name := range f[1:] {
		name, want, _ := strings.Cut(name, "=")
		if f[0] == "stop" || f[0] == "restart" {
			if got := c.house.do("free " + c.pool + " " + c.has[name]); got != "ok" {
				c.tb.Fatal(got)
			}
			c.clock = c.clock.Add(200 * time.Millisecond)
		}
		if f[0] == "start" || f[0] == "restart" {
			got := c.house.do("addr " + c.pool + " " + want)
			a, err := netip.ParsePrefix(got)
			if err != nil {
				c.tb.Fatalf("%s: %s", line, got)
			}
			c.has[name] = a.Addr().String()
		}
	}
}

// TestBack: who has which address, where the engine says no names.
func TestBack(t *testing.T) {
	for name, c := range map[string]struct {
		pool, script, want string
	}{
		"restart":                          {"", "start a b c; restart a; restart b; restart c; restart c", "a=1 b=2 c=3"},
		"stop, a minute, start":            {"", "start a b c; stop b; pass 61s; start b", "a=1 b=2 c=3"},
		"others restart meanwhile":         {"", "start a b c; stop a; pass 61s; restart c; restart b; restart c; pass 61s; start a", "a=1 b=2 c=3"},
		"all stop and start":               {"", "start a b c; stop c b a; start a b c; stop b c a; pass 1h; start a b c", "a=1 b=2 c=3"},
		"two restart at once":              {"", "start a b c; stop a c; start a c", "a=1 b=2 c=3"},
		"a new one takes the lowest":       {"", "start a b c; stop a; pass 61s; start d", "a=1 b=2 c=3 d=1"},
		"the plugin is killed":             {"", "start a b c; stop a; pass 61s; kill; restart b; restart c; pass 3m; start a", "a=1 b=2 c=3"},
		"the engine restarts":              {"", "start a b c; stop a; pass 5m; stop c b; pass 2s; end; pass 10s; start b c; pass 5m; start a", "a=1 b=2 c=3"},
		"the engine is killed":             {"", "start a b c; stop a; pass 5m; kill; pass 2s; stop c b; pass 10s; start b c; pass 5m; start a", "a=1 b=2 c=3"},
		"stopped just before it is killed": {"", "start a b; stop a; end; stop b; start b; pass 5m; start a", "a=1 b=2"},
		"one of them does not come back":   {"", "start a b c; stop a; pass 5m; stop c b; end; pass 10s; start b; pass 5m; start a c", "a=1 b=2 c=3"},
		"stopped long before the end":      {"", "start a b c; stop b; pass 5m; stop a c; end; start a c; pass 5m; start b", "a=1 b=2 c=3"},
		"ended twice":                      {"", "start a b; stop a; end; kill; pass 5m; start c a", "a=3 b=2 c=1"},
		"asked for by number, and stopped": {"", "start a=10.1.0.1 b; stop a; pass 1h; start c; restart b; start a=10.1.0.1", "a=1 b=2 c=3"},
		"that over a restart":              {"", "start a=10.1.0.1 b; stop a; end; start c; kill; start d a=10.1.0.1", "a=1 b=2 c=3 d=4"},
		"that once more":                   {"", "start a=10.1.0.2 b; stop a; start a=10.1.0.2; stop a; pass 1h; start c; start a=10.1.0.2", "a=2 b=1 c=3"},
		"that where nothing else is free":  {"10.1.0.0/30", "start a=10.1.0.1 b; stop a; start c", "a=1 b=2 c=1"},
		"that last of all that rest":       {"10.1.0.0/29 quarantine=1h", "start a=10.1.0.1 b c d e f; stop a b; start g h", "a=1 b=2 c=3 d=4 e=5 f=6 g=2 h=1"},
		"that with keep":                   {"10.1.0.0/24 keep=1m", "start a=10.1.0.1; stop a; start b; pass 2m; start c", "a=1 b=2 c=1"},
		"that with keep=0":                 {"10.1.0.0/24 keep=0", "start a=10.1.0.1; stop a; start b", "a=1 b=1"},
		"quarantine is for everybody":      {"10.1.0.0/24 quarantine=5m", "start a b; restart a", "a=3 b=2"},
		"IPv6":                             {"fd00::/64", "start a=fd00::1 b c; stop a; pass 1m; restart b; stop b; pass 1m; restart c; start b a=fd00::1", "a=1 b=2 c=3"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.pool == "" {
				c.pool = "10.1.0.0/24"
			}
			h := newClock(t)
			g := &crowd{house: h, pool: h.do("pool local " + c.pool), has: map[string]string{}}
			for line := range strings.SplitSeq(c.script, "; ") {
				g.do(line)
			}
			var got []string
			for name, a := range g.has {
				got = append(got, fmt.Sprintf("%s=%s", name, a[strings.LastIndexAny(a, ".:")+1:]))
			}
			slices.Sort(got)
			if s := strings.Join(got, " "); s != c.want {
				t.Errorf("%s\n got %s\nwant %s", c.script, s, c.want)
			}
		})
	}
}
