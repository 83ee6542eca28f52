package datapath

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// In a managed plugin /proc/sys is a read-only mount of its own, and what can
// be written is mounted beside it.
func TestSysctlInPlugin(t *testing.T) {
	_, host := newKernel(t)
	dir := t.TempDir()
	mounted := filepath.Join(dir, "net")
	if err := os.Mkdir(mounted, 0o755); err != nil {
		t.Fatal(err)
	}
	if got := newSysctl(dir).root; got != "/proc/sys" {
		t.Errorf("a directory that is no mount: %s", got)
	}
	host.PrivateMounts(func() error {
		if err := unix.Mount("/proc/sys/net", mounted, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount beside: %w", err)
		}
		err := unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, "")
		if err == nil {
			err = unix.Mount("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		}
		if err != nil {
			return fmt.Errorf("make read-only: %w", err)
		}
		none := newSysctl(filepath.Join(dir, "none"))
		if _, err := none.set(forward4, "1"); err == nil || !strings.Contains(err.Error(), "mount /proc/sys/net of the host at") {
			return fmt.Errorf("on a read-only mount: %w", err)
		}
		if _, err := none.set(forward4, "0"); err != nil {
			return fmt.Errorf("the value it has: %w", err)
		}
		s := newSysctl(dir)
		for _, v := range []string{"1", "0"} {
			if changed, err := s.set(forward4, v); err != nil || !changed {
				return fmt.Errorf("set to %s: changed %t, %w", v, changed, err)
			}
			if got, err := none.get(forward4); err != nil || got != v {
				return fmt.Errorf("reads %s after writing %s, %w", got, v, err)
			}
		}
		return nil
	})
}
