package main

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weftnet/weft/internal/dhcp/dhcptest"
)

// TestChosenMAC gives containers MAC addresses of their users' choice, which the
// engine tells after it has asked for the address: the server's reservation for one
// applies, or it is said what to do.
func TestChosenMAC(t *testing.T) {
	for _, k := range []dhcptest.Kind{dhcptest.Dnsmasq, dhcptest.ISC, dhcptest.Kea} {
		t.Run(fmt.Sprint(k), func(t *testing.T) { chosenMAC(t, k) })
	}
}

func chosenMAC(t *testing.T, k dhcptest.Kind) {
	t.Helper()
	const known, unknown = "02:00:00:00:00:33", "02:00:00:00:00:44"
	l := newLAN(t)
	l.config.Reservations = []dhcptest.Reservation{{MAC: known, Address: netip.MustParseAddr("10.77.0.33")}}
	server := dhcptest.Start(t, k, l.router, l.config)
	l.start()
	pool, subnet, gateway := l.pool("", `"dhcp":"lan0"`)
	if pool == "" {
		t.Fatal(subnet)
	}
	l.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"`+netID+`","Options":{"com.docker.network.generic":{"mode":"macvlan","parent":"lan0"}},`+
		`"IPv4Data":[{"AddressSpace":"weft-local","Pool":"`+subnet+`","Gateway":"`+gateway+`"}]}`)
	n := 0
	endpoint := func(address, mac string) (id, refusal string) {
		t.Helper()
		n++
		id = fmt.Sprintf("%012x", n) + strings.Repeat("e", 52)
		status, m := l.call(t, "NetworkDriver.CreateEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":%q,"MacAddress":%q},"Options":{}}`, netID, id, address, mac))
		if status != 200 {
			return id, fmt.Sprint(m["Err"])
		}
		return id, ""
	}
	gone := func(id, address string) {
		t.Helper()
		l.must(t, "NetworkDriver.DeleteEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q}`, netID, id))
		l.release(pool, address)
	}
	leasedTo := func(address, mac string) {
		t.Helper()
		if _, ok := server.Leases()[first(address)]; !ok && k != dhcptest.ISC || !strings.Contains(server.Log(), mac) { // ISC's has no leases of what is reserved
			t.Errorf("the server has leased %s to somebody else than %s, or not at all", address, mac)
		}
		for _, lease := range l.leases().Leases {
			if lease.Address == first(address) && lease.MAC != mac {
				t.Errorf("status says that %s is leased to %s, want %s", address, lease.MAC, mac)
			}
		}
	}
	order := func(args string) string {
		t.Helper()
		_, out, errs := weft(t, "", append(strings.Fields(args), "--socket", filepath.Join(l.dir, adminSocket))...)
		return out + errs
	}
	// Nothing is reserved for it: it keeps the address, once more and with the
	// station's own MAC address again.
	a := l.request(pool, "", "")
	for _, mac := range []string{unknown, unknown, ""} {
		id, refusal := endpoint(a, mac)
		if refusal != "" {
			t.Fatal(refusal)
		}
		if mac != "" {
			leasedTo(a, mac)
		}
		gone(id, a)
		before := a
		if a = l.request(pool, "", ""); a != before && k != dhcptest.Kea { // which forgets what was given back
			t.Fatalf("made again: %s, before %s", a, before)
		}
	}
	l.release(pool, a)
	// Something is: what to do is said, and works.
	a = l.request(pool, "", "")
	_, refusal := endpoint(a, known)
	l.contains("a MAC address that the server knows", refusal, "MAC address "+known+": the DHCP server on lan0 has 10.77.0.33 for it")
	l.contains("what to do", refusal, "`weft address reserve CONTAINER 10.77.0.33 "+known+"`, and before Docker 29 --ip 10.77.0.33")
	l.release(pool, a)
	l.contains("asked for by number alone", l.request(pool, "10.77.0.33", ""), "if it keeps 10.77.0.33 for a MAC address, say so here, too")
	l.contains("reserved", order("address reserve nas 10.77.0.33 "+known), "is reserved for nas")
	for _, name := range []string{"", "nas"} {
		want := "10.77.0.33"
		if name != "" {
			want = ""
		}
		a = l.request(pool, want, name)
		l.want("reserved, asked for by "+name, a, "10.77.0.33/24")
		id, refusal := endpoint(a, known)
		l.want("reserved", refusal, "")
		leasedTo(a, known)
		gone(id, a)
	}
}
