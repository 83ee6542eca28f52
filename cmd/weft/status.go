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
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/weftnet/weft/internal/admin"
)

// sections are the words that `weft status` takes.
var sections = []string{"networks", "endpoints", "pools", "peers"}

// status shows what one or more plugins on this host say.
func (p program) status(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("weft status", flag.ContinueOnError)
	asJSON := fs.Bool("json", false, "print the whole document as JSON")
	socket := fs.String("socket", "", "socket of the plugin to ask; looked for when not given")
	state := fs.String("state", "", "directory where the plugin keeps its state; looked for when not given")
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
	var raws []json.RawMessage
	for i, s := range sockets {
		if len(sockets) > 1 && !*asJSON {
			_, _ = fmt.Fprintf(p.out, "%s%s:\n", strings.Repeat("\n", min(i, 1)), s)
		}
		raw, doc, err := p.ask(ctx, s)
		if err == nil && !*asJSON {
			err = doc.print(p.out, words)
		}
		if err == nil {
			raws, err = append(raws, raw), doc.trouble()
		}
		failures = append(failures, err)
	}
	if *asJSON && len(raws) > 0 {
		failures = append(failures, p.printJSON(raws, len(sockets) > 1))
	}
	return errors.Join(failures...)
}

// printJSON prints one document, or several as a list, which is one document too.
func (p program) printJSON(raws []json.RawMessage, several bool) error {
	var v any = raws
	if !several {
		v = raws[0]
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = p.out.Write(append(escaped(b), '\n'))
	return err
}

// escaped is JSON in which nothing moves the cursor of a terminal: what is below a
// space is escaped already.
func escaped(b []byte) []byte {
	var out []byte
	for _, r := range string(b) {
		if r != '\n' && !unicode.IsPrint(r) {
			if r > 0xffff {
				hi, lo := utf16.EncodeRune(r)
				out = fmt.Appendf(out, "\\u%04x\\u%04x", hi, lo)
				continue
			}
			out = fmt.Appendf(out, "\\u%04x", r)
			continue
		}
		out = utf8.AppendRune(out, r)
	}
	return out
}

// find returns the socket beside a state that was named, whether it answers or not.
// Without one it returns those of the plugins on this host: inside a plugin and for
// an unmanaged one there is one beside the state; for managed plugins the engine
// keeps the state.
func (p program) find(state string) ([]string, error) {
	if state != "" {
		return []string{filepath.Join(state, adminSocket)}, nil
	}
	own := filepath.Join(defaultState, adminSocket)
	found, err := filepath.Glob(defaultState + "*/" + adminSocket) // other instances are beside it
	if err != nil {
		return nil, fmt.Errorf("look for %s: %w", own, err)
	}
	pattern := ""
	for _, root := range p.roots() {
		pattern = filepath.Join(root, "plugins", "*", "propagated-mount", adminSocket)
		list, err := filepath.Glob(pattern)
		if err != nil {
			return nil, fmt.Errorf("look for %s: %w", pattern, err)
		}
		found = append(found, list...)
	}
	if found = p.trusted(found); len(found) == 0 {
		hint := "is the plugin enabled? if the engine's data is elsewhere, say --socket"
		if os.Geteuid() != 0 {
			hint = "this has to be run as root"
		}
		return nil, fmt.Errorf("no plugin found at %s or %s: %s", own, pattern, hint)
	}
	return found, nil
}

// ask is one plugin's answer, as it came and as it is understood here.
func (p program) ask(ctx context.Context, socket string) (raw json.RawMessage, doc document, err error) {
	if err := admin.Get(ctx, socket, admin.PathStatus, &raw); err != nil {
		return nil, doc, err
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return nil, doc, fmt.Errorf("status of %s: %w", socket, err)
	}
	if p.now != nil {
		doc.now = p.now()
	}
	return raw, doc, nil
}
