package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/weftnet/weft/internal/admin"
	"github.com/weftnet/weft/overlay"
)

// secretRequest is what `weft secret` sends.
type secretRequest struct{ Step, Password string }

// secret exchanges the cluster's password while everything runs, in three steps
// that are each done on all hosts before the next.
func (p program) secret(ctx context.Context, args []string) error {
	steps := []string{overlay.SecretAdd, overlay.SecretUse, overlay.SecretRemove}
	fs := flag.NewFlagSet("weft secret", flag.ContinueOnError)
	find := p.socketFlags(fs)
	words, err := p.parse(fs, args)
	if err != nil {
		return err
	}
	if len(words) != 1 || !slices.Contains(steps, words[0]) {
		return p.wrong("secret takes one of %s, and the password on standard input", strings.Join(steps, ", "))
	}
	password, err := io.ReadAll(io.LimitReader(p.in, 4096))
	if err != nil {
		return fmt.Errorf("read the password: %w", err)
	}
	socket, err := find()
	if err != nil {
		return err
	}
	return admin.Post(ctx, socket, admin.PathSecret, secretRequest{words[0], strings.TrimRight(string(password), "\r\n")}, &struct{}{})
}

// socketFlags adds the flags that say which plugin a command talks to, and
// returns what finds its socket once they are parsed.
func (p program) socketFlags(fs *flag.FlagSet) func() (string, error) {
	socket := fs.String("socket", "", "socket of the plugin; looked for when not given")
	state := fs.String("state", "", "directory where the plugin keeps its state; looked for when not given")
	return func() (string, error) {
		if *socket != "" {
			return *socket, nil
		}
		sockets, err := p.find(*state)
		if err == nil && len(sockets) > 1 {
			err = fmt.Errorf("there are several plugins: choose one with --socket: %s", strings.Join(sockets, ", "))
		}
		if err != nil {
			return "", err
		}
		return sockets[0], nil
	}
}

// secret carries it out.
func (d *daemon) secret(ctx context.Context, body []byte) (any, error) {
	var req secretRequest
	if err := json.Unmarshal(body, &req); err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	p, err := d.recoveredParts()
	if err != nil {
		return nil, err
	}
	return struct{}{}, p.cluster.Secret(ctx, req.Step, req.Password)
}

// recoveredParts are what commands work on.
func (d *daemon) recoveredParts() (*parts, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.parts == nil {
		return nil, errors.New("the plugin has not recovered yet")
	}
	return d.parts, nil
}
