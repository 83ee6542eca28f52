package datapath

import (
	"context"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/internal/netnstest"
)

// pulse is a host's heartbeat in a test.
type pulse struct {
	mu    sync.Mutex
	heard []string
}

func (p *pulse) has(said string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Contains(p.heard, said)
}

func (p *pulse) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.heard = nil
}

func beat(t *testing.T, k *Kernel, host *netnstest.NS, said string) *pulse {
	t.Helper()
	p := &pulse{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go host.Do(func() {
		done <- k.Heartbeat(ctx, Heartbeat{
			Every: 20 * time.Millisecond, Tunnels: func() []string { return []string{"wfx0", "wfx9"} },
			Say: func(tunnel string) []byte { return []byte(said + tunnel) },
			Hear: func(tunnel string, said []byte) {
				p.mu.Lock()
				defer p.mu.Unlock()
				p.heard = append(p.heard, tunnel+" "+string(said))
			},
		})
	})
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return p
}

// TestHeartbeat goes through the tunnel and nowhere else, and not where the tunnel's
// port is closed.
func TestHeartbeat(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(vtep(1, v6).String(), func(t *testing.T) {
			a, b := tunnelled(t, v6, 1500)
			soon := func(what string, ok func() bool) {
				t.Helper()
				for stop := time.Now().Add(5 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
					if time.Now().After(stop) {
						t.Fatal(what)
					}
				}
			}
			noise := capture(t, b.container, "ether proto 0x88b5")
			pa, pb := beat(t, a.k, a.host, "a "), beat(t, b.k, b.host, "b ")
			soon("nothing comes through", func() bool { return pa.has("wfx0 b wfx0") && pb.has("wfx0 a wfx0") })

			// A container says the same, and is not heard: not here, and not there.
			var fd int
			var card *net.Interface
			var err error
			a.container.Do(func() {
				if card, err = net.InterfaceByName("eth0"); err == nil {
					fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = unix.Close(fd) }()
			for range 5 {
				if err := unix.Sendto(fd, ethernet(nearestBridge, mac(1), heartbeatType, []byte("liar")), 0, &unix.SockaddrLinklayer{Ifindex: card.Index, Halen: 6}); err != nil {
					t.Fatal(err)
				}
			}

			// Another VXLAN port of the firewall's, one way.
			a.host.Exec("nft", "add table inet closed; add chain inet closed in { type filter hook input priority 0; }; add rule inet closed in udp dport 4789 drop")
			time.Sleep(50 * time.Millisecond) // what was under way
			pa.forget()
			pb.forget()
			soon("the open direction is closed", func() bool { return pb.has("wfx0 a wfx0") })
			time.Sleep(100 * time.Millisecond)
			if pa.has("wfx0 b wfx0") {
				t.Error("heard through a closed port")
			}
			for _, p := range []*pulse{pa, pb} {
				if p.has("wfx0 liar") || p.has("wfv0 liar") {
					t.Error("a container was heard")
				}
			}
			a.host.Exec("nft", "delete table inet closed")
			soon("it is open again", func() bool { return pa.has("wfx0 b wfx0") })
			if got := noise(0); got != "" {
				t.Errorf("a container hears heartbeats:\n%s", got)
			}
			a.same(t)
		})
	}
}
