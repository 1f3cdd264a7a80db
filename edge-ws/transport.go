package edgews

import (
	"compress/flate"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"

	"tidemark/internal/gateway"
	"tidemark/schema"
)

// closeTimeout is how long the peer may take to answer a close frame.
const closeTimeout = 5 * time.Second

// lastWrite is how long a dead peer's socket may take to take a close frame.
const lastWrite = time.Second

// lingering is how long a peer that was sent the last close frame may take to hang up.
const lingering = time.Second

// keptBuffer is the largest buffer that a connection keeps between messages, in bytes.
const keptBuffer = 4 << 10

// transport implements [gateway.Transport] on a WebSocket.
type transport struct {
	// Static after construction.
	c    *websocket.Conn
	wire *wire
	typ  websocket.MessageType
	// deflate: the peer asked for compression.
	deflate bool
	// ctx has the values of the request and no end: the library arms a timer for every call whose context has one. What is blocked is let go by Close.
	ctx context.Context

	// quick, of capacity 1, is full while Receive reads without the library.
	quick chan struct{}

	// Owned by Receive.
	buf []byte // empty, of at most keptBuffer

	// Shared.
	turns   atomic.Int64 // odd while Receive waits for the peer
	sending atomic.Bool
	closing atomic.Bool // Close has the connection
	broken  atomic.Bool // the peer cannot be told anything more
	// violated: what the peer sends are no frames any more, so its answer to a close frame would not be found among them.
	violated atomic.Bool
	// status is the close code where the refusal's own would be less exact; 0 otherwise.
	status atomic.Int64
	dead   atomic.Pointer[schema.Refusal]

	// ending: Close was called; over is closed when it has done its work.
	ending atomic.Bool
	over   chan struct{}
}

func newTransport(ctx context.Context, c *websocket.Conn, w *wire, text, deflate bool) *transport {
	t := &transport{c: c, wire: w, typ: websocket.MessageBinary, deflate: deflate, ctx: ctx, quick: make(chan struct{}, 1), over: make(chan struct{})}
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
	b, err := t.receiveQuickly()
	if err == errNotOrdinary { //nolint:errorlint // it is returned as it is
		b, err = t.receive()
	}
	t.turns.Add(1)
	switch _, refused := errors.AsType[*schema.Refusal](err); {
	case refused:
		return nil, err
	case err != nil:
		return nil, t.ended(err)
	case t.typ == websocket.MessageText && !utf8.Valid(b):
		t.status.Store(int64(websocket.StatusInvalidFramePayloadData))
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The text message is not valid UTF-8.")
	}
	return b, nil
}

// keep holds on to the buffer of a message for the next one, unless it is large: the connection may be idle for hours.
func (t *transport) keep(b []byte) {
	if cap(b) > keptBuffer {
		b = nil
	}
	t.buf = b[:0]
}

// receiveQuickly takes a message that comes whole in one frame, as those of tokens do, from the wire.
func (t *transport) receiveQuickly() ([]byte, error) {
	t.quick <- struct{}{}
	defer func() { <-t.quick }()
	if t.closing.Load() {
		return nil, errClosing
	}
	b, err := t.wire.message(t.buf, 0x80|byte(t.typ), &t.closing)
	t.keep(b)
	return b, err
}

// receive lets the library read the next message, whatever it is.
func (t *transport) receive() ([]byte, error) {
	typ, r, err := t.c.Reader(t.ctx)
	if err != nil {
		return nil, t.judged(err)
	}
	if typ != t.typ {
		t.status.Store(int64(websocket.StatusUnsupportedData))
		if t.typ == websocket.MessageText {
			return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "This connection speaks text; a binary message came.")
		}
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "This connection speaks binary; a text message came. For text offer the subprotocol %s.", SubprotocolJSON)
	}
	b := t.buf
	for {
		if len(b) == cap(b) {
			b = slices.Grow(b, max(len(b), landing))
		}
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		switch {
		case len(b) > schema.MaxFrameBytes:
			// Whatever is left of it is not read.
			return nil, schema.Refuse(schema.Code_CODE_TOO_LARGE, "The message has more than %d bytes, which is the most that is allowed.", schema.MaxFrameBytes)
		case err == io.EOF && t.wire.failed.Load(): // the library returns it as it is
			// The library takes a connection that ends within a message for the end of the message (v1.8.15, msgReader.Read).
			return nil, io.ErrUnexpectedEOF
		case err == io.EOF: // the library returns it as it is
			t.keep(b)
			return b, nil
		case err != nil:
			return nil, t.judged(err)
		}
	}
}

// judged is what the library's error says of the peer: that it closes, that it breaks the protocol, or nothing. Called by Receive.
func (t *transport) judged(err error) error {
	ce, closes := errors.AsType[websocket.CloseError](err)
	switch {
	case closes && utf8.ValidString(ce.Reason):
		return gateway.ErrPeerClosing
	case closes:
		return t.violation(websocket.StatusInvalidFramePayloadData, "the reason of the close frame is not valid UTF-8")
	case t.closing.Load():
		return err
	}
	// That is known of the bytes that came, whether or not the connection broke behind them.
	if _, is := errors.AsType[flate.CorruptInputError](err); is {
		return t.violation(websocket.StatusInvalidFramePayloadData, "the message is not compressed as it says")
	}
	if t.wire.failed.Load() || t.wire.lost() || errors.Is(err, net.ErrClosed) || errors.Is(err, errBehind) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	for inner := err; inner != nil; inner = errors.Unwrap(inner) {
		err = inner
	}
	return t.violation(websocket.StatusProtocolError, err.Error())
}

// violation is a refusal of what RFC 6455 does not allow: nothing is read any more, and the connection is closed with the code that the RFC has for it.
func (t *transport) violation(status websocket.StatusCode, what string) error {
	t.violated.Store(true)
	t.status.Store(int64(status))
	return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The client breaks the WebSocket protocol (RFC 6455): %s.", what)
}

// ended is what the error of a read means.
func (t *transport) ended(err error) error {
	if r := t.dead.Load(); r != nil {
		return r
	}
	if err == gateway.ErrPeerClosing { //nolint:errorlint // judged returns it as it is
		return err
	}
	t.broken.Store(true)
	// The library's error may be io.EOF inside, which would say that the peer still reads.
	return fmt.Errorf("edgews: the connection was lost: %v", err) //nolint:errorlint // see above
}

// Send implements [gateway.Transport].
func (t *transport) Send(_ context.Context, messages [][]byte) error {
	t.sending.Store(true)
	defer t.sending.Store(false)
	kept := outs.Get().(*[]byte) //nolint:errcheck // the pool holds nothing else
	b := *kept
	var err error
	compressed := t.deflate
	if compressed {
		b, err = t.wire.gather(b, func() error {
			for _, m := range messages {
				if err := t.c.Write(t.ctx, t.typ, m); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil && t.wire.parted() {
			// The peer closes, and the library writes no more; what is left goes as it is.
			b, err, compressed = b[:0], nil, false
		}
	}
	if !compressed {
		for _, m := range messages {
			b = appendFrame(b, byte(t.typ), m)
		}
	}
	if err == nil {
		err = t.wire.send(b, false)
	}
	if cap(b) <= keptOut {
		*kept = b[:0]
		outs.Put(kept)
	}
	if err != nil {
		t.broken.Store(true)
	}
	return err
}

// Close implements [gateway.Transport]. Where the peer has closed, it is answered with what it said.
func (t *transport) Close(code schema.Code, message string) {
	if t.ending.Swap(true) {
		<-t.over
		return
	}
	defer close(t.over)
	// It waits for what the wire does in the background.
	defer func() { _ = t.wire.Close() }() // it is closed already
	parting := t.wire.leave()
	if t.broken.Load() || t.sending.Load() {
		t.wire.cut()
		_ = t.c.CloseNow() // there is nothing to be lost
		return
	}
	status := websocket.StatusNormalClosure
	if code != schema.Code_CODE_UNSPECIFIED {
		status = websocket.StatusCode(code.Rule().Close)
	}
	if s := t.status.Load(); s != 0 {
		status = websocket.StatusCode(s)
	}
	// From here on the library reads: it waits for the peer's close frame.
	t.closing.Store(true)
	if t.wire.filling.Load() {
		t.wire.interrupt()
	}
	t.quick <- struct{}{}
	<-t.quick
	switch {
	case t.dead.Load() != nil:
		// No answer is to be expected, but it may be read one day why the connection ended.
		t.part(closeFrame(status, reason(code, message)), lastWrite, 0)
	case t.violated.Load():
		t.part(closeFrame(status, reason(code, message)), closeTimeout, lingering)
	case parting != nil:
		t.part(parting, closeTimeout, lingering)
	default:
		// The library's own timeouts do not cover the rest of a message that stands before that frame, nor a wire that waits for its turn.
		_ = t.wire.SetDeadline(time.Now().Add(closeTimeout)) // it fails where the connection is closed
		_ = t.c.Close(status, reason(code, message))         // a peer that does not answer is closed all the same
	}
}

// part ends the connection behind one last frame, which may take so long to be written, and then so long to be read.
func (t *transport) part(frame []byte, written, read time.Duration) {
	_ = t.wire.SetWriteDeadline(time.Now().Add(written)) // it fails where the connection is closed
	if t.wire.send(frame, true) == nil && read > 0 {
		t.wire.linger(read)
	}
	t.wire.cut()
	_ = t.c.CloseNow() // there is nothing to be lost
}

// closeFrame is a close frame with a code and a reason.
func closeFrame(status websocket.StatusCode, reason string) []byte {
	return appendFrame(nil, opClose, append([]byte{byte(status >> 8), byte(status)}, reason...))
}

// maxReason is what a close frame has room for, in bytes (RFC 6455, section 5.5).
const maxReason = 123

// reason is a close frame's reason: the code's word, and as much of the sentence as there is room for; of an end without a fault, what there is to be said about it.
func reason(code schema.Code, message string) string {
	s := message
	if code != schema.Code_CODE_UNSPECIFIED {
		s = code.Word() + ": " + message
	}
	if len(s) <= maxReason {
		return s
	}
	end := maxReason - len("…")
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + "…"
}
