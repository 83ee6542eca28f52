package ipam

import (
	"context"
	"io"
	"net"
	"net/http"
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
