package plugin

import (
	"bytes"
	"net/http/httptest"
	"testing"
)

// ServeOnce answers one request without a socket, which fuzzing is too fast
// for.
func ServeOnce(t *testing.T, m *Mux, path string, body []byte) (int, []byte) {
	t.Helper()
	w := httptest.NewRecorder()
	m.serve(t.Context(), w, httptest.NewRequestWithContext(t.Context(), "POST", path, bytes.NewReader(body)))
	return w.Code, w.Body.Bytes()
}
