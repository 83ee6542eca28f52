package driver

import (
	"fmt"
	"strings"
	"testing"
)

// TestInterfaceName: --driver-opt com.docker.network.endpoint.ifname is exact where
// the engine takes a name, near where it only takes a prefix, and said once.
func TestInterfaceName(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net1, "10.1.0.0/24", ""))
	named := func(addr, name string) string {
		return strings.Replace(createEndpoint(net1, ep1, addr, ""), `"Options":{`, fmt.Sprintf(`"Options":{"com.docker.network.endpoint.ifname":%s,`, name), 1)
	}
	for name, want := range map[string]string{
		`"lan0"`:            `{"SrcName":"wfce11111111111","DstPrefix":"lan","DstName":"lan0"}`,
		`"eth10.20"`:        `{"SrcName":"wfce11111111111","DstPrefix":"eth10.","DstName":"eth10.20"}`,
		`"uplink"`:          `{"SrcName":"wfce11111111111","DstPrefix":"eth","DstName":"uplink"}`,
		`"7"`:               `{"SrcName":"wfce11111111111","DstPrefix":"eth","DstName":"7"}`,
		`"fifteen-bytes-1"`: `{"SrcName":"wfce11111111111","DstPrefix":"fifteen-bytes-","DstName":"fifteen-bytes-1"}`,
		`""`:                `{"SrcName":"wfce11111111111","DstPrefix":"eth"}`,
	} {
		r.must("CreateEndpoint", named("10.1.0.2/24", name))
		r.restart() // Join does not say it again
		if answer := r.must("Join", joinBody(net1, ep1)); !strings.Contains(answer, `"InterfaceName":`+want) {
			t.Errorf("%s: join answers %s, want %s", name, answer, want)
		}
		r.must("DeleteEndpoint", ids(net1, ep1))
	}
	for _, name := range []string{`"sixteen-bytes-12"`, `"a/b"`, `"."`, `7`} {
		r.refused("CreateEndpoint", strings.Replace(named("10.1.0.2/24", name), "com.docker.network.endpoint.ifname", "ifname", 1),
			"\"ifname\" is not known", "the interface's name is com.docker.network.endpoint.ifname")
		r.refused("CreateEndpoint", named("10.1.0.2/24", name), "endpoint option com.docker.network.endpoint.ifname", "is not an interface name")
	}

	// What the engine has a flag for.
	for _, key := range []string{"gw-priority", "gw_priority", "com.docker.network.endpoint.gw-priority"} {
		r.refused("CreateEndpoint", strings.Replace(named("10.1.0.2/24", `"1"`), "com.docker.network.endpoint.ifname", key, 1),
			fmt.Sprintf("endpoint option %q is a flag", key), "--network name=NETWORK,gw-priority=1", "docker network connect --gw-priority 1")
	}

	// A misspelt one is not taken for an engine's own, nor an engine's for that.
	for key, near := range map[string]string{
		"com.docker.network.endpoint.ifnane": "com.docker.network.endpoint.ifname", "com.docker.network.endpoint.ifname ": "com.docker.network.endpoint.ifname",
		"com.docker.network.endpoint.IfName": "com.docker.network.endpoint.ifname", "com.docker.network.endpoints.ifname": "com.docker.network.endpoint.ifname",
		"com.docker.network.endpoint.sysctl": "com.docker.network.endpoint.sysctls", "com.docker.network.endpoint.macadress": "com.docker.network.endpoint.macaddress",
	} {
		r.refused("CreateEndpoint", strings.Replace(named("10.1.0.2/24", `"lan0"`), "com.docker.network.endpoint.ifname", key, 1),
			fmt.Sprintf("endpoint option %q is not known: did you mean %q?", key, near))
	}
	for _, key := range []string{
		"com.docker.network.endpoint.sysctls", "com.docker.network.endpoint.macaddress", "com.docker.network.endpoint.name",
		"com.docker.network.endpoint.exposedports", "com.docker.network.portmap", "com.docker.network.driver.private.no_proxy_6to4",
		"com.docker.network.endpoint.bandwidth", // of an engine to come
	} {
		r.must("CreateEndpoint", strings.Replace(named("10.1.0.2/24", `null`), "com.docker.network.endpoint.ifname", key, 1))
		r.must("DeleteEndpoint", ids(net1, ep1))
	}

	r.restart()
	r.log.Reset()
	var said []string
	for range 3 {
		r.must("CreateEndpoint", named("10.1.0.2/24", `"lan0"`))
		r.must("DeleteEndpoint", ids(net1, ep1))
	}
	for _, e := range r.log.AllEntries() {
		if e.Level.String() == "warning" {
			said = append(said, e.Message)
		}
	}
	if len(said) != 1 || !strings.Contains(said[0], "interface name lan0: engines before 29.8 name it lan and the first free number") {
		t.Errorf("said %q", said)
	}
}
