package driver

import (
	"fmt"
	"slices"
	"strings"

	"github.com/weftnet/weft/internal/plugin"
)

// elsewhere says where names belong that people put among a network's options.
var elsewhere = map[string]string{
	"subnet":      "is a flag: --subnet (Compose: ipam: config: subnet)",
	"gateway":     "is a flag: --gateway (Compose: ipam: config: gateway)",
	"ip_range":    "is a flag: --ip-range (Compose: ipam: config: ip_range)",
	"aux_address": "is a flag: --aux-address (Compose: ipam: config: aux_addresses)",
	"internal":    "is a flag: --internal (Compose: internal: true)",
	"ipv6":        "is a flag: --ipv6 (Compose: enable_ipv6: true)",
	"enable_ipv6": "is a flag: --ipv6 (Compose: enable_ipv6: true)",
	"attachable":  "is a flag: --attachable (Compose: attachable: true)",
	"encrypted":   "is not there yet: the traffic of containers between hosts is not encrypted; leave it out, or use an encrypted underlay (setting UNDERLAY)",
}

// addressOptions are those of the IPAM half.
var addressOptions = []string{"dhcp", "space", "quarantine", "keep", "reserve", "client_id", "vendor_class", "hostname", "register_dns", "dhcp_timeout", "dhcp_fallback"}

// pluginSettings are given to the plugin, not to a network.
var pluginSettings = []string{"log_level", "pools", "scope", "peers", "secret", "underlay", "grace", "history", "gossip_port",
	"store", "store_ca", "store_cert", "store_key", "store_user", "store_password"}

// misplaced says where an option belongs that no network has; "" if it is just
// unknown.
func misplaced(key, value string) string {
	name := strings.ReplaceAll(strings.ToLower(key), "-", "_")
	word, _, _ := strings.Cut(name, ".") // before the name of a container
	switch where := elsewhere[name]; {
	case where != "":
		return fmt.Sprintf("option %s %s", clip(key), where)
	case slices.Contains(addressOptions, word):
		return fmt.Sprintf("option %s is an --ipam-opt: write --ipam-driver weft:latest --ipam-opt %s=%s (Compose: under ipam, driver: weft:latest and options)", clip(key), clip(key), clip(value))
	case slices.Contains(pluginSettings, name):
		return fmt.Sprintf("option %s is a setting of the plugin: docker plugin set weft:latest %s=%s, while it is disabled", clip(key), strings.ToUpper(name), clip(value))
	}
	return ""
}

// unknownOption is the error for a name that means nothing in the mode; typed: the
// user chose the mode.
func unknownOption(mode, key, value string, typed bool) error {
	if text := misplaced(key, value); text != "" {
		return fmt.Errorf("%s", text)
	}
	var valid []string
	for name, o := range options {
		if o.set != nil && name != optionJoin && (o.modes == nil || slices.Contains(o.modes, mode)) {
			valid = append(valid, name)
		}
	}
	slices.Sort(valid)
	near := plugin.Nearest(key, valid)
	if o, known := options[key]; known && key != optionJoin {
		switch other := strings.Join(o.modes, ", "); {
		case !typed:
			return fmt.Errorf("option %s belongs to mode %s: add -o mode=%s", key, other, o.modes[0])
		case near != "":
			return fmt.Errorf("option %s belongs to mode %s, not to mode %s: did you mean %q? else use -o mode=%s", key, other, mode, near, o.modes[0])
		default:
			return fmt.Errorf("option %s belongs to mode %s, not to mode %s: leave it out, or use -o mode=%s", key, other, mode, o.modes[0])
		}
	}
	return fmt.Errorf("option %q is not known in mode %s: %svalid are %s", clip(key), mode, meant(near), strings.Join(valid, ", "))
}

// meant is a suggestion, if there is one.
func meant(near string) string {
	if near == "" {
		return ""
	}
	return fmt.Sprintf("did you mean %q? ", near)
}

// notAChoice is the error for a value that is none of a few.
func notAChoice(what, v string, choices []string) error {
	return fmt.Errorf("%q is not %s: %svalid are %s", clip(v), what, meant(plugin.Nearest(v, choices)), strings.Join(choices, ", "))
}
