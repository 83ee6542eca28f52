package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/weftnet/weft/internal/datapath"
)

// Set by the linker.
var (
	version = "dev"
	commit  = "unknown"
)

const usage = `usage: weft COMMAND [FLAGS]

  serve     answer the engine: the plugin itself
  status    show networks, endpoints and pools: status [networks|endpoints|pools|peers]
  address   keep or free an address: address reserve NAME ADDRESS|forget NAME|release ADDRESS|release -stranded
            who had one: address history [ADDRESS|NAME] [-at TIME]
  network   forget a network that the engine no longer has: network forget ID|unclaimed
  cluster   have a host be another one, after a copy was made of it: cluster new-id
  secret    exchange the cluster's password: secret add|use|remove, the password on standard input
  uninstall remove everything of an instance from this host's network, when its plugin is gone
  version   show what this is

weft COMMAND -h lists the flags.
`

// errUsage is for wrong arguments that were already explained.
var errUsage = errors.New("usage")

// stopAfter is when a stop that does not come to its end is cut off; the
// engine kills after 10 s.
const stopAfter = 9500 * time.Millisecond

func main() {
	ctx, release := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, func() {
		release() // a second signal ends the process
		time.Sleep(stopAfter)
		fmt.Fprintln(os.Stderr, "weft: cut off while stopping")
		os.Exit(1)
	})
	os.Exit(run(ctx, os.Args[1:], program{in: os.Stdin, out: os.Stdout, err: os.Stderr, env: os.Getenv, dataRoot: "/var/lib/docker", drop: datapath.DropPrivileges,
		engines: func() []string { return engineRoots("/etc/docker/daemon.json", "/proc") }}))
}

// program is what a command has of the process around it.
type program struct {
	in       io.Reader
	out, err io.Writer
	env      func(string) string
	dataRoot string           // of the engine, where a managed plugin's state is looked for
	drop     func() error     // gives up the privileges that serve does not need; nil for not at all
	engines  func() []string  // where further engines keep their data; may be nil
	now      func() time.Time // may be nil
}

// run is the command; it returns the exit code.
func run(ctx context.Context, args []string, p program) int {
	if len(args) == 0 {
		_, _ = io.WriteString(p.err, usage)
		return 2
	}
	var err error
	switch args[0] {
	case "serve":
		err = p.serve(ctx, args[1:])
	case "status":
		err = p.status(ctx, args[1:])
	case "address":
		err = p.address(ctx, args[1:])
	case "network":
		err = p.network(ctx, args[1:])
	case "uninstall":
		err = p.uninstall(ctx, args[1:])
	case "cluster":
		err = p.cluster(ctx, args[1:])
	case "secret":
		err = p.secret(ctx, args[1:])
	case "version":
		err = p.version(args[1:])
	case "help", "-h", "-help", "--help":
		_, _ = io.WriteString(p.out, usage)
	default:
		_, _ = fmt.Fprintf(p.err, "weft: there is no command %q\n\n%s", args[0], usage)
		return 2
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return 2
	case err != nil:
		_, _ = fmt.Fprintf(p.err, "weft: %s\n", printable(err.Error()))
		return 1
	}
	return 0
}

// parse reads flags that may stand before and after words, and returns the
// words.
func (p program) parse(fs *flag.FlagSet, args []string) ([]string, error) {
	fs.SetOutput(p.err)
	var words []string
	for {
		if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
			return nil, err
		} else if err != nil {
			return nil, errUsage
		}
		if fs.NArg() == 0 {
			return words, nil
		}
		words = append(words, fs.Arg(0))
		args = fs.Args()[1:]
	}
}

// wrong explains wrong arguments.
func (p program) wrong(format string, args ...any) error {
	_, _ = fmt.Fprintf(p.err, "weft: "+format+"\n", args...)
	return errUsage
}

func (p program) version(args []string) error {
	fs := flag.NewFlagSet("weft version", flag.ContinueOnError)
	asJSON := fs.Bool("json", false, "print JSON")
	words, err := p.parse(fs, args)
	if err != nil {
		return err
	}
	if len(words) > 0 {
		return p.wrong("version takes no argument %q", words[0])
	}
	if *asJSON {
		return json.NewEncoder(p.out).Encode(struct{ Version, Commit, Go, Platform string }{
			version, commit, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH,
		})
	}
	_, err = fmt.Fprintf(p.out, "weft %s (commit %s, %s, %s/%s)\n", version, commit, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}
