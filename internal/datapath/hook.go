package datapath

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/coreos/go-iptables/iptables"
	"github.com/sirupsen/logrus"
)

// hookWait is for how many seconds one run of iptables may wait for others
// that hold its lock (legacy only).
const hookWait = 5

// hookRule accepts what our own forward chain marked. Accepting there alone
// is not enough: a packet passes only if no chain of any table drops it. Each
// instance has a rule of its own, since each takes its own away.
func hookRule(comment string) []string {
	return []string{
		"-m", "mark", "--mark", fmt.Sprintf("%#x/%#x", acceptMark, acceptMark),
		"-m", "comment", "--comment", comment,
		"-j", "ACCEPT",
	}
}

// engineDecides are the jumps to the chains by which the engine keeps its networks
// apart: until version 27, and since.
var engineDecides = []string{"-j DOCKER-ISOLATION-STAGE-1", "-j DOCKER-FORWARD"}

// hook is one constant rule in the FORWARD chain of iptables and ip6tables,
// of whichever variant is in use; both may be at once, and each drops on its
// own. The rule comes straight after the jump to DOCKER-USER, or first where
// there is no such jump: what users put into DOCKER-USER binds our containers
// as it does the engine's, and a RETURN from it does not lead into the
// engine's DROP. The jumps by which the engine keeps its own networks apart, where
// they follow, come first as well.
type hook struct {
	log  logrus.FieldLogger
	rule []string
	dirs []string // where iptables may be, before PATH

	mu     sync.Mutex // guards all below, and keeps two runs apart
	tools  map[string]*iptables.IPTables
	warned map[string]bool
}

func newHook(log logrus.FieldLogger, comment string) *hook {
	return &hook{
		log:    log,
		rule:   hookRule(comment),
		dirs:   []string{"/usr/sbin", "/sbin"},
		tools:  map[string]*iptables.IPTables{},
		warned: map[string]bool{},
	}
}

// forwardChain is the FORWARD chain of one family and variant.
type forwardChain struct {
	ipt  *iptables.IPTables
	name string // of the program
	// ours are the positions of our rule, counted from 1.
	ours []int
	// place is where a single rule of ours would do, counted without ours;
	// after is the last position that would do as well. 0: none is needed.
	place, after int
}

// ensure puts the rule where it is needed, takes away what is too much of
// it, and returns a line for each change.
func (h *hook) ensure(ctx context.Context) ([]string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	chains, err := h.chainsLocked(ctx)
	if err != nil {
		return nil, err
	}
	var changed []string
	for _, c := range chains {
		if c.right() {
			continue
		}
		if err := c.clear(ctx, h.rule); err != nil {
			return changed, err
		}
		if c.place == 0 {
			changed = append(changed, c.name+" -D FORWARD "+strings.Join(h.rule, " "))
			continue
		}
		if err := c.ipt.Insert("filter", "FORWARD", c.place, h.rule...); err != nil {
			return changed, fmt.Errorf("%s: insert rule into FORWARD: %w", c.name, err)
		}
		changed = append(changed, fmt.Sprintf("%s -I FORWARD %d %s", c.name, c.place, strings.Join(h.rule, " ")))
	}
	return changed, nil
}

// remove takes away every rule of ours, and returns a line for each chain that had
// one.
func (h *hook) remove(ctx context.Context) (removed []string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	chains, err := h.chainsLocked(ctx)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, c := range chains {
		err := c.clear(ctx, h.rule)
		if err == nil && len(c.ours) > 0 {
			removed = append(removed, c.name+" FORWARD "+strings.Join(h.rule, " "))
		}
		errs = append(errs, err)
	}
	return removed, errors.Join(errs...)
}

// present reports whether the rule is wherever it is needed, and is needed
// somewhere.
func (h *hook) present(ctx context.Context) (bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	chains, err := h.chainsLocked(ctx)
	if err != nil {
		return false, err
	}
	some := false
	for _, c := range chains {
		if !c.right() {
			return false, nil
		}
		some = some || c.place > 0
	}
	return some, nil
}

// chainsLocked reads the FORWARD chain of each variant in use.
func (h *hook) chainsLocked(ctx context.Context) ([]forwardChain, error) {
	var chains []forwardChain
	for _, proto := range []iptables.Protocol{iptables.ProtocolIPv4, iptables.ProtocolIPv6} {
		tools, err := h.toolsLocked(proto)
		if err != nil {
			return nil, err
		}
		for _, t := range tools {
			if err := ctx.Err(); err != nil {
				return nil, fmt.Errorf("read FORWARD chains: %w", err)
			}
			lines, err := t.ipt.List("filter", "FORWARD")
			if err != nil {
				// A table made by nft itself, say, that iptables cannot read.
				h.warnLocked(t.name, fmt.Errorf("list FORWARD: %w", err))
				continue
			}
			t.read(lines, h.rule)
			chains = append(chains, t)
		}
	}
	return chains, nil
}

// toolsLocked finds the programs for the variants in use.
func (h *hook) toolsLocked(proto iptables.Protocol) ([]forwardChain, error) {
	name, names := "iptables", "ip_tables_names"
	if proto == iptables.ProtocolIPv6 {
		name, names = "ip6tables", "ip6_tables_names"
	}
	legacyInUse, err := lists("/proc/thread-self/net/"+names, "filter")
	if err != nil {
		return nil, err
	}
	nft, legacy := h.find(name+"-nft"), h.find(name+"-legacy")
	if plain := h.find(name); plain != "" && nft == "" && legacy == "" {
		// Without a variant in its name the program is what it links to, and
		// before there were variants it was what is called legacy now.
		if real, err := filepath.EvalSymlinks(plain); err == nil && strings.Contains(filepath.Base(real), "nft") {
			nft = plain
		} else {
			legacy = plain
		}
	}
	if nft == "" && legacy == "" {
		h.warnLocked(name, errors.New("not installed; whatever drops forwarded packets will drop those of containers too"))
		return nil, nil
	}
	if !legacyInUse {
		legacy = "" // listing a table of that variant would create it
	} else if legacy == "" {
		h.warnLocked(name+"-legacy", errors.New("not installed, but its tables are in use"))
	}
	var tools []forwardChain
	for _, path := range []string{nft, legacy} {
		if path == "" {
			continue
		}
		ipt := h.tools[path]
		if ipt == nil {
			if ipt, err = iptables.New(iptables.IPFamily(proto), iptables.Path(path), iptables.Timeout(hookWait)); err != nil {
				h.warnLocked(path, err)
				continue
			}
			h.tools[path] = ipt
		}
		tools = append(tools, forwardChain{ipt: ipt, name: filepath.Base(path)})
	}
	return tools, nil
}

// find returns the path of a program, "" if there is none.
func (h *hook) find(name string) string {
	for _, dir := range h.dirs {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p
		}
	}
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	return ""
}

// lists reports whether a file has the word on a line of its own.
func lists(file, word string) (bool, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // the kernel was built without
	}
	if err != nil {
		return false, fmt.Errorf("read tables in use: %w", err)
	}
	return slices.Contains(strings.Fields(string(b)), word), nil
}

// warnLocked logs what keeps us from one program, once.
func (h *hook) warnLocked(what string, err error) {
	if !h.warned[what] {
		h.warned[what] = true
		h.log.WithError(err).WithField("program", what).Warn("cannot use iptables")
	}
}

// read fills in the chain from what iptables -S FORWARD printed.
func (c *forwardChain) read(lines, ours []string) {
	needed, pos := false, 0
	var others []string // without ours
	for _, l := range lines {
		if policy, ok := strings.CutPrefix(l, "-P FORWARD "); ok {
			needed = needed || policy != "ACCEPT"
			continue
		}
		rule, ok := strings.CutPrefix(l, "-A FORWARD ")
		if !ok {
			continue
		}
		pos++
		if isHookRule(rule, ours) {
			c.ours = append(c.ours, pos)
			continue
		}
		needed = needed || mayDrop(rule)
		others = append(others, rule)
	}
	if !needed {
		return
	}
	c.place = slices.Index(others, "-j DOCKER-USER") + 2 // after it; 1 if it is not there
	// What the engine keeps apart stays apart: our mark is also on packets that its
	// networks send to us.
	for i := c.place - 1; i < len(others); i++ {
		if slices.Contains(engineDecides, others[i]) {
			c.place = i + 2
		} else if mayDrop(others[i]) {
			break
		}
	}
	// Further down is as good while nothing in between can drop our packets.
	// The engine's chains drop only what comes from or goes to its bridges,
	// and it puts its jumps above us whenever it starts.
	for c.after = c.place; c.after <= len(others); c.after++ {
		r := others[c.after-1]
		if mayDrop(r) && !strings.Contains(" "+r, " -j DOCKER") {
			break
		}
	}
}

// right reports whether the chain is as it should be.
func (c *forwardChain) right() bool {
	if c.place == 0 {
		return len(c.ours) == 0
	}
	return len(c.ours) == 1 && c.place <= c.ours[0] && c.ours[0] <= c.after
}

// clear deletes our rules from the chain, by content and not by number: in
// the meantime the numbers may belong to others.
func (c *forwardChain) clear(ctx context.Context, ours []string) error {
	for range c.ours {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("%s: delete rule from FORWARD: %w", c.name, err)
		}
		err := c.ipt.Delete("filter", "FORWARD", ours...)
		if e := (*iptables.Error)(nil); errors.As(err, &e) && e.IsNotExist() {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: delete rule from FORWARD: %w", c.name, err)
		}
	}
	return nil
}

func isHookRule(rule string, ours []string) bool {
	return strings.ReplaceAll(rule, `"`, "") == strings.Join(ours, " ")
}

// mayDrop reports whether a rule, or a chain it leads to, could end a
// packet's way.
func mayDrop(rule string) bool {
	f := strings.Fields(rule)
	for i, w := range f[:max(len(f)-1, 0)] {
		switch w {
		case "-g":
			return true
		case "-j":
			return !slices.Contains([]string{"ACCEPT", "RETURN", "LOG", "NFLOG", "MARK", "CONNMARK"}, f[i+1])
		}
	}
	return false
}
