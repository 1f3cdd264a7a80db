package edgegrpc

import (
	"encoding/base64"
	"io"
	"net/http"
	"strings"
)

// textPrefix begins the content types of gRPC-Web's text form, which the official JavaScript client uses for streams: the binary form in base64.
const textPrefix = "application/grpc-web-text"

// decodeText serves gRPC-Web's text form (PROTOCOL-WEB.md of gRPC, "Protocol differences"), which connect-go does not know, by its binary form.
func decodeText(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rest, ok := strings.CutPrefix(r.Header.Get("Content-Type"), textPrefix)
		if !ok {
			h.ServeHTTP(w, r)
			return
		}
		r = r.Clone(r.Context())
		r.Header.Set("Content-Type", "application/grpc-web"+rest)
		r.Header.Set("Accept", "application/grpc-web"+rest)
		r.Body = struct {
			io.Reader
			io.Closer
		}{base64.NewDecoder(base64.StdEncoding, r.Body), r.Body}
		t := &textWriter{ResponseWriter: w, contentType: textPrefix + rest}
		h.ServeHTTP(t, r)
		// What is left is the trailer; where it cannot be written, nobody waits for it.
		_ = t.FlushError()
	})
}

// textWriter encodes an answer in base64. Each flush ends in padding; clients take the pieces one behind the other.
type textWriter struct {
	http.ResponseWriter
	contentType string
	started     bool
	pending     []byte
}

// WriteHeader sends the header with the text form's content type. Where the library refused the request otherwise than by a status of gRPC, its answer is no message of the protocol, and goes as it is.
func (t *textWriter) WriteHeader(code int) {
	if !t.started {
		t.started = true
		if strings.HasPrefix(t.Header().Get("Content-Type"), "application/grpc-web") {
			t.Header().Set("Content-Type", t.contentType)
		}
		t.Header().Del("Content-Length")
	}
	t.ResponseWriter.WriteHeader(code)
}

// Write takes bytes of the binary form.
func (t *textWriter) Write(b []byte) (int, error) {
	if !t.started {
		t.WriteHeader(http.StatusOK)
	}
	if !strings.HasPrefix(t.Header().Get("Content-Type"), textPrefix) {
		return t.ResponseWriter.Write(b)
	}
	t.pending = append(t.pending, b...)
	if len(t.pending) < keepBytes {
		return len(b), nil
	}
	// A multiple of three needs no padding.
	whole := len(t.pending) / 3 * 3
	if err := t.encode(t.pending[:whole]); err != nil {
		return 0, err
	}
	t.pending = append(t.pending[:0], t.pending[whole:]...)
	return len(b), nil
}

// Flush is FlushError for those who do not ask.
func (t *textWriter) Flush() { _ = t.FlushError() }

// FlushError sends what was written.
func (t *textWriter) FlushError() error {
	if !t.started {
		t.WriteHeader(http.StatusOK)
	}
	if len(t.pending) > 0 {
		if err := t.encode(t.pending); err != nil {
			return err
		}
		t.pending = t.pending[:0]
	}
	return http.NewResponseController(t.ResponseWriter).Flush()
}

// Unwrap lets deadlines through.
func (t *textWriter) Unwrap() http.ResponseWriter { return t.ResponseWriter }

func (t *textWriter) encode(b []byte) error {
	_, err := io.WriteString(t.ResponseWriter, base64.StdEncoding.EncodeToString(b))
	return err
}
