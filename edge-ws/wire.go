package edgews

import (
	"bufio"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// upgrade hands a wire to the WebSocket library, in place of the connection that it hijacks.
type upgrade struct {
	http.ResponseWriter
	wire *wire
}

// Hijack implements [http.Hijacker].
func (u *upgrade) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(u.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	u.wire = &wire{Conn: c}
	// The library flushes after each frame, so its writer needs to hold no more than a control frame.
	return u.wire, bufio.NewReadWriter(rw.Reader, bufio.NewWriterSize(u.wire, 256)), nil
}

// wire is the connection below a WebSocket. It gathers the frames of many messages into one write, where the library makes one for each frame. And control frames, which the library also
// writes from the reading side and with a timeout that closes the connection, never wait for a peer that does not read: they are written in the background, or go along behind a write
// that blocks.
type wire struct {
	net.Conn

	// reads counts successful reads: any byte is a sign of life.
	reads atomic.Int64
	// background is the write of a control frame.
	background sync.WaitGroup

	mu sync.Mutex // guards all below
	// gathering: Send is writing messages, and will flush.
	gathering bool
	// writing: somebody is in Conn.Write, and will write what is in buf afterwards.
	writing bool
	buf     []byte
	// done is closed when writing ends; nil while nobody waits for that.
	done chan struct{}
	err  error
}

// maxBehind bounds the control frames behind a write that blocks, in bytes.
const maxBehind = 16 << 10

var errBehind = errors.New("edgews: the peer sends pings and does not read")

func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if n > 0 {
		w.reads.Add(1)
	}
	return n, err
}

// Write implements [net.Conn]. It is called with whole frames.
func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.err != nil:
		return 0, w.err
	case !w.gathering && len(w.buf)+len(p) > maxBehind:
		return 0, errBehind
	case w.gathering || w.writing:
		w.buf = append(w.buf, p...)
	default:
		w.writing = true
		frame := append([]byte(nil), p...)
		w.background.Go(func() {
			// The error stays for the next who writes.
			_ = w.writeOut(frame) //nolint:errcheck // see above
		})
	}
	return len(p), nil
}

// lastWrite is how long a close frame may take to be written.
const lastWrite = time.Second

// Close waits a moment for what is being written, which may be a close frame. It implements [net.Conn].
func (w *wire) Close() error {
	w.mu.Lock()
	done := w.wait()
	w.mu.Unlock()
	if done != nil {
		t := time.NewTimer(lastWrite)
		select {
		case <-done:
		case <-t.C:
		}
		t.Stop()
	}
	w.mu.Lock()
	if w.err == nil {
		w.err = net.ErrClosed
	}
	w.mu.Unlock()
	err := w.Conn.Close()
	w.background.Wait()
	return err
}

// cut closes the connection at once.
func (w *wire) cut() { _ = w.Conn.Close() } //nolint:errcheck // nothing is expected of it any more

// wait returns what will be closed when the write that is under way has ended; nil where there is none. The caller holds mu.
func (w *wire) wait() chan struct{} {
	if w.writing && w.done == nil {
		w.done = make(chan struct{})
	}
	return w.done
}

// gather begins to gather what is written, until flush.
func (w *wire) gather() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gathering = true
	if w.buf == nil {
		w.buf = *buffers.Get().(*[]byte) //nolint:errcheck // the pool holds nothing else
	}
}

// flush writes what was gathered, and waits until it is written.
func (w *wire) flush() error {
	w.mu.Lock()
	w.gathering = false
	if w.writing {
		// A control frame is being written. Whoever does that writes the rest, too.
		done := w.wait()
		w.mu.Unlock()
		<-done
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.err
	}
	p := w.buf
	w.buf = nil
	w.writing = true
	w.mu.Unlock()
	err := w.writeOut(p)
	release(p)
	return err
}

// writeOut writes p, and what came behind it meanwhile. The caller has set writing.
func (w *wire) writeOut(p []byte) error {
	for {
		_, err := w.Conn.Write(p)
		w.mu.Lock()
		if err != nil && w.err == nil {
			w.err = err
		}
		if w.err != nil || len(w.buf) == 0 || w.gathering {
			w.writing = false
			if w.done != nil {
				close(w.done)
				w.done = nil
			}
			defer w.mu.Unlock()
			return w.err
		}
		p = w.buf
		w.buf = nil
		w.mu.Unlock()
	}
}

// buffers are for what is gathered: an idle connection holds none.
var buffers = sync.Pool{New: func() any { return new(make([]byte, 0, 4<<10)) }} //nolint:gochecknoglobals // a pool has no state of its own

func release(b []byte) {
	if c := cap(b); c >= 4<<10 && c <= 256<<10 {
		buffers.Put(new(b[:0]))
	}
}
