package ipam

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/internal/dhcp"
)

// telling is what a DHCP server is told of a container, as the user has typed it; ""
// is the default. For all containers of a network it is KEY=VALUE, for the one of a
// name KEY.NAME=VALUE, for an endpoint KEY=VALUE among its own options.
type telling struct {
	clientID string // duid, mac, name, hex or text
	vendor   string
	hostname string // name, none, or a host name
	register string // true or false
	timeout  time.Duration
}

// The words of a telling that are not taken literally.
const (
	byDUID = "duid" // client identifier: of the host and the station (RFC 4361)
	byMAC  = "mac"  // client identifier: the MAC address
	byName = "name" // client identifier, host name: the container's name
	noName = "none" // host name: none
)

const (
	leastPatience = time.Second
	// mostPatience leaves time for the answer within a call's 10 s.
	mostPatience = 9 * time.Second
	mostTold     = 128 // bytes of a client identifier or a vendor class
)

// TellingKeys are the options that say what a DHCP server is told of an endpoint.
var TellingKeys = []string{"client_id", "hostname", "register_dns", "vendor_class"}

// tellingKeys are those of a network.
var tellingKeys = append([]string{"dhcp_timeout"}, TellingKeys...)

// set takes one option; name is whom it is for, "" for all containers of a network.
func (t *telling) set(key, value string, all bool) error {
	switch key {
	case "client_id":
		t.clientID = value
		if all && !slices.Contains([]string{byDUID, byMAC, byName}, value) {
			return fmt.Errorf("all containers of the network would be one station: choose duid, mac or name, or write client_id.CONTAINER=%s", clip(value))
		}
		_, err := clientID(value)
		return err
	case "vendor_class":
		t.vendor = value
		return checkVendor(value)
	case "hostname":
		t.hostname = value
		if all && value != byName && value != noName {
			return fmt.Errorf("all containers of the network would have one name: choose name or none, or write hostname.CONTAINER=%s", clip(value))
		}
		return checkHostname(value)
	case "register_dns":
		t.register = value
		if value != "true" && value != "false" {
			return errors.New("choose true or false")
		}
		return nil
	}
	d, err := time.ParseDuration(value)
	if err != nil || d < leastPatience || d > mostPatience {
		return fmt.Errorf("choose %s to %s", leastPatience, mostPatience)
	}
	t.timeout = d
	return nil
}

// clientID is the identifier that is typed as one: hex (0x0102, 01:02), or text.
func clientID(s string) ([]byte, error) {
	digits, isHex := strings.CutPrefix(s, "0x")
	if parts := strings.Split(s, ":"); len(parts) > 1 {
		isHex = !slices.ContainsFunc(parts, func(p string) bool { return len(p) != 2 })
		digits = strings.ReplaceAll(s, ":", "")
	}
	if isHex {
		b, err := hex.DecodeString(digits)
		if err != nil || len(b) < 2 || len(b) > mostTold {
			return nil, fmt.Errorf("hex stands for 2 to %d bytes: write it as 0x01024211 or 01:02:42:11", mostTold)
		}
		return b, nil
	}
	if s == "" || len(s) >= mostTold || !printable(s) {
		return nil, fmt.Errorf("choose duid, mac, name, hex (0x01024211), or up to %d printable characters", mostTold-1)
	}
	return append([]byte{0}, s...), nil // not a hardware address (RFC 2132, 9.14)
}

func checkVendor(s string) error {
	if s == "" || len(s) > mostTold || !printable(s) {
		return fmt.Errorf("give 1 to %d printable characters", mostTold)
	}
	return nil
}

// checkHostname takes one label of a DNS name, or a word for what to do.
func checkHostname(s string) error {
	bad := func(r rune) bool {
		return (r < 'a' || 'z' < r) && (r < 'A' || 'Z' < r) && (r < '0' || '9' < r) && r != '-'
	}
	if s == "" || len(s) > 63 || strings.ContainsFunc(s, bad) || s[0] == '-' || s[len(s)-1] == '-' {
		return errors.New("a host name has 1 to 63 letters, digits and dashes, none of them first or last, and no domain")
	}
	return nil
}

// printable reports whether s is printable ASCII.
func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || '~' < r })
}

// over is t where it says something, else o.
func (t telling) over(o telling) telling {
	return telling{
		clientID: cmp.Or(t.clientID, o.clientID), vendor: cmp.Or(t.vendor, o.vendor), hostname: cmp.Or(t.hostname, o.hostname),
		register: cmp.Or(t.register, o.register), timeout: cmp.Or(t.timeout, o.timeout),
	}
}

// apply has a station be told of so; name is its container's, "" where it is not
// known.
func (t telling) apply(s *dhcp.Station, name string) {
	s.ByMAC, s.ClientID = t.clientID == byMAC, nil
	switch t.clientID {
	case "", byDUID, byMAC:
	case byName:
		if name != "" {
			s.ClientID, _ = clientID(name) // else it is a station like any other
		}
	default:
		s.ClientID, _ = clientID(t.clientID) // checked when it was typed
	}
	switch t.hostname {
	case "", byName:
		s.Name = name
	case noName:
		s.Name = ""
	default:
		s.Name = t.hostname
	}
	s.Vendor, s.Register, s.Patience = t.vendor, t.register == "true", t.timeout
}

// tell takes an option of a pool that is one of a telling, and reports whether it is.
func (o *poolOptions) tell(key, value string) (bool, error) {
	key, name, one := strings.Cut(key, ".")
	if !slices.Contains(tellingKeys, key) {
		return false, nil
	}
	if one {
		if key == "dhcp_timeout" {
			return true, errors.New("it is the network's: write dhcp_timeout=TIME")
		}
		if err := checkName(name); err != nil {
			return true, err
		}
	}
	t := o.told[name]
	err := t.set(key, value, !one)
	if o.told == nil {
		o.told = map[string]telling{}
	}
	o.told[name] = t
	return true, err
}

// needsDHCP refuses a telling where there is no server.
func (o *poolOptions) needsDHCP() error {
	if o.dhcp != "" {
		return nil
	}
	for _, k := range slices.Sorted(maps.Keys(o.raw)) {
		if word, _, _ := strings.Cut(k, "."); slices.Contains(tellingKeys, word) || k == fallbackKey {
			return fmt.Errorf("ipam option %s is for a DHCP server: add dhcp=INTERFACE, or leave it out", clip(k))
		}
	}
	return nil
}

// tellingOf is what the server is told of the container of a name; "" if none is
// known.
func (o *poolOptions) tellingOf(name string) telling {
	all := o.told[""]
	if name == "" {
		return all
	}
	return o.told[name].over(all)
}

// parseTelling reads the options of an endpoint.
func parseTelling(options map[string]string) (t telling, err error) {
	for _, k := range slices.Sorted(maps.Keys(options)) {
		if err := t.set(k, options[k], false); err != nil {
			return t, fmt.Errorf("endpoint option %s=%s: %w", k, clip(options[k]), err)
		}
	}
	return t, nil
}
