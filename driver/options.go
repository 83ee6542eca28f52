package driver

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weftnet/weft/internal/plugin"
)

// Options are the network's -o options, parsed, with the defaults that do not
// depend on anything else filled in.
type Options struct {
	// MTU is what the user asked for; 0 lets the path decide.
	MTU    int     `json:",omitempty"`
	Egress Egress  `json:",omitempty"`
	Routes []Route `json:",omitempty"`
	// Prefix is the interface's name in the container, without the number.
	Prefix string `json:",omitempty"`

	// Bridge is one that exists already and is left alone; BridgeName names
	// ours.
	Bridge     string `json:",omitempty"`
	BridgeName string `json:",omitempty"`
	ICC        bool   // containers of the network may talk to each other
	Masquerade bool
	// HostBinding is the host address of published ports that name none.
	HostBinding netip.Addr
	InhibitIPv4 bool        `json:",omitempty"` // the bridge gets no IPv4 address
	Gateway4    GatewayMode `json:",omitempty"`
	Gateway6    GatewayMode `json:",omitempty"`
	// Trusted are host interfaces from which published ports are reached at the
	// containers' own addresses.
	Trusted []string `json:",omitempty"`
	// Parent is the link that a macvlan or ipvlan network hangs on; "" is a
	// dummy of its own. SubMode is macvlan_mode or ipvlan_mode, SubFlag
	// ipvlan_flag.
	Parent  string `json:",omitempty"`
	SubMode string `json:",omitempty"`
	SubFlag string `json:",omitempty"`
	// HostAccess lets the host reach the network's containers and back, and those
	// on its bridges reach them; HostAddrs are addresses of the LAN that it uses.
	HostAccess bool         `json:",omitempty"`
	HostAddrs  []netip.Addr `json:",omitempty"`
	// NoProbe hands addresses out without asking the LAN for them.
	NoProbe bool `json:",omitempty"`
	// VNI and Port are those of an overlay network; 0 leaves them to us.
	VNI  uint32 `json:",omitempty"`
	Port uint16 `json:",omitempty"`
	// Join is where and with which key a swarm's nodes find each other; it is in
	// the leader's answer, not typed.
	Join string `json:",omitempty"`
	// Host4 and Host6 are the source addresses of masqueraded traffic.
	Host4, Host6 netip.Addr
}

// Egress says who takes the containers out.
type Egress string

// The values of Egress.
const (
	EgressDriver Egress = "driver" // we do: Join answers a gateway, we publish ports
	EgressEngine Egress = "engine" // the engine does, with docker_gwbridge
	EgressNone   Egress = "none"   // nobody does
)

// GatewayMode says how a family is reached from outside.
type GatewayMode string

// The values of GatewayMode.
const (
	GatewayNAT         GatewayMode = "nat"             // published ports only; sources translated
	GatewayUnprotected GatewayMode = "nat-unprotected" // also every port, at the container's address
	GatewayRouted      GatewayMode = "routed"          // published ports, at the container's address; nothing translated
	GatewayIsolated    GatewayMode = "isolated"        // the host has no address on the network
)

// gateway is the mode of one family.
func (o Options) gateway(f family) GatewayMode {
	if f == ipv4 {
		return o.Gateway4
	}
	return o.Gateway6
}

// host is the source address given for one family, or the zero Addr.
func (o Options) host(f family) netip.Addr {
	if f == ipv4 {
		return o.Host4
	}
	return o.Host6
}

// modeBridge is the default of -o mode=.
const modeBridge = "bridge"

const (
	optionMode = "mode"
	optionVNI  = "vni"
	optionJoin = "weft.join"
)

// option is one name that users may type after -o.
type option struct {
	// modes where it means something; nil is all of them.
	modes []string
	// set parses; nil accepts what the engine itself reads.
	set func(*settings, string) error
}

// settings is what is being parsed.
type settings struct {
	Options
	internal   bool
	masquerade string // as typed: the default depends on another option
}

var (
	bridgeOnly  = []string{modeBridge}
	macvlanOnly = []string{modeMacvlan}
	ipvlanOnly  = []string{modeIPvlan}
	parentOnly  = []string{modeMacvlan, modeIPvlan}
	overlayOnly = []string{ModeOverlay}
)

// options are all names, by the built-in drivers' spelling where they have
// the option.
var options = map[string]option{
	optionMode:                       {set: func(*settings, string) error { return nil }},
	"mtu":                            {set: setMTU},
	"com.docker.network.driver.mtu":  {set: setMTU},
	"egress":                         {set: setChoice(func(s *settings) *Egress { return &s.Egress }, EgressDriver, EgressEngine, EgressNone)},
	"routes":                         {set: setRoutes},
	"com.docker.network.internal":    {set: setBool(func(s *settings) *bool { return &s.internal })},
	"com.docker.network.enable_ipv4": {}, // the subnets tell
	"com.docker.network.enable_ipv6": {},
	"com.docker.network.advertise_addr_nmsgs": {},
	"com.docker.network.advertise_addr_ms":    {},
	"com.docker.network.container_iface_prefix": {set: func(s *settings, v string) error {
		s.Prefix = v
		return checkLinkName(v, 13) // two digits follow
	}},

	"bridge": {bridgeOnly, func(s *settings, v string) error {
		s.Bridge = v
		return checkLinkName(v, 15)
	}},
	optionBridgeName: {bridgeOnly, func(s *settings, v string) error {
		s.BridgeName = v
		return checkLinkName(v, 15)
	}},
	"com.docker.network.bridge.enable_icc":           {bridgeOnly, setBool(func(s *settings) *bool { return &s.ICC })},
	"com.docker.network.bridge.enable_ip_masquerade": {bridgeOnly, setMasquerade},
	"com.docker.network.bridge.host_binding_ipv4":    {bridgeOnly, setAddr(func(s *settings) *netip.Addr { return &s.HostBinding }, ipv4)},
	"com.docker.network.bridge.inhibit_ipv4":         {bridgeOnly, setBool(func(s *settings) *bool { return &s.InhibitIPv4 })},
	"com.docker.network.bridge.gateway_mode_ipv4":    {bridgeOnly, setGateway(func(s *settings) *GatewayMode { return &s.Gateway4 })},
	"com.docker.network.bridge.gateway_mode_ipv6":    {bridgeOnly, setGateway(func(s *settings) *GatewayMode { return &s.Gateway6 })},
	"com.docker.network.bridge.trusted_host_interfaces": {bridgeOnly, func(s *settings, v string) error {
		s.Trusted = strings.Split(v, ":")
		for _, name := range s.Trusted {
			if err := checkLinkName(name, 15); err != nil {
				return err
			}
		}
		return nil
	}},
	"parent": {parentOnly, func(s *settings, v string) error {
		s.Parent = v
		return checkLinkName(v, 15)
	}},
	"macvlan_mode": {macvlanOnly, setChoice(func(s *settings) *string { return &s.SubMode }, "bridge", "private", "vepa", "passthru")},
	"ipvlan_mode":  {ipvlanOnly, setChoice(func(s *settings) *string { return &s.SubMode }, "l2", "l3", "l3s")},
	"ipvlan_flag":  {ipvlanOnly, setChoice(func(s *settings) *string { return &s.SubFlag }, "bridge", "private", "vepa")},
	"host_access":  {parentOnly, setBool(func(s *settings) *bool { return &s.HostAccess })},
	"host_address": {parentOnly, setHostAddrs},
	optionVNI:      {overlayOnly, setVNI},
	"com.docker.network.driver.overlay.vxlanid_list": {overlayOnly, setVNI},
	"port":     {overlayOnly, setTunnelPort},
	optionJoin: {overlayOnly, func(s *settings, v string) error { s.Join = v; return nil }},
	"probe": {nil, func(s *settings, v string) error {
		on, err := parseBool(v)
		s.NoProbe = !on
		return err
	}},
	"com.docker.network.host_ipv4": {bridgeOnly, setAddr(func(s *settings) *netip.Addr { return &s.Host4 }, ipv4)},
	"com.docker.network.host_ipv6": {bridgeOnly, setAddr(func(s *settings) *netip.Addr { return &s.Host6 }, ipv6)},
}

// parseNetworkOptions reads the Options of CreateNetwork and GwAllocCheck
// into a Network without subnets. modes are those this program has, mode is the
// one of a network that names none.
func parseNetworkOptions(raw map[string]any, modes []string, mode string) (Network, error) {
	n := Network{Version: recordVersion}
	if v, ok := raw[plugin.OptionInternal]; ok {
		internal, isBool := v.(bool)
		if !isBool {
			return n, fmt.Errorf("option %s: %v is neither: write true or false", plugin.OptionInternal, v)
		}
		n.Internal = internal
	}
	generic, err := stringOptions(raw[plugin.OptionGeneric])
	if err != nil {
		return n, err
	}
	n.Mode = mode
	m, typed := generic[optionMode]
	if typed {
		n.Mode = m
	}
	if !slices.Contains(modes, n.Mode) {
		return n, fmt.Errorf("option mode: %w", notAChoice("a mode", n.Mode, slices.Sorted(slices.Values(modes))))
	}
	s := settings{Options: Options{ICC: true}}
	for _, key := range slices.Sorted(maps.Keys(generic)) {
		if err := s.apply(n.Mode, key, generic[key], typed); err != nil {
			return n, err
		}
	}
	if a, b := generic["mtu"], generic["com.docker.network.driver.mtu"]; a != "" && b != "" && a != b {
		return n, fmt.Errorf("options mtu=%s and com.docker.network.driver.mtu=%s contradict each other: leave one out", a, b)
	}
	// A network on somebody else's bridge is usually part of a LAN that knows
	// its addresses.
	s.Masquerade = s.Bridge == "" && (n.Mode == modeBridge || n.Mode == ModeOverlay)
	if s.masquerade != "" {
		s.Masquerade = s.masquerade == "true"
	}
	if a, b := generic["vni"], generic["com.docker.network.driver.overlay.vxlanid_list"]; a != "" && b != "" && a != b {
		return n, fmt.Errorf("options vni=%s and com.docker.network.driver.overlay.vxlanid_list=%s contradict each other: leave one out", a, b)
	}
	n.Internal = n.Internal || s.internal
	n.Options = s.Options
	return n, nil
}

// apply sets one option.
func (s *settings) apply(mode, key, value string, typed bool) error {
	o, ok := options[key]
	if !ok || o.modes != nil && !slices.Contains(o.modes, mode) {
		return unknownOption(mode, key, value, typed)
	}
	if o.set == nil {
		return nil
	}
	if err := o.set(s, value); err != nil {
		return fmt.Errorf("option %s: %w", key, err)
	}
	return nil
}

// engineKeys begin with this in the options of an endpoint; the rest was typed by the
// user.
const engineKeys = "com.docker.network."

// endpointKeys are what engines send for an endpoint, or have their users type. What
// is far from all of them is an engine's that is newer than this.
var endpointKeys = []string{
	plugin.OptionIfName, plugin.OptionMACAddress, plugin.OptionEndpointName, plugin.OptionExposedPorts, plugin.OptionPortMap,
	"com.docker.network.endpoint.sysctls", optionNoProxy6To4,
}

// toldOptions are the endpoint options that a DHCP server is told, whose values the
// address half reads. addressOptions has them, too: they may be a network's.
var toldOptions = []string{"client_id", "hostname", "register_dns", "vendor_class"}

// parseEndpointOptions reads what a user gave with --driver-opt: the interface's
// name, and what a DHCP server is to be told of the endpoint.
func parseEndpointOptions(mode string, raw map[string]any) (ifName string, told map[string]string, err error) {
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		if slices.Contains(toldOptions, key) {
			if told == nil {
				told = map[string]string{}
			}
			told[key] = fmt.Sprint(raw[key])
			continue
		}
		if last := key[strings.LastIndexByte(key, '.')+1:]; strings.ReplaceAll(last, "_", "-") == "gw-priority" {
			return "", nil, fmt.Errorf("endpoint option %q is a flag: docker run --network name=NETWORK,gw-priority=%[2]s, docker network connect --gw-priority %[2]s (Compose: gw_priority), from engine 28 on",
				clip(key), clip(fmt.Sprint(raw[key])))
		}
		if !strings.HasPrefix(key, engineKeys) {
			near := meant(plugin.Nearest(key, toldOptions))
			return "", nil, fmt.Errorf("endpoint option %q is not known: %smode %s has none; the interface's name is %s, and a DHCP server is told %s; options of a network are given when it is created, with -o",
				clip(key), near, mode, plugin.OptionIfName, strings.Join(toldOptions, ", "))
		}
		if near := plugin.Within(2, key, endpointKeys); near != "" {
			return "", nil, fmt.Errorf("endpoint option %q is not known: did you mean %q?", clip(key), near)
		}
	}
	v, ok := raw[plugin.OptionIfName]
	if !ok || v == "" {
		return "", told, nil
	}
	ifName, _ = v.(string)
	if err := checkLinkName(ifName, 15); err != nil {
		return "", nil, fmt.Errorf("endpoint option %s: %w", plugin.OptionIfName, err)
	}
	return ifName, told, nil
}

// named asks for a name in the container. Engines before 29.8 know prefixes only,
// to which they add the first free number.
func (at Attachment) named(name string) Attachment {
	if name == "" {
		return at
	}
	at.Name = name
	if prefix := strings.TrimRight(name, "0123456789"); prefix != "" && prefix != name {
		at.Prefix = prefix
	}
	return at
}

// tellIfName says once what older engines make of a name: nothing tells us which
// one this is.
func (d *Driver) tellIfName(e Endpoint) {
	if e.IfName == "" || d.toldIfName.Swap(true) {
		return
	}
	makes := "ignore it"
	if prefix := (Attachment{}).named(e.IfName).Prefix; prefix != "" {
		makes = fmt.Sprintf("name it %s and the first free number", prefix)
	}
	d.log.WithField("endpoint", e.ID).Warnf("interface name %s: engines before 29.8 %s (said once)", e.IfName, makes)
}

// stringOptions is what the user gave: strings by name. The engine passes a
// boolean of daemon.json on as one.
func stringOptions(v any) (map[string]string, error) {
	if v == nil {
		return nil, nil
	}
	m, ok := v.(map[string]any)
	if !ok {
		return nil, fmt.Errorf("option %s: not an object", plugin.OptionGeneric)
	}
	out := make(map[string]string, len(m))
	for key, value := range m {
		switch value := value.(type) {
		case string:
			out[key] = value
		case bool:
			out[key] = strconv.FormatBool(value)
		default:
			return nil, fmt.Errorf("option %s: %v is not a string: put it in quotes", clip(key), value)
		}
	}
	return out, nil
}

func setMTU(s *settings, v string) error {
	mtu, err := strconv.Atoi(v)
	if err != nil || mtu < leastIPv4 || mtu > 65535 {
		return fmt.Errorf("%q is not an MTU: valid are %d to 65535, with IPv6 %d to 65535", clip(v), leastIPv4, leastIPv6)
	}
	s.MTU = mtu
	return nil
}

// othersPorts are UDP ports that other programs use on hosts with containers: what
// comes to the port of a tunnel, from others than the hosts of the network, is
// dropped.
var othersPorts = map[uint16]string{
	2377:  "swarm's management",
	4500:  "IPsec",
	4789:  "the built-in overlay driver and other VXLAN networks",
	5353:  "mDNS",
	6081:  "Geneve",
	7946:  "swarm's gossip",
	7947:  "weft's own gossip",
	8472:  "VXLAN networks of other programs (flannel, Cilium)",
	51820: "WireGuard",
}

func setTunnelPort(s *settings, v string) error {
	p, err := strconv.ParseUint(v, 10, 16)
	if err != nil || p < 1024 {
		return fmt.Errorf("%q is not a UDP port for tunnels: valid are 1024 to 65535", clip(v))
	}
	if who := othersPorts[uint16(p)]; who != "" {
		return fmt.Errorf("UDP port %d is that of %s: choose another, or leave the option out for 4793", p, who)
	}
	s.Port = uint16(p)
	return nil
}

func setVNI(s *settings, v string) error {
	vni, err := strconv.ParseUint(v, 10, 24)
	if err != nil || vni == 0 {
		return fmt.Errorf("%q is not a VXLAN network identifier: valid are 1 to 16777215", clip(v))
	}
	s.VNI = uint32(vni)
	return nil
}

func setMasquerade(s *settings, v string) error {
	on, err := parseBool(v)
	s.masquerade = strconv.FormatBool(on)
	return err
}

func setBool(field func(*settings) *bool) func(*settings, string) error {
	return func(s *settings, v string) (err error) {
		*field(s), err = parseBool(v)
		return err
	}
}

func parseBool(v string) (bool, error) {
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, fmt.Errorf("%q is neither: write true or false", clip(v))
	}
	return b, nil
}

func setAddr(field func(*settings) *netip.Addr, f family) func(*settings, string) error {
	return func(s *settings, v string) error {
		a, err := netip.ParseAddr(v)
		if err != nil || a.Zone() != "" || !f.of(a.Unmap()) {
			return fmt.Errorf("%q is not an IPv%d address: write it as %s", clip(v), f, f.example())
		}
		*field(s) = a.Unmap()
		return nil
	}
}

func setHostAddrs(s *settings, v string) error {
	for part := range strings.SplitSeq(v, ",") {
		a, err := netip.ParseAddr(strings.TrimSpace(part))
		if err != nil || a.Zone() != "" || a.Is4In6() {
			return fmt.Errorf("%q is not an address: write one, or one of each family with a comma between", clip(part))
		}
		s.HostAddrs = append(s.HostAddrs, a)
	}
	return nil
}

func setGateway(field func(*settings) *GatewayMode) func(*settings, string) error {
	return setChoice(field, GatewayNAT, GatewayUnprotected, GatewayRouted, GatewayIsolated)
}

func setChoice[T ~string](field func(*settings) *T, choices ...T) func(*settings, string) error {
	return func(s *settings, v string) error {
		if !slices.Contains(choices, T(v)) {
			texts := make([]string, len(choices))
			for i, c := range choices {
				texts[i] = string(c)
			}
			return notAChoice("a choice", v, texts)
		}
		*field(s) = T(v)
		return nil
	}
}

func setRoutes(s *settings, v string) (err error) {
	s.Routes, err = parseRoutes(v)
	return err
}

// parseRoutes reads "10.0.0.0/8 via 10.1.0.254, ...".
func parseRoutes(v string) ([]Route, error) {
	var routes []Route
	for part := range strings.SplitSeq(v, ",") {
		words := strings.Fields(part)
		if len(words) != 3 || words[1] != "via" {
			return nil, fmt.Errorf("%q is not a route: write DESTINATION via ADDRESS, with commas between routes", clip(strings.TrimSpace(part)))
		}
		dst, err := netip.ParsePrefix(words[0])
		if err != nil {
			return nil, fmt.Errorf("%q is not a destination: write it as 10.0.0.0/8", clip(words[0]))
		}
		if dst != dst.Masked() {
			return nil, fmt.Errorf("destination %s has bits outside its mask: write %s", dst, dst.Masked())
		}
		hop, err := netip.ParseAddr(words[2])
		if err != nil || hop.Zone() != "" || hop.Is4In6() || hop.IsUnspecified() || hop.IsMulticast() {
			return nil, fmt.Errorf("%q is not the address of a router: write it as 10.1.0.254", clip(words[2]))
		}
		if hop.Is4() != dst.Addr().Is4() || dst.Addr().Is4In6() {
			return nil, fmt.Errorf("route %s via %s mixes IPv4 and IPv6: both ends are of one family", dst, hop)
		}
		if dst.Bits() == 0 {
			return nil, errors.New("a default route is not given with routes: use --gateway")
		}
		if slices.ContainsFunc(routes, func(r Route) bool { return r.Destination == dst }) {
			return nil, fmt.Errorf("destination %s is there twice: leave one out", dst)
		}
		routes = append(routes, Route{Destination: dst, NextHop: hop})
	}
	return routes, nil
}

// checkLinkName accepts what the kernel does, and neither "." nor a colon,
// which it takes for an alias.
func checkLinkName(name string, most int) error {
	if name == "" || name == "." || name == ".." || len(name) > most {
		return fmt.Errorf("%q is not an interface name of 1 to %d bytes", clip(name), most)
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c >= 0x7f || c == '/' || c == ':' || c == '%' || c == '"' {
			return fmt.Errorf("%q is not an interface name: leave spaces and the characters / : %% \" out", clip(name))
		}
	}
	return nil
}

// clip bounds what a user's typing adds to an error, and keeps it on one line.
func clip(s string) string {
	return strings.ToValidUTF8(strings.ReplaceAll(s[:min(len(s), 80)], "\n", " "), "?")
}
