package dhcptest

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Leases are the addresses that stations have, and until when, read from the
// server's lease file. It may be a moment behind the server's answers.
func (s *Server) Leases() map[netip.Addr]time.Time {
	s.tb.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, "leases"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.tb.Fatalf("read leases: %v", err)
	}
	out := map[netip.Addr]time.Time{}
	switch s.kind {
	case Dnsmasq:
		dnsmasqLeases(out, string(b))
	case ISC:
		iscLeases(out, string(b))
	case Kea:
		keaLeases(out, string(b))
	}
	return out
}

// dnsmasqLeases reads lines of expiry, hardware address or IAID, address, name
// and client ID.
func dnsmasqLeases(out map[netip.Addr]time.Time, text string) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		if a, err := netip.ParseAddr(f[2]); err == nil {
			out[a] = epoch(f[0])
		}
	}
}

// iscLeases reads declarations, of which the last one of an address counts.
func iscLeases(out map[netip.Addr]time.Time, text string) {
	var a netip.Addr
	var active bool
	var ends time.Time
	for line := range strings.Lines(text) {
		f := strings.Fields(strings.NewReplacer(";", "", "\"", "").Replace(line))
		switch {
		case len(f) == 3 && (f[0] == "lease" || f[0] == "iaaddr"):
			a, _ = netip.ParseAddr(f[1])
			active = false
		case len(f) == 3 && f[0] == "binding" && f[1] == "state":
			active = f[2] == "active"
		case len(f) == 4 && f[0] == "ends":
			ends, _ = time.Parse("2006/01/02 15:04:05", f[2]+" "+f[3])
		case len(f) == 1 && f[0] == "}" && a.IsValid():
			if active {
				out[a] = ends
			} else {
				delete(out, a)
			}
			a = netip.Addr{}
		}
	}
}

// keaLeases reads comma-separated values, of which the last ones of an address
// count.
func keaLeases(out map[netip.Addr]time.Time, text string) {
	var columns map[string]int
	for line := range strings.Lines(text) {
		f := strings.Split(strings.TrimSpace(line), ",")
		if f[0] == "address" {
			columns = map[string]int{}
			for i, name := range f {
				columns[name] = i
			}
			continue
		}
		a, err := netip.ParseAddr(f[0])
		if err != nil || len(f) < len(columns) {
			continue
		}
		if f[columns["state"]] == "0" && f[columns["valid_lifetime"]] != "0" {
			out[a] = epoch(f[columns["expire"]])
		} else {
			delete(out, a)
		}
	}
}

func epoch(s string) time.Time {
	n, _ := strconv.ParseInt(s, 10, 64)
	return time.Unix(n, 0).UTC()
}
