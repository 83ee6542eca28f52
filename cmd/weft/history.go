package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/weftnet/weft/internal/admin"
	"github.com/weftnet/weft/ipam"
)

// history prints who had an address, or which addresses somebody had.
func (p program) history(ctx context.Context, find func() (string, error), words []string, at string, asJSON bool) error {
	var q ipam.Query
	switch len(words) {
	case 0:
	case 1:
		var err error
		if q.Address, err = netip.ParseAddr(words[0]); err != nil {
			q.Who = words[0]
		}
		q.Address = q.Address.Unmap()
	default:
		return p.wrong("history takes an address, a container's name, a MAC address or an endpoint's ID, or nothing")
	}
	now := time.Now()
	if p.now != nil {
		now = p.now()
	}
	var err error
	if q.Since, q.Until, err = parseMoment(at, now); err != nil {
		return p.wrong("-at %s: %v", at, err)
	}
	socket, err := find()
	if err != nil {
		return err
	}
	var raw json.RawMessage
	if err := admin.Post(ctx, socket, admin.PathHistory, q, &raw); err != nil {
		return err
	}
	if asJSON {
		return p.printJSON([]json.RawMessage{raw}, false)
	}
	var list []ipam.Tenure
	if err := json.Unmarshal(raw, &list); err != nil {
		return fmt.Errorf("history of %s: %w", socket, err)
	}
	if len(list) == 0 {
		_, err := fmt.Fprintln(p.out, "nobody that is known of")
		return err
	}
	return table(plainWriter{p.out}, tenures(list, now.Location()))
}

// tenures are rows, with times to the second as a clock on the wall shows them.
func tenures(list []ipam.Tenure, zone *time.Location) [][]string {
	rows := [][]string{{"ADDRESS", "CONTAINER", "ENDPOINT", "MAC", "FROM", "TO", "POOL"}}
	for _, t := range list {
		who, to := orDash(t.Name), "now"
		if t.Name == "" && t.As == "gateway" {
			who = "(gateway)"
		}
		if !t.To.IsZero() {
			to = t.To.In(zone).Format(moment)
		}
		rows = append(rows, []string{t.Address.String(), who, orDash(short(t.Endpoint)), orDash(t.MAC), t.From.In(zone).Format(moment), to, t.Pool.String()})
	}
	return rows
}

const moment = "2006-01-02 15:04:05"

// layouts are how a time is typed, and how long what is typed lasts.
var layouts = []struct {
	text  string
	lasts time.Duration
}{
	{moment, time.Second}, {"2006-01-02T15:04:05", time.Second}, {"2006-01-02 15:04", time.Minute}, {"2006-01-02T15:04", time.Minute},
	{"15:04:05", time.Second}, {"15:04", time.Minute},
}

// parseMoment reads a time of day, which is the last one before now, a day, or both,
// in the zone of now, and returns the beginning and the end of that second, minute or
// day. "" is no time.
func parseMoment(s string, now time.Time) (since, until time.Time, err error) {
	if s == "" {
		return since, until, nil
	}
	last := func(t time.Time, d time.Duration) (time.Time, time.Time, error) { return t, t.Add(d - 1), nil }
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return last(t, time.Second)
	}
	if t, err := time.ParseInLocation(time.DateOnly, s, now.Location()); err == nil {
		return t, t.AddDate(0, 0, 1).Add(-1), nil
	}
	for _, l := range layouts {
		t, err := time.ParseInLocation(l.text, s, now.Location())
		if err != nil {
			continue
		}
		if t.Year() == 0 { // today, or yesterday
			y, m, d := now.Date()
			if t = time.Date(y, m, d, t.Hour(), t.Minute(), t.Second(), 0, now.Location()); t.After(now) {
				t = time.Date(y, m, d-1, t.Hour(), t.Minute(), t.Second(), 0, now.Location())
			}
		}
		return last(t, l.lasts)
	}
	return since, until, errors.New("write 14:05, 2006-01-02, 2006-01-02 14:05, or 2006-01-02T14:05:00Z")
}

// history answers it.
func (d *daemon) history(ctx context.Context, body []byte) (any, error) {
	var q ipam.Query
	if err := json.Unmarshal(body, &q); err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	p, err := d.recoveredParts()
	if err != nil {
		return nil, err
	}
	return p.ipam.History(ctx, q)
}
