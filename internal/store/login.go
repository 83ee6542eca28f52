package store

import (
	"context"
	"errors"
	"strings"
	"sync"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// login keeps the token that etcd gives for a user's password.
//
// etcd's client could do so, but logs in when it is made, which fails while
// etcd is away; for each stream, which costs the server some 60 ms of bcrypt; and
// with the old token, which etcd 3.4 refuses once that has run out.
type login struct {
	client         *clientv3.Client // set before the first call
	user, password string

	mu    sync.Mutex
	token string
}

func (l *login) get() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.token
}

func (l *login) set(token string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.token = token
}

const authService = "/etcdserverpb.Auth"

// GetRequestMetadata adds the token to every request but the login.
func (l *login) GetRequestMetadata(_ context.Context, uri ...string) (map[string]string, error) {
	if t := l.get(); t != "" && (len(uri) == 0 || !strings.HasSuffix(uri[0], authService)) {
		return map[string]string{rpctypes.TokenFieldNameGRPC: t}, nil
	}
	return nil, nil
}

// RequireTransportSecurity leaves it to the operator whether there is TLS.
func (l *login) RequireTransportSecurity() bool { return false }

// intercept logs in before the first request. A token that the server has
// forgotten is dropped; the client repeats a request that failed for that.
func (l *login) intercept(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if strings.HasPrefix(method, authService) {
		return next(ctx, method, req, reply, cc, opts...)
	}
	if l.get() == "" {
		resp, err := l.client.Authenticate(ctx, l.user, l.password)
		if err != nil && !errors.Is(err, rpctypes.ErrAuthNotEnabled) {
			return err
		}
		if err == nil {
			l.set(resp.Token)
		}
	}
	err := next(ctx, method, req, reply, cc, opts...)
	if e := rpctypes.Error(err); errors.Is(e, rpctypes.ErrInvalidAuthToken) || errors.Is(e, rpctypes.ErrAuthOldRevision) {
		l.set("")
	}
	return err
}
