//go:build e2e

package e2e

import (
	"archive/tar"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// suite is what the tests of one run share. TestMain fills it in.
var suite struct {
	dir     string // every file of this run
	probe   string // the probe's binary
	image   string // tar of the probe image
	bundle  string // build/plugin
	weft    string // the bundle's program, for "weft status"
	version version
	slow    time.Duration // what limits are multiplied by

	mu    sync.Mutex
	notes []string
}

// note adds a line to the summary that is printed at the end of the run.
func note(format string, args ...any) {
	suite.mu.Lock()
	defer suite.mu.Unlock()
	suite.notes = append(suite.notes, fmt.Sprintf(format, args...))
}

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := runSuite(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func runSuite(m *testing.M) (code int, err error) {
	if os.Getuid() != 0 {
		return 1, errors.New("namespaces, engines and links need root")
	}
	// Short, because unix socket paths end at 107 bytes.
	if suite.dir, err = os.MkdirTemp("", "we"); err != nil {
		return 1, err
	}
	defer func() {
		err = errors.Join(err, leftovers(), os.RemoveAll(suite.dir))
	}()
	if suite.bundle, err = filepath.Abs("../build/plugin"); err != nil {
		return 1, err
	}
	suite.slow = 1
	if s := os.Getenv("E2E_SLOW"); s != "" {
		n, err := strconv.ParseUint(s, 10, 8)
		if err != nil || n == 0 {
			return 1, fmt.Errorf("E2E_SLOW=%s: want a whole number", s)
		}
		suite.slow = time.Duration(n)
	}
	if suite.version, err = chooseVersion(os.Getenv("ENGINE")); err != nil {
		return 1, err
	}
	suite.probe = filepath.Join(suite.dir, "probe")
	if err := placeProbe(os.Getenv("E2E_PROBE")); err != nil {
		return 1, err
	}
	if err := copyWeft(); err != nil {
		return 1, err
	}
	suite.image = filepath.Join(suite.dir, "image.tar")
	if err := writeImage(suite.image); err != nil {
		return 1, err
	}
	code = m.Run()
	sort.Strings(suite.notes)
	fmt.Printf("\n=== summary, engine %s\n%s\n", suite.version.name, strings.Join(suite.notes, "\n"))
	return code, nil
}

// placeProbe builds the probe, or takes one that was built before: there may be
// no compiler, or an emulated one.
func placeProbe(built string) error {
	if built != "" {
		return copyProgram(built, suite.probe)
	}
	build := exec.Command("go", "build", "-tags", "e2e", "-trimpath", "-ldflags", "-s -w", "-o", suite.probe, "./probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	_, err := output(build)
	return err
}

// copyWeft puts the bundle's program where machines with another root see it.
func copyWeft() error {
	suite.weft = filepath.Join(suite.dir, "weft")
	err := copyProgram(filepath.Join(suite.bundle, "rootfs/weft"), suite.weft)
	if errors.Is(err, os.ErrNotExist) {
		return nil // needPlugin says what to do
	}
	return err
}

func copyProgram(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}

// writeImage makes the image that every container runs: the probe and busybox.
func writeImage(file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // closed with its error below
	t := tar.NewWriter(f)
	for _, d := range []string{"bin/", "etc/", "proc/", "sys/", "dev/", "tmp/"} {
		if err := t.WriteHeader(&tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o755}); err != nil {
			return err
		}
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	for name, src := range map[string]string{"probe": suite.probe, "bin/busybox": busybox} {
		b, err := os.ReadFile(src)
		if err != nil {
			return err
		}
		if err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(b))}); err != nil {
			return err
		}
		if _, err := t.Write(b); err != nil {
			return err
		}
	}
	for _, n := range []string{"sh", "ip", "ping", "sleep", "wget"} {
		if err := t.WriteHeader(&tar.Header{Name: "bin/" + n, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), f.Close())
}

// leftovers fails the run when something of it is still there: processes in
// its namespaces, mounts, or control groups.
func leftovers() error {
	var left []error
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if strings.Contains(string(mounts), suite.dir) {
		left = append(left, fmt.Errorf("left behind: mounts below %s", suite.dir))
	}
	for _, tree := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} { // version 2, version 1
		groups, err := filepath.Glob(tree + filepath.Base(suite.dir) + "-*")
		if err != nil {
			return err
		}
		if len(groups) > 0 {
			left = append(left, fmt.Errorf("left behind: control groups %v", groups))
		}
	}
	exes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, x := range exes {
		b, err := os.ReadFile(x)
		if err == nil && strings.Contains(string(b), suite.dir+"/") {
			left = append(left, fmt.Errorf("left behind: process %s", strings.ReplaceAll(string(b), "\x00", " ")))
		}
	}
	return errors.Join(left...)
}
