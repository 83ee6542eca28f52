// Package docs has no code, only what the pages promise: that links lead
// somewhere, examples are those that the tests run, and options, settings and
// errors are those of the program.
package docs

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// pages are all Markdown files, by their path from the root.
func pages(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, pattern := range []string{"../*.md", "*.md", "adr/*.md"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			all[filepath.Join("docs", f)] = read(t, f)
		}
	}
	return all
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestWidth(t *testing.T) {
	for page, text := range pages(t) {
		if page == "CHANGELOG.md" {
			continue
		}
		code := false
		for i, l := range strings.Split(text, "\n") {
			if strings.HasPrefix(l, "```") {
				code = !code
			}
			limit := 140
			if page == "README.md" && code {
				limit = 80
			}
			if n := utf8.RuneCountInString(l); n > limit && !strings.HasPrefix(l, "|") {
				t.Errorf("%s:%d: %d columns, at most %d", page, i+1, n, limit)
			}
		}
	}
}

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	example = regexp.MustCompile("(?s)\\[`[a-z/-]*\\.yaml`\\]\\(([^)]+)\\)[^\n]*\n+(?:[^\n]+\n+)?```yaml\n(.*?)```")
	nothing = regexp.MustCompile(`[^a-z0-9 _-]`)
)

// anchor is what GitHub makes of a heading.
func anchor(s string) string {
	s = regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`).ReplaceAllString(s, "$1")
	return strings.ReplaceAll(nothing.ReplaceAllString(strings.ToLower(s), ""), " ", "-")
}

func TestLinks(t *testing.T) {
	all := pages(t)
	for page, text := range all {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			path, fragment, _ := strings.Cut(m[1], "#")
			if strings.Contains(path, "://") {
				continue
			}
			target := page
			if path != "" {
				target = filepath.Join(filepath.Dir(page), path)
			}
			if _, err := os.Stat(filepath.Join("..", target)); err != nil {
				t.Errorf("%s: %s leads nowhere", page, m[1])
				continue
			}
			found := fragment == ""
			for _, h := range heading.FindAllStringSubmatch(all[target], -1) {
				found = found || anchor(h[1]) == fragment
			}
			if !found {
				t.Errorf("%s: %s has no such heading", page, m[1])
			}
		}
	}
}

func TestExamplesShown(t *testing.T) {
	shown := 0
	for page, text := range pages(t) {
		for _, m := range example.FindAllStringSubmatch(text, -1) {
			shown++
			if want := read(t, filepath.Join("..", filepath.Dir(page), m[1])); m[2] != want {
				t.Errorf("%s shows another %s than the tests run", page, m[1])
			}
		}
	}
	if shown < 5 {
		t.Errorf("%d examples in all pages", shown)
	}
}

func TestSettings(t *testing.T) {
	var config struct {
		Env []struct{ Name string }
	}
	if err := json.Unmarshal([]byte(read(t, "../plugin.json")), &config); err != nil {
		t.Fatal(err)
	}
	options := read(t, "options.md")
	for _, e := range config.Env {
		if !strings.Contains(options, "`"+e.Name+"`") {
			t.Errorf("options.md does not have the setting %s", e.Name)
		}
	}
}

// The engine's own words, which are not in our source.
var engineSays = map[string]bool{
	"could not resolve driver weft in registry": true,
	"invalid ipam driver: weft":                 true,
	"plugin is in use":                          true,
	"conflicts with existing route":             true,
	"network … has active endpoints":            true,
	"content sha256:… already exists":           true,
	"dial unix /run/docker/plugins/…/weft.sock: connect: no such file or directory": true,
}

func TestTroubleshooting(t *testing.T) {
	var source strings.Builder
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "build" || d.Name() == ".git" || d.Name() == "e2e"):
			return fs.SkipDir
		case strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go"):
			source.WriteString(read(t, path))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	entries := 0
	for l := range strings.SplitSeq(strings.ReplaceAll(read(t, "troubleshooting.md"), "\n  ", " "), "\n") {
		if !strings.HasPrefix(l, "- `") {
			continue
		}
		entries++
		head, _, _ := strings.Cut(l, "`: ")
		for i, quote := range strings.Split(head+"`", "`") {
			if i%2 == 0 || engineSays[quote] {
				continue
			}
			for piece := range strings.SplitSeq(quote, "…") {
				if piece = strings.Trim(piece, ` "`); len(piece) > 4 && !strings.Contains(source.String(), piece) {
					t.Errorf("no error of ours says %q (%s)", piece, quote)
				}
			}
		}
	}
	if entries < 15 {
		t.Errorf("%d errors in troubleshooting.md", entries)
	}
}
