package ipam

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/internal/plugin"
)

// spaceOption is how the name of a shared address space begins, in a pool ID as
// on the command line.
const spaceOption = "space="

// reserveOption is how the key of a reservation begins; the name follows.
const reserveOption = "reserve."

// restsFar has an address rest only where its next holder's neighbours would look
// for it in another place: after another host has released it. On one host the
// MAC address follows the address, and what neighbours remember stays true.
const restsFar time.Duration = -1

// restTime is how long it rests then. Neighbours forget an address within
// a minute or so (Linux: base_reachable_time and gc_stale_time).
const restTime = 60 * time.Second

// poolOptions is what the user gave with --ipam-opt, in parsed form.
type poolOptions struct {
	space      string
	dhcp       string        // the link on which a DHCP server hands out the addresses
	quarantine time.Duration // how long a released address rests, or restsFar
	// keep is how long a name keeps an address after its release; negative:
	// until the pool needs it.
	keep     time.Duration
	reserved map[string]reservation // by name
	told     map[string]telling     // by name; "" is for all containers
	fallback []netip.Prefix         // where addresses come from while no DHCP server answers
	raw      map[string]string      // as it goes into the record, without space
}

// defaultOptions are those of a network that has none.
func defaultOptions() poolOptions { return poolOptions{quarantine: restsFar, keep: -1} }

// MAC is the hardware address of one interface; zero is none.
type MAC = [6]byte

// reservation is what is kept for a name in one pool.
type reservation struct {
	addr netip.Addr
	mac  MAC
}

// String is the form that parseReservation reads.
func (r reservation) String() string {
	if r.mac == (MAC{}) {
		return r.addr.String()
	}
	return r.addr.String() + "," + net.HardwareAddr(r.mac[:]).String()
}

// parseOptions reads the options of a pool; prefix is zero when it is chosen by
// us. The leader of a swarm mixes marks of its own into the same map.
func parseOptions(all map[string]string, prefix netip.Prefix) (poolOptions, error) {
	o := defaultOptions()
	for _, k := range slices.Sorted(maps.Keys(all)) {
		v := all[k]
		var err error
		name, reserve := strings.CutPrefix(k, reserveOption)
		switch {
		case k+"=" == spaceOption:
			o.space, err = v, checkSpaceName(v)
		case k+"=" == dhcpSpace:
			o.dhcp, err = v, checkLink(v)
		case k == "quarantine":
			o.quarantine, err = parseTime(v)
		case k == "keep":
			o.keep, err = parseTime(v)
		case k == fallbackKey:
			err = o.setFallback(v)
		case reserve:
			err = o.reserve(name, v, prefix)
		case strings.HasPrefix(k, "com.docker.network.") || k == plugin.OptionRequestAddressType:
			continue
		default:
			var known bool
			if known, err = o.tell(k, v); !known {
				return o, unknownOption(k)
			}
		}
		if err != nil {
			return o, fmt.Errorf("ipam option %s=%s: %w", k, v, err)
		}
		if k+"=" != spaceOption {
			if o.raw == nil {
				o.raw = map[string]string{}
			}
			o.raw[k] = v
		}
	}
	if o.space != "" && o.dhcp != "" {
		return o, fmt.Errorf("ipam option space=%s: with dhcp=%s it is the server that hands out addresses, to all hosts: leave space out", o.space, o.dhcp)
	}
	if _, ok := o.raw["quarantine"]; ok && o.dhcp != "" {
		return o, fmt.Errorf("ipam option dhcp=%s: how long a released address rests is up to the server: leave quarantine out", o.dhcp)
	}
	return o, o.needsDHCP()
}

func unknownOption(key string) error {
	words := append([]string{"space", "dhcp", "quarantine", "keep", fallbackKey}, tellingKeys...)
	valid := append(slices.Clone(words), reserveOption+"NAME")
	word, _, _ := strings.Cut(key, ".")
	near := plugin.Nearest(word, append(words, "reserve"))
	if near+"." == reserveOption {
		near += ".NAME"
	}
	if near == "" {
		return fmt.Errorf("ipam option %q is not known: valid are %s; options of the network itself are given with -o (Compose: driver_opts)", clip(key), strings.Join(valid, ", "))
	}
	return fmt.Errorf("ipam option %q is not known: did you mean %q? valid are %s", clip(key), near, strings.Join(valid, ", "))
}

// parseTime takes 90s, 5m, 24h or 0.
func parseTime(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("a time is written as 90s, 5m or 24h, and 0 is none")
	}
	return d, nil
}

// reserve takes ADDRESS[,MAC], and may have an address of each family: the
// engine sends the same options with both pools of a network.
func (o *poolOptions) reserve(name, value string, prefix netip.Prefix) error {
	r, err := parseReservation(name, value, prefix)
	if err != nil || !r.addr.IsValid() {
		return err
	}
	for other, have := range o.reserved {
		if have.addr == r.addr && other != name {
			return fmt.Errorf("%s is reserved for %s already: choose another", r.addr, other)
		}
	}
	if o.reserved == nil {
		o.reserved = map[string]reservation{}
	}
	o.reserved[name] = r
	return nil
}

// parseReservation returns what of a reservation concerns the pool prefix;
// the address is zero when it is of the other family alone.
func parseReservation(name, value string, prefix netip.Prefix) (r reservation, err error) {
	if !prefix.IsValid() {
		return r, fmt.Errorf("give the subnet that the address is of with --subnet")
	}
	if err := checkName(name); err != nil {
		return r, err
	}
	addressed := false
	for part := range strings.SplitSeq(value, ",") {
		part = strings.TrimSpace(part)
		if hw, err := net.ParseMAC(part); err == nil {
			if len(hw) != len(r.mac) || hw[0]&1 != 0 || MAC(hw) == (MAC{}) {
				return r, fmt.Errorf("%s is not the MAC address of one interface: write it as 02:42:c0:a8:01:14", part)
			}
			r.mac = MAC(hw)
			continue
		}
		a, err := netip.ParseAddr(part)
		if err != nil || a.Zone() != "" || a.Is4In6() {
			return r, fmt.Errorf("%q is neither an address nor a MAC address: write it as 192.168.1.20 or 192.168.1.20,02:42:c0:a8:01:14", part)
		}
		addressed = true
		if a.Is4() != prefix.Addr().Is4() {
			continue
		}
		if first, last := (poolKey{prefix: prefix}).usable(); !prefix.Contains(a) || a.Less(first) || last.Less(a) {
			return r, fmt.Errorf("%s is not a usable address of subnet %s: %s to %s are", a, prefix, first, last)
		}
		if r.addr.IsValid() {
			return r, fmt.Errorf("two addresses of subnet %s: a name has one in it", prefix)
		}
		r.addr = a
	}
	if !addressed {
		return r, fmt.Errorf("no address: write it as 192.168.1.20 or 192.168.1.20,02:42:c0:a8:01:14")
	}
	return r, nil
}

// parseReserved reads what reservedTexts wrote, of the pool prefix.
func parseReserved(texts map[string]string, prefix netip.Prefix) (map[string]reservation, error) {
	all := map[string]reservation{}
	for name, v := range texts {
		r, err := parseReservation(name, v, prefix)
		if err != nil {
			return nil, fmt.Errorf("reserved for %s: %w", name, err)
		}
		all[name] = r
	}
	return all, nil
}

// reservedTexts is how reservations are written; nil for none.
func reservedTexts(all map[string]reservation) map[string]string {
	var texts map[string]string
	for name, r := range all {
		if texts == nil {
			texts = map[string]string{}
		}
		texts[name] = r.String()
	}
	return texts
}

// checkName takes what can be the name of a container, and part of a key.
func checkName(name string) error {
	if name == "" || len(name) > 255 || strings.ContainsAny(name, "/\x00 ") {
		return fmt.Errorf("%q is not the name of a container: write it as docker ps shows it", name[:min(len(name), 64)])
	}
	return nil
}

// checkSpaceName takes what can stand in keys and pool IDs.
func checkSpaceName(name string) error {
	bad := func(r rune) bool {
		return (r < 'a' || 'z' < r) && (r < 'A' || 'Z' < r) && (r < '0' || '9' < r) && r != '-' && r != '_' && r != '.'
	}
	if name == "" || len(name) > 63 || strings.ContainsFunc(name, bad) {
		return fmt.Errorf("a space has a name of 1 to 63 letters, digits, dots, dashes and underscores")
	}
	return nil
}
