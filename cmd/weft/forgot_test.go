package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/dhcp/dhcptest"
)

// TestServerForgets: a router is set up anew, or forgets its leases with a restart.
// What it offers next is what containers have; they keep that, the router hears of it
// again, and the new container is given what is free.
func TestServerForgets(t *testing.T) {
	t.Parallel()
	for _, kind := range []dhcptest.Kind{dhcptest.Dnsmasq, dhcptest.ISC, dhcptest.Kea} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			l := newLAN(t)
			l.config.Last = netip.MustParseAddr("10.77.0.103")
			server := dhcptest.Start(t, kind, l.router, l.config)
			l.start()
			id, _, _ := l.pool("", `"dhcp":"lan0"`)
			have := map[netip.Addr]bool{}
			for range 3 {
				have[first(l.request(id, "", ""))] = true
			}
			server.Stop()
			server = dhcptest.Start(t, kind, l.router, l.config) // with an empty file of leases
			got := l.request(id, "", "new")
			if a := first(got); have[a] || !l.config.Subnet.Contains(a) {
				t.Errorf("the new one has %s, the others %v", got, have)
			}
			l.contains("one more than there is room for", l.request(id, "", "more"), "no DHCP server answered")
			if strings.Contains(server.Log(), "DECLINE") {
				t.Errorf("declined what containers have:\n%s", server.Log())
			}
			for end := time.Now().Add(5 * time.Second); len(server.Leases()) < 4; time.Sleep(50 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("the server has %v", server.Leases())
				}
			}
		})
	}
}
