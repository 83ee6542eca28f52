//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
)

// at is a command in the network (and files, for containers) of who.
func (w *world) at(who string, args ...string) *exec.Cmd {
	switch who {
	case "host":
		return w.e.inNet(args...)
	case "client":
		return w.e.lan.client.inNet(args...)
	}
	if m := w.stations[who]; m != nil {
		return m.inNet(args...)
	}
	if args[0] == suite.probe {
		args[0] = "/probe"
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.e.enter(w.pids[who], args...)
}

// target turns "gw.net:80", "host6:80", "name/beta:80" or a literal into what
// a dialer takes.
func (w *world) target(to string) (string, error) {
	if name, ok := strings.CutPrefix(to, "name/"); ok {
		return name, nil
	}
	i := strings.LastIndex(to, ":")
	w.mu.Lock()
	a, ok := w.address[to[:i]]
	w.mu.Unlock()
	if !ok {
		return "", fmt.Errorf("nothing is called %s", to[:i])
	}
	return net.JoinHostPort(a, to[i+1:]), nil
}

// dialFrom connects and says what the server saw, or why there was no answer.
func (w *world) dialFrom(from, proto, to string, flags ...string) string {
	t, err := w.target(to)
	if err != nil {
		return err.Error()
	}
	// A packet that is dropped costs the whole timeout, one that passes
	// milliseconds, also on a busy machine.
	args := slices.Concat([]string{suite.probe, "dial", "-timeout", "1500ms"}, flags, []string{proto, t})
	out, err := output(w.at(from, args...))
	if err != nil {
		return err.Error()
	}
	var a struct{ Name, Src, Err string }
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		return err.Error()
	}
	if a.Err != "" {
		return a.Err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if s, ok := w.symbol[a.Src]; ok {
		a.Src = s
	}
	if n, ok := w.names[a.Name]; ok {
		a.Name = n
	}
	return a.Name + " sees " + a.Src
}

// dial is the question most probes ask.
func dial(from, proto, to string, flags ...string) func(*world) string {
	return func(w *world) string { return w.dialFrom(from, proto, to, flags...) }
}

// ping sends one echo request.
func ping(from, to string) func(*world) string {
	return func(w *world) string {
		t, err := w.target(to + ":0")
		if err != nil {
			return err.Error()
		}
		addr := netip.MustParseAddrPort(t).Addr().String()
		if _, err := output(w.at(from, "busybox", "ping", "-c", "1", "-W", "1", addr)); err != nil {
			return "no answer"
		}
		return "answer"
	}
}

// fact asks about the interfaces of a container.
func fact(container string, f func(w *world, ifs []iface) string) func(*world) string {
	return func(w *world) string {
		out, err := output(w.at(container, suite.probe, "facts"))
		if err != nil {
			return err.Error()
		}
		ifs, err := parseFacts(out)
		if err != nil {
			return err.Error()
		}
		return f(w, ifs)
	}
}

// routes lists the routes of all interfaces, with names for addresses.
func routes(w *world, ifs []iface) string {
	var all []string
	for _, i := range ifs {
		for _, r := range i.Routes {
			w.mu.Lock()
			words := strings.Fields(r)
			for k, x := range words {
				if s, ok := w.symbol[x]; ok {
					words[k] = s
				}
			}
			w.mu.Unlock()
			all = append(all, strings.Join(words, " ")+" dev "+i.Name)
		}
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// destinations is routes without the interfaces' names, which are the
// engine's choice when a network is connected again.
func destinations(w *world, ifs []iface) string {
	for i := range ifs {
		ifs[i].Name = "*"
	}
	return strings.ReplaceAll(routes(w, ifs), " dev *", "")
}
