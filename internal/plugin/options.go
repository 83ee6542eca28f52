package plugin

import (
	"cmp"
	"slices"
	"strings"
)

// Nearest is the valid name with the fewest edits from name, or from which
// its last part has: people leave the long prefix out. "" if none is near enough to
// be what was meant.
func Nearest(name string, valid []string) string {
	name = strings.ToLower(name)
	last := func(s string) string { return s[strings.LastIndexByte(s, '.')+1:] }
	distance := func(to string) int { return min(edits(name, to), edits(last(name), last(to))) }
	if len(valid) == 0 {
		return ""
	}
	best := slices.MinFunc(valid, func(a, b string) int {
		return cmp.Or(distance(a)-distance(b), edits(name, a)-edits(name, b))
	})
	// Three letters in a long word, and no more than a third of a short one: two
	// changed in "dhcp" make "mode".
	if distance(best) > min(3, (len(last(name))+2)/3) {
		return ""
	}
	return best
}

// Within returns which of the valid names is at most so many edits away, and not the
// name itself; "" if none is, or the name is one of them.
func Within(most int, name string, valid []string) string {
	if slices.Contains(valid, name) {
		return ""
	}
	for _, v := range valid {
		if edits(strings.ToLower(name), v) <= most {
			return v
		}
	}
	return ""
}

// edits is the Levenshtein distance, in bytes; a and b are cut so that
// nobody pays for a name of a megabyte.
func edits(a, b string) int {
	a, b = a[:min(len(a), 80)], b[:min(len(b), 80)]
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
