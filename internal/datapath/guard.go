package datapath

import (
	"context"
	"fmt"
)

// ensureForwarding switches forwarding on where it is off. A host that did not
// forward must not become a router for its neighbours, so the guard is there
// first; where forwarding was on already that was somebody's wish. A guard that was
// lifted since is there again.
func (k *Kernel) ensureForwarding(ctx context.Context, want4, want6 bool, d *done) error {
	if !want4 && !want6 {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if l4, l6 := k.firewall.families(setLifted); !k.unguarded && (l4 && want4 || l6 && want6) {
		if err := k.firewall.setFamilies(ctx, setLifted, l4 && !want4, l6 && !want6); err != nil {
			return fmt.Errorf("guard forwarding: %w", err)
		}
	}
	turn4, err := k.off(want4, forward4)
	if err != nil {
		return err
	}
	turn6, err := k.off(want6, forward6)
	if err != nil {
		return err
	}
	if !turn4 && !turn6 {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("switch forwarding on: %w", err)
	}
	if !k.unguarded {
		was4, was6 := k.firewall.families(setGuard)
		if err := k.firewall.setFamilies(ctx, setGuard, was4 || turn4, was6 || turn6); err != nil {
			return fmt.Errorf("guard forwarding: %w", err)
		}
		d.guard4, d.guard6 = turn4 && !was4, turn6 && !was6
	}
	if turn4 {
		if _, err := k.sysctl.set(forward4, "1"); err != nil {
			return fmt.Errorf("switch IPv4 forwarding on: %w", err)
		}
		d.guard4 = false
		d.say("sysctl net.ipv4.ip_forward=1")
	}
	if turn6 {
		if err := k.sysctl.keepRouters(d); err != nil {
			return fmt.Errorf("switch IPv6 forwarding on: %w", err)
		}
		if _, err := k.sysctl.set(forward6, "1"); err != nil {
			return fmt.Errorf("switch IPv6 forwarding on: %w", err)
		}
		d.guard6 = false
		d.say("sysctl net.ipv6.conf.all.forwarding=1")
	}
	return nil
}

// off reports whether a switch is wanted and off.
func (k *Kernel) off(want bool, name string) (bool, error) {
	if !want {
		return false, nil
	}
	on, err := k.sysctl.on(name)
	return !on && err == nil, err
}

// Guarded reports for which families packets between links that are nobody's
// containers are dropped, because the host did not forward before we had it to.
func (k *Kernel) Guarded() (v4, v6 bool) {
	g4, g6 := k.firewall.families(setGuard)
	l4, l6 := k.firewall.families(setLifted)
	return g4 && !l4, g6 && !l6
}

// LiftGuard has the host forward for everybody in the families in which no
// container needs forwarding any more, and in both where the guard is not wanted.
// Whoever makes the host a router then finds nothing in the way; the next container
// brings the guard back. needed is asked while no container's forwarding is being
// switched on.
func (k *Kernel) LiftGuard(ctx context.Context, needed func() (v4, v6 bool)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	g4, g6 := k.firewall.families(setGuard)
	l4, l6 := k.firewall.families(setLifted)
	if !g4 && !g6 && !l4 && !l6 {
		return nil // as on most hosts: it is not worth asking
	}
	n4, n6 := needed()
	want4, want6 := g4 && (!n4 || k.unguarded), g6 && (!n6 || k.unguarded)
	if want4 == l4 && want6 == l6 {
		return nil
	}
	if err := k.firewall.setFamilies(ctx, setLifted, want4, want6); err != nil {
		return fmt.Errorf("lift the guard of forwarding: %w", err)
	}
	return nil
}
