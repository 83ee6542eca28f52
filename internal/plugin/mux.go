package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/sirupsen/logrus"
)

const (
	// maxBody is far above what the engine sends, but for a container that
	// publishes thousands of ports.
	maxBody = 1 << 20
	// maxPortsBody bounds those calls, where each published port takes about
	// 110 bytes. Calls above maxBody are worked on one at a time.
	maxPortsBody = 16 << 20
	// defaultTimeout is below the 15 s that the engine needs to give up on a
	// socket, and well below the 30 s of its own client.
	defaultTimeout = 10 * time.Second

	contentType = "application/vnd.docker.plugins.v1.2+json"
)

// Config is what New needs.
type Config struct {
	Log logrus.FieldLogger
	// Timeout bounds each call from the first byte of its body to its answer.
	// 0 means 10 s.
	Timeout time.Duration
}

// Mux answers the engine's calls. It can be served while the handlers behind
// it are still being prepared: all calls but the constant ones wait for Ready.
type Mux struct {
	log     logrus.FieldLogger
	timeout time.Duration

	mu        sync.RWMutex // over these four
	handlers  map[string]handler
	constants map[string][]byte
	notices   map[string]func()
	readyErr  error

	once  sync.Once
	ready chan struct{} // closed by the first Ready

	large chan struct{} // holds one while a call above maxBody is worked on

	running sync.WaitGroup // handlers, also those whose call was answered at its deadline
}

// handler decodes a body, does the call, and encodes the answer.
type handler func(context.Context, []byte) ([]byte, error)

// New returns a Mux that answers only PathActivate.
func New(c Config) *Mux {
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	m := &Mux{
		log: c.Log, timeout: c.Timeout,
		handlers: map[string]handler{}, constants: map[string][]byte{}, notices: map[string]func(){},
		ready: make(chan struct{}), large: make(chan struct{}, 1),
	}
	m.Constant(PathActivate, Activation{Implements: []string{"NetworkDriver", "IpamDriver"}})
	return m
}

// Handle registers f for path. It may be called while the Mux is being
// served, before Ready. The context of f ends with the call's time, not with
// the connection of the client: half-done work in the kernel is finished
// although the engine has gone away.
func Handle[Req, Resp any](m *Mux, path string, f func(context.Context, Req) (Resp, error)) {
	h := func(ctx context.Context, body []byte) ([]byte, error) {
		var req Req
		if err := json.Unmarshal(body, &req); err != nil {
			return nil, &refusal{http.StatusBadRequest, fmt.Sprintf("undecodable request: %v", err)}
		}
		resp, err := f(ctx, req)
		if err != nil {
			return nil, err
		}
		return encode(resp)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.claim(path)
	m.handlers[path] = h
}

// Constant registers an answer that never changes. It is given at once, also
// before Ready and whatever the body is: the engine asks for capabilities
// while it enables the plugin and sends no body with that.
func (m *Mux) Constant(path string, value any) {
	b, err := encode(value)
	if err != nil {
		panic(fmt.Sprintf("constant answer to %s: %v", path, err))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.claim(path)
	m.constants[path] = b
}

// Notice has f called whenever a constant is asked for, before the answer goes
// out. f returns at once, as the answer is to be given at once. It may be called
// while the Mux is being served.
func (m *Mux) Notice(path string, f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.notices[path] = f
}

// claim panics if path is taken, as http.ServeMux does.
func (m *Mux) claim(path string) {
	if m.handlers[path] != nil || m.constants[path] != nil {
		panic(fmt.Sprintf("two handlers for %s", path))
	}
}

// Ready lets the waiting calls go on. With an error they, and all later ones
// but the constant, are answered with that error: a plugin process that exits
// is restarted at once by the engine, and disabled for good if it exits again.
// A later call of Ready replaces the error, so that what was mended (a full
// disk) needs no restart.
func (m *Mux) Ready(err error) {
	m.mu.Lock()
	m.readyErr = err
	m.mu.Unlock()
	m.once.Do(func() { close(m.ready) })
}

// refused returns what Ready was last called with.
func (m *Mux) refused() error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.readyErr
}

// refusal is an error about the request itself, with its HTTP status.
type refusal struct {
	status int
	text   string
}

func (r *refusal) Error() string { return r.text }

// serve answers one request. ctx ends when the process has to stop without
// waiting any longer; it is not the request's own.
func (m *Mux) serve(ctx context.Context, w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	answer, body, err := m.answer(ctx, w, r)
	status := http.StatusOK
	if err != nil {
		status = http.StatusInternalServerError
		if ref := (*refusal)(nil); errors.As(err, &ref) {
			status = ref.status
		}
		answer = encodeError(err)
	}
	w.Header().Set("Content-Type", contentType)
	if status == http.StatusMethodNotAllowed {
		w.Header().Set("Allow", http.MethodPost)
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	rc := http.NewResponseController(w)
	// The error would mean a connection without deadlines; ours have them.
	_ = rc.SetWriteDeadline(time.Now().Add(m.timeout))
	w.WriteHeader(status)
	_, werr := w.Write(answer)
	if werr == nil {
		werr = rc.Flush() // the engine need not wait for the log
	}
	m.logCall(r.URL.Path, body, time.Since(start), errors.Join(err, werr))
}

// answer does the call and returns its answer and the request's body.
func (m *Mux) answer(ctx context.Context, w http.ResponseWriter, r *http.Request) (answer, body []byte, err error) {
	if r.Method != http.MethodPost {
		return nil, nil, &refusal{http.StatusMethodNotAllowed, fmt.Sprintf("method %s: calls are made with POST", clip(r.Method))}
	}
	m.mu.RLock()
	constant, notice := m.constants[r.URL.Path], m.notices[r.URL.Path]
	m.mu.RUnlock()
	if constant != nil {
		if notice != nil {
			notice()
		}
		return constant, nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, m.timeout)
	defer cancel()
	limit := int64(maxBody)
	if r.ContentLength > maxBody && carriesPorts(r.URL.Path) {
		limit = maxPortsBody
		select {
		case m.large <- struct{}{}:
			defer func() { <-m.large }()
		case <-ctx.Done():
			return nil, nil, errors.New("not started: another container with thousands of ports is being worked on; try again")
		}
	}
	body, err = m.readBody(w, r, limit)
	if err != nil {
		return nil, nil, err
	}
	if err := m.await(ctx, r.Context()); err != nil {
		return nil, body, err // the engine puts the call's name in front itself
	}
	m.mu.RLock()
	h := m.handlers[r.URL.Path]
	m.mu.RUnlock()
	if h == nil {
		return nil, body, &refusal{http.StatusNotFound, fmt.Sprintf("no such call: %s", callName(r.URL.Path))}
	}
	answer, err = m.run(ctx, callName(r.URL.Path), h, body)
	return answer, body, err
}

// await returns once Ready was called, and what it was called with.
func (m *Mux) await(ctx, client context.Context) error {
	select {
	case <-m.ready:
		return m.refused()
	default:
	}
	select {
	case <-m.ready:
		return m.refused()
	case <-ctx.Done():
		return errors.New("not started: the state of before the restart is still being read; try again")
	case <-client.Done():
		// Nothing is half done yet, and nobody would hear that it was done.
		return errors.New("not started: the caller went away")
	}
}

// run calls h in a goroutine of its own, so that the answer goes out in time
// even if h never looks at its context.
func (m *Mux) run(ctx context.Context, call string, h handler, body []byte) ([]byte, error) {
	type result struct {
		answer []byte
		err    error
	}
	done := make(chan result, 1)
	m.running.Go(func() {
		var r result
		returned := false
		defer func() {
			if !returned {
				p := recover()
				m.log.WithField("call", call).WithField("stack", string(debug.Stack())).Errorf("panic: %v", p)
				r = result{err: fmt.Errorf("internal error: %v", p)}
			}
			if ctx.Err() != nil {
				m.log.WithField("call", call).WithError(r.err).Warn("the call ended after it was answered")
			}
			done <- r
		}()
		r.answer, r.err = h(ctx, body)
		returned = true
	})
	select {
	case r := <-done:
		return r.answer, r.err
	case <-ctx.Done():
	}
	select {
	case r := <-done: // both at once: a result is worth more
		return r.answer, r.err
	default:
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil, fmt.Errorf("no result within %v", m.timeout) // the engine puts the call's name in front itself
	}
	return nil, errors.New("interrupted, the plugin stops: try again")
}

// readBody refuses an empty body: when the engine repeats a call whose
// connection broke, it has used up the body and sends none.
func (m *Mux) readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(m.timeout))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	_ = rc.SetReadDeadline(time.Time{}) // when it passed, the client would seem to have gone away
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		if limit == maxPortsBody {
			return nil, &refusal{http.StatusRequestEntityTooLarge, "the container publishes more than 100,000 ports: publish fewer"}
		}
		return nil, &refusal{http.StatusRequestEntityTooLarge, fmt.Sprintf("request body is larger than %d bytes", tooLarge.Limit)}
	}
	if err != nil {
		return nil, &refusal{http.StatusBadRequest, fmt.Sprintf("read request body: %v", err)}
	}
	body = bytes.Trim(body, " \t\r\n") // what JSON takes for white space
	if len(body) == 0 {
		return nil, &refusal{http.StatusBadRequest, "request body is empty: the plugin was restarted during the call, and the engine repeats it without; try again"}
	}
	if body[0] != '{' {
		return nil, &refusal{http.StatusBadRequest, "request body is not a JSON object"}
	}
	return body, nil
}

// carriesPorts reports whether a call comes with all published ports of a container.
func carriesPorts(path string) bool {
	return path == PathCreateEndpoint || path == PathJoin || path == PathProgramExternal
}

// encode makes sure that a success is an object: the engine takes an empty
// body for a failure.
func encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode answer: %w", err)
	}
	if string(b) == "null" {
		return []byte("{}"), nil
	}
	if b[0] != '{' {
		return nil, fmt.Errorf("encode answer: %T is not an object", v)
	}
	return b, nil
}

// encodeError fills both fields: the engine reads Err from a network driver
// and Error from an IPAM driver.
func encodeError(err error) []byte {
	text := oneLine(err.Error())
	b, merr := json.Marshal(struct{ Err, Error string }{text, text})
	if merr != nil { // two strings: cannot be
		return []byte(`{"Err":"internal error","Error":"internal error"}`)
	}
	return b
}

// mostError is the length of an error, in bytes; the engine prints it as it is.
const mostError = 4096

// oneLine makes a text safe to be printed: the name of another host or what a
// server has answered may be part of it.
func oneLine(s string) string {
	s = strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ")
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) && r != utf8.RuneError {
			return r
		}
		return '?'
	}, s)
	if len(s) > mostError {
		s = strings.ToValidUTF8(s[:mostError], "") + "…"
	}
	return s
}

func callName(path string) string { return clip(strings.TrimPrefix(path, "/")) }

// clip bounds what a stranger can put into a log line or an error.
func clip(s string) string { return s[:min(len(s), 64)] }

func (m *Mux) logCall(path string, body []byte, took time.Duration, err error) {
	log := m.log.WithField("call", callName(path)).WithField("duration", took)
	var ids struct{ NetworkID, EndpointID, PoolID string }
	_ = json.Unmarshal(body, &ids) // whatever can be read; the handler reports the rest
	for _, f := range [...]struct{ name, value string }{
		{"network", ids.NetworkID}, {"endpoint", ids.EndpointID}, {"pool", ids.PoolID},
	} {
		if f.value != "" {
			log = log.WithField(f.name, clip(f.value))
		}
	}
	if err != nil {
		log.WithError(err).Warn("call failed")
		return
	}
	log.Debug("call done")
}
