package datapath

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// In a managed plugin /proc/sys is a read-only mount of its own; elsewhere all
// of /proc may be read-only.
func TestSysctlOnReadOnlyMount(t *testing.T) {
	for name, ro := range map[string]struct{ bind, path string }{
		"proc/sys": {"/proc/sys", "/proc/sys"},
		"proc":     {"/proc", "/proc"},
	} {
		t.Run(name, func(t *testing.T) {
			_, host := newKernel(t)
			host.PrivateMounts(func() error {
				err := unix.Mount(ro.bind, ro.bind, "", unix.MS_BIND|unix.MS_REC, "")
				if err == nil {
					err = unix.Mount("", ro.path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
				}
				if err != nil {
					return fmt.Errorf("make read-only: %w", err)
				}
				s := &sysctl{root: "/proc/sys"}
				if err := s.write(forward4, "1"); !errors.Is(err, unix.EROFS) {
					return fmt.Errorf("write to a read-only mount: %w", err)
				}
				if _, err := s.set(forward4, "0"); err != nil || s.remounted {
					return fmt.Errorf("the value it has: remounted %t, %w", s.remounted, err)
				}
				for _, v := range []string{"1", "0"} {
					if changed, err := s.set(forward4, v); err != nil || !changed || !s.remounted {
						return fmt.Errorf("set to %s: changed %t, remounted %t, %w", v, changed, s.remounted, err)
					}
					if got, err := s.get(forward4); err != nil || got != v {
						return fmt.Errorf("reads %s after writing %s, %w", got, v, err)
					}
				}
				return nil
			})
		})
	}
}
