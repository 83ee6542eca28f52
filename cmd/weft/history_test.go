package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/ipam"
)

// TestAddressHistory asks a real plugin who had an address, also after it was killed
// and started again, and after the container has gone.
func TestAddressHistory(t *testing.T) {
	l := newLAN(t)
	l.start()
	pool, subnet, _ := l.pool("10.77.0.0/24", "")
	l.network(subnet, "10.77.0.1/24")
	a := l.request(pool, "10.77.0.5", "/web-1")
	id, refusal := l.endpoint(1, a, "")
	l.want("endpoint", refusal, "")
	ask := func(args ...string) string {
		t.Helper()
		_, out, errs := weft(t, "", append(append([]string{"address", "history"}, args...), "--socket", filepath.Join(l.dir, adminSocket))...)
		return out + errs
	}
	l.want("ready", fmt.Sprint(len(l.status(t).Endpoints)), "1")
	// What is told of it later is written within a second or so.
	for end := time.Now().Add(20 * time.Second); !strings.Contains(ask("10.77.0.5"), id[:12]) && time.Now().Before(end); {
		time.Sleep(50 * time.Millisecond)
	}
	l.again()
	l.ready()
	row := func(text string) []string {
		lines := strings.Split(strings.TrimSpace(text), "\n")
		return strings.Fields(lines[len(lines)-1])
	}
	now := row(ask("10.77.0.5", "-at", time.Now().Format("2006-01-02T15:04:05")))
	if len(now) < 8 || now[0] != "10.77.0.5" || now[1] != "web-1" || now[2] != id[:12] || !strings.HasPrefix(now[3], "02:") || now[6] != "now" {
		t.Errorf("has it now: %q", now)
	}
	l.must(t, "NetworkDriver.DeleteEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q}`, netID, id))
	l.release(pool, a)
	var list []ipam.Tenure
	if text := ask("web-1", "-json"); json.Unmarshal([]byte(text), &list) != nil || len(list) != 1 || list[0].Endpoint != id ||
		list[0].Address != netip.MustParseAddr("10.77.0.5") || list[0].To.IsZero() || list[0].To.Before(list[0].From) {
		t.Errorf("had it: %s", text)
	}
	l.contains("nobody", ask("10.77.0.6"), "nobody that is known of")
	l.contains("two words", ask("a", "b"), "history takes an address, a container's name")
	l.contains("no time", ask("-at", "noon"), "write 14:05")

	if err := l.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-l.ended
	t.Setenv("HISTORY", "0")
	l.start()
	l.ready()
	l.contains("switched off", ask(), "give the plugin the setting HISTORY=720h")
}

// ready waits until calls are answered.
func (l *lan) ready() {
	l.t.Helper()
	for range 250 {
		if l.status(l.t).Phase == serving {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	l.t.Fatal("the plugin does not come up")
}

func TestParseMoment(t *testing.T) {
	zone := time.FixedZone("here", 2*3600)
	now := time.Date(2026, 3, 1, 14, 5, 9, 0, zone)
	for s, want := range map[string]string{
		"": "0001-01-01T00:00:00Z 0", "14:05": "2026-03-01T14:05:00+02:00 60", "14:05:10": "2026-02-28T14:05:10+02:00 1", "23:59": "2026-02-28T23:59:00+02:00 60",
		"2026-02-03": "2026-02-03T00:00:00+02:00 86400", "2026-02-03 04:05": "2026-02-03T04:05:00+02:00 60", "2026-02-03T04:05:06Z": "2026-02-03T04:05:06Z 1",
		"noon": "", "25:00": "", "2026-02-30": "",
	} {
		since, until, err := parseMoment(s, now)
		got := fmt.Sprint(since.Format(time.RFC3339), " ", until.Sub(since).Round(time.Millisecond).Seconds())
		if (err != nil) != (want == "") || err == nil && got != want {
			t.Errorf("%q: %s %v, want %s", s, got, err, want)
		}
	}
}
