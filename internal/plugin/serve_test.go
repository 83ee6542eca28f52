package plugin_test

import (
	"context"
	"errors"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/internal/plugin"
)

func TestRecovery(t *testing.T) {
	t.Run("calls wait", func(t *testing.T) {
		s := serve(t, 0)
		var wg sync.WaitGroup
		var answered atomic.Int32
		for range 8 {
			wg.Go(func() {
				status, body := s.post(t, plugin.PathLeave, leave)
				answered.Add(1)
				if status != 200 {
					t.Errorf("got %d %s", status, body)
				}
			})
		}
		time.Sleep(100 * time.Millisecond)
		if n := answered.Load(); n != 0 {
			t.Errorf("%d calls were answered during recovery", n)
		}
		plugin.Handle(s.Mux, plugin.PathLeave, nop) // registered while served
		s.Ready(nil)
		wg.Wait()
	})
	t.Run("bounded", func(t *testing.T) {
		s := serve(t, 200*time.Millisecond)
		status, body := s.post(t, plugin.PathLeave, leave)
		wantError(t, 500, status, body, "still being read")
		status, body = s.post(t, plugin.PathLeave, "")
		wantError(t, 400, status, body, "empty")
	})
	t.Run("failed", func(t *testing.T) {
		s := serve(t, 0)
		plugin.Handle(s.Mux, plugin.PathLeave, nop)
		go s.Ready(errors.New("weft.db: page 3 is damaged"))
		for range 2 {
			status, body := s.post(t, plugin.PathLeave, leave)
			wantError(t, 500, status, body, "weft.db: page 3 is damaged")
		}
		s.Ready(nil) // mended
		if status, body := s.post(t, plugin.PathLeave, leave); status != 200 {
			t.Errorf("once it was mended: %d %s", status, body)
		}
	})
	t.Run("not started for a caller that left", func(t *testing.T) {
		s := serve(t, 0)
		var calls atomic.Int32
		plugin.Handle(s.Mux, plugin.PathLeave, func(context.Context, network.LeaveRequest) (plugin.Empty, error) {
			calls.Add(1)
			return plugin.Empty{}, nil
		})
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, "POST", "http://weft"+plugin.PathLeave, strings.NewReader(leave))
		if err != nil {
			t.Fatal(err)
		}
		if resp, err := s.client.Do(req); err == nil {
			_ = resp.Body.Close()
			t.Error("answered during recovery")
		}
		s.log.wait(t, "went away")
		s.Ready(nil)
		if status, _ := s.post(t, plugin.PathLeave, leave); status != 200 || calls.Load() != 1 {
			t.Errorf("got %d after %d calls, want 200 after 1", status, calls.Load())
		}
	})
}

func TestStopFinishesCallsInFlight(t *testing.T) {
	s := serve(t, 0)
	started, release := make(chan struct{}), make(chan struct{})
	plugin.Handle(s.Mux, plugin.PathLeave, func(ctx context.Context, _ network.LeaveRequest) (plugin.Empty, error) {
		close(started)
		<-release
		return plugin.Empty{}, ctx.Err()
	})
	s.Ready(nil)
	answer := make(chan int, 1)
	go func() {
		status, _ := s.post(t, plugin.PathLeave, leave)
		answer <- status
	}()
	<-started
	s.stop()
	time.Sleep(50 * time.Millisecond)
	select {
	case err := <-s.done:
		t.Fatalf("Serve returned %v before the call was answered", err)
	default:
	}
	close(release)
	if status := <-answer; status != 200 {
		t.Errorf("the call in flight: %d", status)
	}
	s.ended(t)
	if _, err := os.Lstat(s.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket after stop: %v", err)
	}
}

func TestStopInterruptsHangingCalls(t *testing.T) {
	t.Parallel()
	s := serve(t, time.Minute)
	started, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	plugin.Handle(s.Mux, plugin.PathLeave, func(context.Context, network.LeaveRequest) (plugin.Empty, error) {
		close(started)
		<-release
		return plugin.Empty{}, nil
	})
	s.Ready(nil)
	type answer struct {
		status int
		body   string
	}
	got := make(chan answer, 1)
	go func() {
		status, body := s.post(t, plugin.PathLeave, leave)
		got <- answer{status, body}
	}()
	<-started
	start := time.Now()
	s.stop()
	s.ended(t)
	if took := time.Since(start); took > 9500*time.Millisecond {
		t.Errorf("stop took %v, the engine kills after 10 s", took)
	}
	a := <-got
	wantError(t, 500, a.status, a.body, "interrupted, the plugin stops")
}
