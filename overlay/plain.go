package overlay

import (
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/sirupsen/logrus"
)

// mostText is more than a host name has, and less than a log can take.
const mostText = 255

// Plain is a text of another host as it is kept and shown: without what would
// move the cursor of a terminal, end a line or turn the direction of writing.
func Plain(s string) string {
	odd := func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }
	if len(s) <= mostText && !strings.ContainsFunc(s, odd) {
		return s
	}
	s = strings.Map(func(r rune) rune {
		if odd(r) {
			return '?'
		}
		return r
	}, s[:min(len(s), mostText)])
	for len(s) > mostText { // what replaces a broken byte may be longer than it
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return s
}

// Lines that others can cause: so many at once, and then one in linePause.
const (
	mostLines = 32
	linePause = 30 * time.Second
)

// chatter bounds what is logged because of others. The zero value is ready to
// use.
type chatter struct {
	mu      sync.Mutex
	began   bool
	left    int
	since   time.Time
	dropped int
}

// may reports whether a line may be logged now, and how many were not since the
// last one that was.
func (c *chatter) may(now time.Time) (ok bool, dropped int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.began {
		c.began, c.left, c.since = true, mostLines, now
	}
	if n := int(now.Sub(c.since) / linePause); n > 0 {
		c.left, c.since = min(c.left+n, mostLines), now
	}
	if c.left == 0 {
		c.dropped++
		return false, 0
	}
	c.left--
	dropped, c.dropped = c.dropped, 0
	return true, dropped
}

// allows is may, and tells of lines that were not logged.
func (c *chatter) allows(log logrus.FieldLogger) bool {
	ok, dropped := c.may(time.Now())
	if dropped > 0 {
		log.Warnf("%d further lines about other hosts were not logged: there were too many at once", dropped)
	}
	return ok
}
