package datapath

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/google/nftables"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// DefaultInstance is the one whose objects have no name in theirs.
const DefaultInstance = "local"

// Group is the link group of every link that the default instance makes, and
// nobody else's: the mark by which they are known again. It is "weft" in ASCII;
// the kernel takes it in the creating message, so that there is no moment
// without it. Those of other instances share its first byte.
const Group uint32 = 0x77656674

// instance is what keeps the objects of several wefts on a host apart. The bits
// in the mark are the same for all: each table acts on its own sets alone, and
// what one of them lets through, the others may still drop.
type instance struct {
	name  string
	group uint32 // of links
	table string // of nftables, in each family; and the comment in others' chains
}

// instanceName has no character that nft or iptables would want quoted.
var instanceName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,14}$`)

// CheckInstance says what is wrong with a name.
func CheckInstance(name string) error {
	if instanceName.MatchString(name) {
		return nil
	}
	return fmt.Errorf("%q is not a name for an instance: use up to 15 letters a-z, digits and _, a letter first", name[:min(len(name), 32)])
}

func instanceOf(name string) (instance, error) {
	if name == "" || name == DefaultInstance {
		return instance{DefaultInstance, Group, tableName}, nil
	}
	if err := CheckInstance(name); err != nil {
		return instance{}, err
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(name)) // a hash never fails
	group := Group&^0xffffff | h.Sum32()&0xffffff
	if group == Group {
		group++
	}
	return instance{name, group, tableName + "_" + name}, nil
}

// another reports whether the link is one of another instance's.
func (l link) another() bool { return !l.mine && l.group>>24 == Group>>24 }

// Lock is what one process of an instance holds.
type Lock struct {
	l net.Listener // nil where somebody keeps us from locking
}

// Close lets another process begin.
func (k *Lock) Close() {
	if k.l != nil {
		_ = k.l.Close()
	}
}

// Acquire makes this process the only one of its instance in the network
// namespace of the calling thread, until the lock is closed or the process ends.
// An abstract socket holds it: that needs no directory which all wefts of a host
// can see, and leaves nothing behind. about describes this process to those that
// come after it.
//
// Anybody on the host may bind that name. A user who is not root cannot keep us
// from our work with it: then there is no lock, which is logged.
func Acquire(ctx context.Context, log logrus.FieldLogger, name, about string) (*Lock, error) {
	in, err := instanceOf(name)
	if err != nil {
		return nil, err
	}
	// The group and not the name: it is what must not be shared.
	path := fmt.Sprintf("@weft/instance/%08x", in.group)
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err == nil {
		go tell(l, about)
		return &Lock{l}, nil
	}
	if !errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("make this process the only one of instance %s: %w", in.name, err)
	}
	holder, root := holderOf(ctx, path)
	if !root {
		log.WithField("socket", path).Warn("a process of another user holds the lock of this instance: going on without it")
		return &Lock{}, nil
	}
	return nil, fmt.Errorf("instance %s runs already on this host (%s): stop that one, or give this one another name with INSTANCE=NAME", in.name, holder)
}

// tell answers everybody who asks who holds the lock.
func tell(l net.Listener, about string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return // closed
		}
		_ = c.SetDeadline(time.Now().Add(lockAnswer))
		_, _ = io.WriteString(c, about)
		_ = c.Close()
	}
}

// lockAnswer bounds the wait for the holder's description.
const lockAnswer = time.Second

// holderOf describes the process that holds a lock; root is false where it
// belongs to neither root nor our own user.
func holderOf(ctx context.Context, path string) (holder string, root bool) {
	ctx, cancel := context.WithTimeout(ctx, lockAnswer)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return "", false // bound and not listening: no weft
	}
	defer func() { _ = c.Close() }()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return "", false
	}
	var who *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { who, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil || err != nil {
		return "", false
	}
	if who.Uid != 0 && int(who.Uid) != os.Geteuid() {
		return "", false
	}
	_ = c.SetDeadline(time.Now().Add(lockAnswer))
	text, _ := io.ReadAll(io.LimitReader(c, 200)) // one that hangs says nothing
	about := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, string(text))
	if who.Pid != 0 { // 0 is one in a PID namespace that we do not see
		about = strings.TrimSuffix(fmt.Sprintf("process %d, %s", who.Pid, about), ", ")
	}
	return about, true
}

// Uninstall removes all that the instance has in the kernel and returns what that
// was, a line each. Only forwarding stays as it is: others may rely on it by now.
func (k *Kernel) Uninstall(ctx context.Context) ([]string, error) {
	tables, err := k.firewall.tables(ctx) // before Owned, which may make ours
	if err != nil {
		return nil, err
	}
	have, err := k.Owned(ctx)
	if err != nil {
		return nil, err
	}
	have.Forward4, have.Forward6, have.Hook = false, false, false
	if err := k.Remove(ctx, have); err != nil {
		return nil, err
	}
	var removed []string
	if text := strings.TrimSpace(have.String()); text != "" {
		removed = strings.Split(text, "\n")
	}
	lines, err := k.hook.remove(ctx) // also a rule that is not where it should be
	removed = append(removed, lines...)
	if err != nil {
		return removed, err
	}
	if err := k.firewall.drop(ctx); err != nil {
		return removed, err
	}
	if name := k.firewall.rs.table.Name; slices.Contains(tables, name) {
		removed = append(removed, "nft table inet "+name)
	}
	there, err := k.shortcuts.drop(ctx)
	if there && err == nil {
		removed = append(removed, "nft table netdev "+k.shortcuts.table)
	}
	return removed, err
}

// Others names the other instances that have something in the kernel, or interfaces
// of theirs where the name is not known.
func (k *Kernel) Others(ctx context.Context) ([]string, error) {
	tables, err := k.firewall.tables(ctx)
	if err != nil {
		return nil, err
	}
	all, err := k.links.list(ctx)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var others []string
	known := map[uint32]bool{}
	for _, t := range tables {
		name, ok := strings.CutPrefix(t, tableName+"_")
		if t == tableName {
			name, ok = DefaultInstance, true
		}
		if in, err := instanceOf(name); ok && err == nil && t != k.firewall.rs.table.Name {
			others, known[in.group] = append(others, name), true
		}
	}
	for _, l := range all {
		if l.another() && !known[l.group] {
			others = append(others, "that has interface "+l.name)
		}
	}
	return others, nil
}

// tables are the names of all tables of the family.
func (f *firewall) tables(ctx context.Context) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.dialLocked(); err != nil {
		return nil, err
	}
	err := f.sock.SetDeadline(deadline(ctx))
	if err != nil {
		return nil, err
	}
	list, err := f.conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		f.hangUpLocked()
		return nil, fmt.Errorf("list nft tables: %w", err)
	}
	var names []string
	for _, t := range list {
		names = append(names, t.Name)
	}
	return names, nil
}

// drop removes the table, whatever is in it.
func (f *firewall) drop(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.dialLocked(); err != nil {
		return err
	}
	f.conn.AddTable(f.rs.table) // or deleting it fails where there is none
	f.conn.DelTable(f.rs.table)
	f.have, f.sound = map[Element]bool{}, false
	if err := f.flushLocked(deadline(ctx)); err != nil {
		f.hangUpLocked()
		return fmt.Errorf("remove nft table inet %s: %w", f.rs.table.Name, err)
	}
	return nil
}

// drop removes the table, whatever is in it, and says whether there was one.
func (s *shortcuts) drop(ctx context.Context) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	until := deadline(ctx)
	there, err := s.thereLocked(until, unix.NFT_MSG_GETTABLE, "")
	if err != nil || !there {
		return false, nil // a kernel without the family has none
	}
	var b nfBatch
	b.table(s.table, unix.NFT_MSG_DELTABLE)
	if err := s.commitLocked(until, b); err != nil {
		return true, fmt.Errorf("remove nft table netdev %s: %w", s.table, err)
	}
	return true, nil
}
