package dhcp

import "testing"

// TestNameOfServer: a domain of a server, which status shows to be pasted into a shell,
// is one, or it is not taken.
func TestNameOfServer(t *testing.T) {
	for s, want := range map[string]string{
		"lan.example": "lan.example", "a_b-1.Lan.": "a_b-1.Lan.", "lan\x00": "lan", "xn--bcher-kva.example": "xn--bcher-kva.example",
		"": "", "x y": "", "x;reboot": "", "$(reboot)": "", "`reboot`": "", "x|sh": "", "x>/etc/y": "", "--privileged": "", "it's": "", `a\b`: "",
	} {
		if got := name(s); got != want {
			t.Errorf("%q is taken as %q, want %q", s, got, want)
		}
	}
}
