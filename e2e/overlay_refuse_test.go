//go:build e2e

package e2e

import (
	"strings"
	"testing"
)

// refuses fails unless a docker command is refused in one line with these words.
func (e *engine) refuses(tb testing.TB, words []string, args ...string) {
	tb.Helper()
	_, err := e.docker(args...)
	if err == nil {
		tb.Errorf("%s: accepted: docker %s", e.name, strings.Join(args, " "))
		return
	}
	// The client adds a hint of its own after "docker run".
	line, _, _ := strings.Cut(strings.TrimSpace(lastLine(err)), "\nSee 'docker run --help'")
	line, _, _ = strings.Cut(line, "\n\nRun 'docker run --help'")
	if strings.Contains(strings.TrimSpace(line), "\n") {
		tb.Errorf("%s: more than one line: %s", e.name, line)
	}
	for _, w := range words {
		if !strings.Contains(line, w) {
			tb.Errorf("%s: docker %s: the error does not say %q: %s", e.name, strings.Join(args, " "), w, line)
		}
	}
	tb.Logf("%s: %s", e.name, line)
}

// refusals are what contradicts another host, or this one.
func (all members) refusals(t *testing.T, list []box) {
	t.Helper()
	host1, host2 := all[0], all[1]
	host1.must(t, host1.overlayArgs("mine", 50, "-o", "vni=5000")...)
	id := host1.must(t, "network", "inspect", "-f", "{{slice .Id 0 12}}", "mine")
	for _, c := range []struct {
		e     *engine
		args  []string
		words []string
	}{
		{host2, host2.overlayArgs("no", 51, "-o", "vni=5000"), []string{"VNI 5000", "host1", "10.50.0.0/16", "10.51.0.0/16", "give another vni"}},
		{host2, host2.overlayArgs("no", 50, "-o", "vni=5000", "-o", "port=4795"), []string{"VNI 5000", "host1", "port 4793", "4795", "make it alike"}},
		{host2, host2.overlayArgs("no", 50, "-o", "vni=5000", "-o", "mtu=1400"), []string{"VNI 5000", "host1", "mtu 1450", "1400", "make it alike"}},
		{host2, host2.overlayArgs("no", 51, "-o", "mtu=1451"), []string{"mtu 1451", "lan0", "1500", "at most 1450"}},
		{host1, host1.overlayArgs("no", 51, "-o", "vni=5000"), []string{"VNI 5000", id, "another"}},
		// Traffic could be told apart by the port, but not what hosts say of it.
		{host1, host1.overlayArgs("no", 51, "-o", "vni=5000", "-o", "port=4795"), []string{"VNI 5000", id, "another"}},
	} {
		c.e.refuses(t, c.words, c.args...)
	}
	for _, a := range list[0].addrs {
		flag := "--ip"
		if strings.Contains(a, ":") {
			flag = "--ip6"
		}
		host2.refuses(t, []string{a, "host1", "another address"}, "run", "-d", "--name", "no", "--network", "blue", flag, a, image)
		host2.must(t, "rm", "-f", "no")
	}
	for _, e := range all {
		if out := e.must(t, "network", "ls", "-q", "--filter", "name=^no$"); out != "" {
			t.Errorf("%s has a network that was refused: %s", e.name, out)
		}
	}
	host1.must(t, "network", "rm", "mine")
	all.agree(t, "blue")
}
