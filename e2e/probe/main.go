//go:build e2e

// Command probe is what the end-to-end tests run inside containers, hosts and
// clients: a server that answers with the address that it saw, a dialer that
// says in one word what happened, a router that advertises itself, a printer of
// interface facts, and the first process of a machine.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	if len(args) == 0 {
		return errors.New("usage: probe init|serve|dial|stream|flow|send|carry|ping|beat|hear|shout|advertise|facts|free")
	}
	switch cmd, args := args[0], args[1:]; cmd {
	case "init":
		return runInit(args, out)
	case "serve":
		return serve(args)
	case "dial":
		return dial(args, out)
	case "stream":
		return stream(args, out)
	case "flow":
		return flow(args, out)
	case "send":
		return send(args, out)
	case "advertise":
		return advertise(args)
	case "carry":
		return carry(args)
	case "ping":
		return ping(args, out)
	case "beat":
		return beat(args, out)
	case "hear":
		return hear(args, out)
	case "shout":
		return shout(args)
	case "free":
		return free(args, out)
	case "facts":
		f, err := facts()
		if err != nil {
			return err
		}
		return json.NewEncoder(out).Encode(f)
	default:
		return fmt.Errorf("unknown command %q", strings.Join(append([]string{cmd}, args...), " "))
	}
}
