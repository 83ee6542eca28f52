package ipam

import (
	"fmt"
	"strings"

	"github.com/weftnet/weft/internal/plugin"
)

// checkOptions refuses what the user gave with --ipam-opt: there is no such
// option yet. The leader of a swarm mixes marks of its own into the same map.
func checkOptions(all map[string]string) error {
	for k := range all {
		if !strings.HasPrefix(k, "com.docker.network.") && k != plugin.OptionRequestAddressType {
			return fmt.Errorf("unknown ipam option %q: there are no ipam options", k)
		}
	}
	return nil
}
