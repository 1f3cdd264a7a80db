package edgews

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"

	"tidemark/internal/gateway"
	"tidemark/schema"
)

// closeTimeout is how long the peer may take to answer a close frame.
const closeTimeout = 5 * time.Second

// keptBuffer is the largest buffer that a connection keeps between messages, in bytes.
const keptBuffer = 16 << 10

// transport implements [gateway.Transport] on a WebSocket.
type transport struct {
	// Static after construction.
	c    *websocket.Conn
	wire *wire
	typ  websocket.MessageType
	// ctx has the values of the request and no end: the library arms a timer for every call whose context has one. What is blocked is let go by Close.
	ctx context.Context

	// Owned by Receive.
	buf []byte

	// Shared.
	turns   atomic.Int64 // odd while Receive waits for the peer
	sending atomic.Bool
	broken  atomic.Bool // the connection cannot tell the peer anything more
	// status is the close code where the refusal's own would be less exact; 0 otherwise.
	status atomic.Int64
	dead   atomic.Pointer[schema.Refusal]

	closed sync.Once
}

func newTransport(ctx context.Context, c *websocket.Conn, w *wire, text bool) *transport {
	t := &transport{c: c, wire: w, typ: websocket.MessageBinary, ctx: context.WithoutCancel(ctx)}
	if text {
		t.typ = websocket.MessageText
	}
	// Receive has the bound, and says it with a code.
	c.SetReadLimit(-1)
	return t
}

// Receive implements [gateway.Transport].
func (t *transport) Receive(context.Context) ([]byte, error) {
	t.turns.Add(1)
	b, err := t.receive()
	t.turns.Add(1)
	return b, err
}

func (t *transport) receive() ([]byte, error) {
	typ, r, err := t.c.Reader(t.ctx)
	if err != nil {
		return nil, t.ended(err)
	}
	if typ != t.typ {
		t.status.Store(int64(websocket.StatusUnsupportedData))
		if t.typ == websocket.MessageText {
			return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "This connection speaks text; a binary message came.")
		}
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "This connection speaks binary; a text message came. For text offer the subprotocol %s.", SubprotocolJSON)
	}
	b := t.buf[:0]
	if cap(b) == 0 || cap(b) > keptBuffer {
		b = make([]byte, 0, 512)
	}
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		t.buf = b
		if len(b) > schema.MaxFrameBytes {
			// Whatever is left of it is not read.
			return nil, schema.Refuse(schema.Code_CODE_TOO_LARGE, "The message has more than %d bytes, which is the most that is allowed.", schema.MaxFrameBytes)
		}
		if err == io.EOF { //nolint:errorlint // the library returns it as it is
			break
		}
		if err != nil {
			return nil, t.ended(err)
		}
	}
	if t.typ == websocket.MessageText && !utf8.Valid(b) {
		t.status.Store(int64(websocket.StatusInvalidFramePayloadData))
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The text message is not valid UTF-8.")
	}
	return b, nil
}

// ended is what the library's error means.
func (t *transport) ended(err error) error {
	if r := t.dead.Load(); r != nil {
		return r
	}
	t.broken.Store(true)
	if websocket.CloseStatus(err) != -1 {
		return gateway.ErrPeerClosed
	}
	return err
}

// Send implements [gateway.Transport].
func (t *transport) Send(_ context.Context, messages [][]byte) error {
	t.sending.Store(true)
	defer t.sending.Store(false)
	t.wire.gather()
	var errs error
	for _, m := range messages {
		// Into memory: this does not block.
		if err := t.c.Write(t.ctx, t.typ, m); err != nil {
			errs = err
			break
		}
	}
	if err := t.wire.flush(); err != nil {
		errs = errors.Join(errs, err)
	}
	if errs != nil {
		t.broken.Store(true)
	}
	return errs
}

// Close implements [gateway.Transport].
func (t *transport) Close(code schema.Code, message string) {
	t.closed.Do(func() {
		if t.broken.Load() || t.sending.Load() {
			t.wire.cut()
			_ = t.c.CloseNow() //nolint:errcheck // there is nothing to be lost
			return
		}
		status := websocket.StatusNormalClosure
		if code != schema.Code_CODE_UNSPECIFIED {
			status = websocket.StatusCode(code.Rule().Close)
		}
		if s := t.status.Load(); s != 0 {
			status = websocket.StatusCode(s)
		}
		if t.dead.Load() == nil {
			// The library's own timeout does not cover the rest of a message that stands before the peer's close frame.
			_ = t.wire.SetReadDeadline(time.Now().Add(closeTimeout)) //nolint:errcheck // it fails where the connection is closed
		}
		_ = t.c.Close(status, reason(code, message)) //nolint:errcheck // a peer that does not answer is closed all the same
	})
}

// maxReason is what a close frame has room for, in bytes (RFC 6455, section 5.5).
const maxReason = 123

// reason is a close frame's reason: the code's word, and as much of the sentence as there is room for.
func reason(code schema.Code, message string) string {
	if code == schema.Code_CODE_UNSPECIFIED {
		return ""
	}
	s := code.Word() + ": " + message
	if len(s) <= maxReason {
		return s
	}
	end := maxReason - len("…")
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + "…"
}
