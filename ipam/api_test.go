package ipam

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weftnet/weft/internal/plugin"
)

// TestWire sends bodies as engines 20.10, 28 and 29 do, over a socket.
func TestWire(t *testing.T) {
	h := newHouse(t)
	m := plugin.New(plugin.Config{Log: nullLog()})
	m.Constant(plugin.PathIpamCapabilities, Capabilities)
	m.Constant(plugin.PathAddressSpaces, Spaces)
	h.Register(m)
	m.Ready(nil)
	path := filepath.Join(t.TempDir(), "weft.sock")
	l, err := plugin.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- m.Serve(ctx, l) }()
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}
	for _, c := range []struct {
		call, body, want string
		status           int
	}{
		{"GetCapabilities", "", `{"RequiresMACAddress":false}`, 200},
		{"GetDefaultAddressSpaces", "", `{"LocalDefaultAddressSpace":"weft-local","GlobalDefaultAddressSpace":"weft-global"}`, 200},
		{"RequestPool", `{"AddressSpace":"weft-local","Pool":"","SubPool":"","Options":null,"V6":false}`, `{"PoolID":"weft-local,172.16.0.0/24","Pool":"172.16.0.0/24","Data":{}}`, 200},
		{"RequestPool", `{"AddressSpace":"weft-local","Pool":"10.1.0.0/24","SubPool":"10.1.0.128/25","Options":{},"V6":false}`, `{"PoolID":"weft-local,10.1.0.0/24,10.1.0.128/25","Pool":"10.1.0.0/24","Data":{}}`, 200},
		{"RequestAddress", `{"PoolID":"weft-local,172.16.0.0/24","Address":"","Options":{"RequestAddressType":"com.docker.network.gateway"}}`, `{"Address":"172.16.0.1/24","Data":{}}`, 200},
		{"RequestAddress", `{"PoolID":"weft-local,172.16.0.0/24","Address":"","Options":null}`, `{"Address":"172.16.0.2/24","Data":{}}`, 200},
		{"RequestAddress", `{"PoolID":"weft-local,172.16.0.0/24","Address":"","Options":{"com.docker.network.endpoint.name":"web"}}`, `{"Address":"172.16.0.3/24","Data":{}}`, 200},
		{"RequestAddress", `{"PoolID":"weft-local,172.16.0.0/24","Address":"172.16.0.3","Options":null}`, `next free is 172.16.0.4; 3 of 254 used`, 500},
		{"RequestAddress", ``, `Err`, 400},
		{"RequestPool", ``, `Err`, 400},
		{"ReleaseAddress", `{"PoolID":"weft-local,172.16.0.0/24","Address":"172.16.0.2"}`, `{}`, 200},
		{"ReleasePool", `{"PoolID":"weft-local,172.16.0.0/24"}`, `{}`, 200},
		{"ReleasePool", `{"PoolID":"weft-local,172.16.0.0/24"}`, `{}`, 200},
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://weft/IpamDriver."+c.call, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if text := strings.TrimSpace(string(got)); resp.StatusCode != c.status || c.status == 200 && text != c.want || !strings.Contains(text, c.want) {
			t.Errorf("%s %s\n got %d %s\nwant %d %s", c.call, c.body, resp.StatusCode, text, c.status, c.want)
		}
	}
	client.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestChosen: what nobody typed is known as such, also where the engine asks for
// the gateway with a request of its own; what a DHCP server said was not made up.
func TestChosen(t *testing.T) {
	h := newHouse(t)
	auto := h.do("pool local 4")
	prefix := netip.MustParsePrefix(strings.TrimPrefix(auto, "weft-local,"))
	h.do("pool local 10.1.0.0/24")
	h.do("pool local 10.2.0.0/24 sub 10.2.0.128/25")
	h.do("gw weft-local,10.1.0.0/24 10.1.0.254")
	for _, c := range []struct {
		pool, gateway string
		want          [3]bool // subnet, gateway, ours
	}{
		{prefix.String(), strings.Split(h.do("gw "+auto), "/")[0], [3]bool{true, true, true}},
		{"10.1.0.0/24", "10.1.0.254", [3]bool{false, false, true}},
		{"10.2.0.0/24", strings.Split(h.do("gw weft-local,10.2.0.0/24,10.2.0.128/25"), "/")[0], [3]bool{false, true, true}},
		{"10.3.0.0/24", "10.3.0.1", [3]bool{}},
	} {
		subnet, gateway, ours := h.Chosen(netip.MustParsePrefix(c.pool), netip.MustParseAddr(c.gateway))
		if got := [3]bool{subnet, gateway, ours}; got != c.want {
			t.Errorf("%s, gateway %s: %v, want %v", c.pool, c.gateway, got, c.want)
		}
	}
}
