package datapath

import (
	"context"
	"testing"
	"time"
)

// TestDamaged: who takes rules of ours away is heard of, and nobody else.
func TestDamaged(t *testing.T) {
	k, ns := newKernel(t)
	ensure(t, k, State{Elements: []Element{{Set: SetBridges, Link: "wfa"}}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- k.Watch(ctx) }()
	heard := func(patience time.Duration) bool {
		select {
		case <-k.Damaged():
			return true
		case <-time.After(patience):
			return false
		}
	}
	for stop := time.Now().Add(5 * time.Second); ; { // until it listens
		ns.Exec("nft", "table ip filter { chain FORWARD { }; }; delete table ip filter")
		if heard(20 * time.Millisecond) {
			break
		}
		if time.Now().After(stop) {
			t.Fatal("nothing is heard of")
		}
	}
	for heard(100 * time.Millisecond) { // what was not waited for
	}
	for _, x := range []struct {
		change string
		want   bool
	}{
		{"table inet theirs { chain c { drop; }; }; delete table inet theirs", false},
		{"add element inet weft bridges { \"wfb\" }; delete element inet weft bridges { \"wfb\" }", false},
		{"table ip filter { chain DOCKER { drop; }; }; flush chain ip filter DOCKER", false},
		{"table ip filter { chain FORWARD { drop; }; }; flush chain ip filter FORWARD", true},
		{"flush table inet weft", true},
		{"delete table inet weft", true},
		{"flush ruleset", true},
	} {
		if _, err := k.Owned(t.Context()); err != nil { // sees what the last one did
			t.Fatal(err)
		}
		ensure(t, k, State{Elements: []Element{{Set: SetBridges, Link: "wfa"}}})
		for heard(100 * time.Millisecond) {
		}
		ns.Exec("nft", x.change)
		patience := 5 * time.Second
		if !x.want {
			patience = 300 * time.Millisecond
		}
		if got := heard(patience); got != x.want {
			t.Errorf("nft %s: heard of %t, want %t", x.change, got, x.want)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
