package store

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
)

const (
	etcdPrefix = "/weft/v1/"

	dialTime = 2 * time.Second // for one connection
	// callTime bounds a call whose context does not: long enough for an
	// election, short enough that the engine gets a reason and not silence.
	callTime = 5 * time.Second
	// A member that no longer answers is given up after pingTime and
	// pingTimeout; gRPC does not ping more often than every 10 s.
	pingTime    = 10 * time.Second
	pingTimeout = 3 * time.Second
	// redialTime is the longest pause between two attempts to connect. gRPC's
	// own is two minutes, which every host would be late by.
	redialTime = 2 * time.Second
)

// Etcd is records in an etcd cluster, which hosts share.
type Etcd struct {
	client *clientv3.Client
	at     string // its members, for people
	prefix string
	log    logrus.FieldLogger
}

// Check says what is wrong with it, as far as that shows without etcd.
func (c EtcdConfig) Check() error {
	_, err := c.client()
	return err
}

// OpenEtcd returns the records of a cluster. It does not connect: a host
// starts, and its containers run, also while etcd is away. What is wrong with
// an address, a certificate or a password is said by the calls.
func OpenEtcd(c EtcdConfig) (*Etcd, error) {
	if c.Log == nil {
		return nil, errors.New("open store: no log")
	}
	cc, err := c.client()
	if err != nil {
		return nil, fmt.Errorf("open store %q: %w", c.Endpoints, err)
	}
	cc.Logger = zap.NewNop() // what it says is in the errors, or repeats every second
	cc.DialTimeout = dialTime
	cc.DialKeepAliveTime, cc.DialKeepAliveTimeout = pingTime, pingTimeout
	cc.DialOptions = []grpc.DialOption{
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: redialTime},
			MinConnectTimeout: dialTime,
		}),
		grpc.WithStatsHandler(watchCalls{}),
		grpc.WithChainUnaryInterceptor(noteCall),
	}
	login := &login{user: c.User, password: c.Password}
	if c.User != "" {
		cc.DialOptions = append(cc.DialOptions, grpc.WithPerRPCCredentials(login), grpc.WithChainUnaryInterceptor(login.intercept))
	}
	client, err := clientv3.New(cc)
	if err != nil {
		return nil, fmt.Errorf("open store %q: %w", c.Endpoints, err)
	}
	login.client = client
	e := &Etcd{client: client, at: c.Endpoints, prefix: c.Prefix, log: c.Log}
	if e.prefix == "" {
		e.prefix = etcdPrefix
	}
	return e, nil
}

// Close ends the connections, and every call.
func (e *Etcd) Close() error {
	if err := e.client.Close(); err != nil && !errors.Is(err, context.Canceled) { // which is how it says that it is closed
		return fmt.Errorf("close store %s: %w", e.at, err)
	}
	return nil
}

// List returns the records whose key starts with prefix, in order of key.
func (e *Etcd) List(ctx context.Context, prefix string) ([]Record, error) {
	out, _, err := e.list(ctx, prefix)
	return out, err
}

// list is List, and the revision of the store at which it is true.
func (e *Etcd) list(ctx context.Context, prefix string) (out []Record, rev int64, err error) {
	var resp *clientv3.GetResponse
	err = e.read(ctx, func(ctx context.Context) (err error) {
		resp, err = e.client.Get(ctx, e.prefix+prefix, clientv3.WithPrefix())
		return err
	})
	if err != nil {
		return nil, 0, fmt.Errorf("list records %s*: %w", prefix, err)
	}
	for _, kv := range resp.Kvs {
		out = append(out, e.record(kv.Key, kv.Value, kv.ModRevision))
	}
	return out, resp.Header.Revision, nil
}

func (e *Etcd) record(key, value []byte, rev int64) Record {
	return Record{Key: strings.TrimPrefix(string(key), e.prefix), Value: value, Rev: uint64(rev)}
}

// Get returns the record under key, or an error that matches [ErrNotFound].
func (e *Etcd) Get(ctx context.Context, key string) (Record, error) {
	var resp *clientv3.GetResponse
	err := e.read(ctx, func(ctx context.Context) (err error) {
		resp, err = e.client.Get(ctx, e.prefix+key)
		return err
	})
	if err == nil && len(resp.Kvs) == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return Record{}, fmt.Errorf("get record %s: %w", key, err)
	}
	return e.record(resp.Kvs[0].Key, resp.Kvs[0].Value, resp.Kvs[0].ModRevision), nil
}

// Put writes a record and returns it with its new revision. With Rev 0 there
// must be no record under the key ([ErrExists]); with another Rev there must be
// exactly that one ([ErrConflict], [ErrNotFound]).
func (e *Etcd) Put(ctx context.Context, r Record) (Record, error) {
	if err := r.check(); err != nil {
		return Record{}, err
	}
	key := e.prefix + r.Key
	var resp *clientv3.TxnResponse
	err := e.write(ctx, func(ctx context.Context) (err error) {
		resp, err = e.client.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(key), "=", int64(r.Rev))). // 0 where there is none
			Then(clientv3.OpPut(key, string(r.Value))).
			Else(clientv3.OpGet(key, clientv3.WithKeysOnly())).Commit()
		return err
	})
	if err == nil && !resp.Succeeded {
		have := resp.Responses[0].GetResponseRange().Kvs
		switch {
		case r.Rev == 0:
			err = ErrExists
		case len(have) == 0:
			err = ErrNotFound
		default:
			err = fmt.Errorf("%w: revision %d, not %d", ErrConflict, have[0].ModRevision, r.Rev)
		}
	}
	if err != nil {
		return Record{}, fmt.Errorf("put record %s: %w", r.Key, err)
	}
	return Record{Key: r.Key, Value: r.Value, Rev: uint64(resp.Header.Revision)}, nil
}

// Delete removes the record under key; an absent one is success.
func (e *Etcd) Delete(ctx context.Context, key string) error {
	if err := e.delete(ctx, key); err != nil {
		return fmt.Errorf("delete record %s: %w", key, err)
	}
	return nil
}

// Remove deletes a record if it still has the revision of r, and fails with
// [ErrConflict] if it has another. An absent one is success. An uncertain Remove
// that comes late finds another revision, where Delete would not look.
func (e *Etcd) Remove(ctx context.Context, r Record) error {
	key := e.prefix + r.Key
	var resp *clientv3.TxnResponse
	err := e.write(ctx, func(ctx context.Context) (err error) {
		resp, err = e.client.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(key), "=", int64(r.Rev))).
			Then(clientv3.OpDelete(key)).
			Else(clientv3.OpGet(key, clientv3.WithKeysOnly())).Commit()
		return err
	})
	if err == nil && !resp.Succeeded {
		if have := resp.Responses[0].GetResponseRange().Kvs; len(have) > 0 {
			err = fmt.Errorf("%w: revision %d, not %d", ErrConflict, have[0].ModRevision, r.Rev)
		}
	}
	if err != nil {
		return fmt.Errorf("remove record %s: %w", r.Key, err)
	}
	return nil
}

// DeletePrefix removes every record whose key starts with prefix, at once.
func (e *Etcd) DeletePrefix(ctx context.Context, prefix string) error {
	if prefix == "" {
		return errNoPrefix
	}
	if err := e.delete(ctx, prefix, clientv3.WithPrefix()); err != nil {
		return fmt.Errorf("delete records %s*: %w", prefix, err)
	}
	return nil
}

func (e *Etcd) delete(ctx context.Context, key string, opts ...clientv3.OpOption) error {
	return e.write(ctx, func(ctx context.Context) error {
		_, err := e.client.Delete(ctx, e.prefix+key, opts...)
		return err
	})
}

func (e *Etcd) read(ctx context.Context, f func(context.Context) error) error {
	_, err := e.call(ctx, f)
	return err
}

func (e *Etcd) write(ctx context.Context, f func(context.Context) error) error {
	sent, err := e.call(ctx, f)
	if sent && err != nil && !refused(err) {
		return fmt.Errorf("%w: %w", ErrUncertain, err)
	}
	return err
}

// call carries out one request. sent reports whether any of it was handed to a
// connection.
func (e *Etcd) call(ctx context.Context, f func(context.Context) error) (sent bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if e.client.Ctx().Err() != nil {
		return false, ErrClosed
	}
	var c call
	bounded, cancel := context.WithTimeout(context.WithValue(ctx, callKey{}, &c), callTime)
	defer cancel()
	err = f(bounded)
	switch {
	case err == nil:
		return true, nil
	case e.client.Ctx().Err() != nil:
		return c.sent.Load(), ErrClosed
	case refused(err):
		return true, fmt.Errorf("etcd at %s: %w", e.at, err)
	case ctx.Err() != nil: // the caller's; etcd's error may hide it
		err = ctx.Err()
	}
	if c.sent.Load() {
		return true, fmt.Errorf("etcd at %s does not answer: %w", e.at, err)
	}
	return false, fmt.Errorf("etcd at %s cannot be reached, check that it runs there, and the TLS settings: %s: %w", e.at, reason(c.err), err)
}

// refused reports whether an error is etcd's own word that it did not do what
// it was asked. Where it is not, as when a leader was lost, it may have.
func refused(err error) bool {
	var s interface{ Code() codes.Code } // of etcd's errors
	if !errors.As(err, &s) {
		return false
	}
	switch s.Code() {
	case codes.InvalidArgument, codes.NotFound, codes.PermissionDenied, codes.Unauthenticated,
		codes.FailedPrecondition, codes.OutOfRange, codes.ResourceExhausted:
		return true
	default:
		return false
	}
}

// reason is why there is no connection, without the layers around it.
func reason(err error) string {
	text := status.Convert(err).Message()
	for _, layer := range []string{"latest balancer error: ", "desc = ", "transport: ", "Error while dialing: "} {
		if _, inner, ok := strings.Cut(text, layer); ok {
			text = inner
		}
		if inner, err := strconv.Unquote(text); err == nil {
			text = inner
		}
	}
	return text
}

// call is what becomes of a request on its way through gRPC, which etcd's
// client does not tell: whether a failed write has certainly not happened, and
// why there is no connection.
type call struct {
	sent atomic.Bool
	err  error // gRPC's last
}

type callKey struct{}

// noteCall is below the client's own retries, which replace gRPC's errors by
// that of the context.
func noteCall(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := next(ctx, method, req, reply, cc, opts...)
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		if _, ok := status.FromError(err); ok {
			c.err = err
		}
	}
	return err
}

// watchCalls notes that a request was handed to a connection.
type watchCalls struct{}

func (watchCalls) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutHeader); !ok {
		return
	}
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		c.sent.Store(true)
	}
}

// TagRPC leaves the login out, which is no write.
func (watchCalls) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	if strings.HasPrefix(info.FullMethodName, authService) {
		return context.WithValue(ctx, callKey{}, nil)
	}
	return ctx
}

func (watchCalls) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (watchCalls) HandleConn(context.Context, stats.ConnStats)                       {}
