package dhcptest

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Kind is a server program.
type Kind string

// The servers of Debian.
const (
	Dnsmasq Kind = "dnsmasq"
	ISC     Kind = "dhcpd"
	Kea     Kind = "kea"
)

// startTime is how long a server may take to open its socket.
const startTime = 20 * time.Second

// Namespace is where a server runs: Do calls f on a thread that is in it.
// *netnstest.NS is one.
type Namespace interface{ Do(f func()) }

// Config is what a server is to hand out. The family is that of the subnet.
type Config struct {
	Link          string        // the server's, with an address in the subnet
	Subnet        netip.Prefix  // the only one
	First, Last   netip.Addr    // of the addresses handed out
	Lease         time.Duration // whole seconds; dnsmasq grants 2 minutes at least
	Router        netip.Addr
	DNS           []netip.Addr
	Domain        string
	MTU           int
	Routes        []Route
	Reservations  []Reservation
	Ping          bool // asks whether an address is in use before it offers it, as dnsmasq (for 3 s) and dhcpd (1 s) do by default
	Authoritative bool // refuses what it does not know, instead of being silent
}

// Route is one of option 121.
type Route struct {
	To  netip.Prefix
	Via netip.Addr
}

// Reservation is an address for a station known by one of the three; a name
// is for dnsmasq only.
type Reservation struct {
	MAC      string
	ClientID []byte
	Name     string
	Address  netip.Addr
}

// Server is a running server.
type Server struct {
	tb   testing.TB
	kind Kind
	ns   Namespace
	cfg  Config
	dir  string
	args []string
	cmd  *exec.Cmd
	log  lockedBuffer
	done chan struct{}
}

// Start starts a server and waits until it listens. It ends with the test.
func Start(tb testing.TB, k Kind, ns Namespace, cfg Config) *Server {
	tb.Helper()
	s := &Server{tb: tb, kind: k, ns: ns, cfg: cfg, dir: tb.TempDir()}
	program := string(k)
	if k == Kea {
		program = map[bool]string{false: "kea-dhcp4", true: "kea-dhcp6"}[cfg.Subnet.Addr().Is6()]
	}
	s.args = []string{s.install(program)}
	s.configure()
	tb.Cleanup(s.end)
	s.Resume()
	return s
}

// configure writes the server's files and sets its arguments.
func (s *Server) configure() {
	six := s.cfg.Subnet.Addr().Is6()
	var args []string
	switch s.kind {
	case Dnsmasq:
		args = s.dnsmasq()
	case ISC:
		args = s.isc(six)
	case Kea:
		args = s.kea(six)
	}
	s.args = append(s.args[:1], args...)
}

// Change stops the server and starts it with another configuration and the leases
// that it had.
func (s *Server) Change(change func(*Config)) {
	s.tb.Helper()
	s.Stop()
	change(&s.cfg)
	s.configure()
	s.Resume()
}

// install copies a program into the test's directory: AppArmor's profiles are
// for the paths of Debian, and keep the program there from files of a test.
func (s *Server) install(program string) string {
	s.tb.Helper()
	path := ""
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin") {
		if at := filepath.Join(dir, program); path == "" && exec.Command("test", "-x", at).Run() == nil {
			path = at
		}
	}
	if path == "" {
		s.tb.Fatalf("%s is not installed: hack/deps.sh does it", program)
	}
	to := filepath.Join(s.dir, program)
	// By another process: a child forked meanwhile would keep a file of ours open
	// for writing, which then could not be run.
	if out, err := exec.Command("cp", path, to).CombinedOutput(); err != nil {
		s.tb.Fatalf("copy %s: %v\n%s", path, err, out)
	}
	return to
}

// Resume starts the server again after Stop, with the leases that it had.
func (s *Server) Resume() {
	s.tb.Helper()
	s.cmd, s.done = exec.Command(s.args[0], s.args[1:]...), make(chan struct{})
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	s.cmd.Env = append(os.Environ(), "KEA_PIDFILE_DIR="+s.dir, "KEA_LOCKFILE_DIR="+s.dir)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var err error
	s.ns.Do(func() { err = s.cmd.Start() })
	if err != nil {
		s.tb.Fatalf("start %s: %v", s.kind, err)
	}
	go func(cmd *exec.Cmd, done chan struct{}) {
		_ = cmd.Wait() // it is killed, mostly
		close(done)
	}(s.cmd, s.done)
	table, port := "udp", ":0043 "
	if s.cfg.Subnet.Addr().Is6() {
		table, port = "udp6", ":0223 "
	}
	for end := time.Now().Add(startTime); ; {
		// The table of the namespace that the process is in.
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", s.cmd.Process.Pid, table))
		if bytes.Contains(b, []byte(port)) && s.ready() {
			return
		}
		select {
		case <-s.done:
			s.tb.Fatalf("%s has ended:\n%s", s.kind, s.Log())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(end) {
			s.tb.Fatalf("%s does not listen:\n%s", s.kind, s.Log())
		}
	}
}

// ready is false while a server has its socket but does not read it yet.
func (s *Server) ready() bool {
	mark := map[Kind]string{ISC: "Server starting service", Kea: "_STARTED"}[s.kind]
	return strings.Contains(s.Log(), mark)
}

// Stop ends the server without a warning, as a power cut would.
func (s *Server) Stop() {
	_ = s.cmd.Process.Kill()
	<-s.done
}

func (s *Server) end() {
	if s.cmd != nil && s.cmd.Process != nil {
		s.Stop()
	}
	if s.tb.Failed() {
		l := s.Log()
		s.tb.Logf("%s:\n%s", s.kind, l[max(len(l)-4096, 0):])
	}
}

// Log is what the server has printed.
func (s *Server) Log() string { return s.log.String() }

func (s *Server) write(name, content string) string {
	s.tb.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		s.tb.Fatal(err)
	}
	return path
}

// lockedBuffer collects output while others read it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
