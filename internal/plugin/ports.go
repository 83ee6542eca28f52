package plugin

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
)

// PortBinding is one port that a container publishes, or a range of them.
type PortBinding struct {
	Proto uint8      // 6 (TCP), 17 (UDP) or 132 (SCTP)
	IP    netip.Addr // the container's; usually not set
	Port  uint16     // the container's; never 0
	// More is how many ports follow Port, each of them bound to the host's port
	// that follows HostPort as far; HostPortEnd is HostPort then.
	More uint16
	// HostIP is not set when the port is published on every address of both
	// families.
	HostIP netip.Addr
	// HostPort and HostPortEnd bound the choice of the host's port; both are
	// 0 when any port will do.
	HostPort, HostPortEnd uint16
}

// ParsePortMap reads the published ports out of the Options of
// CreateEndpoint, Join or ProgramExternalConnectivity. The engine's order is
// random; the answer is sorted. The engine sends an entry for each port of a
// range, which is a range again in the answer.
func ParsePortMap(options map[string]any) ([]PortBinding, error) {
	var wire []struct {
		Proto                       uint8
		IP, HostIP                  string
		Port, HostPort, HostPortEnd uint16
	}
	if err := reread(options, OptionPortMap, &wire); err != nil {
		return nil, err
	}
	bindings := make([]PortBinding, 0, len(wire))
	for _, w := range wire {
		b := PortBinding{Proto: w.Proto, Port: w.Port, HostPort: w.HostPort, HostPortEnd: w.HostPortEnd}
		err := checkPort(w.Proto, w.Port)
		if err == nil {
			b.IP, err = parseIP(w.IP)
		}
		if err == nil {
			b.HostIP, err = parseIP(w.HostIP)
		}
		if b.HostPortEnd == 0 {
			b.HostPortEnd = b.HostPort
		}
		if err == nil && (b.HostPortEnd < b.HostPort || b.HostPort == 0 && b.HostPortEnd != 0) {
			err = fmt.Errorf("host ports %d to %d are not a range", w.HostPort, w.HostPortEnd)
		}
		if err != nil {
			return nil, fmt.Errorf("option %s: container port %d: %w", OptionPortMap, w.Port, err)
		}
		bindings = append(bindings, b)
	}
	slices.SortFunc(bindings, func(a, b PortBinding) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Port, b.Port), a.HostIP.Compare(b.HostIP),
			cmp.Compare(a.HostPort, b.HostPort), cmp.Compare(a.HostPortEnd, b.HostPortEnd), a.IP.Compare(b.IP))
	})
	return ranges(slices.Compact(bindings)), nil
}

// ranges joins what is bound port by port in one step. The list is sorted.
func ranges(list []PortBinding) []PortBinding {
	type line struct { // what the ports of one range have in common
		proto      uint8
		ip, hostIP netip.Addr
		distance   int
	}
	var out []PortBinding
	ends := make(map[line]int, 1) // where in out the last range of the line is
	for _, b := range list {
		if b.HostPort == 0 || b.HostPort != b.HostPortEnd { // one of several, not known yet
			out = append(out, b)
			continue
		}
		l := line{b.Proto, b.IP, b.HostIP, int(b.HostPort) - int(b.Port)}
		if i, ok := ends[l]; ok && int(out[i].Port)+int(out[i].More)+1 == int(b.Port) {
			out[i].More++
			continue
		}
		ends[l] = len(out)
		out = append(out, b)
	}
	return out
}

// ContainerOptions are the Options of a call that carries a container's ports.
// A port takes about a hundred bytes there, twice, and a container may publish
// ten thousand: the port map is left as it came for ParsePortMap, and the ports
// that an image exposes, which nothing depends on, are left out.
type ContainerOptions map[string]any

// UnmarshalJSON implements json.Unmarshaler.
func (o *ContainerOptions) UnmarshalJSON(b []byte) error {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		return err
	}
	*o = make(ContainerOptions, len(raw))
	for key, value := range raw {
		var v any = value
		switch key {
		case OptionExposedPorts:
			continue
		case OptionPortMap:
		default:
			if err := json.Unmarshal(value, &v); err != nil {
				return err
			}
		}
		(*o)[key] = v
	}
	return nil
}

// reread decodes one option, which the decoding of the request left as maps
// and float64s, into a typed value; numbers that are out of range or not
// whole are refused on the way. An absent or null option leaves into alone.
func reread(options map[string]any, key string, into any) error {
	v, ok := options[key]
	if !ok || v == nil {
		return nil
	}
	b, raw := v.(json.RawMessage) // see ContainerOptions
	if !raw {
		var err error
		if b, err = json.Marshal(v); err != nil {
			return fmt.Errorf("option %s: %w", key, err)
		}
	}
	if json.Unmarshal(b, into) != nil {
		return fmt.Errorf("option %s is not as Docker sends it: %.80q", key, b)
	}
	return nil
}

func checkPort(proto uint8, port uint16) error {
	switch {
	case proto != 6 && proto != 17 && proto != 132:
		return fmt.Errorf("protocol %d is none of 6 (tcp), 17 (udp), 132 (sctp)", proto)
	case port == 0:
		return fmt.Errorf("port 0 cannot be reached")
	}
	return nil
}

func parseIP(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%.80q is not an IP address: write it as 192.0.2.1", s)
	}
	if a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("address %q has a zone", s)
	}
	return a.Unmap(), nil
}
