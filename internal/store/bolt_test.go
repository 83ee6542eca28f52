package store

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
)

func open(tb testing.TB, path string) *Bolt {
	tb.Helper()
	b, err := Open(path, Options{})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := b.Close(); err != nil {
			tb.Error(err)
		}
		if err := check(path); err != nil {
			tb.Errorf("after the test: %v", err)
		}
	})
	return b
}

func mustPut(tb testing.TB, b *Bolt, key, value string) Record {
	tb.Helper()
	r, err := b.Put(tb.Context(), Record{Key: key, Value: []byte(value)})
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

func all(tb testing.TB, b *Bolt) []Record {
	tb.Helper()
	out, err := b.List(tb.Context(), "")
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	b, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		mustPut(t, b, fmt.Sprintf("k%03d", i), strings.Repeat("v", i))
	}
	if err := b.Delete(t.Context(), "k007"); err != nil {
		t.Fatal(err)
	}
	want := all(t, b)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Put(t.Context(), Record{Key: "x"}); !errors.Is(err, ErrClosed) {
		t.Errorf("put after close: %v", err)
	}
	if _, err := b.Get(t.Context(), "x"); !errors.Is(err, ErrClosed) {
		t.Errorf("get after close: %v", err)
	}
	b = open(t, path)
	if d := cmp.Diff(want, all(t, b)); d != "" {
		t.Errorf("after reopening (-want +got):\n%s", d)
	}
	if r := mustPut(t, b, "new", ""); r.Rev <= want[len(want)-1].Rev {
		t.Errorf("revision %d was used before", r.Rev)
	}
	if m, err := filepath.Glob(path + "*"); err != nil || len(m) != 1 {
		t.Errorf("files %v, want only the store", m)
	}
}

func TestLeftoverOfCreateIsRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	if err := os.WriteFile(path+newSuffix+"123", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, path)
	if m, _ := filepath.Glob(path + "*"); len(m) != 1 {
		t.Errorf("files %v", m)
	}
}

func TestBusy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	open(t, path)
	start := time.Now()
	if b, err := Open(path, Options{}); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), path) {
		t.Errorf("second open: %v, %v", b, err)
	}
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("it took %v", d)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(filepath.Join(dir, "no", "s.db"), Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent folder: %v", err)
	}
	foreign := filepath.Join(dir, "foreign.db")
	db, err := bbolt.Open(foreign, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	newer := filepath.Join(dir, "newer.db")
	b, err := Open(newer, Options{})
	if err != nil {
		t.Fatal(err)
	}
	err = b.db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketMeta).Put(keySchema, binary.BigEndian.AppendUint64(nil, schema+1))
	})
	if err = errors.Join(err, b.Close()); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		foreign: "not a store of weft",
		newer:   "use the version that wrote it",
	} {
		before, _ := os.ReadFile(path)
		if _, err := Open(path, Options{}); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("error %v, want one about %s with %q", err, path, want)
		}
		if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
			t.Errorf("%s was changed", path)
		}
	}
}

func TestOpenBoot(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run.db")
	if b, err := OpenBoot(path, "../x"); err == nil {
		_ = b.Close()
		t.Fatal("a boot ID that is a path was taken")
	}
	b, err := OpenBoot(path, "1111-aaaa")
	if err != nil {
		t.Fatal(err)
	}
	mustPut(t, b, "k", "v")
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err = OpenBoot(path, "1111-aaaa"); err != nil {
		t.Fatal(err)
	}
	if got := all(t, b); len(got) != 1 {
		t.Errorf("same boot: %v", got)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	// What an older boot left is torn, and never opened.
	if err := os.Truncate(filepath.Join(dir, "run-1111-aaaa.db"), 5000); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "weft.db")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err = OpenBoot(path, "2222-bbbb"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Close() }()
	if got := all(t, b); len(got) != 0 {
		t.Errorf("next boot: %v", got)
	}
	m, _ := filepath.Glob(dir + "/*")
	if d := cmp.Diff([]string{filepath.Join(dir, "run-2222-bbbb.db"), other}, m); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
}

// TestSharing: a failed write does not fail those that share its commit, and
// 64 callers need far fewer than 64 commits each round.
func TestSharing(t *testing.T) {
	b := open(t, filepath.Join(t.TempDir(), "s.db"))
	mustPut(t, b, "taken", "")
	var commits atomic.Int64
	slow := b.commit
	b.commit = func(f func(*bbolt.Tx) error) error { commits.Add(1); return slow(f) }
	const callers, times = 64, 20
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for i := range times {
				if c%4 == 0 {
					if _, err := b.Put(t.Context(), Record{Key: "taken"}); !errors.Is(err, ErrExists) {
						t.Errorf("create of a taken key: %v", err)
					}
					continue
				}
				key := fmt.Sprintf("k-%d-%d", c, i)
				if _, err := b.Put(t.Context(), Record{Key: key, Value: []byte(key)}); err != nil {
					t.Error(err)
				}
				if r, err := b.Get(t.Context(), key); err != nil || string(r.Value) != key {
					t.Errorf("read back %v, %v", r, err)
				}
			}
		})
	}
	wg.Wait()
	if got, want := len(all(t, b)), callers*3/4*times+1; got != want {
		t.Errorf("%d records, want %d", got, want)
	}
	if n := commits.Load(); n > callers*times/4 {
		t.Errorf("%d writes took %d commits", callers*times, n)
	}
}

// TestDiskHangs: every call returns when its context ends, what was handed
// over is uncertain, what was not is not, and everything goes on afterwards.
func TestDiskHangs(t *testing.T) {
	b := open(t, filepath.Join(t.TempDir(), "s.db"))
	mustPut(t, b, "old", "")
	hung, release := make(chan struct{}), make(chan struct{})
	real := b.commit
	var once sync.Once
	b.commit = func(f func(*bbolt.Tx) error) error {
		err := real(f)
		once.Do(func() { close(hung); <-release })
		return err
	}
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	start := time.Now()
	_, err := b.Put(short(), Record{Key: "handed over"})
	if !errors.Is(err, ErrUncertain) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("first put: %v", err)
	}
	<-hung
	_, err = b.Put(short(), Record{Key: "waited"})
	if errors.Is(err, ErrUncertain) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second put: %v", err)
	}
	if err := b.Delete(short(), "old"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("delete: %v", err)
	}
	if _, err := b.Get(short(), "old"); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("get: %v", err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("four calls of 50 ms took %v", d)
	}
	close(release)
	mustPut(t, b, "later", "")
	var keys []string
	for _, r := range all(t, b) {
		keys = append(keys, r.Key)
	}
	if d := cmp.Diff([]string{"handed over", "later", "old"}, keys); d != "" {
		t.Errorf("records (-want +got):\n%s", d)
	}
}

// TestAbandonedWrite: what the writer still does for a caller that has gone is none
// of the caller's any more (this one is for -race).
func TestAbandonedWrite(t *testing.T) {
	b := open(t, filepath.Join(t.TempDir(), "s.db"))
	real, release := b.commit, make(chan struct{})
	b.commit = func(f func(*bbolt.Tx) error) error {
		return real(func(tx *bbolt.Tx) error {
			err := f(tx)
			<-release
			return err
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	out, err := b.Write(ctx, Batch{Put: &Record{Key: "handed over"}})
	close(release)
	if !errors.Is(err, ErrUncertain) || out.Key != "" || out.Rev != 0 {
		t.Errorf("%+v, %v", out, err)
	}
	if list := all(t, b); len(list) > 1 {
		t.Errorf("%+v", list)
	}
}

// TestFailedSync: after a sync that failed nothing is written any more.
func TestFailedSync(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	b := open(t, path)
	mustPut(t, b, "a", "")
	real := b.commit
	b.commit = func(f func(*bbolt.Tx) error) error {
		if err := real(f); err != nil {
			return err
		}
		return errors.New("input/output error")
	}
	if _, err := b.Put(t.Context(), Record{Key: "b"}); !errors.Is(err, ErrUncertain) || !strings.Contains(err.Error(), path) {
		t.Errorf("failing put: %v", err)
	}
	b.commit = real
	if _, err := b.Put(t.Context(), Record{Key: "c"}); err == nil || errors.Is(err, ErrUncertain) && !strings.Contains(err.Error(), "restart") {
		t.Errorf("next put: %v", err)
	}
	if _, err := b.Get(t.Context(), "a"); err != nil {
		t.Errorf("reading goes on: %v", err)
	}
}

// TestPanicIsDamage: a panic of bbolt is an error, not the end of the process.
func TestPanicIsDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	b := open(t, path)
	b.commit = func(func(*bbolt.Tx) error) error { panic("page 7 is not a page") }
	for range 2 {
		if _, err := b.Put(t.Context(), Record{Key: "b"}); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), path) {
			t.Errorf("put: %v", err)
		}
		b.commit = b.db.Update
	}
	if _, err := view(t.Context(), b, func(*bbolt.Bucket) (int, error) { panic("page 8") }); !errors.Is(err, ErrDamaged) {
		t.Errorf("view: %v", err)
	}
}

// TestDamage flips each byte and cuts at each sector. Either the file is
// refused and left as it is, or all records are as they were before the last
// or last but one transaction (a bad meta page is what a crash in the middle of
// a commit leaves, and means the one before).
func TestDamage(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.db")
	b, err := Open(path, Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 400 {
		mustPut(t, b, fmt.Sprintf("key-%03d", i), strings.Repeat("value ", 5))
	}
	before := all(t, b)
	mustPut(t, b, "last", "one")
	want := all(t, b)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(dir, "bad.db")
	refused, same, older := 0, 0, 0
	try := func(what string, content []byte) {
		if err := os.WriteFile(bad, content, 0o600); err != nil {
			t.Fatal(err)
		}
		b, err := Open(bad, Options{NoSync: true})
		if err != nil {
			refused++
			if !errors.Is(err, ErrDamaged) && !strings.Contains(err.Error(), "schema") || !strings.Contains(err.Error(), bad) {
				t.Fatalf("%s: error %v", what, err)
			}
			if after, err := os.ReadFile(bad); err != nil || !bytes.Equal(after, content) {
				t.Fatalf("%s: the refused file was changed (%v)", what, err)
			}
			return
		}
		got := all(t, b)
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		switch {
		case reflect.DeepEqual(got, want):
			same++
		case reflect.DeepEqual(got, before):
			older++
		default:
			t.Fatalf("%s: opened with %d records, not what was written", what, len(got))
		}
	}
	step := 13
	if raceEnabled {
		step = 61
	}
	for i := 0; i < len(good); i += step {
		c := bytes.Clone(good)
		c[i] ^= byte(1 + i%255)
		try(fmt.Sprintf("byte %d", i), c)
	}
	for n := 0; n < len(good); n += 512 {
		try(fmt.Sprintf("cut at %d", n), good[:n])
	}
	t.Logf("%d refused, %d without effect, %d back by one transaction", refused, same, older)
	if refused == 0 || same == 0 || older == 0 || older > 200 {
		t.Error("that is not plausible")
	}
}

// TestDamageUnderway: a file that is damaged while it is open gives errors.
func TestDamageUnderway(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	b, err := Open(path, Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2000 {
		mustPut(t, b, fmt.Sprintf("key-%04d", i), strings.Repeat("value ", 5))
	}
	if err := os.Truncate(path, 8192); err != nil { // the rest of the map now faults
		t.Fatal(err)
	}
	if _, err := b.Get(t.Context(), "key-1000"); !errors.Is(err, ErrDamaged) {
		t.Errorf("get: %v", err)
	}
	if _, err := b.Put(t.Context(), Record{Key: "key-1000"}); err == nil {
		t.Error("put succeeded")
	}
	_ = b.Close()
}

// TestCrash kills a process that writes as fast as it can; everything that it
// had been told was written is there afterwards.
func TestCrash(t *testing.T) {
	if path := os.Getenv("WEFT_TEST_CRASH"); path != "" {
		crashChild(path)
		return
	}
	path := filepath.Join(t.TempDir(), "s.db")
	acked := map[string]bool{}
	for round := range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestCrash$")
		cmd.Env = append(os.Environ(), "WEFT_TEST_CRASH="+path, "WEFT_TEST_ROUND="+strconv.Itoa(round))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines, n := bufio.NewScanner(out), 0
		for lines.Scan() {
			f := strings.Fields(lines.Text())
			switch f[0] {
			case "put":
				acked[f[1]] = true
			case "del":
				delete(acked, f[1])
			default:
				t.Fatalf("child says %q", lines.Text())
			}
			if n++; n == 300+round*97 {
				_ = cmd.Process.Kill() // and read what is left in the pipe
			}
		}
		_ = cmd.Wait()
		b, err := Open(path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		have := map[string]bool{}
		for _, r := range all(t, b) {
			have[r.Key] = true
		}
		for k := range acked {
			if !have[k] {
				t.Errorf("round %d: %s was acknowledged and is gone", round, k)
			}
		}
		for k := range have { // written but not acknowledged is allowed, once a writer
			acked[k] = true
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(acked) < 500 {
		t.Errorf("only %d records were written", len(acked))
	}
}

func crashChild(path string) {
	b, err := Open(path, Options{})
	if err != nil {
		fmt.Println("error", err)
		return
	}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 100_000 {
				key := fmt.Sprintf("%s/%d/%d", os.Getenv("WEFT_TEST_ROUND"), w, i)
				if _, err := b.Put(context.Background(), Record{Key: key, Value: []byte(key)}); err != nil {
					fmt.Println("error", err)
					return
				}
				fmt.Println("put", key)
				if i%3 == 0 {
					fmt.Println("del", key) // from here on it may be gone
					if err := b.Delete(context.Background(), key); err != nil {
						fmt.Println("error", err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}
