package dhcptest

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// dnsmasq writes nothing; all of it is in the arguments.
func (s *Server) dnsmasq() []string {
	c := s.cfg
	args := []string{"--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--group=root", "--pid-file=", "--port=0",
		"--log-dhcp", "--log-facility=-", "--no-resolv", "--no-hosts", "--interface=" + c.Link,
		"--dhcp-lease-max=2000", "--dhcp-leasefile=" + filepath.Join(s.dir, "leases")}
	seconds := int(c.Lease.Seconds())
	if c.Authoritative {
		args = append(args, "--dhcp-authoritative")
	}
	if !c.Ping {
		args = append(args, "--no-ping")
	}
	option := func(name6 string, code int, value string) {
		switch {
		case value == "":
		case !c.Subnet.Addr().Is6():
			args = append(args, fmt.Sprintf("--dhcp-option=%d,%s", code, value))
		case name6 != "":
			args = append(args, fmt.Sprintf("--dhcp-option=option6:%s,%s", name6, value))
		}
	}
	if c.Subnet.Addr().Is6() {
		args = append(args, fmt.Sprintf("--dhcp-range=%s,%s,%d,%d", c.First, c.Last, c.Subnet.Bits(), seconds))
	} else {
		args = append(args, fmt.Sprintf("--dhcp-range=%s,%s,%s,%d", c.First, c.Last, mask(c.Subnet), seconds))
	}
	if c.Router.IsValid() {
		option("", 3, c.Router.String())
	}
	if c.MTU != 0 {
		option("", 26, fmt.Sprint(c.MTU))
	}
	option("dns-server", 6, c.servers(","))
	option("domain-search", 15, c.Domain)
	var routes []string
	for _, r := range c.Routes {
		routes = append(routes, r.To.String(), r.Via.String())
	}
	option("", 121, strings.Join(routes, ","))
	for _, r := range c.Reservations {
		who := r.MAC + r.Name
		if r.ClientID != nil {
			who = "id:" + colons(r.ClientID)
		}
		address := r.Address.String()
		if r.Address.Is6() {
			address = "[" + address + "]"
		}
		args = append(args, fmt.Sprintf("--dhcp-host=%s,%s", who, address))
	}
	return args
}

func (s *Server) isc(six bool) []string {
	c := s.cfg
	var b strings.Builder
	line := func(format string, arg ...any) { fmt.Fprintf(&b, format+";\n", arg...) }
	line("ddns-update-style none")
	line("ping-check %t", c.Ping)
	line("default-lease-time %[1]d;max-lease-time %[1]d;min-lease-time %[1]d", int(c.Lease.Seconds()))
	if c.Authoritative {
		line("authoritative")
	}
	if six {
		if len(c.DNS) > 0 {
			line("option dhcp6.name-servers %s", c.servers(", "))
		}
		if c.Domain != "" {
			line("option dhcp6.domain-search %q", c.Domain)
		}
		fmt.Fprintf(&b, "subnet6 %s { range6 %s %s; }\n", c.Subnet, c.First, c.Last)
	} else {
		line("option rfc3442 code 121 = array of unsigned integer 8")
		if c.Router.IsValid() {
			line("option routers %s", c.Router)
		}
		if len(c.DNS) > 0 {
			line("option domain-name-servers %s", c.servers(", "))
		}
		if c.Domain != "" {
			line("option domain-name %q", c.Domain)
		}
		if c.MTU != 0 {
			line("option interface-mtu %d", c.MTU)
		}
		if r := c.routes(); len(r) > 0 {
			line("option rfc3442 %s", decimal(r))
		}
		fmt.Fprintf(&b, "subnet %s netmask %s { range %s %s; }\n", c.Subnet.Masked().Addr(), mask(c.Subnet), c.First, c.Last)
	}
	for i, r := range c.Reservations {
		who := "hardware ethernet " + r.MAC
		if r.ClientID != nil {
			who = "option dhcp-client-identifier " + colons(r.ClientID)
		}
		fmt.Fprintf(&b, "host h%d { %s; fixed-address %s; }\n", i, who, r.Address)
	}
	family := map[bool]string{false: "-4", true: "-6"}[six]
	leases := filepath.Join(s.dir, "leases")
	if _, err := os.Stat(leases); err != nil { // it has to be there
		s.write("leases", "")
	}
	return []string{family, "-f", "-d", "-cf", s.write("dhcpd.conf", b.String()), "-lf", leases,
		"-pf", filepath.Join(s.dir, "dhcpd.pid"), c.Link}
}

func (s *Server) kea(six bool) []string {
	type object = map[string]any
	c := s.cfg
	var options []object
	option := func(name, data string) {
		if data != "" {
			options = append(options, object{"name": name, "data": data})
		}
	}
	seconds := int(c.Lease.Seconds())
	subnet := object{"id": 1, "subnet": c.Subnet.Masked().String(), "interface": c.Link,
		"pools": []object{{"pool": fmt.Sprintf("%s - %s", c.First, c.Last)}}}
	root := object{
		"interfaces-config": object{"interfaces": []string{c.Link}},
		"lease-database":    object{"type": "memfile", "persist": true, "name": filepath.Join(s.dir, "leases"), "lfc-interval": 0},
		"valid-lifetime":    seconds,
		"loggers": []object{{"name": "kea-dhcp4", "severity": "INFO", "output_options": []object{{"output": "stdout", "flush": true}}},
			{"name": "kea-dhcp6", "severity": "INFO", "output_options": []object{{"output": "stdout", "flush": true}}}},
	}
	name, list := "Dhcp4", "subnet4"
	if six {
		name, list = "Dhcp6", "subnet6"
		root["preferred-lifetime"] = seconds
		// Its own would be kept in a file below /var.
		root["server-id"] = object{"type": "EN", "enterprise-id": 1, "identifier": "77", "persist": false}
		option("dns-servers", c.servers(", "))
		option("domain-search", c.Domain)
	} else {
		root["authoritative"] = c.Authoritative
		if c.Router.IsValid() {
			option("routers", c.Router.String())
		}
		option("domain-name-servers", c.servers(", "))
		option("domain-name", c.Domain)
		if c.MTU != 0 {
			option("interface-mtu", fmt.Sprint(c.MTU))
		}
		if r := c.routes(); len(r) > 0 { // a name for 121 came after Debian 12's version
			options = append(options, object{"code": 121, "space": "dhcp4", "csv-format": false, "data": hex.EncodeToString(r)})
		}
	}
	var reservations []object
	for _, r := range c.Reservations {
		o := object{"hw-address": r.MAC, "ip-address": r.Address.String()}
		if r.ClientID != nil {
			o = object{"client-id": colons(r.ClientID), "ip-address": r.Address.String()}
		}
		reservations = append(reservations, o)
	}
	if reservations != nil {
		subnet["reservations"] = reservations
	}
	root["option-data"], root[list] = append([]object{}, options...), []object{subnet}
	b, err := json.Marshal(object{name: root})
	if err != nil {
		s.tb.Fatal(err)
	}
	return []string{"-c", s.write("kea.conf", string(b))}
}

// routes is the value of option 121.
func (c *Config) routes() []byte {
	var b []byte
	for _, r := range c.Routes {
		b = append(b, byte(r.To.Bits()))
		b = append(b, r.To.Masked().Addr().AsSlice()[:(r.To.Bits()+7)/8]...)
		b = append(b, r.Via.AsSlice()...)
	}
	return b
}

// servers are the name servers, those of IPv6 as each program likes them.
func (c *Config) servers(sep string) string {
	var out []string
	for _, a := range c.DNS {
		s := a.String()
		if a.Is6() && sep == "," { // dnsmasq
			s = "[" + s + "]"
		}
		out = append(out, s)
	}
	return strings.Join(out, sep)
}

func mask(p netip.Prefix) string { return net.IP(net.CIDRMask(p.Bits(), 32)).String() }

func colons(b []byte) string { return net.HardwareAddr(b).String() }

// decimal is bytes as dhcpd has them in an array.
func decimal(b []byte) string {
	var out []string
	for _, x := range b {
		out = append(out, fmt.Sprint(x))
	}
	return strings.Join(out, ", ")
}
