package dhcp

import (
	"time"

	"golang.org/x/sys/unix"
)

// Asleep is for how long this machine has slept since it started. The clock by
// which Go measures (CLOCK_MONOTONIC) stood still meanwhile; servers' did not.
func Asleep() time.Duration {
	var boot, awake unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot) != nil || unix.ClockGettime(unix.CLOCK_MONOTONIC, &awake) != nil {
		return 0
	}
	return time.Duration(boot.Nano() - awake.Nano())
}
