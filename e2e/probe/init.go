//go:build e2e

package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// runInit is process 1 of a machine. It arrives in new namespaces, makes the
// mounts a machine of its own would have, says "ready" and then only reaps
// until its stdin closes: the pipe's other end is the test process, so a test
// that dies takes the machine along.
func runInit(args []string, out io.Writer) error {
	fs := flag.NewFlagSet("init", flag.ContinueOnError)
	name := fs.String("name", "machine", "host name")
	root := fs.String("root", "", "directory that becomes /")
	keep := fs.String("keep", "", "directories kept visible at the same path inside root, comma separated")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(*name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	var err error
	if *root != "" {
		err = newRoot(*root, strings.Split(*keep, ","))
	} else {
		err = sameRoot()
	}
	if err != nil {
		return err
	}
	// A new namespace inherits IPv4 settings from the first one (kernel
	// documentation, net.core.devconf_inherit_init_net), where an engine may have
	// run: with forwarding on already, an engine leaves the policy of FORWARD alone.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0); err != nil {
		return fmt.Errorf("switch forwarding off: %w", err)
	}
	if _, err := io.WriteString(out, "ready\n"); err != nil {
		return err
	}
	go reap()
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// reap waits for the orphans that process 1 inherits, container shims mostly.
func reap() {
	for {
		var s unix.Siginfo
		// WNOWAIT is not needed: this process starts no children of its own.
		if err := unix.Waitid(unix.P_ALL, 0, &s, unix.WEXITED, nil); err != nil {
			// No child at the moment; SIGCHLD would do, a pause is simpler.
			ts := unix.Timespec{Nsec: 20e6}
			_ = unix.Nanosleep(&ts, nil)
		}
	}
}

// sameRoot keeps the machine's files and replaces what tells machines apart.
func sameRoot() error {
	// The sysfs mounted here shows the devices of the old network namespace.
	// A new one hides the cgroup mounts below it, so they are carried over.
	tmp, err := os.MkdirTemp("", "cg")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp) }() // a directory less or more in /tmp
	steps := []struct {
		src, dst, kind string
		flags          uintptr
	}{
		{"proc", "/proc", "proc", 0},
		{"/sys/fs/cgroup", tmp, "", unix.MS_BIND | unix.MS_REC},
		{"sysfs", "/sys", "sysfs", 0},
		{tmp, "/sys/fs/cgroup", "", unix.MS_MOVE},
	}
	for _, s := range steps {
		if err := unix.Mount(s.src, s.dst, s.kind, s.flags, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", s.src, s.dst, err)
		}
	}
	// Nobody else's engine, containerd or firewall lock.
	for _, d := range []string{"/run/docker", "/run/containerd", "/etc/docker"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", d, "tmpfs", 0, ""); err != nil {
			return fmt.Errorf("mount tmpfs on %s: %w", d, err)
		}
	}
	return nil
}

// newRoot makes root the file system of the machine, as a boot from it would.
func newRoot(root string, keep []string) error {
	steps := []struct {
		src, dst, kind string
		flags          uintptr
	}{
		{root, "", "", unix.MS_BIND | unix.MS_REC},
		{"proc", "proc", "proc", 0},
		{"sysfs", "sys", "sysfs", 0},
		{"/sys/fs/cgroup", "sys/fs/cgroup", "", unix.MS_BIND | unix.MS_REC},
		{"/dev", "dev", "", unix.MS_BIND | unix.MS_REC},
		{"tmpfs", "run", "tmpfs", 0},
		{"tmpfs", "tmp", "tmpfs", 0},
		{"tmpfs", "mnt", "tmpfs", 0},
		{"tmpfs", "etc/docker", "tmpfs", 0},
	}
	if err := os.MkdirAll(filepath.Join(root, "etc/docker"), 0o755); err != nil {
		return err
	}
	for _, s := range steps {
		if err := unix.Mount(s.src, filepath.Join(root, s.dst), s.kind, s.flags, ""); err != nil {
			return fmt.Errorf("mount %s on %s/%s: %w", s.src, root, s.dst, err)
		}
	}
	for _, d := range keep {
		dst := filepath.Join(root, d)
		if err := os.MkdirAll(dst, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(d, dst, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("keep %s: %w", d, err)
		}
	}
	old := filepath.Join(root, "mnt/old")
	if err := os.MkdirAll(old, 0o755); err != nil {
		return err
	}
	if err := unix.PivotRoot(root, old); err != nil {
		return fmt.Errorf("pivot_root %s: %w", root, err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return unix.Unmount("/mnt/old", unix.MNT_DETACH)
}
