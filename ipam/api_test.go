package ipam

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"regexp"
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

// TestErrorsSayWhatToDo: whatever a user types wrong is answered in plain words with
// what to type instead.
func TestErrorsSayWhatToDo(t *testing.T) {
	h := newHouse(t)
	goWords := regexp.MustCompile(`ParseAddr|ParsePrefix|strconv|invalid syntax|time: |netip|%!|<nil>`)
	p := h.do("pool local 10.1.0.0/24")
	for line, want := range map[string]string{
		"pool local 10.0.0":                                            `subnet "10.0.0" is not one: write it as 10.0.0.0/24`,
		"pool local 10.0.0.0/33":                                       "write it as 10.0.0.0/24",
		"pool local 10.9.0.0/24 sub 10.9.0.x":                          "write it as 10.0.0.128/25",
		"pool local 10.9.0.0/24 sub 10.8.0.0/25":                       "choose one that is",
		"pool local 4 sub 10.9.0.0/25":                                 "add --subnet",
		"pool local 224.0.0.0/24":                                      "choose another",
		"pool local 10.9.0.0/24 parent=eth0":                           "valid are space, dhcp, quarantine, keep, dhcp_fallback, dhcp_timeout, client_id, hostname, register_dns, vendor_class, reserve.NAME; options of the network itself are given with -o",
		"pool local 10.9.0.0/24 dhpc=eth0":                             `did you mean "dhcp"?`,
		"pool local 10.9.0.0/24 quarantine=1x":                         "a time is written as 90s, 5m or 24h",
		"pool local 10.9.0.0/24 reserve.db=10.9.0":                     "write it as 192.168.1.20",
		"pool local 10.9.0.0/24 dhcp=a/b":                              "name one that ip link shows",
		"pool local 10.9.0.0/24 client_id=mac":                         "add dhcp=INTERFACE",
		"pool local 10.9.0.0/24 hostname.web=cam":                      "add dhcp=INTERFACE",
		"pool local 10.9.0.0/24 dhcp=a client_id=cam":                  "write client_id.CONTAINER=cam",
		"pool local 10.9.0.0/24 dhcp=a client_id.web=01:0x":            "write it as 0x01024211 or 01:02:42:11",
		"pool local 10.9.0.0/24 dhcp=a client_id.web=0x1":              "write it as 0x01024211",
		"pool local 10.9.0.0/24 dhcp=a client_id.a/b=mac":              "write it as docker ps shows it",
		"pool local 10.9.0.0/24 dhcp=a client.id=mac":                  "valid are space",
		"pool local 10.9.0.0/24 dhcp=a vendor_class=\x1b":              "printable characters",
		"pool local 10.9.0.0/24 dhcp=a hostname=cam":                   "write hostname.CONTAINER=cam",
		"pool local 10.9.0.0/24 dhcp=a hostname.web=cam.lan":           "and no domain",
		"pool local 10.9.0.0/24 dhcp=a register_dns=yes":               "choose true or false",
		"pool local 10.9.0.0/24 dhcp=a dhcp_timeout=30s":               "choose 1s to 9s",
		"pool local 10.9.0.0/24 dhcp=a dhcp_timeout.web=3s":            "write dhcp_timeout=TIME",
		"pool local 10.9.0.0/24 dhcp=a dhcp_timout=3s":                 `did you mean "dhcp_timeout"?`,
		"pool local 10.9.0.0/24 dhcp_fallback=refuse":                  "add dhcp=INTERFACE",
		"pool local 10.9.0.0/24 dhcp=a dhcp_fallback=link-local":       "choose refuse, or a range that the server leaves alone, as 192.168.1.240/28",
		"pool local 10.9.0.0/24 dhcp=a dhcp_fallback=10.9.0.8/24":      "choose refuse, or a range",
		"pool local 10.9.0.0/24 space=a/b":                             "letters, digits, dots",
		"addr " + p + " 10.1.0":                                        "write it as 10.0.0.5",
		"addr " + p + " 10.1.0.255":                                    "10.1.0.1 to 10.1.0.254 are",
		"pool local 10.9.0.0/24 reserve.db=10.9.0.5,01:00:5e:00:00:01": "write it as 02:42:c0:a8:01:14",
	} {
		got := h.do(line)
		if !strings.HasPrefix(got, "error: ") || !strings.Contains(got, want) || goWords.MatchString(got) || strings.Contains(got, "\n") {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
	for text, want := range map[string]string{
		"10.0.0.0": "write CIDR:SIZE as in 10.0.0.0/8:24", "10.0.0/8:24": "write CIDR:SIZE", "10.0.0.0/8:x": "a prefix length from 8 to 30, as in 10.0.0.0/8:24",
		"10.0.0.1/8:24": "write 10.0.0.0/8", "10.0.0.0/8:24,10.1.0.0/16:24": "leave one out",
	} {
		if _, err := ParsePools(text); err == nil || !strings.Contains(err.Error(), want) || goWords.MatchString(err.Error()) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}
