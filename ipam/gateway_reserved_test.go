package ipam

import (
	"strings"
	"testing"
)

// A reservation of the first address and a gateway that nobody typed are both
// possible, and it is said; with that address typed as gateway they are not.
func TestGatewayBesideReservation(t *testing.T) {
	h := newHouse(t)
	id, err := h.pooled("10.1.0.0/24", map[string]string{"reserve.db": "10.1.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	wantText(t, h.do("gw "+id+" 10.1.0.1"), "error:", "gateway 10.1.0.1 of pool 10.1.0.0/24 is reserved for db", "another --gateway", "reserve.db=")
	if got := h.do("gw " + id); got != "10.1.0.2/24" {
		t.Errorf("gateway %s", got)
	}
	said := 0
	for _, e := range h.log.AllEntries() {
		if strings.Contains(e.Message, "gateway 10.1.0.2: 10.1.0.1 is reserved for db") {
			said++
		}
	}
	if said != 1 {
		t.Errorf("said %d times", said)
	}
	if got := h.addressFor(id, "db", ""); got != "10.1.0.1/24" {
		t.Errorf("db has %s", got)
	}

	// As an engine's restart says it again; and a network from before stays.
	h = newHouse(t)
	if id, err = h.pooled("10.1.0.0/24", nil); err != nil {
		t.Fatal(err)
	}
	h.do("gw " + id + " 10.1.0.1")
	h.restart()
	if id, err = h.pooled("10.1.0.0/24", map[string]string{"reserve.db": "10.1.0.1"}); err != nil {
		t.Fatal(err)
	}
	if got := h.do("gw " + id + " 10.1.0.1"); got != "10.1.0.1/24" {
		t.Errorf("taken up again: %s", got)
	}
}

func wantText(t *testing.T, got string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(got, p) {
			t.Errorf("%q lacks %q", got, p)
		}
	}
}
