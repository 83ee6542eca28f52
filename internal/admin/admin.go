package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/sirupsen/logrus"
)

// The paths. PathStatus is read; what is sent to another is carried out.
const (
	PathStatus  = "/v1/status"
	PathSecret  = "/v1/secret"
	PathAddress = "/v1/address"
	PathNetwork = "/v1/network"
	PathNewID   = "/v1/cluster/new-id"
	PathHistory = "/v1/history"
)

// Call answers a request with a value, or an error in one line. The body is
// empty for what is only read.
type Call func(ctx context.Context, body []byte) (any, error)

const (
	timeout = 10 * time.Second // for one request
	grace   = 2 * time.Second  // for requests in flight at a stop
	maxBody = 64 << 20         // of an answer; an endpoint takes less than 1 KiB
	// maxRequest bounds what is sent to us.
	maxRequest = 64 << 10
)

// failure is the body of every answer that is not a success.
type failure struct {
	Error string
}

// Serve answers calls on l until ctx ends, then closes l and returns nil. Each
// is at a path; PathStatus is read, the others are sent something.
func Serve(ctx context.Context, l net.Listener, calls map[string]Call, log logrus.FieldLogger) error {
	mux := http.NewServeMux()
	for path, call := range calls {
		method := http.MethodPost
		if path == PathStatus {
			method = http.MethodGet
		}
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			if r.Method != method {
				answer(w, log, http.StatusMethodNotAllowed, failure{fmt.Sprintf("%s takes %s only", path, method)})
				return
			}
			ctx, cancel := context.WithTimeout(r.Context(), timeout)
			defer cancel()
			body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
			if err != nil {
				answer(w, log, http.StatusBadRequest, failure{err.Error()})
				return
			}
			v, err := call(ctx, body)
			if err != nil {
				answer(w, log, http.StatusInternalServerError, failure{err.Error()})
				return
			}
			answer(w, log, http.StatusOK, v)
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		answer(w, log, http.StatusNotFound, failure{"there is nothing at " + r.URL.Path})
	})
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	srv := &http.Server{
		Handler:           mux,
		BaseContext:       func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: timeout, ReadTimeout: timeout, WriteTimeout: 2 * timeout,
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	stop, cancelStop := context.WithTimeout(base, grace)
	defer cancelStop()
	if err := srv.Shutdown(stop); err != nil {
		_ = srv.Close() // a reader that loses its answer asks again
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// answer encodes before it sends, so that a value that cannot be encoded is
// an error and not half an answer.
func answer(w http.ResponseWriter, log logrus.FieldLogger, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		log.WithError(err).Error("encode status")
		code, b = http.StatusInternalServerError, []byte(`{"Error":"the status cannot be encoded, see the log"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if _, err := w.Write(append(b, '\n')); err != nil {
		log.WithError(err).Debug("send status")
	}
}

// Get decodes what the plugin that listens on socket answers at path.
func Get(ctx context.Context, socket, path string, into any) error {
	return ask(ctx, socket, http.MethodGet, path, nil, into)
}

// Post sends v to path and decodes the answer.
func Post(ctx context.Context, socket, path string, v, into any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("ask %s: encode: %w", socket, err)
	}
	return ask(ctx, socket, http.MethodPost, path, bytes.NewReader(body), into)
}

func ask(ctx context.Context, socket, method, path string, send io.Reader, into any) error {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, socket) },
	}
	ctx, cancel := context.WithTimeout(ctx, 2*timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://weft"+path, send)
	if err != nil {
		return fmt.Errorf("ask %s: %w", socket, err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("ask %s: %w", socket, err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return fmt.Errorf("ask %s: read answer: %w", socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		var f failure
		if json.Unmarshal(body, &f) != nil || f.Error == "" {
			f.Error = resp.Status
		}
		if method == http.MethodPost && resp.StatusCode != http.StatusNotFound {
			return errors.New(f.Error) // what is wrong with the order; who was asked is no part of that
		}
		return fmt.Errorf("ask %s for %s: %s", socket, path, f.Error)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("ask %s: decode answer: %w", socket, err)
	}
	return nil
}

// maxAddr is the longest path that fits into a socket's address (sun_path
// with its final zero).
const maxAddr = 107

// dial also reaches sockets whose path is too long for an address, as that of
// a managed plugin's state on the host is.
func dial(ctx context.Context, socket string) (net.Conn, error) {
	addr := socket
	if len(socket) > maxAddr {
		dir, err := os.Open(filepath.Dir(socket))
		if err != nil {
			return nil, err
		}
		defer func() { _ = dir.Close() }()
		addr = fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(socket))
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", addr)
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return nil, op.Err // the address in it may be the made-up one
	}
	return conn, err
}
