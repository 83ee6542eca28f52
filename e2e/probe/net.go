//go:build e2e

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// answer is what the server says and the dialer prints.
type answer struct {
	Name string `json:"name,omitempty"` // host name of the server
	Src  string `json:"src,omitempty"`  // client's address as the server saw it
	Err  string `json:"err,omitempty"`
}

// serve listens on every "proto:port" or "proto:address:port" until it is
// ended.
func serve(specs []string) error {
	if len(specs) == 0 {
		specs = []string{"tcp:80"}
	}
	// Process 1 of a container gets no signal that it does not ask for, and
	// would cost every stop the engine's whole patience.
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	done := make(chan error, len(specs))
	for _, s := range specs {
		proto, addr, ok := strings.Cut(s, ":")
		if !ok {
			return fmt.Errorf("serve %q: want proto:port", s)
		}
		if !strings.Contains(addr, ":") {
			addr = ":" + addr
		}
		if strings.HasPrefix(proto, "udp") {
			c, err := persist(func() (net.PacketConn, error) { return net.ListenPacket(proto, addr) })
			if err != nil {
				return err
			}
			go func() { done <- serveUDP(c) }()
			continue
		}
		l, err := persist(func() (net.Listener, error) { return net.Listen(proto, addr) })
		if err != nil {
			return err
		}
		go func() { done <- serveTCP(l) }()
	}
	select {
	case err := <-done:
		return err
	case <-stop.Done():
		return nil
	}
}

// persist repeats listen while the port is taken: whoever asks whether the
// server is there yet takes it for a moment.
func persist[T any](listen func() (T, error)) (T, error) {
	for try := 0; ; try++ {
		l, err := listen()
		if try == 50 || !errors.Is(err, syscall.EADDRINUSE) {
			return l, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// who is the question that a server answers.
const who = "who\n"

func reply(src net.Addr) []byte {
	name, _ := os.Hostname()
	a := answer{Name: name, Src: src.String()}
	if ap, err := netip.ParseAddrPort(src.String()); err == nil {
		a.Src = ap.Addr().Unmap().WithZone("").String()
	}
	b, _ := json.Marshal(a)
	return append(b, '\n')
}

// serveTCP answers every line with one line, so that a client can hold a
// connection open and see that it still works.
func serveTCP(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer func() { _ = c.Close() }() // nothing is lost with it
			r := bufio.NewScanner(c)
			for r.Scan() {
				switch r.Text() { // until the client has had enough
				case "sink":
					_, _ = io.Copy(sink{}, c)
					return
				case "back":
					// Not before this answer does the client send what r would take.
					_, _ = c.Write([]byte("\n"))
					_, _ = io.Copy(c, c)
					return
				}
				if _, err := c.Write(reply(c.RemoteAddr())); err != nil {
					return
				}
			}
		}()
	}
}

// sink takes what it is given in large pieces; io.Discard would have the kernel
// splice them, which no program that reads does.
type sink struct{}

func (sink) Write(b []byte) (int, error) { return len(b), nil }

// ReadFrom implements io.ReaderFrom.
func (sink) ReadFrom(r io.Reader) (total int64, err error) {
	b := make([]byte, 256<<10)
	for {
		n, err := r.Read(b)
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
}

func serveUDP(c net.PacketConn) error {
	buf := make([]byte, 2048)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		b := buf[:n]
		if bytes.Equal(b, []byte(who)) {
			b = reply(from)
		} // else it is of a flow, whose numbers come back as they are
		if _, err := c.WriteTo(b, from); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			return err
		}
	}
}

// dial connects once and prints the answer, or why there is none.
func dial(args []string, out io.Writer) error {
	fs := flag.NewFlagSet("dial", flag.ContinueOnError)
	timeout := fs.Duration("timeout", time.Second, "for the whole exchange")
	wait := fs.Duration("wait", 0, "try again for this long until it works")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 2 {
		return errors.New("usage: probe dial [-timeout D] [-wait D] tcp|udp[4|6] address:port")
	}
	end := time.Now().Add(*wait)
	for {
		a, err := exchange(fs.Arg(0), fs.Arg(1), *timeout)
		if err == nil {
			return json.NewEncoder(out).Encode(a)
		}
		if time.Now().After(end) {
			return json.NewEncoder(out).Encode(answer{Err: word(err)})
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func exchange(proto, addr string, timeout time.Duration) (answer, error) {
	var a answer
	end := time.Now().Add(timeout)
	d := net.Dialer{Deadline: end}
	c, err := d.Dial(proto, addr)
	if err != nil {
		return a, err
	}
	defer func() { _ = c.Close() }() // nothing is lost with it
	if err := c.SetDeadline(end); err != nil {
		return a, err
	}
	if _, err := io.WriteString(c, who); err != nil {
		return a, err
	}
	line, err := bufio.NewReader(c).ReadBytes('\n')
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(line, &a)
}

// stream keeps one TCP connection busy until stdin ends, then prints how many
// answers came and how long the longest one took.
func stream(args []string, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("usage: probe stream address:port")
	}
	c, err := net.DialTimeout("tcp", args[0], 5*time.Second)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }() // nothing is lost with it
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	var answers int
	var longest time.Duration
	for r := bufio.NewReader(c); ; answers++ {
		select {
		case <-stop:
			_, err := fmt.Fprintf(out, "%d %d\n", answers, longest.Milliseconds())
			return err
		default:
		}
		start := time.Now()
		if err := c.SetDeadline(start.Add(5 * time.Second)); err != nil {
			return err
		}
		if _, err := io.WriteString(c, who); err != nil {
			return fmt.Errorf("after %d answers: %w", answers, err)
		}
		if _, err := r.ReadBytes('\n'); err != nil {
			return fmt.Errorf("after %d answers: %w", answers, err)
		}
		longest = max(longest, time.Since(start))
		time.Sleep(5 * time.Millisecond)
	}
}

// flow sends a numbered datagram every 20 ms, which comes back, until stdin ends.
// It prints how many were sent, how many of them never came back, and the longest
// run of those in milliseconds.
func flow(args []string, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("usage: probe flow address:port")
	}
	c, err := net.Dial("udp", args[0])
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }() // nothing is lost with it
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	const pace = 20 * time.Millisecond
	var mu sync.Mutex
	var back []bool
	go func() {
		buf := make([]byte, 64)
		for {
			n, err := c.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// Errors are what routers and the other host say of one datagram.
			if i, err := strconv.Atoi(string(buf[:n])); err == nil {
				mu.Lock()
				if i < len(back) {
					back[i] = true
				}
				mu.Unlock()
			}
		}
	}()
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for sending := true; sending; {
		select {
		case <-stop:
			sending = false
		case <-tick.C:
			mu.Lock()
			back = append(back, false)
			i := len(back) - 1
			mu.Unlock()
			_, _ = c.Write(strconv.AppendInt(nil, int64(i), 10)) // lost, if it failed
		}
	}
	time.Sleep(time.Second) // for the last ones
	mu.Lock()
	defer mu.Unlock()
	var lost, run, longest int
	for _, b := range back {
		if run++; b {
			run = 0
		} else {
			lost++
		}
		longest = max(longest, run)
	}
	_, err = fmt.Fprintf(out, "%d %d %d\n", len(back), lost, (time.Duration(longest) * pace).Milliseconds())
	return err
}

// send sends what a connection takes for some time and prints how many bytes a
// second that was. A server of ours takes them after a line of its own.
func send(args []string, out io.Writer) error {
	if len(args) != 2 {
		return errors.New("usage: probe send address:port duration")
	}
	d, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	c, err := net.DialTimeout("tcp", args[0], 5*time.Second)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }() // nothing is lost with it
	if _, err := io.WriteString(c, "sink\n"); err != nil {
		return err
	}
	block := make([]byte, 256<<10)
	start, total := time.Now(), 0
	for time.Since(start) < d {
		if err := c.SetWriteDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		n, err := c.Write(block)
		if err != nil {
			return err
		}
		total += n
	}
	_, err = fmt.Fprintf(out, "%.0f\n", float64(total)/time.Since(start).Seconds())
	return err
}

// free says whether a program could listen on proto and address now.
func free(args []string, out io.Writer) error {
	if len(args) != 2 {
		return errors.New("usage: probe free tcp|udp address:port")
	}
	var c io.Closer
	var err error
	if strings.HasPrefix(args[0], "udp") {
		c, err = net.ListenPacket(args[0], args[1])
	} else {
		c, err = net.Listen(args[0], args[1])
	}
	if err != nil {
		return json.NewEncoder(out).Encode(answer{Err: word(err)})
	}
	return c.Close()
}

// word names an error as tests compare it.
func word(err error) string {
	var dns *net.DNSError
	var ne net.Error
	switch {
	case errors.As(err, &dns):
		return "no such name"
	case errors.As(err, &ne) && ne.Timeout():
		return "timeout"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EADDRNOTAVAIL):
		return "unreachable"
	case errors.Is(err, syscall.EMSGSIZE):
		return "too long"
	case errors.Is(err, syscall.EADDRINUSE):
		return "in use"
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return "reset"
	}
	return err.Error()
}
