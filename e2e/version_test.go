//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// version is an engine that the suite can run.
type version struct {
	name   string
	major  int
	root   string         // file system that it runs in, "" for this machine's
	client []string       // its own docker command
	config map[string]any // daemon.json
}

// chooseVersion returns the engine named by ENGINE, bootstrapping it if need
// be.
func chooseVersion(engine string) (version, error) {
	switch engine {
	case "", "20":
		client := "/usr/bin/docker" // docker.io's own, of the daemon's version
		if _, err := os.Stat(client); err != nil {
			if client, err = exec.LookPath("docker"); err != nil {
				return version{}, err
			}
		}
		return version{name: "20.10 (this machine's docker.io)", major: 20, client: []string{client},
			// What newer engines do by default, the built-in bridge of 20.10
			// does only with these two.
			config: map[string]any{"experimental": true, "ip6tables": true}}, nil
	case "28":
		dir, err := bootstrap("engine-28", "sid")
		if err != nil {
			return version{}, err
		}
		// The tree's client is linked to the tree's libc.
		ld, err := filepath.Glob(filepath.Join(dir, "lib64/ld-linux-*.so.*"))
		if err != nil || len(ld) != 1 {
			return version{}, fmt.Errorf("loader of %s: found %v: %w", dir, ld, err)
		}
		libs, err := filepath.Glob(filepath.Join(dir, "usr/lib/*-linux-gnu"))
		if err != nil || len(libs) != 1 {
			return version{}, fmt.Errorf("libraries of %s: found %v: %w", dir, libs, err)
		}
		return version{name: "28.5 (Debian sid)", major: 28, root: dir,
			client: []string{ld[0], "--library-path", libs[0], filepath.Join(dir, "usr/bin/docker")}}, nil
	}
	return version{}, fmt.Errorf("ENGINE=%s: want 20 or 28", engine)
}

// cacheOf is where a tree is kept.
func cacheOf(name string) string {
	if cache := os.Getenv("WEFT_CACHE"); cache != "" {
		return cache
	}
	base := os.Getenv("XDG_CACHE_HOME")
	if base == "" {
		base = "/var/cache"
	}
	return filepath.Join(base, "weft", name)
}

// bootstrap makes a Debian tree with an engine, once.
func bootstrap(name, suiteName string) (string, error) {
	cache := cacheOf(name)
	if _, err := os.Stat(cache); err == nil {
		return cache, nil
	}
	if err := os.MkdirAll(filepath.Dir(cache), 0o755); err != nil {
		return "", err
	}
	// A bootstrap that was interrupted must not pass for a finished one.
	tmp, err := os.MkdirTemp(filepath.Dir(cache), name+".")
	if err != nil {
		return "", err
	}
	fmt.Fprintf(os.Stderr, "e2e: bootstrapping Debian %s into %s, about a minute\n", suiteName, cache)
	if _, err := output(exec.Command("debootstrap", "--variant=minbase",
		"--include=docker.io,docker-cli,iptables,iproute2,busybox-static", suiteName, tmp)); err != nil {
		_ = os.RemoveAll(tmp)
		return "", err
	}
	return cache, os.Rename(tmp, cache)
}
