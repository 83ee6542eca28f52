package main

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestLater: a registration is not an election.
func TestLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		f := later(func() { calls++ })
		for range 3 {
			f()
			time.Sleep(registering / 2)
		}
		if calls != 0 {
			t.Errorf("called %d times within %v", calls, registering)
		}
		f()
		if calls != 1 {
			t.Errorf("called %d times after it", calls)
		}
	})
}
