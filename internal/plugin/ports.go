package plugin

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
)

// PortBinding is one port that a container publishes.
type PortBinding struct {
	Proto uint8      // 6 (TCP), 17 (UDP) or 132 (SCTP)
	IP    netip.Addr // the container's; usually not set
	Port  uint16     // the container's; never 0
	// HostIP is not set when the port is published on every address of both
	// families.
	HostIP netip.Addr
	// HostPort and HostPortEnd bound the choice of the host's port; both are
	// 0 when any port will do.
	HostPort, HostPortEnd uint16
}

// ParsePortMap reads the published ports out of the Options of
// CreateEndpoint, Join or ProgramExternalConnectivity. The engine's order is
// random; the answer is sorted.
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
	return bindings, nil
}

// reread decodes one option, which the decoding of the request left as maps
// and float64s, into a typed value; numbers that are out of range or not
// whole are refused on the way. An absent or null option leaves into alone.
func reread(options map[string]any, key string, into any) error {
	v, ok := options[key]
	if !ok || v == nil {
		return nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("option %s: %w", key, err)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("option %s: %w", key, err)
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
		return netip.Addr{}, fmt.Errorf("address %q: %w", s, err)
	}
	if a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("address %q has a zone", s)
	}
	return a.Unmap(), nil
}
