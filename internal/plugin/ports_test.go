package plugin_test

import (
	"context"
	"encoding/json"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/plugin"
)

func options(t *testing.T, text string) map[string]any {
	t.Helper()
	var o map[string]any
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		t.Fatal(err)
	}
	return o
}

func TestParsePortMap(t *testing.T) {
	any4 := netip.MustParseAddr("127.0.0.1")
	for _, c := range []struct {
		name, entries string
		want          []plugin.PortBinding
		err           string
	}{
		{name: "one, either family", entries: `[{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":8080,"HostPortEnd":8080}]`,
			want: []plugin.PortBinding{{Proto: 6, Port: 80, HostPort: 8080, HostPortEnd: 8080}}},
		{name: "any host port", entries: `[{"Proto":132,"IP":"","Port":80,"HostIP":"::1","HostPort":0,"HostPortEnd":0}]`,
			want: []plugin.PortBinding{{Proto: 132, Port: 80, HostIP: netip.MustParseAddr("::1")}}},
		{name: "no end", entries: `[{"Proto":17,"Port":53,"HostIP":"127.0.0.1","HostPort":53}]`,
			want: []plugin.PortBinding{{Proto: 17, Port: 53, HostIP: any4, HostPort: 53, HostPortEnd: 53}}},
		{name: "range and order", entries: `[{"Proto":17,"Port":1,"HostPort":9,"HostPortEnd":12},{"Proto":6,"Port":2,"HostPort":10},{"Proto":6,"Port":1,"HostPort":8}]`,
			want: []plugin.PortBinding{
				{Proto: 6, Port: 1, HostPort: 8, HostPortEnd: 8}, {Proto: 6, Port: 2, HostPort: 10, HostPortEnd: 10},
				{Proto: 17, Port: 1, HostPort: 9, HostPortEnd: 12},
			}},
		{name: "ranges, on two addresses", entries: `[{"Proto":17,"Port":12,"HostPort":22},{"Proto":17,"Port":11,"HostIP":"127.0.0.1","HostPort":21},{"Proto":17,"Port":10,"HostIP":"127.0.0.1","HostPort":20},{"Proto":17,"Port":11,"HostPort":21,"HostPortEnd":21},{"Proto":17,"Port":11,"HostPort":21}]`,
			want: []plugin.PortBinding{
				{Proto: 17, Port: 10, HostIP: any4, HostPort: 20, HostPortEnd: 20, More: 1},
				{Proto: 17, Port: 11, HostPort: 21, HostPortEnd: 21, More: 1},
			}},
		{name: "not in step, to be chosen, other protocol", entries: `[{"Proto":6,"Port":1,"HostPort":9},{"Proto":6,"Port":2,"HostPort":11},{"Proto":6,"Port":3,"HostPort":12,"HostPortEnd":13},{"Proto":6,"Port":4},{"Proto":6,"Port":5},{"Proto":17,"Port":3,"HostPort":12}]`,
			want: []plugin.PortBinding{
				{Proto: 6, Port: 1, HostPort: 9, HostPortEnd: 9}, {Proto: 6, Port: 2, HostPort: 11, HostPortEnd: 11}, {Proto: 6, Port: 3, HostPort: 12, HostPortEnd: 13},
				{Proto: 6, Port: 4}, {Proto: 6, Port: 5}, {Proto: 17, Port: 3, HostPort: 12, HostPortEnd: 12},
			}},
		{name: "mapped IPv4", entries: `[{"Proto":6,"IP":"::ffff:10.0.0.2","Port":80,"HostIP":"::ffff:127.0.0.1","HostPort":1}]`,
			want: []plugin.PortBinding{{Proto: 6, IP: netip.MustParseAddr("10.0.0.2"), Port: 80, HostIP: any4, HostPort: 1, HostPortEnd: 1}}},
		{name: "unknown field of a later engine", entries: `[{"Proto":6,"Port":80,"HostPort":1,"New":[1]}]`,
			want: []plugin.PortBinding{{Proto: 6, Port: 80, HostPort: 1, HostPortEnd: 1}}},
		{name: "none", entries: `[]`},
		{name: "null", entries: `null`},
		{name: "protocol", entries: `[{"Proto":1,"Port":80}]`, err: "protocol 1"},
		{name: "no protocol", entries: `[{"Port":80}]`, err: "protocol 0"},
		{name: "port 0", entries: `[{"Proto":6,"Port":0}]`, err: "port 0"},
		{name: "port too high", entries: `[{"Proto":6,"Port":65536}]`, err: "65536"},
		{name: "negative", entries: `[{"Proto":6,"Port":80,"HostPort":-1}]`, err: "-1"},
		{name: "fraction", entries: `[{"Proto":6,"Port":80.5}]`, err: "80.5"},
		{name: "text", entries: `[{"Proto":"tcp","Port":80}]`, err: "not as Docker sends it"},
		{name: "backwards", entries: `[{"Proto":6,"Port":80,"HostPort":10,"HostPortEnd":9}]`, err: "10 to 9"},
		{name: "range from 0", entries: `[{"Proto":6,"Port":80,"HostPort":0,"HostPortEnd":9}]`, err: "0 to 9"},
		{name: "address", entries: `[{"Proto":6,"Port":80,"HostIP":"localhost"}]`, err: "localhost"},
		{name: "zone", entries: `[{"Proto":6,"Port":80,"HostIP":"fe80::1%eth0"}]`, err: "zone"},
		{name: "not a list", entries: `{"Proto":6}`, err: "not as Docker sends it"},
		{name: "list of text", entries: `["80:80"]`, err: "not as Docker sends it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := plugin.ParsePortMap(options(t, `{"com.docker.network.portmap":`+c.entries+`}`))
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), plugin.OptionPortMap) {
					t.Errorf("got %v, want an error about %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	if got, err := plugin.ParsePortMap(nil); err != nil || len(got) != 0 {
		t.Errorf("no options: %v %v", got, err)
	}
}

func discard() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return log
}

// FuzzRequest sends any bytes to calls of both drivers: whatever they are,
// the answer is an object, a success only for an object, and an error says so
// to both halves.
func FuzzRequest(f *testing.F) {
	for _, seed := range []string{
		leave, "", "null", "[]", "{}", `{"NetworkID":1}`,
		`{"NetworkID":"n","EndpointID":"e","Options":{"com.docker.network.portmap":[{"Proto":6,"Port":80,"HostPort":8080,"HostPortEnd":8081,"HostIP":"::"}]}}`,
		`{"AddressSpace":"l","Pool":"10.0.0.0/8","SubPool":"","Options":{"a":"b"},"V6":false}`,
		`{"PoolID":"p","Options":{"x":1}}`,
	} {
		f.Add([]byte(seed))
	}
	m := plugin.New(plugin.Config{Log: discard()})
	plugin.Handle(m, plugin.PathJoin, func(_ context.Context, r network.JoinRequest) (plugin.Empty, error) {
		_, err := plugin.ParsePortMap(r.Options)
		return plugin.Empty{}, err
	})
	plugin.Handle(m, plugin.PathRequestPool, func(context.Context, ipam.RequestPoolRequest) (*ipam.RequestPoolResponse, error) {
		return nil, nil
	})
	m.Ready(nil)
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, path := range []string{plugin.PathJoin, plugin.PathRequestPool} {
			status, answer := plugin.ServeOnce(t, m, path, body)
			var e struct{ Err, Error string }
			if err := json.Unmarshal(answer, &e); err != nil {
				t.Fatalf("answer %q: %v", answer, err)
			}
			if ok := status == 200; ok != (e.Err == "") || e.Err != e.Error {
				t.Errorf("status %d with %q", status, answer)
			}
			var object map[string]json.RawMessage
			if status == 200 && json.Unmarshal(body, &object) != nil {
				t.Errorf("%q was accepted", body)
			}
		}
	})
}

// FuzzParsePortMap checks that what is accepted could be published, and means
// the same when it is written out and read again.
func FuzzParsePortMap(f *testing.F) {
	f.Add([]byte(`[{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":8080,"HostPortEnd":8080}]`))
	f.Add([]byte(`[{"Proto":17,"Port":53,"HostIP":"::ffff:1.2.3.4","HostPort":0},{"Proto":132,"Port":1,"HostPort":1,"HostPortEnd":65535}]`))
	f.Add([]byte(`[{"Proto":6,"Port":1e1}]`))
	f.Fuzz(func(t *testing.T, entries []byte) {
		var v any
		if json.Unmarshal(entries, &v) != nil {
			return
		}
		got, err := plugin.ParsePortMap(map[string]any{plugin.OptionPortMap: v})
		if err != nil {
			return
		}
		for _, b := range got {
			if b.Port == 0 || b.HostPort > b.HostPortEnd || b.HostPort == 0 && b.HostPortEnd != 0 || b.HostIP.Is4In6() || b.HostIP.Zone() != "" {
				t.Errorf("accepted %+v", b)
			}
		}
		again, err := plugin.ParsePortMap(map[string]any{plugin.OptionPortMap: got})
		if err != nil {
			t.Fatalf("%+v: %v", got, err)
		}
		if diff := cmp.Diff(got, again, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("read again (-first +second):\n%s", diff)
		}
	})
}
