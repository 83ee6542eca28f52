package ipam

import (
	"context"
	"errors"
	"fmt"

	"github.com/weftnet/weft/internal/store"
)

// identityStore is what ForgetIdentity works on. *store.Bolt satisfies it.
type identityStore interface {
	Delete(ctx context.Context, key string) error
	DeletePrefix(ctx context.Context, prefix string) error
}

// ForgetIdentity has another DUID made when one is needed next: what this host is to
// DHCP servers. With leases it forgets the leases too, and tells no server: they are
// those of another machine, which goes on using them. Without, containers that run
// keep theirs under the old DUID until they start again. It is called before New, and
// may be repeated.
func ForgetIdentity(ctx context.Context, s identityStore, leases bool) error {
	var err error
	if leases {
		err = s.DeletePrefix(ctx, leasePrefix)
	}
	if derr := s.Delete(ctx, duidKey); !errors.Is(derr, store.ErrNotFound) {
		err = errors.Join(err, derr)
	}
	if err != nil {
		return fmt.Errorf("forget who this host is to DHCP servers: %w", err)
	}
	return nil
}
