package admin_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/admin"
)

type document struct {
	Networks []string
}

// serve runs the socket with the given status until the test ends.
func serve(t *testing.T, status func(context.Context) (any, error)) (socket string, stop func() error) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- admin.Serve(ctx, l, map[string]admin.Call{
			admin.PathStatus: func(ctx context.Context, _ []byte) (any, error) { return status(ctx) },
			admin.PathSecret: func(_ context.Context, body []byte) (any, error) {
				if string(body) != `"please"` {
					return nil, fmt.Errorf("%s is not please", body)
				}
				return struct{}{}, nil
			},
		}, log)
	}()
	stop = func() error {
		cancel()
		select {
		case err := <-done:
			done <- err
			return err
		case <-time.After(5 * time.Second):
			return errors.New("Serve did not return")
		}
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return socket, stop
}

func TestStatus(t *testing.T) {
	socket, _ := serve(t, func(context.Context) (any, error) { return document{[]string{"n1", "n2"}}, nil })
	for range 2 {
		var got document
		if err := admin.Get(t.Context(), socket, admin.PathStatus, &got); err != nil {
			t.Fatal(err)
		}
		if strings.Join(got.Networks, " ") != "n1 n2" {
			t.Errorf("got %v", got)
		}
	}
}

func TestPost(t *testing.T) {
	socket, _ := serve(t, func(context.Context) (any, error) { return nil, nil })
	if err := admin.Post(t.Context(), socket, admin.PathSecret, "please", new(any)); err != nil {
		t.Error(err)
	}
	for path, part := range map[string]string{admin.PathSecret: "is not please", admin.PathStatus: "takes GET only"} {
		if err := admin.Post(t.Context(), socket, path, "now", new(any)); err == nil || !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), socket) {
			t.Errorf("%s: %v, want %q", path, err, part)
		}
	}
	if err := admin.Get(t.Context(), socket, admin.PathSecret, new(any)); err == nil || !strings.Contains(err.Error(), "takes POST only") {
		t.Error(err)
	}
	if err := admin.Post(t.Context(), socket, admin.PathSecret, strings.Repeat("x", 1<<17), new(any)); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Error(err)
	}
}

func TestErrors(t *testing.T) {
	socket, stop := serve(t, func(context.Context) (any, error) { return nil, errors.New("read links: interrupted") })
	unencodable, _ := serve(t, func(context.Context) (any, error) { return func() {}, nil })
	for _, c := range []struct{ socket, path, part string }{
		{socket, admin.PathStatus, "read links: interrupted"},
		{socket, "/v1/other", "nothing at /v1/other"},
		{unencodable, admin.PathStatus, "cannot be encoded"},
		{socket + "x", admin.PathStatus, "no such file"},
	} {
		var got document
		err := admin.Get(t.Context(), c.socket, c.path, &got)
		if err == nil || !strings.Contains(err.Error(), c.part) || !strings.Contains(err.Error(), c.socket) {
			t.Errorf("%s: %v, want %q", c.path, err, c.part)
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := admin.Get(t.Context(), socket, admin.PathStatus, &document{}); err == nil {
		t.Error("answered after stop")
	}
}

// A status that hangs holds up neither the stop nor its caller.
func TestStopWhileAsked(t *testing.T) {
	asked := make(chan struct{})
	socket, stop := serve(t, func(ctx context.Context) (any, error) {
		close(asked)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	answer := make(chan error, 1)
	go func() { answer <- admin.Get(context.Background(), socket, admin.PathStatus, &document{}) }()
	<-asked
	start := time.Now()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("stop took %v", took)
	}
	if err := <-answer; err == nil {
		t.Error("the caller got an answer")
	}
}

func TestOnlyReads(t *testing.T) {
	socket, _ := serve(t, func(context.Context) (any, error) { return document{}, nil })
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "DELETE /v1/status HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(conn)
	if err != nil || !strings.Contains(string(b), "405") {
		t.Errorf("got %q %v, want 405", b, err)
	}
}

// The state of a managed plugin lies deeper on the host than an address is long.
func TestLongPath(t *testing.T) {
	short, _ := serve(t, func(context.Context) (any, error) { return document{[]string{"n1"}}, nil })
	deep := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	long := filepath.Join(deep, "admin.sock")
	if err := os.Rename(short, long); err != nil {
		t.Fatal(err)
	}
	var got document
	if err := admin.Get(t.Context(), long, admin.PathStatus, &got); err != nil || len(got.Networks) != 1 {
		t.Errorf("got %v %v", got, err)
	}
	err := admin.Get(t.Context(), long+"x", admin.PathStatus, &got)
	if err == nil || strings.Contains(err.Error(), "/proc/self") || !strings.Contains(err.Error(), long) {
		t.Errorf("got %v, want an error about %s", err, long)
	}
}
