package overlay

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/weftnet/weft/internal/store"
)

const identityKey = "host/id"

// Identity is the ID of this host among others, made at the first call. It is
// not the host name, which people change.
func Identity(ctx context.Context, s disk) (string, error) {
	r, err := s.Get(ctx, identityKey)
	if errors.Is(err, store.ErrNotFound) {
		id := fmt.Sprintf("%016x%016x", rand.Uint64(), rand.Uint64())
		r, err = s.Put(ctx, store.Record{Key: identityKey, Value: []byte(id)})
	}
	return string(r.Value), err
}

// ForgetIdentity has the next call of Identity make another one. It may be repeated.
func ForgetIdentity(ctx context.Context, s disk) error {
	if err := s.Delete(ctx, identityKey); err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("forget which host this is: %w", err)
	}
	return nil
}
