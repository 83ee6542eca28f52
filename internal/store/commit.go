package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"go.etcd.io/bbolt"
)

// maxBatch bounds the writes that share one commit.
const maxBatch = 1024

// op is one write on its way to the disk. run may run in a transaction that
// is never committed; err then is the transaction's.
type op struct {
	ctx  context.Context
	run  func(*bucket) error
	err  error
	done chan struct{}
}

// do hands a write to the writer and waits for its commit.
func (b *Bolt) do(ctx context.Context, run func(*bucket) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	o := &op{ctx: ctx, run: run, done: make(chan struct{})}
	select {
	case b.ops <- o:
	case <-ctx.Done():
		return ctx.Err() // never handed over: it did not happen
	case <-b.done:
		return ErrClosed
	}
	select {
	case <-o.done:
		return o.err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrUncertain, ctx.Err())
	}
}

// write is the goroutine that does all the writing. Whoever waits when a
// commit ends is in the next one.
func (b *Bolt) write() {
	defer close(b.done)
	var broken error
	batch := make([]*op, 0, maxBatch)
	for {
		select {
		case o := <-b.ops:
			batch = append(batch[:0], o)
		case <-b.quit:
			return
		}
		// Those whom the last commit woke run first, and come back with
		// their next write in time for this one.
		for n := 0; n < len(batch) && len(batch) < maxBatch; {
			n = len(batch)
			runtime.Gosched()
			batch = b.drain(batch)
		}
		err := broken
		if err == nil {
			err, broken = b.commitBatch(batch)
		}
		for _, o := range batch {
			if err != nil {
				o.err = err
			}
			close(o.done)
		}
	}
}

// drain adds whoever is waiting.
func (b *Bolt) drain(batch []*op) []*op {
	for len(batch) < maxBatch {
		select {
		case o := <-b.ops:
			batch = append(batch, o)
		default:
			return batch
		}
	}
	return batch
}

// commitBatch carries out one batch in one transaction. err is set when none
// of it was, or may have been, written; broken when the file must not be
// written to again.
func (b *Bolt) commitBatch(batch []*op) (err, broken error) {
	id := 0
	err = guard(func() error {
		return b.commit(func(tx *bbolt.Tx) error {
			id = tx.ID()
			k, err := openBucket(tx)
			if err != nil {
				return err
			}
			for _, o := range batch {
				// Whoever has gone away is not waiting for a result,
				// and is told "uncertain" whatever we do: do nothing.
				if o.err = o.ctx.Err(); o.err != nil {
					continue
				}
				if o.err = o.run(k); errors.Is(o.err, ErrDamaged) {
					return o.err
				}
			}
			return k.close()
		})
	})
	switch {
	case err == nil:
		return nil, nil
	case errors.Is(err, ErrDamaged):
		err = fmt.Errorf("%s: %w", b.path, err)
		return err, err
	case b.unwritten(err, id):
		return fmt.Errorf("%s: %w", b.path, err), nil
	}
	// The kernel forgets pages that it could not write, so after a failed
	// sync the file on disk is unknown until it is opened again.
	err = fmt.Errorf("%s: %w: %w", b.path, ErrUncertain, err)
	return err, fmt.Errorf("%s: not written since an earlier write failed, restart to check the file: %w", b.path, err)
}

// unwritten reports whether a commit failed before it could have had any
// effect: the disk is full, and the meta page still names an older transaction.
func (b *Bolt) unwritten(err error, id int) bool {
	// bbolt does not wrap the cause when it cannot make the file longer.
	full := errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG) ||
		strings.HasPrefix(err.Error(), "file resize error")
	if !full {
		return false
	}
	now := id
	verr := guard(func() error {
		return b.db.View(func(tx *bbolt.Tx) error { now = tx.ID(); return nil })
	})
	return verr == nil && now < id
}

// guard turns a panic into an error that matches ErrDamaged: bbolt panics where
// a page is not what it should be.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrDamaged, r)
		}
	}()
	return f()
}

// The file has two buckets. Records maps a key to revision (8 bytes), checksum
// (4 bytes) and value. Meta holds the schema, and the number of records and sum
// of checksums: bbolt has no checksums on its pages, and a damaged page can
// make records disappear as well as change.
var (
	bucketRecords = []byte("records")
	bucketMeta    = []byte("meta")
	keySchema     = []byte("schema")
	keySums       = []byte("sums")
	castagnoli    = crc32.MakeTable(crc32.Castagnoli)
)

// schema is the version of this layout.
const schema = 1

const header = 12 // bytes before the value

type sums struct{ count, sum uint64 }

func (s *sums) add(raw []byte) { s.count++; s.sum += uint64(binary.BigEndian.Uint32(raw[8:])) }
func (s *sums) sub(raw []byte) { s.count--; s.sum -= uint64(binary.BigEndian.Uint32(raw[8:])) }

// bucket is the records in a write transaction.
type bucket struct {
	k, meta *bbolt.Bucket
	sums    sums
}

func openBucket(tx *bbolt.Tx) (*bucket, error) {
	k := &bucket{k: tx.Bucket(bucketRecords), meta: tx.Bucket(bucketMeta)}
	raw := k.meta.Get(keySums)
	if len(raw) != 16 {
		return nil, fmt.Errorf("%w: no sums", ErrDamaged)
	}
	k.sums = sums{binary.BigEndian.Uint64(raw), binary.BigEndian.Uint64(raw[8:])}
	return k, nil
}

func (k *bucket) close() error {
	raw := binary.BigEndian.AppendUint64(nil, k.sums.count)
	return k.meta.Put(keySums, binary.BigEndian.AppendUint64(raw, k.sums.sum))
}

func (k *bucket) put(r Record) (uint64, error) {
	key := []byte(r.Key)
	old := k.k.Get(key)
	switch {
	case old == nil && r.Rev != 0:
		return 0, ErrNotFound
	case old != nil && r.Rev == 0:
		return 0, ErrExists
	case old != nil:
		have, err := decode(key, old)
		if err != nil {
			return 0, err
		}
		if have.Rev != r.Rev {
			return 0, fmt.Errorf("%w: revision %d, not %d", ErrConflict, have.Rev, r.Rev)
		}
		k.sums.sub(old)
	}
	rev, err := k.k.NextSequence()
	if err != nil {
		return 0, err
	}
	raw := encode(key, rev, r.Value)
	k.sums.add(raw)
	return rev, k.k.Put(key, raw)
}

// set is put over whatever there is.
func (k *bucket) set(r Record) error {
	r.Rev = 0
	if old := k.k.Get([]byte(r.Key)); old != nil {
		have, err := decode([]byte(r.Key), old)
		if err != nil {
			return err
		}
		r.Rev = have.Rev
	}
	_, err := k.put(r)
	return err
}

func (k *bucket) delete(key []byte) error {
	old := k.k.Get(key)
	if old == nil {
		return nil
	}
	if _, err := decode(key, old); err != nil {
		return err
	}
	k.sums.sub(old)
	return k.k.Delete(key)
}

func (k *bucket) deletePrefix(prefix string, limit int) (int, error) {
	// Keys first: deleting while walking makes bbolt's cursor skip.
	var keys [][]byte
	c := k.k.Cursor()
	for key, _ := c.Seek([]byte(prefix)); key != nil && len(keys) < limit && strings.HasPrefix(string(key), prefix); key, _ = c.Next() {
		keys = append(keys, key)
	}
	for _, key := range keys {
		if err := k.delete(key); err != nil {
			return 0, err
		}
	}
	return len(keys), nil
}

func encode(key []byte, rev uint64, value []byte) []byte {
	raw := make([]byte, header, header+len(value))
	binary.BigEndian.PutUint64(raw, rev)
	raw = append(raw, value...)
	binary.BigEndian.PutUint32(raw[8:], checksum(key, raw))
	return raw
}

// decode copies: bbolt's slices end with the transaction.
func decode(key, raw []byte) (Record, error) {
	if len(raw) < header || binary.BigEndian.Uint32(raw[8:]) != checksum(key, raw) {
		return Record{}, fmt.Errorf("%w: record %q has a wrong checksum", ErrDamaged, key)
	}
	return Record{Key: string(key), Value: append([]byte{}, raw[header:]...), Rev: binary.BigEndian.Uint64(raw)}, nil
}

func checksum(key, raw []byte) uint32 {
	c := crc32.Checksum(key, castagnoli)
	c = crc32.Update(c, castagnoli, raw[:8])
	return crc32.Update(c, castagnoli, raw[header:])
}
