package plugin_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"testing"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/internal/plugin"
)

// BenchmarkCall is what the wire adds to a call: Join, with the ports of a
// usual container, and no driver behind it.
func BenchmarkCall(b *testing.B) {
	m := plugin.New(plugin.Config{Log: discard()})
	plugin.Handle(m, plugin.PathJoin, func(_ context.Context, r network.JoinRequest) (plugin.JoinResponse, error) {
		_, err := plugin.ParsePortMap(r.Options)
		return plugin.JoinResponse{InterfaceName: &plugin.InterfaceName{InterfaceName: network.InterfaceName{SrcName: "wfp1", DstPrefix: "eth"}}}, err
	})
	m.Ready(nil)
	l, err := plugin.Listen(filepath.Join(b.TempDir(), "p.sock"))
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- m.Serve(ctx, l) }()
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", l.Addr().String())
		},
	}}
	body := []byte(`{"NetworkID":"18ac6c89434132d4c32e028153931aff5f1cb434c88a00b94d4af4000d03ea79",` +
		`"EndpointID":"cafecafecafecafecafecafecafecafecafecafecafecafecafecafecafecafe","SandboxKey":"/var/run/docker/netns/ab12",` +
		`"Options":{"com.docker.network.portmap":[{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":8080,"HostPortEnd":8080}],` +
		`"com.docker.network.endpoint.exposedports":[{"Proto":6,"Port":80}]}}`)
	b.ReportAllocs()
	for b.Loop() {
		resp, err := client.Post("http://weft"+plugin.PathJoin, "", bytes.NewReader(body))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
			b.Fatal(resp.Status, err)
		}
		_ = resp.Body.Close()
	}
	b.StopTimer()
	client.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}
