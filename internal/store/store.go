package store

import (
	"errors"
	"fmt"
)

// Record is one record. Rev is given by the store.
type Record struct {
	Key   string
	Value []byte
	Rev   uint64
}

// Limits of a record; both stores would take somewhat more.
const (
	maxKey   = 1 << 10 // bytes
	maxValue = 1 << 20 // bytes
)

func (r Record) check() error {
	if r.Key == "" || len(r.Key) > maxKey || len(r.Value) > maxValue {
		return fmt.Errorf("put record %.80q: key of %d or value of %d bytes is too long or empty", r.Key, len(r.Key), len(r.Value))
	}
	return nil
}

var errNoPrefix = errors.New("delete records: the prefix is empty")

var (
	// ErrNotFound is returned by Get, and by Put with a revision, when there
	// is no record under the key.
	ErrNotFound = errors.New("no such record")
	// ErrExists is returned by Put with revision 0 when there is a record.
	ErrExists = errors.New("record exists already")
	// ErrConflict is returned by Put when the record has another revision.
	ErrConflict = errors.New("record was changed meanwhile")
	// ErrUncertain is returned by Put, Delete and DeletePrefix when the
	// context ended, or the disk or the connection failed, after the write had
	// been handed over: it may or may not have happened.
	ErrUncertain = errors.New("the write may or may not have reached the store")
	// ErrDamaged is returned by every call once the file has been found
	// damaged. Such a file is never written to.
	ErrDamaged = errors.New("store file is damaged")
	// ErrBusy is returned by Open while another process has the file open.
	ErrBusy = errors.New("store file is in use by another process")
	// ErrClosed is returned by every call after Close.
	ErrClosed = errors.New("store is closed")
)
