package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

const (
	// stopGrace is what calls in flight get to end by themselves when the
	// process is to stop, stopLast what those get that were then interrupted.
	// Together they stay below the 10 s after which the engine kills.
	stopGrace = 7 * time.Second
	stopLast  = 1 * time.Second
)

// Serve answers calls on l until ctx ends, then lets those in flight finish,
// closes l and returns nil. It touches nothing that was set up in the kernel.
func (m *Mux) Serve(ctx context.Context, l net.Listener) error {
	calls, interrupt := context.WithCancel(context.WithoutCancel(ctx))
	defer interrupt()
	srv := &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { m.serve(calls, w, r) }),
		ReadHeaderTimeout: m.timeout,
		// The engine keeps connections for later. Were one closed just as it
		// sends the next call, it would repeat that call with an empty body.
		IdleTimeout: -1,
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	m.stop(calls, srv, interrupt)
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// stop waits for connections and then for handlers whose calls were answered
// at their deadline.
func (m *Mux) stop(ctx context.Context, srv *http.Server, interrupt func()) {
	ctx = context.WithoutCancel(ctx)
	if err := shutdown(ctx, srv, stopGrace); err != nil {
		m.log.WithError(err).Warn("stop: interrupting the calls in flight")
		interrupt() // all of them are answered at that
		if err := shutdown(ctx, srv, stopLast); err != nil {
			_ = srv.Close()
			return
		}
	}
	// No call can start any more. A handler that never looks at its context
	// is left to the end of the process, as it would be under a kill; the next
	// start repairs.
	interrupt()
	handlers := make(chan struct{})
	go func() { m.running.Wait(); close(handlers) }()
	select {
	case <-handlers:
	case <-time.After(stopLast):
		m.log.Warn("stop: a handler is still running")
	}
}

func shutdown(ctx context.Context, srv *http.Server, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return srv.Shutdown(ctx)
}

// Listen opens the unix socket at path with mode 0600, making its directory
// if need be. A socket left behind by a process that is gone is replaced; one
// on which somebody answers, and a file of another kind, are refused. Closing
// the listener removes the socket, unless somebody has put another in its place.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := checkStale(path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// Made under another name, so that nobody can connect before the mode is
	// set, nor ever find no socket where a stale one was.
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false) // it would look for the name that is given up below
	info, err := settle(tmp, path)
	if err != nil {
		_ = l.Close()
		_ = os.Remove(tmp)
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return &listener{UnixListener: l, path: path, info: info}, nil
}

// checkStale returns nil if nothing is at path or a socket nobody listens on.
func checkStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errors.New("the file there is not a socket")
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = conn.Close()
		return errors.New("another process answers on the socket; stop it first")
	}
	// Only a refused connection says that nobody listens; a full queue does not.
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func settle(tmp, path string) (fs.FileInfo, error) {
	if err := os.Chmod(tmp, 0o600); err != nil {
		return nil, err
	}
	info, err := os.Lstat(tmp)
	if err != nil {
		return nil, err
	}
	return info, os.Rename(tmp, path)
}

// listener removes its socket when it is closed.
type listener struct {
	*net.UnixListener
	path string
	info fs.FileInfo
	once sync.Once
}

// Addr tells the name under which the socket can be found.
func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close implements net.Listener.
func (l *listener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() {
		if now, lerr := os.Lstat(l.path); lerr == nil && os.SameFile(now, l.info) {
			err = errors.Join(err, os.Remove(l.path))
		}
	})
	return err
}
