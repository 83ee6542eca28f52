package ipam

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/ipam"
	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"

	"github.com/weftnet/weft/internal/plugin"
	"github.com/weftnet/weft/internal/store"
)

const (
	localID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	swarmID = "n2x8v0q1w2e3r4t5y6u7i8o9p"
)

// house is an IPAM over a real store file that can be restarted.
type house struct {
	tb   testing.TB
	path string
	bolt *store.Bolt
	wrap func(records) records
	host []netip.Prefix
	held map[netip.Prefix]string
	// networks is how many have each subnet in held; 0: one.
	networks int
	pools    []PoolRange
	log      *test.Hook
	// With a cluster: its store as this host sees it, and the host's name.
	shared cluster
	name   string
	stop   func()        // ends Run
	clock  time.Time     // zero: the real one
	keep   time.Duration // of the history; 0: a month
	*IPAM
}

const month = 720 * time.Hour

type cluster interface {
	claims
	feed
}

func newHouse(tb testing.TB) *house {
	tb.Helper()
	h := &house{tb: tb, path: filepath.Join(tb.TempDir(), "weft.db"), held: map[netip.Prefix]string{}}
	h.wrap = func(r records) records { return r }
	h.start()
	tb.Cleanup(func() { _ = h.bolt.Close() })
	return h
}

func (h *house) start() {
	h.tb.Helper()
	var err error
	if h.bolt, err = store.Open(h.path, store.Options{NoSync: true}); err != nil {
		h.tb.Fatal(err)
	}
	log, hook := test.NewNullLogger()
	h.log = hook
	h.IPAM, err = New(Config{
		Store: h.wrap(h.bolt), Log: log, Pools: h.pools, Shared: h.shared, HostID: "id-" + h.name, HostName: h.name, History: cmp.Or(h.keep, month),
		Host:   func(context.Context) ([]netip.Prefix, error) { return h.host, nil },
		Holder: func(p netip.Prefix) (string, bool) { id, ok := h.held[p]; return id, ok },
		Holders: func(p netip.Prefix) int {
			if h.held[p] == "" {
				return 0
			}
			return max(h.networks, 1)
		},
	})
	if err != nil {
		h.tb.Fatal(err)
	}
	if !h.clock.IsZero() {
		h.now = func() time.Time { return h.clock }
	}
	if err := h.Load(h.tb.Context()); err != nil {
		h.tb.Fatal(err)
	}
	if h.shared == nil {
		return
	}
	ctx, cancel := context.WithCancel(h.tb.Context())
	done := make(chan error, 1)
	go func(i *IPAM) { done <- i.Run(ctx) }(h.IPAM)
	h.stop = func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, store.ErrClosed) {
			h.tb.Error(err)
		}
	}
}

func (h *house) restart() {
	h.tb.Helper()
	if h.stop != nil {
		h.stop()
	}
	if err := h.bolt.Close(); err != nil {
		h.tb.Fatal(err)
	}
	h.start()
}

func (h *house) hold(p, id string) {
	if id == "" {
		delete(h.held, netip.MustParsePrefix(p))
		return
	}
	h.held[netip.MustParsePrefix(p)] = id
}

// do runs one line as an operator would write it down, and returns the answer
// or the error as text:
//
//	pool [global|local] [PREFIX|4|6] [sub PREFIX] [OPTION=VALUE...]
//	unpool ID | addr ID [ADDRESS] [for NAME] | gw ID [ADDRESS] | free ID ADDRESS
//	release|forget|reserve SPACE [ADDRESS] [NAME]
func (h *house) do(line string) string {
	h.tb.Helper()
	f := strings.Fields(line)
	arg := func(n int) string {
		if n < len(f) {
			return f[n]
		}
		return ""
	}
	ctx := h.tb.Context()
	switch f[0] {
	case "pool":
		req := ipam.RequestPoolRequest{AddressSpace: "weft-" + f[1], Pool: f[2]}
		if f[2] == "4" || f[2] == "6" {
			req.Pool, req.V6 = "", f[2] == "6"
		}
		if arg(3) == "sub" {
			req.SubPool = f[4]
		}
		for _, o := range f[3:] {
			if k, v, ok := strings.Cut(o, "="); ok {
				if req.Options == nil {
					req.Options = map[string]string{}
				}
				req.Options[k] = v
			}
		}
		r, err := h.RequestPool(ctx, req)
		if err != nil {
			return "error: " + err.Error()
		}
		return r.PoolID
	case "unpool":
		if _, err := h.ReleasePool(ctx, ipam.ReleasePoolRequest{PoolID: f[1]}); err != nil {
			return "error: " + err.Error()
		}
	case "addr", "gw":
		req := ipam.RequestAddressRequest{PoolID: f[1], Address: arg(2)}
		if n := len(f) - 2; n > 1 && f[n] == "for" {
			req.Options = map[string]string{plugin.OptionEndpointName: f[n+1]}
			if n == 2 {
				req.Address = ""
			}
		}
		if f[0] == "gw" {
			req.Options = map[string]string{plugin.OptionRequestAddressType: plugin.RequestAddressGateway}
		}
		r, err := h.RequestAddress(ctx, req)
		if err != nil {
			return "error: " + err.Error()
		}
		return r.Address
	case "free":
		if _, err := h.ReleaseAddress(ctx, ipam.ReleaseAddressRequest{PoolID: f[1], Address: f[2]}); err != nil {
			return "error: " + err.Error()
		}
	case "release", "forget", "reserve":
		o := Order{Do: f[0], Space: f[1]}
		for _, x := range f[2:] {
			if a, err := netip.ParseAddr(x); err == nil {
				o.Address = a
			} else {
				o.Name = x
			}
		}
		done, err := h.Carry(ctx, o)
		if err != nil {
			return "error: " + err.Error()
		}
		return done
	default:
		h.tb.Fatalf("what is %q?", line)
	}
	return "ok"
}

func TestScripts(t *testing.T) {
	const (
		p24 = "weft-local,10.1.0.0/24"
		g24 = "weft-global,10.1.0.0/24"
	)
	// Each line: call -> answer. An answer with … in it need only have the
	// parts. "restart", "elected", "hold PREFIX ID" and "host PREFIX" change the scene.
	for name, script := range map[string]string{
		"a network's life": `
			pool local 10.1.0.0/24 -> weft-local,10.1.0.0/24
			gw P -> 10.1.0.1/24
			addr P -> 10.1.0.2/24
			addr P -> 10.1.0.3/24
			free P 10.1.0.2 -> ok
			addr P -> 10.1.0.2/24
			unpool P -> ok
			pool local 10.1.0.0/24 -> P
			addr P -> 10.1.0.1/24`,
		"in turn, as a swarm wants it": `
			pool global 10.2.0.0/29 -> weft-global,10.2.0.0/29
			gw weft-global,10.2.0.0/29 -> 10.2.0.1/29
			addr weft-global,10.2.0.0/29 -> 10.2.0.2/29
			addr weft-global,10.2.0.0/29 -> 10.2.0.3/29
			free weft-global,10.2.0.0/29 10.2.0.2 -> ok
			addr weft-global,10.2.0.0/29 -> 10.2.0.4/29
			restart
			addr weft-global,10.2.0.0/29 -> 10.2.0.5/29
			addr weft-global,10.2.0.0/29 -> 10.2.0.6/29
			addr weft-global,10.2.0.0/29 -> 10.2.0.2/29
			addr weft-global,10.2.0.0/29 -> error: no free address left in pool 10.2.0.0/29: 6 of 6 are in use: remove a container, or make the network with a larger --subnet
			free weft-global,10.2.0.0/29 10.2.0.4 -> ok
			addr weft-global,10.2.0.0/29 -> 10.2.0.4/29`,
		"explicit addresses": `
			pool local 10.1.0.0/24 sub 10.1.0.128/25 -> weft-local,10.1.0.0/24,10.1.0.128/25
			gw S -> 10.1.0.128/24
			gw S 10.1.0.1 -> 10.1.0.1/24
			addr S 10.1.0.77 -> 10.1.0.77/24
			addr S 10.1.0.1 -> error: …10.1.0.1 of pool 10.1.0.0/24 is in use by the gateway: next free is…
			addr S 10.1.0.77 -> error: address 10.1.0.77 of pool 10.1.0.0/24 is in use: next free is 10.1.0.129; 3 of 254 used
			addr S 10.1.0.0 -> error: address 10.1.0.0 is not a usable one of pool 10.1.0.0/24: 10.1.0.1 to 10.1.0.254 are
			addr S 10.1.0.255 -> error: …not a usable…
			addr S 10.1.1.7 -> error: …10.1.1.7…10.1.0.0/24…
			addr S fd00::1 -> error: …fd00::1…10.1.0.0/24…
			addr S ::ffff:10.1.0.9 -> error: …not a usable…
			addr S nonsense -> error: …nonsense…
			free S 10.1.0.77 -> ok
			free S 10.1.0.77 -> ok
			addr S 10.1.0.77 -> 10.1.0.77/24
			free S ::ffff:10.1.0.77 -> ok
			addr S 10.1.0.77 -> error: …in use…`,
		"sub-pool runs out": `
			pool local 10.1.0.0/24 sub 10.1.0.252/30 -> weft-local,10.1.0.0/24,10.1.0.252/30
			addr weft-local,10.1.0.0/24,10.1.0.252/30 -> 10.1.0.252/24
			addr weft-local,10.1.0.0/24,10.1.0.252/30 -> 10.1.0.253/24
			addr weft-local,10.1.0.0/24,10.1.0.252/30 -> 10.1.0.254/24
			addr weft-local,10.1.0.0/24,10.1.0.252/30 -> error: no free address left in 10.1.0.252/30 of pool 10.1.0.0/24: all 3 are in use: remove a container, give --ip, or make the network with a larger --ip-range
			addr weft-local,10.1.0.0/24,10.1.0.252/30 10.1.0.9 -> 10.1.0.9/24`,
		"small pools": `
			pool local 10.3.0.0/31 -> weft-local,10.3.0.0/31
			gw weft-local,10.3.0.0/31 -> 10.3.0.0/31
			addr weft-local,10.3.0.0/31 -> 10.3.0.1/31
			addr weft-local,10.3.0.0/31 -> error: …2 of 2…
			pool local 10.3.1.1/32 -> weft-local,10.3.1.1/32
			addr weft-local,10.3.1.1/32 -> 10.3.1.1/32
			addr weft-local,10.3.1.1/32 -> error: …1 of 1…
			pool local 10.3.2.0/30 -> weft-local,10.3.2.0/30
			addr weft-local,10.3.2.0/30 -> 10.3.2.1/30
			addr weft-local,10.3.2.0/30 -> 10.3.2.2/30
			addr weft-local,10.3.2.0/30 -> error: …
			pool local fd01::/127 -> weft-local,fd01::/127
			gw weft-local,fd01::/127 -> fd01::/127
			addr weft-local,fd01::/127 -> fd01::1/127
			pool local fd02::9/128 -> weft-local,fd02::9/128
			addr weft-local,fd02::9/128 -> fd02::9/128
			addr weft-local,fd02::9/128 -> error: …1 of 1…`,
		"IPv6": `
			pool local fd05::/64 -> weft-local,fd05::/64
			gw weft-local,fd05::/64 -> fd05::1/64
			addr weft-local,fd05::/64 -> fd05::2/64
			addr weft-local,fd05::/64 fd05:: -> error: …not a usable…
			addr weft-local,fd05::/64 fd05::ffff:ffff:ffff:ffff -> fd05::ffff:ffff:ffff:ffff/64
			addr weft-local,fd05::/64 FD05:0::3 -> fd05::3/64
			addr weft-local,fd05::/64 -> fd05::4/64
			pool local fd05:0:0:1::/64 sub fd05:0:0:1:8000::/80 -> weft-local,fd05:0:0:1::/64,fd05:0:0:1:8000::/80
			addr weft-local,fd05:0:0:1::/64,fd05:0:0:1:8000::/80 -> fd05:0:0:1:8000::/64
			pool local fc00::/8 -> weft-local,fc00::/8
			addr weft-local,fc00::/8 -> fc00::1/8`,
		"refused pools": `
			pool local 10.1.0.0/24 -> P
			pool local 10.1.0.0/24 -> error: subnet 10.1.0.0/24 is in use: choose another subnet, or remove the network that has it; on one parent, networks can share it where each has its own --ip-range
			pool local 10.1.0.0/24 sub 10.1.0.128/25 -> error: subnet 10.1.0.0/24 is in use, without an --ip-range: choose another subnet, or remove the network that has it; to share it on one parent, make that network again with an --ip-range beside 10.1.0.128/25
			pool local 10.1.0.128/25 -> error: subnet 10.1.0.128/25 overlaps 10.1.0.0/24, which is in use: choose another subnet
			pool local 10.0.0.0/8 -> error: …overlaps 10.1.0.0/24…
			hold 10.1.0.0/24 L
			pool local 10.1.0.0/24 -> error: subnet 10.1.0.0/24 is in use by network 0123456789ab: …
			pool local 10.1.0.0/16 -> error: …in use by network 0123456789ab…
			pool local 10.9.9.9/24 -> weft-local,10.9.9.0/24
			pool local nonsense -> error: …nonsense…
			pool local 0.0.0.0/0 -> error: …write it as 10.0.0.0/24…
			pool local 224.1.0.0/16 -> error: …multicast…
			pool local 127.1.0.0/16 -> error: …loopback…
			pool local ::ffff:10.0.0.0/120 -> error: …
			pool local 10.7.0.0/24 sub 10.8.0.0/25 -> error: …10.8.0.0/25 is not a part of subnet 10.7.0.0/24
			pool local 10.7.0.0/24 sub 10.7.0.255/32 -> error: …no usable address…
			pool local 10.7.0.0/24 sub 10.7.0.0/24 -> weft-local,10.7.0.0/24
			pool mars 10.7.0.0/24 -> error: …"weft-mars"…
			pool local 4 sub 10.7.0.0/25 -> error: …10.7.0.0/25 needs a subnet…`,
		"global space": `
			pool local 10.1.0.0/24 -> P
			addr P 10.1.0.7 -> 10.1.0.7/24
			pool global 10.1.0.0/24 -> weft-global,10.1.0.0/24
			gw G -> 10.1.0.1/24
			gw G -> 10.1.0.1/24
			addr G 10.1.0.7 -> 10.1.0.7/24
			addr G 10.1.0.7 -> 10.1.0.7/24
			pool global 10.1.0.0/24 -> G
			gw G 10.1.0.1 -> 10.1.0.1/24
			restart
			pool global 10.1.0.0/24 -> G
			gw G 10.1.0.1 -> 10.1.0.1/24
			addr G 10.1.0.7 -> 10.1.0.7/24
			addr G -> 10.1.0.2/24
			pool global 10.1.0.0/25 -> error: …overlaps…
			pool global 10.1.0.0/24 sub 10.1.0.64/26 -> weft-global,10.1.0.0/24,10.1.0.64/26
			addr weft-global,10.1.0.0/24,10.1.0.64/26 -> 10.1.0.64/24
			unpool G -> ok
			addr weft-global,10.1.0.0/24,10.1.0.64/26 -> 10.1.0.65/24
			unpool weft-global,10.1.0.0/24,10.1.0.64/26 -> ok
			addr P 10.1.0.7 -> error: …in use…`,
		"a new allocator repeats": `
			pool global 10.1.0.0/24 -> G
			gw G 10.1.0.1 -> 10.1.0.1/24
			addr G 10.1.0.7 -> 10.1.0.7/24
			pool local 10.1.0.0/24 -> P
			elected
			pool global 10.1.0.0/24 -> G
			gw G 10.1.0.1 -> 10.1.0.1/24
			addr G 10.1.0.7 -> 10.1.0.7/24
			pool global 10.1.0.0/25 -> error: …overlaps 10.1.0.0/24…
			pool global 10.1.0.0/16 -> error: …overlaps 10.1.0.0/24…
			pool local 10.1.0.0/25 -> error: …overlaps 10.1.0.0/24…
			addr G -> 10.1.0.2/24`,
		"a new allocator does not know": `
			pool global 10.1.0.0/24 -> G
			addr G 10.1.0.7 -> 10.1.0.7/24
			pool local 10.1.0.0/24 -> P
			addr P 10.1.0.8 -> 10.1.0.8/24
			pool global 10.1.0.0/16 -> error: …overlaps 10.1.0.0/24…
			elected
			pool global 4 -> weft-global,172.16.0.0/24
			pool global 10.1.0.0/16 -> weft-global,10.1.0.0/16
			addr weft-global,10.1.0.0/16 10.1.0.7 -> 10.1.0.7/16
			pool global 10.1.0.0/24 -> error: …overlaps 10.1.0.0/16…
			addr G -> error: unknown pool weft-global,10.1.0.0/24: …overlaps 10.1.0.0/16…
			unpool G -> ok
			pool local 10.1.0.0/16 -> error: …overlaps 10.1.0.0/24…
			addr P 10.1.0.8 -> error: …in use…
			restart
			pool global 10.1.0.0/24 -> error: …overlaps 10.1.0.0/16…
			pool global 10.1.0.0/16 -> weft-global,10.1.0.0/16`,
		"a pool in two, one of them unknown": `
			pool global 10.1.0.0/24 -> G
			pool global 10.1.1.0/24 -> weft-global,10.1.1.0/24
			addr weft-global,10.1.1.0/24 10.1.1.7 -> 10.1.1.7/24
			elected
			pool global 10.1.0.0/24 -> G
			pool global 10.1.0.0/16 -> error: …overlaps 10.1.0.0/24…
			pool global 10.1.1.0/24 -> weft-global,10.1.1.0/24
			pool global 10.1.1.0/25 -> error: …overlaps 10.1.1.0/24…`,
		"restart after an election": `
			pool global 10.1.0.0/24 -> G
			elected
			restart
			pool global 10.1.0.0/25 -> error: …overlaps 10.1.0.0/24…
			pool global 10.1.0.0/24 -> G`,
		"not the allocator's": `
			pool global 10.1.0.0/24 -> G
			hold 10.1.0.0/24 L
			elected
			pool global 10.1.0.0/25 -> error: …overlaps 10.1.0.0/24…`,
		"addresses that a new allocator does not name": `
			pool global 10.1.0.0/29 -> weft-global,10.1.0.0/29
			gw weft-global,10.1.0.0/29 -> 10.1.0.1/29
			addr weft-global,10.1.0.0/29 -> 10.1.0.2/29
			addr weft-global,10.1.0.0/29 -> 10.1.0.3/29
			addr weft-global,10.1.0.0/29 -> 10.1.0.4/29
			addr weft-global,10.1.0.0/29 -> 10.1.0.5/29
			elected
			pool global 10.2.0.0/24 -> weft-global,10.2.0.0/24
			addr weft-global,10.1.0.0/29 -> 10.1.0.6/29
			addr weft-global,10.1.0.0/29 -> error: no free address…
			pool global 10.1.0.0/29 -> weft-global,10.1.0.0/29
			addr weft-global,10.1.0.0/29 10.1.0.2 -> 10.1.0.2/29
			addr weft-global,10.1.0.0/29 10.1.0.4 -> 10.1.0.4/29
			addr weft-global,10.1.0.0/29 -> 10.1.0.3/29
			addr weft-global,10.1.0.0/29 -> 10.1.0.5/29
			addr weft-global,10.1.0.0/29 -> error: no free address…
			restart
			addr weft-global,10.1.0.0/29 -> error: no free address…`,
		"swarm network on a node": `
			pool local 10.1.0.0/24 -> P
			gw P 10.1.0.1 -> 10.1.0.1/24
			hold 10.1.0.0/24 S
			addr P 10.1.0.5 -> 10.1.0.5/24
			addr P 10.1.0.5 -> 10.1.0.5/24
			pool local 10.1.0.0/24 -> P
			restart
			pool local 10.1.0.0/24 sub 10.1.0.128/25 -> weft-local,10.1.0.0/24,10.1.0.128/25
			gw P 10.1.0.1 -> 10.1.0.1/24
			addr P 10.1.0.5 -> 10.1.0.5/24`,
		"died before the network was made": `
			pool local 10.1.0.0/24 -> P
			gw P -> 10.1.0.1/24
			addr P 10.1.0.9 -> 10.1.0.9/24
			restart
			pool local 10.1.0.0/24 -> P
			gw P -> 10.1.0.1/24
			addr P 10.1.0.9 -> 10.1.0.9/24
			addr P 10.1.0.9 -> error: …in use…
			addr P 10.1.0.1 -> error: …in use…
			pool local 10.1.0.0/24 -> error: …in use…`,
		"in use since the restart": `
			pool local 10.1.0.0/24 -> P
			restart
			addr P -> 10.1.0.1/24
			pool local 10.1.0.0/24 -> error: …in use…`,
		"held since before the restart": `
			pool local 10.1.0.0/24 -> P
			hold 10.1.0.0/24 L
			restart
			pool local 10.1.0.0/24 -> error: …in use by network 0123456789ab…`,
		"unknown pool is taken up": `
			gw P -> 10.1.0.1/24
			addr P 10.1.0.9 -> 10.1.0.9/24
			restart
			addr P 10.1.0.9 -> error: …in use…
			addr weft-local,10.1.0.0/25 -> error: unknown pool weft-local,10.1.0.0/25: subnet 10.1.0.0/25 overlaps 10.1.0.0/24…
			addr weft-local,10.5.0.0/24 10.6.0.1 -> error: …not a usable…
			pool local 10.5.0.0/24 -> weft-local,10.5.0.0/24
			addr bridge,10.1.0.0/24 -> error: …no address space "bridge"…
			addr weft-local/10.1.0.0/24 -> error: …is not one of ours…`,
		"releases of unknown things": `
			unpool P -> ok
			unpool nonsense -> ok
			free P 10.1.0.1 -> ok
			free nonsense 10.1.0.1 -> ok
			pool local 10.1.0.0/24 -> P
			free P nonsense -> ok
			free P 10.1.0.1 -> ok
			free P 10.99.0.1 -> ok
			unpool P -> ok
			unpool P -> ok`,
		"automatic pools": `
			pool local 4 -> weft-local,172.16.0.0/24
			pool local 4 -> weft-local,172.16.1.0/24
			host 172.16.2.7/23
			host 172.16.4.0/32
			host 0.0.0.0/0
			pool local 4 -> weft-local,172.16.5.0/24
			pool global 4 -> weft-global,172.16.6.0/24
			pool local 0.0.0.0/22 -> weft-local,172.16.8.0/22
			restart
			pool local 4 -> weft-local,172.16.7.0/24
			unpool weft-local,172.16.1.0/24 -> ok
			pool local 0.0.0.0/26 -> weft-local,172.16.1.0/26
			pool local 0.0.0.0/31 -> error: …at most /30…
			pool local 0.0.0.0/7 -> error: no free /7: no range of POOLS is that large, give a subnet or set POOLS
			host 172.16.0.0/12
			host 10.0.0.0/8
			pool local 4 -> weft-local,192.168.0.0/24
			host 192.168.0.0/17
			pool local 0.0.0.0/17 -> weft-local,192.168.128.0/17
			pool local 4 -> error: no free pool left in 172.16.0.0/12, 10.0.0.0/8, 192.168.0.0/16 beside …: remove networks, give a subnet, or set POOLS`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			names := map[string]string{"P": p24, "G": g24, "S": p24 + ",10.1.0.128/25"}
			long := func(s string) string {
				return regexp.MustCompile(`\b[PGS]\b`).ReplaceAllStringFunc(s, func(n string) string { return names[n] })
			}
			for n, line := range strings.Split(strings.TrimSpace(script), "\n") {
				call, want, _ := strings.Cut(strings.TrimSpace(line), " -> ")
				switch f := strings.Fields(call); f[0] {
				case "restart":
					h.restart()
					continue
				case "elected":
					h.Elected()
					continue
				case "hold":
					h.hold(f[1], map[string]string{"L": localID, "S": swarmID}[f[2]])
					continue
				case "host":
					h.host = append(h.host, netip.MustParsePrefix(f[1]))
					continue
				}
				got := h.do(long(call))
				if want = long(want); !matches(got, want) {
					t.Errorf("line %d: %s\n got %s\nwant %s", n+1, call, got, want)
				}
			}
		})
	}
}

func matches(got, want string) bool {
	parts := strings.Split(want, "…")
	if len(parts) == 1 {
		return got == want
	}
	if !strings.HasPrefix(got, parts[0]) {
		return false
	}
	for _, p := range parts {
		at := strings.Index(got, p)
		if at < 0 {
			return false
		}
		got = got[at+len(p):]
	}
	return true
}

func TestOwnIPv6Prefix(t *testing.T) {
	h := newHouse(t)
	a := h.do("pool local 6")
	id, err := parsePoolID(a)
	if err != nil || id.prefix.Bits() != 64 || id.prefix.Addr().As16()[0] != 0xfd {
		t.Fatalf("automatic IPv6 pool %s: %v", a, err)
	}
	h.restart()
	other, err := parsePoolID(h.do("pool local 6"))
	if err != nil || other.prefix == id.prefix || netip.PrefixFrom(other.prefix.Addr(), 48).Masked() != netip.PrefixFrom(id.prefix.Addr(), 48).Masked() {
		t.Errorf("after a restart %v, first was %v", other, id)
	}
	if third := h.do("pool local ::/80"); !strings.HasSuffix(third, "/80") {
		t.Errorf("a /80: %s", third)
	}
	if elsewhere := newHouse(t).do("pool local 6"); elsewhere == a {
		t.Errorf("two hosts have the same prefix %s", a)
	}
}

// TestAskedForEver: the engine compares automatic pools with the host's routes
// itself, and asks again while it keeps those it did not like.
func TestAskedForEver(t *testing.T) {
	h := newHouse(t)
	h.pools = []PoolRange{{netip.MustParsePrefix("10.0.0.0/20"), 24}}
	h.restart()
	seen := map[string]bool{}
	for range 16 {
		id := h.do("pool local 4")
		if seen[id] || strings.HasPrefix(id, "error") {
			t.Fatalf("after %d pools: %s", len(seen), id)
		}
		seen[id] = true
	}
	if got := h.do("pool local 4"); !strings.HasPrefix(got, "error: no free pool left in 10.0.0.0/20") {
		t.Errorf("seventeenth: %s", got)
	}
}

func TestOptions(t *testing.T) {
	h := newHouse(t)
	_, err := h.RequestPool(t.Context(), ipam.RequestPoolRequest{AddressSpace: LocalSpace, Pool: "10.0.0.0/24", Options: map[string]string{"spcae": "x"}})
	if err == nil || !strings.Contains(err.Error(), `ipam option "spcae" is not known: did you mean "space"?`) {
		t.Errorf("unknown option: %v", err)
	}
	_, err = h.RequestPool(t.Context(), ipam.RequestPoolRequest{AddressSpace: GlobalSpace, Pool: "10.0.0.0/24", Options: map[string]string{
		plugin.OptionSerial: "true", plugin.OptionRequestAddressType: plugin.RequestAddressGateway,
	}})
	if err != nil {
		t.Errorf("the marks of a swarm leader: %v", err)
	}
}

func TestStatus(t *testing.T) {
	h := newHouse(t)
	for _, l := range []string{
		"pool global 10.9.0.0/24", "pool local fd05::/64", "pool local 10.1.0.0/24 sub 10.1.0.128/25", "pool local 10.0.0.0/24",
		"gw weft-local,10.1.0.0/24,10.1.0.128/25 10.1.0.1", "addr weft-local,10.1.0.0/24,10.1.0.128/25",
	} {
		if got := h.do(l); strings.HasPrefix(got, "error") {
			t.Fatal(got)
		}
	}
	want := `{weft-local,10.0.0.0/24 weft-local 10.0.0.0/24  [] 254 0 0  0 [] [] <nil> }
{weft-local,10.1.0.0/24,10.1.0.128/25 weft-local 10.1.0.0/24 10.1.0.128/25 [] 254 2 0 10.1.0.1 0 [] [] <nil> }
{weft-local,fd05::/64 weft-local fd05::/64  [] 18446744073709551615 0 0  0 [] [] <nil> }
{weft-global,10.9.0.0/24 weft-global 10.9.0.0/24  [] 254 0 0  0 [] [] <nil> }
`
	for range 2 { // the same after a restart
		got := ""
		for _, p := range h.Status(t.Context()).Pools {
			got += fmt.Sprintln(p)
		}
		if got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
		h.restart()
	}
}

func TestUnknownPoolIsLogged(t *testing.T) {
	h := newHouse(t)
	h.do("addr weft-local,10.1.0.0/24")
	h.do("addr weft-local,10.1.0.0/24")
	if n := len(h.log.AllEntries()); n != 1 || h.log.LastEntry().Level.String() != "warning" {
		t.Errorf("%d lines logged, want one warning", n)
	}
}

func TestNotLoaded(t *testing.T) {
	h := newHouse(t)
	i, err := New(Config{Store: h.bolt, Log: nullLog(), Host: func(context.Context) ([]netip.Prefix, error) { return nil, nil }})
	if err != nil {
		t.Fatal(err)
	}
	h.IPAM = i
	for _, l := range []string{"pool local 10.0.0.0/24", "unpool x", "addr weft-local,10.0.0.0/24", "free x y"} {
		if got := h.do(l); got != "error: "+errNotLoaded.Error() {
			t.Errorf("%s: %s", l, got)
		}
	}
	if _, err := New(Config{}); err == nil {
		t.Error("an empty Config was taken")
	}
}

func nullLog() logrus.FieldLogger { l, _ := test.NewNullLogger(); return l }

func TestLoadRefusesBadRecords(t *testing.T) {
	for key, value := range map[string]string{
		poolPrefix + "weft-local,10.0.0.0/24":            `{"Version":2}`,
		poolPrefix + "weft-local,10.0.0.1/24":            `{"Version":1}`,
		poolPrefix + "weft-local,10.1.0.0/24":            `{`,
		addressPrefix + "weft-local,10.0.0.0/24/1.2.3.4": `{"Version":1}`,
		addressPrefix + "nonsense":                       `{"Version":1}`,
	} {
		h := newHouse(t)
		if _, err := h.bolt.Put(t.Context(), store.Record{Key: key, Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
		i, err := New(Config{Store: h.bolt, Log: nullLog(), Host: h.IPAM.host})
		if err != nil {
			t.Fatal(err)
		}
		if err := i.Load(t.Context()); err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%s: error %v", key, err)
		}
	}
}
