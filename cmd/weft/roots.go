package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// roots are the directories where engines of this host keep their data.
func (p program) roots() []string {
	list := []string{p.dataRoot}
	if p.engines != nil {
		list = append(list, p.engines()...)
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// engineRoots are those that the engine's file names, and engines that run. Any user
// can start a program that looks like one, and a container has paths of its own:
// it must be root's, also before it changed its user, and see this file system.
func engineRoots(config, proc string) (list []string) {
	var c struct {
		DataRoot string `json:"data-root"`
	}
	if b, err := os.ReadFile(config); err == nil && json.Unmarshal(b, &c) == nil && filepath.IsAbs(c.DataRoot) {
		list = append(list, filepath.Clean(c.DataRoot))
	}
	lines, _ := filepath.Glob(filepath.Join(proc, "[0-9]*", "cmdline")) // the pattern is a constant
	here, _ := os.Readlink(filepath.Join(proc, "self", "ns", "mnt"))    // "" is nobody's
	for _, path := range lines {
		dir := filepath.Dir(path)
		if there, err := os.Readlink(filepath.Join(dir, "ns", "mnt")); err != nil || there != here || !rootRuns(dir) {
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		if root := dataRootOf(b); root != "" {
			list = append(list, root)
		}
	}
	return list
}

// dataRootOf is what the command line of an engine names.
func dataRootOf(cmdline []byte) string {
	args := strings.Split(string(bytes.TrimRight(cmdline, "\x00")), "\x00")
	if filepath.Base(args[0]) != "dockerd" {
		return ""
	}
	for i, a := range args[1:] {
		name, value, ok := strings.Cut(a, "=")
		if !slices.Contains([]string{"--data-root", "-g", "--graph", "-data-root"}, name) {
			continue
		}
		if !ok && i+2 < len(args) {
			value = args[i+2]
		}
		if filepath.IsAbs(value) {
			return filepath.Clean(value)
		}
	}
	return ""
}

// rootRuns reports whether all users of a process, the real one too, are root.
func rootRuns(dir string) bool {
	b, err := os.ReadFile(filepath.Join(dir, "status"))
	return err == nil && slices.Contains(strings.Split(string(b), "\n"), "Uid:\t0\t0\t0\t0")
}

// trusted are sockets that belong to root, or to whoever asks; the others are
// told.
func (p program) trusted(sockets []string) (list []string) {
	for _, s := range sockets {
		info, err := os.Stat(s)
		if err != nil {
			continue // it is just gone
		}
		if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid() {
			_, _ = fmt.Fprintf(p.err, "weft: %s is left out: it does not belong to root; say --socket to ask it all the same\n", printable(s))
			continue
		}
		list = append(list, s)
	}
	return list
}
