package overlay

import (
	"encoding/json"
	"testing"
	"time"
)

// restarted is a table that knows what another kept on disk.
func restarted(t *testing.T, self string, c *clock, kept []Known) *Table {
	t.Helper()
	table := tableAt(self, c)
	table.Set(part(0, 1))
	for _, k := range kept {
		value, err := json.Marshal(k)
		if err != nil {
			t.Fatal(err)
		}
		var read Known
		if err := json.Unmarshal(value, &read); err != nil {
			t.Fatal(err)
		}
		if err := table.Restore(read); err != nil {
			t.Fatal(err)
		}
	}
	return table
}

// kept is what a table writes to disk of other hosts.
func kept(table *Table, c *clock) (list []Known) {
	for _, k := range table.Known() {
		if k.Part.Host != table.self {
			k.Saved = c.now()
			list = append(list, k)
		}
	}
	return list
}

// tell is the exchange of everything between two hosts, one way.
func tell(t *testing.T, from, to *Table) {
	t.Helper()
	m, err := decode(message{From: from.self, Parts: from.Known()}.encode())
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range m.Parts {
		if _, err := to.merge(k, false); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRestartKeepsTheGraceTime: however often plugins restart, what leads to a dead
// host goes when its grace time is over, on all hosts.
func TestRestartKeepsTheGraceTime(t *testing.T) {
	for name, heardWhenSaved := range map[string]bool{"it died before the plugin ended": false, "it died while the plugin was away": true} {
		t.Run(name, func(t *testing.T) {
			c := newClock()
			one, two := tableAt("a", c), tableAt("c", c)
			for _, x := range []*Table{one, two} {
				x.Set(part(0, 1))
				x.Heard("b", "host-1")
				merge(t, x, later(part(1, 1), 1), 0)
			}
			two.Silent("b")
			if !heardWhenSaved {
				one.Silent("b")
			}
			disk := kept(one, c)
			for range 9 { // a minute each
				c.pass(30 * time.Second)
				one = restarted(t, "a", c, disk)
				tell(t, one, two)
				tell(t, two, one)
				c.pass(30 * time.Second)
				disk = kept(one, c)
			}
			c.pass(time.Minute - time.Millisecond)
			if one.Expire() != nil || two.Expire() != nil {
				t.Fatal("forgotten before the grace time")
			}
			c.pass(time.Millisecond)
			if got := two.Expire(); len(got) != 1 {
				t.Error("the host that went on has it after the grace time")
			}
			if got := one.Expire(); len(got) != 1 {
				t.Error("the host that was restarted has it after the grace time")
			}
		})
	}
}

// TestRestartGrantsTheGraceTime: a host that was heard when the plugin ended has all
// of it, however long the plugin was away.
func TestRestartGrantsTheGraceTime(t *testing.T) {
	c := newClock()
	one := tableAt("a", c)
	one.Set(part(0, 1))
	one.Heard("b", "host-1")
	merge(t, one, later(part(1, 1), 1), 0)
	disk := kept(one, c)
	c.pass(10 * testGrace)
	one = restarted(t, "a", c, disk)
	c.pass(testGrace - 1)
	if one.Expire() != nil {
		t.Fatal("forgotten before the grace time")
	}
	c.pass(1)
	if one.Expire() == nil {
		t.Fatal("not forgotten after the grace time")
	}
}
