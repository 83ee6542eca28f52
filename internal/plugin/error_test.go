package plugin

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestErrorIsOneLine: what another host says may be part of an error, and the
// engine prints it as it is.
func TestErrorIsOneLine(t *testing.T) {
	var got struct{ Err, Error string }
	if err := json.Unmarshal(encodeError(errors.New("host x\x1b[2J\u009b\nsecond\n")), &got); err != nil || got.Err != "host x?[2J?; second" || got.Err != got.Error {
		t.Errorf("%q, %v", got, err)
	}
	if err := json.Unmarshal(encodeError(errors.New(strings.Repeat("ü", 1<<16))), &got); err != nil || len(got.Err) > mostError+3 || !utf8.ValidString(got.Err) {
		t.Errorf("%d bytes, %v", len(got.Err), err)
	}
}
