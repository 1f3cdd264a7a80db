package edgews

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tidemark/schema"
)

// Sizes of a wire's buffers, in bytes.
const (
	// landing is where a wire waits for bytes: a connection that is idle needs no more.
	landing = 512
	// gulp is what it reads at once while there is more: 8 KiB are some 100 tokens.
	gulp = 8 << 10
	// maxBehind bounds the control frames behind a write that blocks.
	maxBehind = 16 << 10
	// keptOut is the largest buffer of a write that is used again.
	keptOut = 256 << 10
)

// upgrade hands a wire to the WebSocket library, in place of the connection that it hijacks.
type upgrade struct {
	http.ResponseWriter
	wire *wire
	// status is that of the library's refusal; 0 where it has not refused.
	status int
}

// WriteHeader implements [http.ResponseWriter].
func (u *upgrade) WriteHeader(status int) {
	if status < http.StatusBadRequest {
		u.ResponseWriter.WriteHeader(status)
		return
	}
	u.status = status
}

// Write implements [http.ResponseWriter]: the library's refusal of a handshake gets the form of all others.
func (u *upgrade) Write(p []byte) (int, error) {
	if u.status == 0 {
		return u.ResponseWriter.Write(p)
	}
	answer(u.ResponseWriter, u.status, problem{
		Error: http.StatusText(u.status), Details: "The request is no WebSocket handshake: " + strings.TrimSpace(string(p)), Code: schema.Code_CODE_INVALID_MESSAGE.Word(),
	})
	return len(p), nil
}

// Hijack implements [http.Hijacker].
func (u *upgrade) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(u.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	u.wire = &wire{Conn: c}
	if n := rw.Reader.Buffered(); n > 0 {
		p, err := rw.Reader.Peek(n)
		if err != nil {
			return nil, nil, err
		}
		u.wire.unread(p)
	}
	// The server's buffers of 4 KiB are left to the collector. The library reads frames that are out of the ordinary, and writes control frames: neither needs much.
	u.wire.br = bufio.NewReaderSize(u.wire, 256)
	return u.wire, bufio.NewReadWriter(u.wire.br, bufio.NewWriterSize(u.wire, 256)), nil
}

// wire is the connection below a WebSocket, and does what is done for every token; the library does the rest: handshakes, control frames, fragments, compression, the rules.
//
// Reading, it gives out messages that arrived whole in one frame, without the library's locks, and holds a large buffer only while there is something in it.
//
// Writing, it gathers the frames of many messages into one write. And control frames, which the library also writes from the reading side and with a timeout that closes the connection,
// never wait for a peer that does not read: they are written in the background, or go along behind a write that blocks.
//
// Closing, it keeps the library's answer to the peer's close frame, and the connection that the library would close there, until [wire.leave]: what was accepted is answered before, and the
// answer is written, not cut off (RFC 6455, section 5.5.1).
type wire struct {
	net.Conn
	// br is the library's reader on this wire.
	br *bufio.Reader

	// reads counts successful reads: any byte is a sign of life.
	reads atomic.Int64
	// filling: message waits for bytes.
	filling atomic.Bool

	// Owned by whoever reads: message, or the library.
	in    []byte // not yet read; in first, or in large
	first [landing]byte
	large *[gulp]byte // from gulps; nil while first is enough

	// failed: a read of the library failed. The library may read in Close while Receive looks at why its own read ended.
	failed atomic.Bool

	// background is the write of a control frame.
	background sync.WaitGroup

	mu sync.Mutex // guards all below
	// writing: somebody is in Conn.Write, and will write what is in out afterwards.
	writing bool
	out     []byte
	// gathering: the library is writing messages into gathered.
	gathering bool
	gathered  []byte
	// unfinished is what is still to come of the frame that is being gathered, in bytes.
	unfinished int
	// parting is the close frame that the library has for the peer, by itself; nil where there is none.
	parting []byte
	// leaving: the connection is being closed, and nothing is kept any more.
	leaving bool
	// closing: a close frame was written, and nothing follows it.
	closing bool
	// done is closed when writing ends; nil while nobody waits for that.
	done chan struct{}
	err  error
}

var (
	errBehind  = errors.New("edgews: the peer sends pings and does not read")
	errClosing = errors.New("edgews: the connection is being closed")
)

// Read implements [net.Conn], for the library.
func (w *wire) Read(p []byte) (int, error) {
	if len(w.in) > 0 {
		n := copy(p, w.in)
		w.take(n)
		return n, nil
	}
	n, err := w.Conn.Read(p)
	if n > 0 {
		w.reads.Add(1)
	}
	if err != nil {
		w.failed.Store(true)
	}
	return n, err
}

// take removes n bytes from in.
func (w *wire) take(n int) {
	w.in = w.in[n:]
	if len(w.in) == 0 && w.large != nil {
		gulps.Put(w.large)
		w.large, w.in = nil, nil
	}
}

// unread puts bytes before those in in.
func (w *wire) unread(p []byte) {
	w.in = append(append(make([]byte, 0, len(p)+len(w.in)), p...), w.in...)
	if w.large != nil {
		gulps.Put(w.large)
		w.large = nil
	}
}

// fill reads more, waiting for it. There is room in a large buffer for what is in in and more.
func (w *wire) fill() error {
	var to []byte
	if len(w.in) == 0 {
		to = w.first[:]
	} else {
		if w.large == nil {
			w.large = gulps.Get().(*[gulp]byte) //nolint:errcheck // the pool holds nothing else
		}
		to = w.large[copy(w.large[:], w.in):]
		w.in = w.large[:len(w.in)]
	}
	n, err := w.Conn.Read(to)
	if n > 0 {
		w.reads.Add(1)
		if len(w.in) == 0 {
			w.in = to[:n]
		} else {
			w.in = w.large[:len(w.in)+n]
		}
		return nil
	}
	return err
}

// errNotOrdinary says that the next frame is not an ordinary one: the library reads it.
var errNotOrdinary = errors.New("edgews: not an ordinary frame")

// message appends the next message to b, where it is one whole frame with this first byte and small enough. It is not to be called while the library reads; closed tells it to leave that to
// the library for good.
func (w *wire) message(b []byte, first byte, closed *atomic.Bool) ([]byte, error) {
	if n := w.br.Buffered(); n > 0 {
		// What the library has read ahead.
		p, err := w.br.Peek(n)
		if err != nil {
			return b, err
		}
		w.unread(p)
		if _, err := w.br.Discard(n); err != nil {
			return b, err
		}
	}
	for {
		if len(w.in) >= 2 {
			if w.in[0] != first || w.in[1]&0x80 == 0 {
				return b, errNotOrdinary
			}
			head, size := 6, int(w.in[1]&0x7f)
			if size == 126 && len(w.in) >= 4 {
				head, size = 8, int(binary.BigEndian.Uint16(w.in[2:]))
			}
			switch whole := head + size; {
			case size == 127 && head == 6, whole > gulp:
				return b, errNotOrdinary
			case size == 126 && head == 6:
				// The length is still to come.
			case len(w.in) >= whole:
				b = unmask(b, w.in[head:whole], w.in[head-4:head])
				w.take(whole)
				return b, nil
			}
		}
		w.filling.Store(true)
		if closed.Load() {
			// Whoever set it may have done so before it could see that somebody waits here.
			w.filling.Store(false)
			return b, errClosing
		}
		err := w.fill()
		w.filling.Store(false)
		if err != nil {
			return b, err
		}
	}
}

// unmask appends a client's payload, which is masked with a key of four bytes (RFC 6455, section 5.3).
func unmask(b, payload, key []byte) []byte {
	from := len(b)
	b = append(b, payload...)
	k := uint64(binary.LittleEndian.Uint32(key))
	k |= k << 32
	p := b[from:]
	for len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, binary.LittleEndian.Uint64(p)^k)
		p = p[8:]
	}
	for i := range p {
		p[i] ^= key[i&3]
	}
	return b
}

// Write implements [net.Conn], for the library. It is called with whole control frames, and while gathering with parts of messages, too.
func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	last := w.unfinished == 0 && p[0]&0x0f == opClose
	if last && w.leaving {
		// The connection is closed next, so this is waited for.
		w.mu.Unlock()
		return len(p), w.send(p, true)
	}
	defer w.mu.Unlock()
	switch {
	case w.err != nil:
		return 0, w.err
	case last:
		w.parting = append([]byte(nil), p...)
	case w.gathering:
		if w.unfinished == 0 {
			w.unfinished = frameBytes(p)
		}
		w.unfinished -= len(p)
		w.gathered = append(w.gathered, p...)
	case len(w.out)+len(p) > maxBehind:
		return 0, errBehind
	case w.writing:
		w.out = append(w.out, p...)
	default:
		w.writing = true
		frame := append([]byte(nil), p...)
		w.background.Go(func() {
			// The error stays for the next who writes.
			_ = w.writeOut(frame)
		})
	}
	return len(p), nil
}

// frameBytes is how long the server's frame is whose head p begins with, head and payload.
func frameBytes(p []byte) int {
	switch n := int(p[1] & 0x7f); n {
	case 126:
		return 4 + int(binary.BigEndian.Uint16(p[2:]))
	case 127:
		return 10 + int(binary.BigEndian.Uint64(p[2:]))
	default:
		return 2 + n
	}
}

// gather appends to b what the library writes while write runs.
func (w *wire) gather(b []byte, write func() error) ([]byte, error) {
	w.mu.Lock()
	w.gathering, w.gathered, w.unfinished = true, b, 0
	w.mu.Unlock()
	err := write()
	w.mu.Lock()
	defer w.mu.Unlock()
	b = w.gathered
	w.gathering, w.gathered, w.unfinished = false, nil, 0
	return b, err
}

// opClose is the opcode of a close frame (RFC 6455, section 5.2).
const opClose = 8

// appendFrame appends a server's data frame: whole, not masked.
func appendFrame(b []byte, opcode byte, payload []byte) []byte {
	b = append(b, 0x80|opcode)
	switch n := len(payload); {
	case n < 126:
		b = append(b, byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 127), uint64(n))
	}
	return append(b, payload...)
}

// send writes p, whole frames, and waits until it is written. Behind the last there is no other.
func (w *wire) send(p []byte, last bool) error {
	w.mu.Lock()
	for w.writing {
		// A control frame is on its way.
		done := w.wait()
		w.mu.Unlock()
		<-done
		w.mu.Lock()
	}
	if w.closing && w.err == nil {
		w.err = errClosing
	}
	if w.err != nil {
		defer w.mu.Unlock()
		return w.err
	}
	w.writing, w.closing = true, last
	w.mu.Unlock()
	return w.writeOut(p)
}

// writeOut writes p, and what came behind it meanwhile. The caller has set writing.
func (w *wire) writeOut(p []byte) error {
	for {
		_, err := w.Conn.Write(p)
		w.mu.Lock()
		if err != nil && w.err == nil {
			w.err = err
		}
		if w.err != nil || len(w.out) == 0 {
			w.writing = false
			if w.done != nil {
				close(w.done)
				w.done = nil
			}
			defer w.mu.Unlock()
			return w.err
		}
		p = w.out
		w.out = nil
		w.mu.Unlock()
	}
}

// wait returns what will be closed when the write that is under way has ended; nil where there is none. The caller holds mu.
func (w *wire) wait() chan struct{} {
	if w.writing && w.done == nil {
		w.done = make(chan struct{})
	}
	return w.done
}

// leave says that the connection is being closed: from now on the library's close frame is written when it comes, and Close closes. It returns the one that came before.
func (w *wire) leave() (parting []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leaving = true
	return w.parting
}

// parted says whether the library has had its last word: it writes nothing more.
func (w *wire) parted() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.parting != nil
}

// lost says whether the peer cannot be written to.
func (w *wire) lost() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err != nil
}

// Close implements [net.Conn]. It does not wait for what is being written: who cares for that has waited before.
func (w *wire) Close() error {
	w.mu.Lock()
	if w.parting != nil && !w.leaving {
		// The library has read the peer's close frame and takes its answer to be on the way.
		w.mu.Unlock()
		return nil
	}
	if w.err == nil {
		w.err = net.ErrClosed
	}
	w.mu.Unlock()
	err := w.Conn.Close()
	w.background.Wait()
	return err
}

// linger ends what is written, and gives the peer so long to read it and to hang up: what it sent and nobody has read would make the system reset the connection, and with it drop what is on
// the way.
func (w *wire) linger(most time.Duration) {
	half, ok := w.Conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	_ = w.SetReadDeadline(time.Now().Add(most)) // it fails where the connection is closed
	_, _ = io.Copy(io.Discard, w.Conn)          // however it ends, it has ended
}

// cut closes the connection at once.
func (w *wire) cut() { _ = w.Conn.Close() } // nothing is expected of it any more

// interrupt makes a read that waits return.
func (w *wire) interrupt() { _ = w.SetReadDeadline(time.Unix(1, 0)) } // it fails where the connection is closed

// Buffers that are in use while there is something in them.
var (
	gulps = sync.Pool{New: func() any { return new([gulp]byte) }}              //nolint:gochecknoglobals // a pool has no state of its own
	outs  = sync.Pool{New: func() any { return new(make([]byte, 0, 16<<10)) }} //nolint:gochecknoglobals // a pool has no state of its own
)
