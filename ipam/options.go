package ipam

import (
	"fmt"
	"strings"

	"github.com/weftnet/weft/internal/plugin"
)

// spaceOption is how the name of a shared address space begins, in a pool ID as
// on the command line.
const spaceOption = "space="

// parseOptions reads what the user gave with --ipam-opt. The leader of a swarm
// mixes marks of its own into the same map.
func parseOptions(all map[string]string) (space string, err error) {
	for k, v := range all {
		switch {
		case k+"=" == spaceOption:
			if err := checkSpaceName(v); err != nil {
				return "", fmt.Errorf("ipam option %s=%s: %w", k, v, err)
			}
			space = v
		case !strings.HasPrefix(k, "com.docker.network.") && k != plugin.OptionRequestAddressType:
			return "", fmt.Errorf("unknown ipam option %q: valid is space=NAME", k)
		}
	}
	return space, nil
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
