package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	bberrors "go.etcd.io/bbolt/errors"
)

const (
	lockTimeout  = 2 * time.Second
	closeTimeout = 5 * time.Second
)

// Options changes how a file is opened; the zero value is right for records
// that must survive.
type Options struct {
	// NoSync leaves it to the kernel when writes reach the disk. A killed
	// process loses nothing then, a machine that stops does.
	NoSync bool
}

// Bolt is an open store file.
type Bolt struct {
	path string
	db   *bbolt.DB
	ops  chan *op
	quit chan struct{} // closed by Close
	done chan struct{} // closed when the writer has ended
	once sync.Once

	// commit is db.Update, except in tests that need a disk that hangs.
	commit func(func(*bbolt.Tx) error) error
}

// Open opens the file at path and makes it if there is none; the folder must
// exist. The whole file is read and checked. It returns an error that matches
// [ErrDamaged] or [ErrBusy] and names the file, and never writes to a file
// that it refuses.
func Open(path string, opts Options) (*Bolt, error) {
	if err := create(path, opts); err != nil {
		return nil, fmt.Errorf("create store %s: %w", path, err)
	}
	if err := check(path); err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	db, err := openFile(path, options(opts))
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	// A process that died in create may have left its temporary file; nobody
	// can be about to use one once the real file exists.
	if left, err := filepath.Glob(path + newSuffix + "*"); err == nil {
		for _, f := range left {
			_ = os.Remove(f)
		}
	}
	b := &Bolt{
		path: path, db: db, commit: db.Update,
		ops: make(chan *op), quit: make(chan struct{}), done: make(chan struct{}),
	}
	go b.write()
	return b, nil
}

// OpenBoot opens a file of records that describe this boot's kernel objects.
// The boot ID becomes part of the file's name and files of other boots are
// deleted unread: they were not synced, so they may be torn, and what they
// describe is gone. The file is not synced; a killed process loses nothing.
func OpenBoot(path, bootID string) (*Bolt, error) {
	if bootID == "" || strings.Trim(bootID, "0123456789abcdefABCDEF-") != "" {
		return nil, fmt.Errorf("open store %s: boot ID %q is not an ID", path, bootID)
	}
	ext := filepath.Ext(path)
	stem := strings.TrimSuffix(path, ext) + "-"
	name := stem + bootID + ext
	old, err := filepath.Glob(stem + "*" + ext)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	for _, f := range old {
		if f == name {
			continue
		}
		if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("remove store of an older boot: %w", err)
		}
	}
	return Open(name, Options{NoSync: true})
}

func options(opts Options) *bbolt.Options {
	return &bbolt.Options{
		Timeout:    lockTimeout,
		NoSync:     opts.NoSync,
		NoGrowSync: opts.NoSync,
		// The list of free pages is stored, although working it out at open
		// would save a page per commit: bbolt would also work it out after
		// each commit that fails, in a goroutine where a page that cannot be
		// read ends the process.
		FreelistType: bbolt.FreelistMapType,
		NoStatistics: true,
	}
}

// openFile is bbolt.Open, with the panics that a damaged file causes turned
// into ErrDamaged and the file closed again in that case.
func openFile(path string, o *bbolt.Options) (db *bbolt.DB, err error) {
	var file *os.File
	o.OpenFile = func(name string, flag int, mode os.FileMode) (*os.File, error) {
		// Without O_CREATE: an absent file was made by create, in one piece.
		f, err := os.OpenFile(name, flag&^os.O_CREATE, mode)
		file = f
		return f, err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			_ = file.Close() // and with it the lock
			db, err = nil, fmt.Errorf("%w: %v", ErrDamaged, r)
		}
	}()
	db, err = bbolt.Open(path, 0o600, o)
	var errno syscall.Errno
	switch {
	case errors.Is(err, bberrors.ErrTimeout):
		return nil, ErrBusy
	case err != nil && !errors.As(err, &errno): // not the system's word but bbolt's, about the content
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return db, err
}

// Close ends the writer and closes the file. What was handed over before is
// still written. If the disk hangs it gives up after some seconds.
func (b *Bolt) Close() error {
	b.once.Do(func() { close(b.quit) })
	ch := make(chan error, 1)
	go func() {
		<-b.done
		ch <- guard(b.db.Close)
	}()
	t := time.NewTimer(closeTimeout)
	defer t.Stop()
	select {
	case err := <-ch:
		if err != nil {
			return fmt.Errorf("close store %s: %w", b.path, err)
		}
		return nil
	case <-t.C:
		return fmt.Errorf("close store %s: the disk hangs", b.path)
	}
}

// List returns the records whose key starts with prefix, in order of key.
func (b *Bolt) List(ctx context.Context, prefix string) ([]Record, error) {
	out, err := view(ctx, b, func(k *bbolt.Bucket) ([]Record, error) {
		var out []Record
		c := k.Cursor()
		for key, raw := c.Seek([]byte(prefix)); key != nil && strings.HasPrefix(string(key), prefix); key, raw = c.Next() {
			r, err := decode(key, raw)
			if err != nil {
				return nil, err
			}
			out = append(out, r)
		}
		return out, nil
	})
	if err != nil {
		return nil, fmt.Errorf("list records %s*: %w", prefix, err)
	}
	return out, nil
}

// Get returns the record under key, or an error that matches [ErrNotFound].
func (b *Bolt) Get(ctx context.Context, key string) (Record, error) {
	r, err := view(ctx, b, func(k *bbolt.Bucket) (Record, error) {
		raw := k.Get([]byte(key))
		if raw == nil {
			return Record{}, ErrNotFound
		}
		return decode([]byte(key), raw)
	})
	if err != nil {
		return Record{}, fmt.Errorf("get record %s: %w", key, err)
	}
	return r, nil
}

// view runs f in a read transaction, in a goroutine of its own because a page
// that has to come from a disk that hangs would hold the caller.
func view[T any](ctx context.Context, b *Bolt, f func(*bbolt.Bucket) (T, error)) (T, error) {
	type answer struct {
		v   T
		err error
	}
	var none T
	if err := ctx.Err(); err != nil {
		return none, err
	}
	ch := make(chan answer, 1)
	go func() {
		var a answer
		err := guard(func() error {
			return b.db.View(func(tx *bbolt.Tx) error {
				a.v, a.err = f(tx.Bucket(bucketRecords))
				return nil
			})
		})
		if errors.Is(err, bberrors.ErrDatabaseNotOpen) {
			err = ErrClosed
		}
		if err != nil {
			a = answer{err: err}
		}
		if errors.Is(a.err, ErrDamaged) {
			a.err = fmt.Errorf("%s: %w", b.path, a.err)
		}
		ch <- a
	}()
	select {
	case a := <-ch:
		return a.v, a.err
	case <-ctx.Done():
		return none, ctx.Err()
	}
}

// Put writes a record and returns it with its new revision. With Rev 0 there
// must be no record under the key ([ErrExists]); with another Rev there must be
// exactly that one ([ErrConflict], [ErrNotFound]).
func (b *Bolt) Put(ctx context.Context, r Record) (Record, error) {
	if err := r.check(); err != nil {
		return Record{}, err
	}
	out := Record{Key: r.Key, Value: r.Value}
	err := b.do(ctx, func(k *bucket) error {
		rev, err := k.put(r)
		out.Rev = rev
		return err
	})
	if err != nil {
		return Record{}, fmt.Errorf("put record %s: %w", r.Key, err)
	}
	return out, nil
}

// Batch is what belongs into one transaction: all of it happens, or nothing.
type Batch struct {
	Put    *Record  // as Put has it; if that fails, so does the rest
	Delete []string // keys; absent ones are success
	Set    []Record // whatever is there under their keys; Rev counts for nothing
}

// Write carries a batch out and returns what was put with its new revision, if
// something was.
func (b *Bolt) Write(ctx context.Context, w Batch) (Record, error) {
	var out Record // the writer may still be using it after do gave up
	if w.Put != nil {
		out = Record{Key: w.Put.Key, Value: w.Put.Value}
	}
	for _, r := range w.all() {
		if err := r.check(); err != nil {
			return Record{}, err
		}
	}
	err := b.do(ctx, func(k *bucket) error {
		if w.Put != nil {
			rev, err := k.put(*w.Put)
			if err != nil {
				return err
			}
			out.Rev = rev
		}
		for _, key := range w.Delete {
			if err := k.delete([]byte(key)); err != nil {
				return err
			}
		}
		for _, r := range w.Set {
			if err := k.set(r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return Record{}, fmt.Errorf("write %s: %w", w.what(), err)
	}
	return out, nil
}

// all are the records that a batch writes.
func (w Batch) all() []Record {
	if w.Put == nil {
		return w.Set
	}
	return append([]Record{*w.Put}, w.Set...)
}

// what names the first record of a batch, in errors.
func (w Batch) what() string {
	switch {
	case w.Put != nil:
		return "record " + w.Put.Key
	case len(w.Delete) > 0:
		return "record " + w.Delete[0]
	case len(w.Set) > 0:
		return "record " + w.Set[0].Key
	}
	return "nothing"
}

// Delete removes the record under key; an absent one is success.
func (b *Bolt) Delete(ctx context.Context, key string) error {
	if err := b.do(ctx, func(k *bucket) error { return k.delete([]byte(key)) }); err != nil {
		return fmt.Errorf("delete record %s: %w", key, err)
	}
	return nil
}

// prefixChunk bounds how many records one transaction deletes, so that other
// writers get their turn in between.
const prefixChunk = 5000

// DeletePrefix removes every record whose key starts with prefix, in order of
// key and in as few transactions as is fair to other writers. After an error,
// or a crash, the records that are left are the last ones in order of key.
func (b *Bolt) DeletePrefix(ctx context.Context, prefix string) error {
	if prefix == "" {
		return errNoPrefix
	}
	for more := true; more; {
		var m bool // the writer may still be using it after do gave up
		err := b.do(ctx, func(k *bucket) error {
			n, err := k.deletePrefix(prefix, prefixChunk)
			m = n == prefixChunk
			return err
		})
		if err != nil {
			return fmt.Errorf("delete records %s*: %w", prefix, err)
		}
		more = m
	}
	return nil
}
