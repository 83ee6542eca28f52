package plugin_test

import (
	"testing"

	"github.com/weftnet/weft/internal/plugin"
)

// TestNearest: a suggestion is what somebody may have meant, or none.
func TestNearest(t *testing.T) {
	valid := []string{"mode", "mtu", "vni", "parent", "bridge", "host_access", "com.docker.network.bridge.enable_icc"}
	for name, want := range map[string]string{
		"mod": "mode", "MTU": "mtu", "mtuu": "mtu", "parnet": "parent", "brigde": "bridge", "hostaccess": "host_access",
		"enable_icc": "com.docker.network.bridge.enable_icc", "enable-icc": "com.docker.network.bridge.enable_icc",
		"dhcp": "", "encrypted": "", "x": "", "": "", "vlan": "", "subnet": "", "hairpin": "",
	} {
		if got := plugin.Nearest(name, valid); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
	if got := plugin.Nearest("x", nil); got != "" {
		t.Errorf("of nothing: %q", got)
	}
}

// TestWithin: a name that is right, or far from all, is nobody's misspelling.
func TestWithin(t *testing.T) {
	valid := []string{"ifname", "name"}
	for name, want := range map[string]string{
		"ifname": "", "name": "", "ifnmae": "ifname", "IFNAME": "ifname", "fname": "ifname", "nam": "name", "bandwidth": "", "": "",
	} {
		if got := plugin.Within(2, name, valid); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}
