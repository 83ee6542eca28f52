package store_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/store"
	"github.com/weftnet/weft/internal/store/etcdtest"
)

func openEtcd(t *testing.T, c store.EtcdConfig) *store.Etcd {
	t.Helper()
	if c.Log == nil {
		log := logrus.New()
		log.SetOutput(t.Output())
		c.Log = log
	}
	e, err := store.OpenEtcd(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// within gives calls a context that ends after a time.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits until f is true.
func eventually(t *testing.T, d time.Duration, what string, f func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !f() {
		if time.Since(start) > d {
			t.Fatalf("%s: not within %v", what, d)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(start)
}

// mirror is what a follower knows.
type mirror struct {
	mu        sync.Mutex
	have      map[string]string
	snapshots int
	events    int
}

func follow(t *testing.T, e *store.Etcd, prefix string) *mirror {
	t.Helper()
	m := &mirror{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- e.Follow(ctx, prefix, func(list []store.Record) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.snapshots++
			m.have = map[string]string{}
			for _, r := range list {
				m.have[r.Key] = string(r.Value)
			}
		}, func(ev store.Event) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.events++
			if ev.Deleted {
				delete(m.have, ev.Key)
			} else {
				m.have[ev.Key] = string(ev.Value)
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("follow ended with %v", err)
		}
	})
	eventually(t, 10*time.Second, "first snapshot", func() bool { return m.count() > 0 })
	return m
}

func (m *mirror) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.snapshots
}

func (m *mirror) is(want map[string]string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return cmp.Equal(want, m.have)
}

func (m *mirror) has(key string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.have[key]
	return ok
}

// contents is what is in the store.
func contents(t *testing.T, e *store.Etcd, prefix string) map[string]string {
	t.Helper()
	list, err := e.List(t.Context(), prefix)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for _, r := range list {
		m[r.Key] = string(r.Value)
	}
	return m
}

// create writes a new record, and again while the outcome is no clear success.
func create(t *testing.T, e *store.Etcd, key string) {
	t.Helper()
	eventually(t, 30*time.Second, "create "+key, func() bool {
		_, err := e.Put(t.Context(), store.Record{Key: key, Value: []byte(key)})
		if errors.Is(err, store.ErrExists) {
			_, err = e.Get(t.Context(), key)
		}
		return err == nil
	})
}

func TestEtcdEndpoints(t *testing.T) {
	file := filepath.Join(t.TempDir(), "no.pem")
	if err := os.WriteFile(file, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := "want etcd://host:2379,host2:2379, or etcds:// for TLS"
	for _, c := range []struct {
		config store.EtcdConfig
		want   string
	}{
		{store.EtcdConfig{}, `open store "": ` + want},
		{store.EtcdConfig{Endpoints: "http://h:1"}, `open store "http://h:1": ` + want},
		{store.EtcdConfig{Endpoints: "etcd://"}, `open store "etcd://": "" is not a host and port: ` + want},
		{store.EtcdConfig{Endpoints: "etcd://a,,b"}, `open store "etcd://a,,b": "" is not a host and port: ` + want},
		{store.EtcdConfig{Endpoints: "etcd://a:x"}, `open store "etcd://a:x": "a:x" is not a host and port: ` + want},
		{store.EtcdConfig{Endpoints: "etcd://u:p@a:1"}, `open store "etcd://u:p@a:1": "u:p@a:1" is not a host and port: ` + want},
		{store.EtcdConfig{Endpoints: "etcd://a/b"}, `open store "etcd://a/b": "a/b" is not a host and port: ` + want},
		{store.EtcdConfig{Endpoints: "etcd://a", CA: file}, `open store "etcd://a": there are TLS files, but etcd:// does without TLS: write etcds://`},
		{store.EtcdConfig{Endpoints: "etcds://a", CA: file}, `open store "etcds://a": read CA: ` + file + ` has no certificate in PEM form`},
		{store.EtcdConfig{Endpoints: "etcds://a", CA: "/none"}, `open store "etcds://a": read CA: open /none: no such file or directory`},
		{store.EtcdConfig{Endpoints: "etcds://a", Cert: "/none"}, `open store "etcds://a": read certificate "/none" and key "": open /none: no such file or directory`},
		{store.EtcdConfig{Endpoints: "etcd://a", User: "u"}, `open store "etcd://a": a user needs a password, and a password a user`},
	} {
		c.config.Log = logrus.New()
		e, err := store.OpenEtcd(c.config)
		if err == nil {
			t.Errorf("%+v: taken", c.config)
			_ = e.Close()
		} else if err.Error() != c.want {
			t.Errorf("%+v:\ngot  %s\nwant %s", c.config, err, c.want)
		}
	}
	for _, good := range []string{"etcd://a", "etcd://a:1,[::1]:2,[fd00::1],10.0.0.1", "etcds://a.example:2379"} {
		openEtcd(t, store.EtcdConfig{Endpoints: good})
	}
}

// TestEtcdAway: opening needs no etcd, a call says why it fails, and a write
// that was never sent is not uncertain.
func TestEtcdAway(t *testing.T) {
	e := openEtcd(t, store.EtcdConfig{Endpoints: "etcd://127.0.0.1:1,127.0.0.2:1", User: "u", Password: "p"})
	for d, want := range map[time.Duration]error{time.Second: context.DeadlineExceeded, time.Minute: nil} {
		start := time.Now()
		_, err := e.Put(within(t, d), store.Record{Key: "k"})
		if took := time.Since(start); took > 6*time.Second {
			t.Errorf("put took %v", took)
		}
		text := "put record k: etcd at etcd://127.0.0.1:1,127.0.0.2:1 cannot be reached, check that it runs there, and the TLS settings: "
		if errors.Is(err, store.ErrUncertain) || want != nil && !errors.Is(err, want) ||
			!strings.HasPrefix(err.Error(), text+"dial tcp 127.0.0.") || !strings.HasSuffix(err.Error(), ":1: connect: connection refused: context deadline exceeded") {
			t.Errorf("put: %v", err)
		}
		t.Log(err)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if _, err := e.Put(t.Context(), store.Record{Key: "k"}); !errors.Is(err, store.ErrClosed) {
		t.Errorf("put after close: %v", err)
	}
	if err := e.Follow(t.Context(), "", nil, nil); !errors.Is(err, store.ErrClosed) {
		t.Errorf("follow after close: %v", err)
	}
}

func TestEtcdTLS(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{TLS: true})
	good := store.EtcdConfig{Endpoints: c.Endpoints, CA: c.CA, Cert: c.Cert, Key: c.Key}
	if _, err := openEtcd(t, good).Put(t.Context(), store.Record{Key: "k"}); err != nil {
		t.Error(err)
	}
	for _, bad := range []struct {
		config store.EtcdConfig
		want   string
	}{
		{store.EtcdConfig{Endpoints: c.Endpoints, CA: etcdtest.NewAuthority(t).File, Cert: c.Cert, Key: c.Key}, "certificate signed by unknown authority"},
		{store.EtcdConfig{Endpoints: c.Endpoints, CA: c.CA}, ": "}, // no certificate; how much of the refusal arrives varies
		{store.EtcdConfig{Endpoints: strings.Replace(c.Endpoints, "etcds", "etcd", 1)}, "error reading server preface"},
	} {
		_, err := openEtcd(t, bad.config).Get(within(t, 3*time.Second), "k")
		if err == nil || !strings.Contains(err.Error(), bad.want) || !strings.Contains(err.Error(), "TLS settings") {
			t.Errorf("got %v, want %s", err, bad.want)
		}
		t.Log(err)
	}
}

func TestEtcdPassword(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	c.Protect("weft", "secret", "/weft/")
	e := openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints, User: "weft", Password: "secret"})
	m := follow(t, e, "")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Alive(ctx, "alive", []byte("x"), nil) })
	defer wg.Wait()
	defer cancel()
	create(t, e, "k")
	eventually(t, 5*time.Second, "both records", func() bool { return m.has("k") && m.has("alive") })
	// A member that is started again has forgotten everybody's login.
	c.StopAll()
	c.StartAll()
	create(t, e, "k2")
	eventually(t, 10*time.Second, "record after restart", func() bool { return m.has("k2") })
	time.Sleep(8 * time.Second) // longer than the lease
	if !m.has("alive") {
		t.Error("not alive after the restart")
	}
	for _, bad := range []struct {
		config store.EtcdConfig
		want   string
	}{
		{store.EtcdConfig{User: "weft", Password: "wrong"}, "authentication failed, invalid user ID or password"},
		{store.EtcdConfig{User: "weft", Password: "secret", Prefix: "/other/"}, "permission denied"},
		{store.EtcdConfig{}, "user name is empty"},
	} {
		bad.config.Endpoints = c.Endpoints
		_, err := openEtcd(t, bad.config).Put(within(t, 3*time.Second), store.Record{Key: "k"})
		if err == nil || !strings.Contains(err.Error(), bad.want) || errors.Is(err, store.ErrUncertain) {
			t.Errorf("got %v, want %s", err, bad.want)
		}
		t.Log(err)
	}
}

// TestEtcdUncertain: what was handed to a member that hangs may happen later.
func TestEtcdUncertain(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	e := openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints})
	create(t, e, "a")
	c.Freeze(0)
	start := time.Now()
	_, err := e.Put(within(t, time.Second), store.Record{Key: "b"})
	if !errors.Is(err, store.ErrUncertain) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("put: %v", err)
	}
	if err := e.Delete(within(t, time.Second), "a"); !errors.Is(err, store.ErrUncertain) {
		t.Errorf("delete: %v", err)
	}
	if _, err := e.List(within(t, time.Second), ""); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, store.ErrUncertain) {
		t.Errorf("list: %v", err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("three calls of a second each took %v", d)
	}
	c.Thaw(0)
	// Whether they came to pass or not, a write that is repeated now is clear.
	create(t, e, "b")
	if err := e.Delete(t.Context(), "a"); err != nil {
		t.Error(err)
	}
}

// TestEtcdRemove deletes what was read, and nothing that came after.
func TestEtcdRemove(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	e := openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints})
	old, err := e.Put(t.Context(), store.Record{Key: "a", Value: []byte("1")})
	if err != nil {
		t.Fatal(err)
	}
	now, err := e.Put(t.Context(), store.Record{Key: "a", Value: []byte("2"), Rev: old.Rev})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Remove(t.Context(), old); !errors.Is(err, store.ErrConflict) {
		t.Errorf("the revision before: %v", err)
	}
	for range 2 { // the second time it is absent
		if err := e.Remove(t.Context(), now); err != nil {
			t.Error(err)
		}
	}
	if _, err := e.Get(t.Context(), "a"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("after it: %v", err)
	}
}

// TestEtcdLeaderKilled: writes and followers go on with the others.
func TestEtcdLeaderKilled(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{Members: 3})
	e := openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints})
	m := follow(t, e, "k")
	var slowest time.Duration
	acked := map[string]bool{}
	uncertain := 0
	for i := range 200 {
		if i == 50 {
			c.Kill(c.Leader())
		}
		key := fmt.Sprintf("k%03d", i)
		start := time.Now()
		_, err := e.Put(t.Context(), store.Record{Key: key})
		slowest = max(slowest, time.Since(start))
		switch {
		case err == nil:
			acked[key] = true
		case errors.Is(err, store.ErrUncertain):
			uncertain++
		default:
			t.Errorf("put: %v", err)
		}
	}
	t.Logf("%d of 200 writes uncertain, the slowest took %v", uncertain, slowest)
	if uncertain > 10 {
		t.Errorf("%d writes uncertain", uncertain)
	}
	have := contents(t, e, "k")
	for k := range acked {
		if _, ok := have[k]; !ok {
			t.Errorf("%s was acknowledged and is lost", k)
		}
	}
	eventually(t, 15*time.Second, "follower is complete", func() bool { return m.is(have) })
}

// TestEtcdOutage: all members are gone for a time, in which a lease would have
// run out; and etcd has forgotten the changes since.
func TestEtcdOutage(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{Members: 3})
	e, other := openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints}), openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var failing atomic.Bool
	wg.Go(func() {
		_ = e.Alive(ctx, "alive/a", []byte("host a"), func(err error) { failing.Store(err != nil) })
	})
	defer wg.Wait()
	defer cancel()
	m := follow(t, other, "")
	eventually(t, 5*time.Second, "alive", func() bool { return m.has("alive/a") })
	create(t, e, "k/1")
	c.StopAll()
	time.Sleep(8 * time.Second)
	if !m.has("alive/a") {
		t.Error("an outage of etcd is taken for a sign about a host")
	}
	if !failing.Load() {
		t.Error("nobody was told that etcd does not answer")
	}
	c.StartAll()
	start := time.Now()
	create(t, e, "k/2")
	t.Logf("first write %v after the start", time.Since(start))
	eventually(t, 15*time.Second, "change after the outage", func() bool { return m.has("k/2") })
	t.Logf("seen %v after the start", time.Since(start))
	if err := e.Delete(t.Context(), "k/1"); err != nil {
		t.Error(err)
	}
	eventually(t, 5*time.Second, "deletion", func() bool { return !m.has("k/1") })
	time.Sleep(8 * time.Second)
	if !m.has("alive/a") {
		t.Error("not alive after the outage")
	}
	if failing.Load() {
		t.Error("nobody was told that etcd answers again")
	}
}

// TestEtcdCompaction: what was deleted while a follower was cut off is noticed
// although etcd has forgotten that it was.
func TestEtcdCompaction(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{Members: 3})
	e := openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints})
	parts := strings.Split(strings.TrimPrefix(c.Endpoints, "etcd://"), ",")
	alone := openEtcd(t, store.EtcdConfig{Endpoints: "etcd://" + parts[0]})
	for i := range 10 {
		create(t, e, fmt.Sprintf("k%d", i))
	}
	m := follow(t, alone, "k")
	if n := m.count(); n != 1 {
		t.Errorf("%d snapshots", n)
	}
	c.Kill(0)
	for i := range 5 {
		if err := e.Delete(t.Context(), fmt.Sprintf("k%d", i)); err != nil {
			t.Logf("delete: %v", err)
		}
	}
	create(t, e, "k-new")
	eventually(t, 10*time.Second, "compact", func() bool {
		now, err := c.Client().Get(t.Context(), "none")
		if err == nil {
			_, err = c.Client().Compact(t.Context(), now.Header.Revision)
		}
		return err == nil
	})
	want := contents(t, e, "k")
	c.Start(0)
	c.Wait()
	eventually(t, 20*time.Second, "resync", func() bool { return m.is(want) })
	if n := m.count(); n < 2 {
		t.Errorf("%d snapshots", n)
	}
	create(t, e, "k-after")
	eventually(t, 5*time.Second, "event after the resync", func() bool { return m.has("k-after") })
}

// TestEtcdAlive: a record on a lease comes back when it or the lease is deleted,
// and stays for the time of the lease when its process ends.
func TestEtcdAlive(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	e := openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints})
	m := follow(t, e, "alive/")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.Alive(ctx, "alive/a", []byte("host a"), nil) }()
	want := map[string]string{"alive/a": "host a"}
	eventually(t, 5*time.Second, "alive", func() bool { return m.is(want) })
	time.Sleep(8 * time.Second)
	m.mu.Lock()
	if m.events != 1 {
		t.Errorf("%d events in 8 s of a quiet life", m.events)
	}
	m.mu.Unlock()
	if err := e.Delete(t.Context(), "alive/a"); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "gone", func() bool { return m.is(map[string]string{}) })
	t.Logf("record back %v after it was deleted", eventually(t, 5*time.Second, "back", func() bool { return m.is(want) }))
	leases, err := c.Client().Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range leases.Leases {
		if _, err := c.Client().Revoke(t.Context(), l.ID); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 5*time.Second, "gone", func() bool { return m.is(map[string]string{}) })
	t.Logf("record back %v after its lease was lost", eventually(t, 5*time.Second, "back", func() bool { return m.is(want) }))
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("alive ended with %v", err)
	}
	took := eventually(t, 10*time.Second, "silence", func() bool { return m.is(map[string]string{}) })
	t.Logf("silent %v after the end", took)
	if took < 3*time.Second {
		t.Errorf("silent after %v already", took)
	}
}

// TestEtcdMemberHangs: a leader that stops without a word costs no lease, and a
// follower only the time until it is given up.
func TestEtcdMemberHangs(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{Members: 3})
	// One client for each member that a stream may have been opened to.
	var ms []*mirror
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for i := range 6 {
		e := openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints})
		wg.Go(func() { _ = e.Alive(ctx, fmt.Sprintf("alive/%d", i), nil, nil) })
		ms = append(ms, follow(t, e, ""))
	}
	all := func() bool {
		for i := range 6 {
			if !ms[0].has(fmt.Sprintf("alive/%d", i)) {
				return false
			}
		}
		return true
	}
	eventually(t, 10*time.Second, "all alive", all)
	leader := c.Leader()
	c.Freeze(leader)
	defer c.Thaw(leader)
	start := time.Now()
	create(t, openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints}), "k")
	t.Logf("written after %v", time.Since(start))
	for _, m := range ms {
		eventually(t, 25*time.Second, "follower", func() bool { return m.has("k") })
	}
	t.Logf("all know after %v", time.Since(start))
	if !all() {
		t.Error("a host is taken for silent")
	}
	for _, m := range ms {
		m.mu.Lock()
		t.Logf("%d snapshots, %d events", m.snapshots, m.events)
		m.mu.Unlock()
	}
}

func TestEtcdCloseEndsAll(t *testing.T) {
	c := etcdtest.Start(t, etcdtest.Config{})
	before := runtime.NumGoroutine()
	e := openEtcd(t, store.EtcdConfig{Endpoints: c.Endpoints})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Alive(ctx, "alive/a", nil, nil) })
	wg.Go(func() { _ = e.Follow(ctx, "", func([]store.Record) {}, func(store.Event) {}) })
	create(t, e, "k")
	cancel()
	wg.Wait()
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "goroutines end", func() bool { return runtime.NumGoroutine() <= before })
}
