package driver

import (
	"fmt"
	"path/filepath"
	"testing"

	wire "github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/internal/store"

	"github.com/weftnet/weft/internal/plugin"
)

// BenchmarkCreateEndpoint is what the driver and its store add to a container
// start, with a kernel that takes no time; the record is written and the
// tables searched. It must not grow with the endpoints that are there.
func BenchmarkCreateEndpoint(b *testing.B) {
	for _, there := range []int{0, 1000} {
		b.Run(fmt.Sprintf("there=%d", there), func(b *testing.B) {
			d := benchDriver(b, there)
			n, unlock := d.find(net1)
			defer unlock()
			for i := 0; b.Loop(); i++ {
				rec := benchEndpoint(50000 + i%5000)
				if err := d.createEndpoint(b.Context(), n, rec); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := d.finish(b.Context(), n, n.endpoints[rec.ID]); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkReconcileIdle is the periodic pass over 1,000 endpoints with
// nothing to do.
func BenchmarkReconcileIdle(b *testing.B) {
	d := benchDriver(b, 1000)
	for b.Loop() {
		if lines, err := d.Reconcile(b.Context()); err != nil || len(lines) > 0 {
			b.Fatal(lines, err)
		}
	}
}

// BenchmarkRecover is the start with 1,000 endpoints recorded.
func BenchmarkRecover(b *testing.B) {
	d := benchDriver(b, 1000)
	for b.Loop() {
		if err := d.Recover(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func benchEndpoint(i int) Endpoint {
	rec := Endpoint{Version: recordVersion, ID: numbered(i + 1), Network: net1}
	p, err := parseInterface(Network{Subnets: []Subnet{subnet("10.0.0.0/8", "10.0.0.1/8")}},
		plugin.CreateEndpointRequest{EndpointID: rec.ID, Interface: &wire.EndpointInterface{Address: fmt.Sprintf("10.1.%d.%d/8", i/250, 2+i%250)}})
	if err != nil {
		panic(err)
	}
	rec.Addrs, rec.MAC = p.Addrs, endpointMAC(rec.ID, p.Addrs)
	return rec
}

func benchDriver(b *testing.B, there int) *Driver {
	b.Helper()
	s, err := store.Open(filepath.Join(b.TempDir(), "weft.db"), store.Options{NoSync: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	d, err := New(Config{Networks: s, Endpoints: s, Kernel: newFakeKernel(&faults{}), Backends: map[string]Backend{"bridge": Bridge{}},
		Host: newFakeHost(newFakeKernel(&faults{}), 1500), Log: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	rec, err := parseNetworkOptions(nil, []string{"bridge"}, modeBridge)
	if err != nil {
		b.Fatal(err)
	}
	rec.ID, rec.Subnets = net1, []Subnet{subnet("10.0.0.0/8", "10.0.0.1/8")}
	if err := d.createNetwork(b.Context(), rec); err != nil {
		b.Fatal(err)
	}
	n, unlock := d.find(net1)
	defer unlock()
	for i := range there {
		if err := d.createEndpoint(b.Context(), n, benchEndpoint(i)); err != nil {
			b.Fatal(err)
		}
	}
	return d
}
