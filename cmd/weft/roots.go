package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

// engineRoots are those that the engine's file names, and engines that run.
func engineRoots(config, proc string) (list []string) {
	var c struct {
		DataRoot string `json:"data-root"`
	}
	if b, err := os.ReadFile(config); err == nil && json.Unmarshal(b, &c) == nil && filepath.IsAbs(c.DataRoot) {
		list = append(list, filepath.Clean(c.DataRoot))
	}
	lines, _ := filepath.Glob(filepath.Join(proc, "[0-9]*", "cmdline")) // the pattern is a constant
	for _, path := range lines {
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
