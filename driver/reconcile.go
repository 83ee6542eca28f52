package driver

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/internal/datapath"
)

const (
	// period is how long damage lasts that others do.
	period = 30 * time.Second
	// leastWait and mostWait bound the time between two passes for which the
	// firewall's damage is the reason: a reload makes several changes, and who
	// damages it over and over must not keep us busy.
	leastWait = 50 * time.Millisecond
	mostWait  = time.Second
	// passTime bounds one pass.
	passTime = 25 * time.Second
	// joinTime is how long the engine may take from CreateEndpoint until it
	// has moved the interface. It takes milliseconds, or, before 28, as long as
	// the container's process needs to start.
	joinTime = time.Minute
)

// Recover reads the records and makes the kernel equal to them. It comes
// before the first call. It leaves IP forwarding as it is: the plugin starts
// before the engine has set its own networks up, and an engine that finds
// forwarding on does not set FORWARD to DROP.
func (d *Driver) Recover(ctx context.Context) error {
	if err := d.load(ctx); err != nil {
		return err
	}
	d.findFallbacks()
	d.findMates()
	if err := d.hold(ctx); err != nil {
		return err
	}
	d.shareAll()
	_, err := d.reconcile(ctx, true)
	if err != nil {
		// One broken network must not keep the others from being served; the
		// next pass tries again.
		d.log.WithError(err).Warn("not everything could be restored")
	}
	d.holdUnclaimed(ctx)
	return nil
}

// load reads both stores. What cannot be understood stops it.
func (d *Driver) load(ctx context.Context) error {
	d.change.Lock()
	defer d.change.Unlock()
	networks := map[string]*network{}
	list, err := d.nets.List(ctx, networkPrefix)
	if err != nil {
		return err
	}
	for _, r := range list {
		rec, err := decodeNetwork(r.Key, r.Value)
		if err != nil {
			return err
		}
		if d.backends[rec.Mode] == nil {
			return fmt.Errorf("%s: this program does not know its mode %q", r.Key, rec.Mode)
		}
		// We died before the answer, so the engine has no such network.
		n := newNetwork(rec)
		n.rev, n.doomed = r.Rev, rec.Pending
		networks[rec.ID] = n
	}
	if list, err = d.eps.List(ctx, endpointPrefix); err != nil {
		return err
	}
	for _, r := range list {
		rec, err := decodeEndpoint(r.Key, r.Value)
		if err != nil {
			return err
		}
		n := networks[rec.Network]
		if n == nil {
			d.log.WithField("network", rec.Network).WithField("endpoint", rec.ID).Warn("forgotten: its network is not known; what its container uses is left as it is")
			if err := d.eps.Delete(ctx, r.Key); err != nil {
				return err
			}
			continue
		}
		n.enter(&endpoint{rec: rec, rev: r.Rev, loaded: true, sandbox: rec.Sandbox})
	}
	d.mu.Lock()
	d.networks = networks
	d.mu.Unlock()
	return nil
}

// hold takes the host ports again that the process before us held until it
// ended. That is no repair and not worth a line.
func (d *Driver) hold(ctx context.Context) error {
	have, err := d.kernel.Owned(ctx)
	if err != nil {
		return fmt.Errorf("read the kernel: %w", err)
	}
	is := indexOf(have)
	for _, w := range d.wanted() {
		if len(w.state.Sockets) == 0 || is.lacks(w.state.Veths) {
			continue
		}
		if _, err := d.kernel.Ensure(ctx, datapath.State{Sockets: w.state.Sockets}); err != nil {
			w.log(d).WithError(err).Warn("a published port is not held")
		}
	}
	return nil
}

// Run repairs every 30 s, and when the firewall was damaged, until ctx ends.
func (d *Driver) Run(ctx context.Context) error {
	tick := time.NewTicker(period)
	defer tick.Stop()
	last, wait, before := "", leastWait, time.Time{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-d.damaged:
			if time.Since(before) > 10*mostWait {
				wait = leastWait
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(wait):
			}
			wait, before = min(2*wait, mostWait), time.Now()
		}
		pass, cancel := context.WithTimeout(ctx, passTime)
		_, err := d.Reconcile(pass)
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		text := ""
		if err != nil {
			text = err.Error()
		}
		if text != last && text != "" { // the same trouble is told once
			d.log.WithError(err).Warn("repair is not complete")
		}
		last = text
	}
}

// Reconcile makes the kernel equal to the records and returns a line for each
// thing that it had to change. It never makes a link again whose other end was
// in a container: that end went with it.
func (d *Driver) Reconcile(ctx context.Context) (changed []string, err error) {
	return d.reconcile(ctx, false)
}

func (d *Driver) reconcile(ctx context.Context, starting bool) ([]string, error) {
	d.pass.Lock()
	defer d.pass.Unlock()
	d.orphans(ctx)
	d.tellAllMates(ctx)
	p := &pass{d: d, starting: starting}
	idle, err := p.look(ctx)
	if err == nil && !idle {
		err = p.repair(ctx)
	}
	err = join(err, p.bridges(ctx), d.kernel.LiftGuard(ctx, d.forwards))
	verb, log := "repaired", d.log.Warn
	if starting {
		verb, log = "restored", d.log.Info
	}
	for _, line := range p.lines {
		log(verb + ": " + line)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drift.Checked, d.drift.Error = d.now().UTC(), ""
	if err != nil {
		d.drift.Error = err.Error()
	}
	if len(p.lines) > 0 {
		d.drift.Repaired, d.drift.RepairedAt = p.lines, d.drift.Checked
	}
	return p.lines, err
}

// pass is one run of reconcile.
type pass struct {
	d        *Driver
	starting bool
	lines    []string // what was changed
}

func (p *pass) say(format string, args ...any) {
	p.lines = append(p.lines, fmt.Sprintf(format, args...))
}

// look reports whether there is nothing to do. It holds no lock while it reads
// the kernel, so a call in flight may look like something to do; never the
// other way round: the table says what is wanted before the kernel is changed
// to it, and until after it was changed from it.
func (p *pass) look(ctx context.Context) (idle bool, err error) {
	have, err := p.d.kernel.Owned(ctx)
	if err != nil {
		return false, err
	}
	pending := len(p.d.forgotten(have)) > 0
	p.d.mu.Lock()
	for _, n := range p.d.networks {
		pending = pending || n.doomed
		for _, e := range n.endpoints {
			pending = pending || e.doomed || e.unsaved
		}
	}
	p.d.mu.Unlock()
	diff := p.compare(have, p.d.wanted())
	unclaimed, rest := p.d.unnamed(diff.stray)
	diff.stray = rest
	return !pending && diff.empty() && p.d.noticed(unclaimed), nil
}

// repair stops all calls, looks again, and mends.
func (p *pass) repair(ctx context.Context) error {
	d := p.d
	d.change.Lock()
	defer d.change.Unlock()
	for _, n := range d.networks { // change is held: the table stands still
		n.mu.Lock()
		defer n.mu.Unlock()
	}
	have, err := d.kernel.Owned(ctx)
	if err != nil {
		return err
	}
	for _, w := range d.forgotten(have) {
		why := "it was never joined"
		if w.e.rec.Left {
			why = "its deletion was interrupted"
		}
		w.log(d).Warn("forgotten: " + why)
		d.mu.Lock()
		w.e.doomed = true
		d.mu.Unlock()
		p.say("endpoint %s of network %s: forgotten, %s", short(w.e.rec.ID), short(w.n.rec.ID), why)
	}
	err = d.finishAll(ctx)
	if have, err2 := d.kernel.Owned(ctx); err2 != nil {
		err = join(err, err2)
	} else {
		err = join(err, p.mend(ctx, have))
	}
	return join(err, d.saveAll(ctx))
}

// finishAll completes deletions that failed half-way. All locks are held.
func (d *Driver) finishAll(ctx context.Context) (err error) {
	for _, n := range slices.Collect(maps.Values(d.networks)) {
		if n.doomed {
			err = join(err, d.removeNetwork(ctx, n))
			continue
		}
		for _, e := range slices.Collect(maps.Values(n.endpoints)) {
			if e.doomed {
				err = join(err, d.removeEndpoint(ctx, n, e))
			}
		}
	}
	return err
}

// saveAll writes records whose last write failed. All locks are held.
func (d *Driver) saveAll(ctx context.Context) (err error) {
	for _, n := range d.networks {
		for _, e := range n.endpoints {
			if e.unsaved && !e.doomed {
				err = join(err, d.save(ctx, e, e.rec))
			}
		}
	}
	return err
}

// mend makes the kernel, which holds have, equal to what is wanted. All locks
// are held.
func (p *pass) mend(ctx context.Context, have datapath.State) error {
	d := p.d
	diff := p.compare(have, d.wanted())
	for _, w := range diff.lost {
		// Published ports would lead nowhere: they go with the rest of what
		// nobody wants any more. The record stays, the engine will delete it.
		w.log(d).Warnf("its link %s is gone, and with it the container's interface: disconnect and connect it again", hostEnd(w.e.rec.ID))
		p.say("endpoint %s of network %s: link %s is gone", short(w.e.rec.ID), short(w.n.rec.ID), hostEnd(w.e.rec.ID))
		d.mu.Lock()
		w.e.gone = true
		d.mu.Unlock()
		d.share(w.n)
	}
	if len(diff.lost) > 0 {
		diff = p.compare(have, d.wanted())
	}
	unclaimed, rest := d.unnamed(diff.stray)
	diff.stray = rest
	d.notice(unclaimed)
	// What is wanted with another value goes before it is set: a map of the
	// firewall takes no second value for a key.
	err := p.remove(ctx, diff.stale)
	err = join(err, p.ensure(ctx, diff.missing))
	return join(err, p.remove(ctx, diff.stray))
}

// ensure adds what is missing, at once or, if something cannot be made, each
// by itself, so that it alone is left out.
func (p *pass) ensure(ctx context.Context, missing []wanted) (err error) {
	var all datapath.State
	for _, w := range missing {
		all.Add(w.state)
	}
	if all.Empty() {
		return nil
	}
	lines, err := p.d.kernel.Ensure(ctx, all)
	if err == nil || len(missing) == 1 {
		p.lines = append(p.lines, lines...)
		return err
	}
	err = nil
	for _, w := range missing {
		lines, e := p.d.kernel.Ensure(ctx, w.state)
		p.lines = append(p.lines, lines...)
		if e != nil {
			err = join(err, fmt.Errorf("%s: %w", w, e))
		}
	}
	return err
}

func (p *pass) remove(ctx context.Context, s datapath.State) error {
	if s.Empty() {
		return nil
	}
	err := p.d.kernel.Remove(ctx, s)
	if err == nil {
		for line := range strings.SplitSeq(strings.TrimSpace(s.String()), "\n") {
			p.say("not wanted, removed: %s", line)
		}
	}
	return err
}

// bridges checks those that others made; nothing shows whether they are there but
// asking for them. One that vanished is told by Run, once.
func (p *pass) bridges(ctx context.Context) (err error) {
	seen := map[string]bool{}
	for _, w := range p.d.wanted() {
		for _, one := range existing(w.state) {
			key := one.String()
			if seen[key] {
				continue
			}
			seen[key] = true
			if _, e := p.d.kernel.Ensure(ctx, one); e != nil {
				err = join(err, fmt.Errorf("%s: %w", w, e))
			}
		}
	}
	return err
}

// forgotten are endpoints that the engine does not know, because we died
// before the answer to CreateEndpoint: nobody joined them, and their container's
// end, if there is one, is still in the host's namespace. Or it has forgotten
// them, because we died when it had asked for their deletion.
func (d *Driver) forgotten(have datapath.State) []wanted {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []wanted
	if d.now().Sub(d.started) < joinTime {
		return nil
	}
	for _, n := range d.networks {
		for _, e := range n.endpoints {
			if e.doomed || !e.orphan(n.place(have, e.rec)) {
				continue
			}
			if d.now().Sub(e.rec.Created) >= joinTime {
				list = append(list, wanted{n: n, e: e})
			}
		}
	}
	return list
}

// orphan reports whether nobody will ask for the endpoint's deletion: its link
// has been with no container since our start, or the engine asked before that
// and moves on.
func (e *endpoint) orphan(at place) bool {
	switch {
	case e.rec.Left:
		return e.loaded
	case e.joined:
		return false
	}
	return at == onHost || at == nowhere && e.loaded
}

// existing are the links of others in a State, each by itself.
func existing(s datapath.State) (list []datapath.State) {
	for _, b := range s.Bridges {
		if b.Existing {
			list = append(list, datapath.State{Bridges: []datapath.Bridge{b}})
		}
	}
	for _, p := range s.Parents {
		if p.Existing {
			list = append(list, datapath.State{Parents: []datapath.Parent{p}})
		}
	}
	return list
}

// place is where the link is that becomes a container's interface.
type place int

const (
	nowhere place = iota
	onHost
	inContainer
)

// place tells where an endpoint's link is. A sub-interface that is not on the
// host cannot be seen; it is taken to be in its container if that was joined.
func (n *network) place(have datapath.State, e Endpoint) place {
	if n.rec.onParent() {
		switch {
		case slices.ContainsFunc(have.Children, func(c datapath.Child) bool { return c.Name == peerEnd(e.ID) }):
			return onHost
		case !e.Joined:
			return nowhere
		}
		return inContainer
	}
	switch v, ok := veth(have, hostEnd(e.ID)); {
	case !ok:
		return nowhere
	case v.Peer == "":
		return inContainer
	}
	return onHost
}
