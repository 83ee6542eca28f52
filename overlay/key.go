package overlay

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/hashicorp/memberlist"
)

const (
	keyLen = 32 // bytes: AES-256
	// keyRounds is what OWASP asks for with PBKDF2 and SHA-256. It takes a host
	// a few tenths of a second when it starts, and whoever has recorded a packet
	// as long for each password that he tries.
	keyRounds = 600_000
	// keySalt is not secret and the same everywhere: all hosts must get the same
	// key out of a password without having talked to each other.
	keySalt = "github.com/weftnet/weft overlay gossip 1"
)

// Key makes the key of a password: PBKDF2-HMAC-SHA-256 with a fixed salt. It is
// slow on purpose, because people choose passwords that can be guessed.
func Key(password string) []byte {
	k, err := pbkdf2.Key(sha256.New, password, []byte(keySalt), keyRounds, keyLen)
	if err != nil {
		panic(err) // the parameters are constants, and allowed
	}
	return k
}

func newRing(keys [][]byte) (*memberlist.Keyring, error) {
	if len(keys) == 0 {
		return memberlist.NewKeyring(nil, nil)
	}
	return memberlist.NewKeyring(keys[1:], keys[0])
}

// AddKey accepts a further key from now on. To change the key of a cluster, add
// the new one on all hosts, then use it on all, then remove the old one from all.
// A cluster without keys cannot get one that way: who has one refuses all who
// have none.
func (g *Gossip) AddKey(key []byte) error {
	switch {
	case len(key) != keyLen:
		return fmt.Errorf("add key: %d bytes, want %d", len(key), keyLen)
	case len(g.ring.GetKeys()) == 0:
		return errors.New("add key: the host was started without a password; start it with one")
	}
	if err := g.ring.AddKey(key); err != nil {
		return fmt.Errorf("add key: %w", err)
	}
	return nil
}

// UseKey encrypts with a key, which was added, from now on.
func (g *Gossip) UseKey(key []byte) error {
	if err := g.ring.UseKey(key); err != nil {
		return fmt.Errorf("use key: %w", err)
	}
	return nil
}

// RemoveKey no longer accepts a key. It must not be the one in use.
func (g *Gossip) RemoveKey(key []byte) error {
	keys := g.ring.GetKeys()
	if len(keys) == 0 {
		return errors.New("remove key: there is none")
	}
	// memberlist removes a key by moving those behind it, while others may read
	// them. Nothing is moved if it is the last, so it is made the last: the order
	// is that of use.
	if !bytes.Equal(key, keys[0]) && !bytes.Equal(key, keys[len(keys)-1]) {
		for _, k := range slices.Backward(keys) {
			if bytes.Equal(key, k) {
				continue
			}
			if err := g.ring.UseKey(k); err != nil {
				return fmt.Errorf("remove key: %w", err)
			}
		}
	}
	if err := g.ring.RemoveKey(key); err != nil {
		return fmt.Errorf("remove key: %w", err)
	}
	return nil
}

const otherPassword = "it has another password, or only one of both has any: set the same SECRET on all hosts"

// lines is where memberlist logs to, line by line. It is all for those who look
// for a fault, but that a password is wrong nobody else says.
type lines struct{ g *Gossip }

// Write is part of io.Writer.
func (l lines) Write(b []byte) (int, error) {
	line := strings.TrimSpace(string(b))
	if i := strings.Index(line, "["); i > 0 {
		line = line[i:] // the time comes before it
	}
	l.g.log.Debug(line)
	host, ok := strangerIn(line)
	if !ok {
		return len(b), nil
	}
	host = Plain(host)
	l.g.trouble(host, otherPassword)
	if l.g.once("key " + host) {
		l.g.log.Warnf("host %s has another password than this one, or only one of both has any; nothing is exchanged. Set the same on all hosts", host)
	}
	return len(b), nil
}

// strangerIn is whom a line of memberlist is about that says that keys differ.
func strangerIn(line string) (host string, ok bool) {
	for _, sign := range []string{
		"Decrypt packet failed", "no installed keys could decrypt", "but remote state is not encrypted",
		"remote state is encrypted and encryption is not configured",
	} {
		ok = ok || strings.Contains(line, sign)
	}
	if !ok {
		return "", false
	}
	_, rest, found := strings.Cut(line, "from=")
	if !found {
		_, rest, _ = strings.Cut(line, "failed to join ")
	}
	rest, _, _ = strings.Cut(rest, " ")
	if a, err := netip.ParseAddrPort(strings.TrimSuffix(rest, ":")); err == nil {
		return a.Addr().Unmap().String(), true
	}
	return rest, rest != ""
}
