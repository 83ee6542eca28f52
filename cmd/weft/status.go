package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weftnet/weft/internal/admin"
)

// sections are the words that `weft status` takes.
var sections = []string{"networks", "endpoints", "pools", "peers"}

// status shows what one or more plugins on this host say.
func (p program) status(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("weft status", flag.ContinueOnError)
	asJSON := fs.Bool("json", false, "print the whole document as JSON")
	socket := fs.String("socket", "", "socket of the plugin to ask; looked for when not given")
	state := fs.String("state", defaultState, "directory where a plugin keeps its state")
	words, err := p.parse(fs, args)
	if err != nil {
		return err
	}
	for _, w := range words {
		if !slices.Contains(sections, w) {
			return p.wrong("status of %q: choose from %s", w, strings.Join(sections, ", "))
		}
	}
	sockets := []string{*socket}
	if *socket == "" {
		if sockets, err = p.find(*state); err != nil {
			return err
		}
	}
	var failures []error
	for i, s := range sockets {
		if len(sockets) > 1 && !*asJSON {
			_, _ = fmt.Fprintf(p.out, "%s%s:\n", strings.Repeat("\n", min(i, 1)), s)
		}
		if err := p.show(ctx, s, words, *asJSON); err != nil {
			failures = append(failures, err)
		}
	}
	return errors.Join(failures...)
}

// find returns the sockets of the plugins on this host: inside a plugin and
// for an unmanaged one there is one beside the state; for managed plugins the
// engine keeps the state.
func (p program) find(state string) ([]string, error) {
	own := filepath.Join(state, adminSocket)
	if _, err := os.Stat(own); err == nil && state != defaultState {
		return []string{own}, nil
	}
	var plain []string
	if state == defaultState { // other instances are beside it
		var err error
		if plain, err = filepath.Glob(state + "*/" + adminSocket); err != nil {
			return nil, fmt.Errorf("look for %s: %w", own, err)
		}
	}
	pattern := filepath.Join(p.dataRoot, "plugins", "*", "propagated-mount", adminSocket)
	found, err := filepath.Glob(pattern)
	if err != nil {
		return nil, fmt.Errorf("look for %s: %w", pattern, err)
	}
	if found = append(plain, found...); len(found) == 0 {
		hint := "is the plugin enabled? if the engine's data is elsewhere, say --socket"
		if os.Geteuid() != 0 {
			hint = "this has to be run as root"
		}
		return nil, fmt.Errorf("no plugin found at %s or %s: %s", own, pattern, hint)
	}
	return found, nil
}

// show prints one plugin's answer.
func (p program) show(ctx context.Context, socket string, words []string, asJSON bool) error {
	var raw json.RawMessage
	if err := admin.Get(ctx, socket, admin.PathStatus, &raw); err != nil {
		return err
	}
	if asJSON {
		enc := json.NewEncoder(p.out)
		enc.SetIndent("", "  ")
		return enc.Encode(raw)
	}
	var doc document
	if err := json.Unmarshal(raw, &doc); err != nil {
		return fmt.Errorf("status of %s: %w", socket, err)
	}
	return doc.print(p.out, words)
}
