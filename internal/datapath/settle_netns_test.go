package datapath

import (
	"testing"
	"time"

	"github.com/weftnet/weft/internal/netnstest"
)

// A container's sub-interface that the kernel has not cleaned up yet keeps its
// hardware address; the next one with it waits.
func TestSettle(t *testing.T) {
	k, host := newKernel(t)
	old := netnstest.New(t)
	host.Exec("sh", "-ec", `
		ip link add eth0 type veth peer name eth1; ip link set eth0 up; ip link set eth1 up
		ip link add wfc1 link eth0 address 02:42:0a:01:00:02 type macvlan mode bridge
		ip link add wfc2 link eth0 address 02:42:0a:01:00:02 type macvlan mode bridge`)
	host.Do(func() { old.Take("wfc1", "eth0", prefix("10.1.0.2/24")) })
	done := make(chan error, 1)
	go func() { done <- k.Settle(t.Context(), "wfc2") }()
	select {
	case err := <-done:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	old.Exec("ip", "link", "del", "eth0")
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if l, err := k.links.change.get("wfc2"); err != nil || l.up {
		t.Errorf("up: %t, %v", l.up, err)
	}
	wantError(t, k.Settle(t.Context(), "wfc9"), "wfc9")
	for name, want := range map[string]bool{"wfc2": true, "wfc9": false} {
		if there, err := k.Present(name); err != nil || there != want {
			t.Errorf("%s present: %t, %v", name, there, err)
		}
	}
}
