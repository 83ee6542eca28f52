package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/sirupsen/logrus"

	"github.com/weftnet/weft/internal/store"
)

// bootKey is, in both databases, the record of the boot in which they were used last;
// in that of endpoints it says since when there are records.
const bootKey = "host/boot"

// bootLost is the value of bootKey in a database of endpoints that was new in a boot
// that had one before.
const bootLost = "lost"

// ownBoot reports whether the endpoint records of this boot were lost since it began:
// what they named may be in use by containers that run. It is known until the next
// boot.
func ownBoot(ctx context.Context, weft, run *store.Bolt, boot string, log logrus.FieldLogger) (lost bool, err error) {
	last, lerr := weft.Get(ctx, bootKey)
	here, herr := run.Get(ctx, bootKey)
	for _, err := range []error{lerr, herr} {
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return false, fmt.Errorf("find out whether endpoints are remembered: %w", err)
		}
	}
	same := lerr == nil && string(last.Value) == boot
	if herr != nil {
		value := boot
		if same {
			value = bootLost
		}
		if here, err = run.Put(ctx, store.Record{Key: bootKey, Value: []byte(value)}); err != nil {
			return false, fmt.Errorf("remember this boot: %w", err)
		}
	}
	if !same {
		if _, err := weft.Put(ctx, store.Record{Key: bootKey, Value: []byte(boot), Rev: last.Rev}); err != nil {
			return false, fmt.Errorf("remember this boot: %w", err)
		}
	}
	if lost = string(here.Value) == bootLost; lost {
		log.Warn("the records of endpoints were lost since the host started: no address is freed by itself until it starts again")
	}
	return lost, nil
}
