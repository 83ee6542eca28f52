package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/internal/dhcp/dhcptest"
)

// network makes the macvlan network of a pool.
func (l *lan) network(subnet, gateway string) {
	l.t.Helper()
	l.must(l.t, "NetworkDriver.CreateNetwork", `{"NetworkID":"`+netID+`","Options":{"com.docker.network.generic":{"mode":"macvlan","parent":"lan0"}},`+
		`"IPv4Data":[{"AddressSpace":"weft-local","Pool":"`+subnet+`","Gateway":"`+gateway+`"}]}`)
}

// endpoint makes one of that network, with options of its own, or returns why not.
func (l *lan) endpoint(n int, address, options string) (id, refusal string) {
	l.t.Helper()
	id = fmt.Sprintf("%012x", n) + strings.Repeat("e", 52)
	status, m := l.call(l.t, "NetworkDriver.CreateEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":%q},"Options":{%s}}`, netID, id, address, options))
	if status != 200 {
		return id, fmt.Sprint(m["Err"])
	}
	return id, ""
}

// TestTold has real servers told what users choose: of all containers of a network, of
// those of a name, and of an endpoint, which the engine says after the address.
func TestTold(t *testing.T) {
	for _, k := range []dhcptest.Kind{dhcptest.Dnsmasq, dhcptest.ISC, dhcptest.Kea} {
		t.Run(fmt.Sprint(k), func(t *testing.T) { told(t, k) })
	}
}

func told(t *testing.T, k dhcptest.Kind) {
	t.Helper()
	l := newLAN(t)
	l.config.Reservations = []dhcptest.Reservation{
		{ClientID: []byte{1, 2, 3, 4}, Address: netip.MustParseAddr("10.77.0.33")},
		{ClientID: append([]byte{1}, 2, 0, 0, 0, 0, 0x44), Address: netip.MustParseAddr("10.77.0.44")},
	}
	server := dhcptest.Start(t, k, l.router, l.config)
	l.start()
	pool, subnet, gateway := l.pool("10.77.0.0/24", `"dhcp":"lan0","vendor_class":"weft test","register_dns":"true","hostname.web":"cam","client_id.nas":"01:02:03:04",`+
		`"client_id.box":"mac","reserve.box":"10.77.0.44,02:00:00:00:00:44","dhcp_timeout":"5s"`)
	if pool == "" {
		t.Fatal(subnet)
	}
	l.network(subnet, gateway)
	said := func(what, text string) {
		t.Helper()
		if k == dhcptest.Dnsmasq { // it logs what it is told
			l.contains(what, server.Log(), text)
		}
	}
	web := l.request(pool, "", "web")
	l.contains("leased", web, "/24")
	said("vendor class", "vendor class: weft test")
	said("host name", "client provides name: cam")
	l.want("a client identifier that the server knows", l.request(pool, "", "nas"), "10.77.0.33/24")
	l.want("a MAC address as client identifier", l.request(pool, "", "box"), "10.77.0.44/24")

	// An endpoint's: the address stays, unless the server has another one for it.
	id, refusal := l.endpoint(1, web, `"hostname":"door","client_id":"0x0a0b0c","vendor_class":"else"`)
	l.want("an endpoint's options", refusal, "")
	said("the endpoint's vendor class", "vendor class: else")
	said("the endpoint's host name", "client provides name: door")
	if _, ok := server.Leases()[first(web)]; !ok {
		t.Errorf("the server has leased %v", server.Leases())
	}
	for _, lease := range l.leases().Leases {
		if lease.Address == first(web) && lease.Name != "web" {
			t.Errorf("status: %+v", lease)
		}
	}
	l.must(t, "NetworkDriver.DeleteEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q}`, netID, id))
	l.release(pool, web)
	l.release(pool, "10.77.0.33/24")
	other := l.request(pool, "", "")
	_, refusal = l.endpoint(2, other, `"client_id":"01:02:03:04"`)
	l.contains("a client identifier of a reservation", refusal, "has 10.77.0.33 for it")
	l.contains("what to do", refusal, "--ipam-opt OPTION.CONTAINER=VALUE")
	_, refusal = l.endpoint(3, other, `"client_id":"x:"`)
	l.want("nothing to tell", refusal, "")
	for text, want := range map[string]string{
		`"client_id":""`:   "endpoint option client_id=: choose duid, mac, name, hex",
		`"hostname":"a.b"`: "endpoint option hostname=a.b: a host name has",
		`"register_dns":7`: "choose true or false",
		`"client_ids":"x"`: `did you mean "client_id"?`,
	} {
		_, refusal = l.endpoint(4, "10.77.0.99/24", text)
		l.contains(text, refusal, want)
	}
	_, refusal = l.endpoint(4, "10.77.0.99/24", `"hostname":"door"`)
	l.contains("an address that is not leased", refusal, "there is no DHCP server to tell, as none has leased 10.77.0.99")
}

// TestDHCPFallback: while no server answers, containers start with addresses of the
// range that is named for it, which no station of the LAN has.
func TestDHCPFallback(t *testing.T) {
	l := newLAN(t)
	l.router.Exec("ip", "address", "add", "10.77.0.240/24", "dev", "eth0")
	l.start()
	id, subnet, _ := l.pool("10.77.0.0/24", `"dhcp":"lan0","dhcp_timeout":"1s","dhcp_fallback":"10.77.0.240/29"`)
	l.network(subnet, "10.77.0.1/24")
	web := l.request(id, "", "web")
	l.want("the first one", web, "10.77.0.241/24")
	begin := time.Now()
	l.want("the next one", l.request(id, "", "db"), "10.77.0.242/24")
	if took := time.Since(begin); took > 900*time.Millisecond {
		t.Errorf("waited %v for a server that has just been silent", took)
	}
	_, refusal := l.endpoint(1, web, "")
	l.want("its endpoint", refusal, "")
	for _, p := range l.status(t).Pools {
		l.contains("status", p.Warning, "2 addresses are of dhcp_fallback, because no DHCP server answered on lan0")
	}
}

// TestPatience: a container does not wait longer for a server than its network says.
func TestPatience(t *testing.T) {
	l := newLAN(t)
	l.start()
	id, _, _ := l.pool("10.77.0.0/24", `"dhcp":"lan0","dhcp_timeout":"1s"`)
	begin := time.Now()
	l.contains("no server", l.request(id, "", "web"), "no DHCP server answered on lan0 within 1")
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("waited %v", took)
	}
}
