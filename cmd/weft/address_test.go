package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// TestNames plays an engine of version 29, which says which container an
// address is for: containers of a name have their address and MAC again after
// they are made again, after the plugin was killed, and by reservation.
func TestNames(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir)
	const pool = "weft-local,10.99.0.0/24"
	request := func(address, name string) string {
		t.Helper()
		options := `null`
		if name != "" {
			options = fmt.Sprintf(`{"com.docker.network.endpoint.name":%q}`, name)
		}
		status, m := p.call(t, "IpamDriver.RequestAddress", fmt.Sprintf(`{"PoolID":%q,"Address":%q,"Options":%s}`, pool, address, options))
		if status != 200 {
			return fmt.Sprint(m["Error"])
		}
		return strings.TrimSuffix(fmt.Sprint(m["Address"]), "/24")
	}
	n := 0
	mac := func(address string) (mac, endpoint string) {
		t.Helper()
		n++
		id := fmt.Sprintf("%012x", n) + strings.Repeat("e", 52)
		m := p.must(t, "NetworkDriver.CreateEndpoint", fmt.Sprintf(
			`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":"%s/24","AddressIPv6":"","MacAddress":""},"Options":{}}`, netID, id, address))
		return fmt.Sprint(m["Interface"].(map[string]any)["MacAddress"]), id
	}
	remove := func(endpoint, address string) {
		t.Helper()
		p.must(t, "NetworkDriver.DeleteEndpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q}`, netID, endpoint))
		p.must(t, "IpamDriver.ReleaseAddress", fmt.Sprintf(`{"PoolID":%q,"Address":%q}`, pool, address))
	}
	want := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	contains := func(what, got, part string) {
		t.Helper()
		if !strings.Contains(got, part) {
			t.Errorf("%s: %s, want something with %q", what, got, part)
		}
	}
	weft := func(args string) string {
		t.Helper()
		_, out, errs := weft(t, "", append(strings.Fields(args), "--socket", filepath.Join(dir, adminSocket))...)
		return out + errs
	}

	p.must(t, "IpamDriver.RequestPool", `{"AddressSpace":"weft-local","Pool":"10.99.0.0/24","SubPool":"","V6":false,`+
		`"Options":{"reserve.db":"10.99.0.20,02:00:00:00:00:20","reserve.dns":"10.99.0.2"}}`)
	p.must(t, "IpamDriver.RequestAddress", `{"PoolID":"`+pool+`","Address":"","Options":{"RequestAddressType":"com.docker.network.gateway"}}`)
	p.must(t, "NetworkDriver.CreateNetwork", `{"NetworkID":"`+netID+`","Options":{"com.docker.network.generic":{}},`+
		`"IPv4Data":[{"AddressSpace":"weft-local","Pool":"10.99.0.0/24","Gateway":"10.99.0.1/24"}],"IPv6Data":[]}`)

	want("the first one passes what is reserved over", request("", "web"), "10.99.0.3")
	want("the second one", request("", "/cache"), "10.99.0.4")
	webMAC, web := mac("10.99.0.3")
	want("by reservation", request("", "db"), "10.99.0.20")
	dbMAC, db := mac("10.99.0.20")
	want("its MAC", dbMAC, "02:00:00:00:00:20")
	want("a second one of the name", request("", "web"), "10.99.0.5")
	contains("the log", p.said(), "10.99.0.3 is kept for web")
	contains("somebody else's", request("10.99.0.2", "web2"), "is reserved for dns")
	want("with --ip of an engine that tells no names", request("10.99.0.2", ""), "10.99.0.2")
	remove(web, "10.99.0.3")
	remove(db, "10.99.0.20")
	want("somebody else meanwhile", request("", "other"), "10.99.0.6")
	want("a task of swarm", request("", "svc.2.n2x8v0q1w2e3r4t5y6u7i8o9p"), "10.99.0.7")
	p.must(t, "IpamDriver.ReleaseAddress", `{"PoolID":"`+pool+`","Address":"10.99.0.7"}`)

	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.ended
	p = start(t, dir)
	want("recreated after a kill", request("", "web"), "10.99.0.3")
	again, web := mac("10.99.0.3")
	want("its MAC", again, webMAC)
	want("reserved after a kill", request("", "db"), "10.99.0.20")
	want("the next task of the slot", request("", "svc.2.zzzzv0q1w2e3r4t5y6u7i8o9p"), "10.99.0.7")
	remove(web, "10.99.0.3")

	status := weft("status pools")
	for _, line := range []string{
		"NAME   ADDRESS     MAC                POOL          STATE",
		"db     10.99.0.20  02:00:00:00:00:20  10.99.0.0/24  reserved, in use",
		"dns    10.99.0.2   -                  10.99.0.0/24  reserved, in use",
		"other  10.99.0.6   -                  10.99.0.0/24  in use",
		"svc.2  10.99.0.7   -                  10.99.0.0/24  in use",
		"web    10.99.0.3   -                  10.99.0.0/24  kept, released ",
	} {
		contains("status", status, line)
	}
	contains("reserve what another has", weft("address reserve nas 10.99.0.6"), "is in use by other")
	contains("reserve what is reserved", weft("address reserve nas 10.99.0.20"), "is reserved for db")
	contains("reserve", weft("address reserve nas 10.99.0.30 02:00:00:00:00:30"), "10.99.0.30,02:00:00:00:00:30 of pool 10.99.0.0/24 is reserved for nas")
	want("what was reserved", request("", "nas"), "10.99.0.30")
	contains("release in use", weft("address release 10.99.0.1"), "is the gateway")
	contains("release", weft("address release 10.99.0.30"), "10.99.0.30 of pool 10.99.0.0/24 is free")
	contains("forget by option", weft("address forget db"), "reserve.db")
	contains("forget", weft("address forget nas"), "nothing is kept for nas")
	contains("forget", weft("address forget web"), "nothing is kept for web")
	contains("forget again", weft("address forget web"), "name web is in no pool")
	want("what was forgotten is as any other", request("", "web"), "10.99.0.3")
}
