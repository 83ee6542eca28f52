package driver

import (
	"regexp"
	"strings"
	"testing"

	"github.com/weftnet/weft/internal/plugin"
)

// goWords are those of Go's libraries, which say nothing to who typed an option.
var goWords = regexp.MustCompile(`ParseAddr|ParsePrefix|strconv|invalid syntax|time: |netip|json:|unmarshal|Go struct|%!|<nil>`)

// TestHints: an option in the wrong place is told where it belongs, and a
// suggestion is one that somebody may have meant.
func TestHints(t *testing.T) {
	for _, c := range []struct {
		options string // NAME=VALUE, ...
		want    string
	}{
		{"parent=eth0", "option parent belongs to mode macvlan, ipvlan: add -o mode=macvlan"},
		{"macvlan_mode=vepa", "option macvlan_mode belongs to mode macvlan: add -o mode=macvlan"},
		{"vni=7", "option vni belongs to mode overlay: add -o mode=overlay"},
		{"mode=macvlan,bridge=br0", "option bridge belongs to mode bridge, not to mode macvlan: leave it out, or use -o mode=bridge"},
		{"mode=ipvlan,macvlan_mode=vepa", `option macvlan_mode belongs to mode macvlan, not to mode ipvlan: did you mean "ipvlan_mode"? else use -o mode=macvlan`},
		{"dhcp=eth0", "option dhcp is an --ipam-opt: write --ipam-driver weft:latest --ipam-opt dhcp=eth0 (Compose: under ipam, driver: weft:latest and options)"},
		{"mode=macvlan,parent=eth0,dhcp=eth0", "option dhcp is an --ipam-opt"},
		{"reserve.db=10.1.0.5", "option reserve.db is an --ipam-opt"},
		{"mode=mcvlan", `option mode: "mcvlan" is not a mode: did you mean "macvlan"? valid are bridge, ipvlan, macvlan, overlay`},
		{"mode=host", `option mode: "host" is not a mode: valid are bridge, ipvlan, macvlan, overlay`},
		{"mode=Macvlan", `did you mean "macvlan"?`},
		{"mode=macvlan,macvlan_mode=privat", `option macvlan_mode: "privat" is not a choice: did you mean "private"? valid are bridge, private, vepa, passthru`},
		{"com.docker.network.bridge.gateway_mode_ipv4=route", `did you mean "routed"?`},
		{"egress=host", `option egress: "host" is not a choice: valid are driver, engine, none`},
		{"encrypted=true", "option encrypted is not there yet: the traffic of containers between hosts is not encrypted; leave it out"},
		{"mode=overlay,encrypted=true", "option encrypted is not there yet"},
		{"subnet=10.1.0.0/24", "option subnet is a flag: --subnet (Compose: ipam: config: subnet)"},
		{"ip-range=10.1.0.0/25", "option ip-range is a flag: --ip-range"},
		{"internal=true", "option internal is a flag: --internal"},
		{"UNDERLAY=eth1", "option UNDERLAY is a setting of the plugin: docker plugin set weft:latest UNDERLAY=eth1"},
		{"frobnicate=1", `option "frobnicate" is not known in mode bridge: valid are bridge, com.docker`},
		{"mtuu=1", `option "mtuu" is not known in mode bridge: did you mean "mtu"? valid are`},
		{"weft.join=x", `option "weft.join" is not known in mode bridge`},
		{"mode=macvlan,parent=eth0,mtu=575", "576 to 65535, with IPv6 1280"},
		{"com.docker.network.bridge.enable_icc=yes", "write true or false"},
	} {
		generic := map[string]any{}
		for o := range strings.SplitSeq(c.options, ",") {
			k, v, _ := strings.Cut(o, "=")
			generic[k] = v
		}
		_, err := parseNetworkOptions(map[string]any{plugin.OptionGeneric: generic}, []string{"overlay", "bridge", "macvlan", "ipvlan"}, modeBridge)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v\nwant %s", c.options, err, c.want)
		} else if goWords.MatchString(err.Error()) {
			t.Errorf("%s: %v", c.options, err)
		}
	}
}

// TestErrorsSayWhatToDo sends the driver what users can get wrong beyond the names of
// options; every answer is one line, in plain words, with what to type.
func TestErrorsSayWhatToDo(t *testing.T) {
	r := newRig(t)
	r.must("CreateNetwork", createNetwork(net2, "10.2.0.0/24", `{"com.docker.network.bridge.name":"taken"}`))
	r.must("CreateNetwork", createNetwork(net3, "10.3.0.0/24", `{"mode":"macvlan","parent":"eth0"}`))
	body := func(options string) string { return createNetwork(net1, "10.1.0.0/24", options) }
	for _, c := range []struct{ method, body, want string }{
		{"CreateNetwork", createNetwork(net1, "10.2.0.0/24", "{}"), "choose another --subnet"},
		{"CreateNetwork", body(`{"com.docker.network.bridge.name":"taken"}`), "choose another name"},
		{"CreateNetwork", strings.ReplaceAll(body("{}"), "10.1.0.0/24", "10.1.0"), `subnet "10.1.0" is not one: write it as 10.0.0.0/24`},
		{"CreateNetwork", strings.ReplaceAll(body("{}"), "10.1.0.1/24", "10.9.0.1/24"), "give one that is with --gateway"},
		{"CreateNetwork", body(`{"routes":"10.9.0.0/16 via 10.8.0.1"}`), "(10.1.0.0/24): choose one that is"},
		{"CreateNetwork", body(`{"routes":"2001:db8::/64 via fd00:1::1"}`), "create it with --ipv6 --subnet"},
		{"CreateNetwork", body(`{"routes":"10.1.0.0/25 via 10.1.0.1"}`), "leave it out"},
		{"CreateNetwork", body(`{"mode":"macvlan","parent":"eth0","host_access":"true","host_address":"fd00:1::9"}`), "create it with --ipv6 --subnet"},
		{"CreateNetwork", body(`{"mode":"macvlan","parent":"eth0","host_address":"10.1.0.9"}`), "add it, or leave host_address out"},
		{"CreateNetwork", body(`{"mode":"macvlan","parent":"eth0","host_access":"true","host_address":"10.1.0.8,10.1.0.9"}`), "give at most one IPv4 and one IPv6 address"},
		{"CreateNetwork", body(`{"mode":"macvlan","egress":"driver"}`), "add -o parent=, or leave egress out"},
		{"CreateNetwork", body(`{"mode":"macvlan","parent":"eth9"}`), "name one that ip link shows"},
		{"CreateNetwork", body(`{"mode":"macvlan","parent":"eth0.1.2.3"}`), "use at most two, as in eth0.10.20"},
		{"CreateNetwork", body(`{"mode":"macvlan","parent":"eth0","mtu":"9000"}`), "give at most 1500, or leave it out"},
		{"CreateNetwork", createDual(`{"mtu":"1200"}`), "mtu 1200 is too small: IPv6 needs 1280: give -o mtu=1280 or more"},
		{"CreateNetwork", body(`{"com.docker.network.host_ipv4":"192.0.2.1","com.docker.network.bridge.enable_ip_masquerade":"false"}`), "leave it out"},
		{"CreateNetwork", body(`{"com.docker.network.host_ipv4":"localhost"}`), "write it as 192.0.2.1"},
		{"CreateNetwork", body(`{"mtu":"1400","com.docker.network.driver.mtu":"1500"}`), "leave one out"},
		{"CreateEndpoint", createEndpoint(net3, ep1, "10.9.0.2/24", ""), "(10.3.0.0/24): choose one that is"},
		{"CreateEndpoint", strings.Replace(createEndpoint(net3, ep1, "10.3.0.2/24", ""), `"MacAddress":""`, `"MacAddress":"x"`, 1), "write it as 02:42:c0:a8:01:14"},
		{"CreateEndpoint", strings.Replace(createEndpoint(net3, ep1, "10.3.0.2/24", ""), `"Options":{`, `"Options":{"mtu":"1400",`, 1), "when it is created, with -o"},
		{"Join", strings.Replace(program(net3, ep1, binding(6, 80, "", 8080, 8080)), `"HostIP":""`, `"HostIP":"here"`, 1), `"here" is not an IP address`},
	} {
		answer, err := r.call(c.method, c.body)
		switch {
		case err == nil:
			t.Errorf("%s %s: accepted: %s", c.method, c.body, answer)
		case !strings.Contains(err.Error(), c.want):
			t.Errorf("%s: %q does not say %q", c.method, err, c.want)
		case goWords.MatchString(err.Error()) || strings.Contains(err.Error(), "\n"):
			t.Errorf("%s: %q", c.method, err)
		}
	}
}
