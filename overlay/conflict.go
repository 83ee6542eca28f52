package overlay

import (
	"slices"
	"time"
)

// conflictPause is how long hosts may contradict each other before that is told. A host
// that is heard again counts with what it said before until it says what it has now:
// a container that moved meanwhile is on both for a moment.
const conflictPause = 2 * time.Second

// dispute takes in what hosts contradict each other in. It returns what is to be told
// now, and whether there is something that has only begun.
func (n *network) dispute(lines []string, now time.Time) (news []string, more bool) {
	before := n.disputed
	n.disputed = map[string]time.Time{}
	var old []string
	for _, line := range lines {
		since, ok := before[line]
		if !ok {
			since, more = now, true
		}
		n.disputed[line] = since
		if now.Sub(since) < conflictPause {
			continue
		}
		old = append(old, line)
		if !slices.Contains(n.conflicts, line) {
			news = append(news, line)
		}
	}
	n.conflicts = old
	return news, more
}

// lookAgain has a network looked at once more.
func (t *Table) lookAgain(vni uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.has(vni) {
		t.touch(vni)
	}
}
