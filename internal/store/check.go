package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"go.etcd.io/bbolt"
)

const newSuffix = ".new-"

// create makes an empty store unless there is a file at path. The file gets
// its name when it is complete, so an empty or short file under that name is a
// damaged one and never a beginning.
func create(path string, opts Options) error {
	if _, err := os.Lstat(path); err == nil || !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+newSuffix)
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	if err := f.Close(); err != nil {
		return err
	}
	db, err := openFile(f.Name(), options(opts))
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		if _, err := tx.CreateBucket(bucketRecords); err != nil {
			return err
		}
		meta, err := tx.CreateBucket(bucketMeta)
		if err != nil {
			return err
		}
		if err := meta.Put(keySchema, binary.BigEndian.AppendUint64(nil, schema)); err != nil {
			return err
		}
		return (&bucket{meta: meta}).close()
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return err
	}
	// Link, not rename: a file that appeared meanwhile is left alone.
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if opts.NoSync {
		return nil
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// check reads every page that is in use and every record, and compares the
// sums. It reads the file itself instead of asking bbolt, which follows a
// damaged page out of its memory map, or in a circle. What passes cannot make
// bbolt panic later, short of damage that comes later.
func check(path string) error {
	if info, err := os.Stat(path); err != nil {
		return err
	} else if info.Size() == 0 {
		return fmt.Errorf("%w: it is empty", ErrDamaged) // bbolt would take it for a new one
	}
	o := options(Options{})
	o.ReadOnly = true
	db, err := openFile(path, o) // looks at the meta pages only, and locks
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }() // read-only: nothing to lose
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return guard(func() error {
		return db.View(func(tx *bbolt.Tx) error {
			size := uint64(db.Info().PageSize)
			w := &walker{f: f, size: size, end: uint64(tx.Size()) / size, seen: map[uint64]bool{}}
			if err := w.file(uint64(tx.Cursor().Bucket().Root())); err != nil {
				return err
			}
			return w.free(uint64(tx.ID()))
		})
	})
}

// walker reads pages in the format of bbolt's file version 2: a header of
// 16 bytes (id 8, kind 2, count 2, further pages 4), then count elements of
// 16 bytes (branch: position 4, key length 4, page 8; leaf: kind 4, position 4,
// key length 4, value length 4), positions counted from the element.
type walker struct {
	f    *os.File
	size uint64 // of a page
	end  uint64 // first page that was never used
	seen map[uint64]bool
}

const (
	element    = 16
	pageBranch = 1
	pageLeaf   = 2
	pageFree   = 16
	leafBucket = 1
)

var native = binary.NativeEndian

// span is a range of keys; nil is open.
type span struct{ from, to []byte }

func (s span) has(key []byte) bool {
	return (s.from == nil || bytes.Compare(key, s.from) >= 0) && (s.to == nil || bytes.Compare(key, s.to) < 0)
}

// leaf is what a walk calls for each element in order.
type leaf func(kind uint32, key, value []byte) error

// file checks the whole file.
func (w *walker) file(root uint64) error {
	buckets := map[string][]byte{}
	err := w.tree(root, span{}, func(kind uint32, key, value []byte) error {
		if kind != leafBucket || len(value) < element {
			return fmt.Errorf("%w: %q is not a bucket", ErrDamaged, key)
		}
		buckets[string(key)] = value
		return nil
	})
	if err != nil {
		return err
	}
	meta := map[string][]byte{}
	err = w.bucket(buckets[string(bucketMeta)], func(_ uint32, key, value []byte) error {
		meta[string(key)] = value
		return nil
	})
	if err != nil {
		return err
	}
	v, raw := meta[string(keySchema)], meta[string(keySums)]
	if len(v) != 8 || len(raw) != 16 {
		return fmt.Errorf("%w: no schema number or no sums", ErrDamaged)
	}
	if n := binary.BigEndian.Uint64(v); n != schema {
		return fmt.Errorf("the file has schema %d and this version of weft knows only %d: use the version that wrote it", n, schema)
	}
	var have sums
	err = w.bucket(buckets[string(bucketRecords)], func(kind uint32, key, value []byte) error {
		if _, err := decode(key, value); kind != 0 || err != nil {
			return fmt.Errorf("record %q of kind %d: %w", key, kind, cmp.Or(err, ErrDamaged))
		}
		have.add(value)
		return nil
	})
	if err != nil {
		return err
	}
	if want := (sums{binary.BigEndian.Uint64(raw), binary.BigEndian.Uint64(raw[8:])}); have != want {
		return fmt.Errorf("%w: %d records found (sum %x), %d written (sum %x)", ErrDamaged, have.count, have.sum, want.count, want.sum)
	}
	return nil
}

// free checks the list of free pages of transaction txid: bbolt writes to the
// pages on it, so none of them may be in use. bbolt alternates between two meta
// pages and has checked them (list at byte 48, transaction at byte 64); the
// list's count is in its first entry when it does not fit into the header.
func (w *walker) free(txid uint64) error {
	meta := make([]byte, 72)
	if _, err := w.f.ReadAt(meta, int64(txid%2*w.size)); err != nil {
		return err
	}
	if native.Uint64(meta[64:]) != txid {
		return fmt.Errorf("%w: no meta page of transaction %d", ErrDamaged, txid)
	}
	p, err := w.page(native.Uint64(meta[48:]))
	if err != nil {
		return err
	}
	first, n := element, int(native.Uint16(p[10:]))
	if n == 0xffff {
		first, n = first+8, int(native.Uint64(p[element:]))
	}
	if native.Uint16(p[8:]) != pageFree || n < 0 || n > len(p) {
		return fmt.Errorf("%w: no list of free pages", ErrDamaged)
	}
	list, err := slice(p, first, 8*n)
	if err != nil {
		return err
	}
	for ; len(list) > 0; list = list[8:] {
		id := native.Uint64(list)
		if id < 2 || id >= w.end || w.seen[id] {
			return fmt.Errorf("%w: page %d is both in use and free, or does not exist", ErrDamaged, id)
		}
		w.seen[id] = true
	}
	return nil
}

// bucket walks one bucket, given its value in the root: the root page (8), a
// sequence (8) and, where the root page is 0, the only page itself.
func (w *walker) bucket(value []byte, f leaf) error {
	if value == nil {
		return fmt.Errorf("%w: it is not a store of weft", ErrDamaged)
	}
	if id := native.Uint64(value); id != 0 {
		return w.tree(id, span{}, f)
	}
	return leaves(value[element:], span{}, f)
}

// tree walks the pages below and including page id.
func (w *walker) tree(id uint64, s span, f leaf) error {
	p, err := w.page(id)
	if err != nil {
		return err
	}
	if native.Uint16(p[8:]) == pageLeaf {
		if err := leaves(p, s, f); err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
		return nil
	}
	n := int(native.Uint16(p[10:]))
	if native.Uint16(p[8:]) != pageBranch || n == 0 {
		return fmt.Errorf("%w: page %d is neither branch nor leaf", ErrDamaged, id)
	}
	keys, children := make([][]byte, n), make([]uint64, n)
	for i := range n {
		e, err := slice(p, element*(i+1), element)
		if err != nil {
			return err
		}
		if keys[i], err = slice(p, element*(i+1)+int(native.Uint32(e)), int(native.Uint32(e[4:]))); err != nil {
			return err
		}
		children[i] = native.Uint64(e[8:])
		if len(keys[i]) == 0 || !s.has(keys[i]) || i > 0 && bytes.Compare(keys[i-1], keys[i]) >= 0 {
			return fmt.Errorf("%w: page %d is out of order", ErrDamaged, id)
		}
	}
	for i := range n {
		below := span{keys[i], s.to}
		if i+1 < n {
			below.to = keys[i+1]
		}
		if err := w.tree(children[i], below, f); err != nil {
			return err
		}
	}
	return nil
}

// leaves walks the elements of one leaf page.
func leaves(p []byte, s span, f leaf) error {
	if len(p) < element || native.Uint16(p[8:]) != pageLeaf {
		return fmt.Errorf("%w: not a leaf", ErrDamaged)
	}
	var last []byte
	for i := range int(native.Uint16(p[10:])) {
		at := element * (i + 1)
		e, err := slice(p, at, element)
		if err != nil {
			return err
		}
		pos, k, v := int(native.Uint32(e[4:])), int(native.Uint32(e[8:])), int(native.Uint32(e[12:]))
		key, err := slice(p, at+pos, k)
		if err != nil {
			return err
		}
		value, err := slice(p, at+pos+k, v)
		if err != nil {
			return err
		}
		if k == 0 || !s.has(key) || last != nil && bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("%w: key %.80q is out of order", ErrDamaged, key)
		}
		if err := f(native.Uint32(e), key, value); err != nil {
			return err
		}
		last = key
	}
	return nil
}

// page reads a page with those that belong to it. Each is met once: two ways
// to one page would be a circle, or a page that is written to twice.
func (w *walker) page(id uint64) ([]byte, error) {
	p := make([]byte, w.size)
	if id < 2 || id >= w.end {
		return nil, fmt.Errorf("%w: there is no page %d", ErrDamaged, id)
	}
	if _, err := w.f.ReadAt(p, int64(id*w.size)); errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: page %d is cut off", ErrDamaged, id)
	} else if err != nil {
		return nil, err
	}
	more := uint64(native.Uint32(p[12:]))
	if native.Uint64(p) != id || more >= w.end-id {
		return nil, fmt.Errorf("%w: page %d says that it is page %d with %d more", ErrDamaged, id, native.Uint64(p), more)
	}
	for i := id; i <= id+more; i++ {
		if w.seen[i] {
			return nil, fmt.Errorf("%w: page %d is used twice", ErrDamaged, i)
		}
		w.seen[i] = true
	}
	if more == 0 {
		return p, nil
	}
	rest := make([]byte, more*w.size)
	if _, err := w.f.ReadAt(rest, int64((id+1)*w.size)); errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: page %d is cut off", ErrDamaged, id)
	} else if err != nil {
		return nil, err
	}
	return append(p, rest...), nil
}

func slice(p []byte, at, n int) ([]byte, error) {
	if at > len(p) || n > len(p)-at {
		return nil, fmt.Errorf("%w: an element points out of its page", ErrDamaged)
	}
	return p[at : at+n : at+n], nil
}
