package edgegrpc

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// pipeListener is a listener in memory.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return pipeAddr{} }

// dial gives the client's end.
func (l *pipeListener) dial(ctx context.Context) (*freezer, error) {
	a, b := newPipe()
	select {
	case l.conns <- b:
		return &freezer{Conn: a, thaw: make(chan struct{})}, nil
	case <-l.done:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// pipeBuffer is what a socket holds on its way, about.
const pipeBuffer = 64 << 10

// pipeEnd is one end of a connection in memory. Other than net.Pipe it has a buffer, as a socket does: both ends of an HTTP/2 connection may write before they read.
type pipeEnd struct {
	in, out *half
}

func newPipe() (net.Conn, net.Conn) {
	a, b := newHalf(), newHalf()
	return &pipeEnd{a, b}, &pipeEnd{b, a}
}

func (p *pipeEnd) Read(b []byte) (int, error)  { return p.in.read(b) }
func (p *pipeEnd) Write(b []byte) (int, error) { return p.out.write(b) }
func (p *pipeEnd) LocalAddr() net.Addr         { return pipeAddr{} }
func (p *pipeEnd) RemoteAddr() net.Addr        { return pipeAddr{} }

func (p *pipeEnd) Close() error {
	p.in.close(true)
	p.out.close(false)
	return nil
}

func (p *pipeEnd) SetDeadline(t time.Time) error {
	p.in.setDeadline(&p.in.readBy, t)
	p.out.setDeadline(&p.out.writeBy, t)
	return nil
}

func (p *pipeEnd) SetReadDeadline(t time.Time) error {
	p.in.setDeadline(&p.in.readBy, t)
	return nil
}

func (p *pipeEnd) SetWriteDeadline(t time.Time) error {
	p.out.setDeadline(&p.out.writeBy, t)
	return nil
}

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }

// half is one direction.
type half struct {
	mu              sync.Mutex
	changed         *sync.Cond
	buf             []byte
	deaf            bool // the reader has closed
	ended           bool // the writer has closed
	readBy, writeBy time.Time
}

func newHalf() *half {
	h := new(half)
	h.changed = sync.NewCond(&h.mu)
	return h
}

func passed(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (h *half) read(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.deaf:
			return 0, net.ErrClosed
		case passed(h.readBy):
			return 0, os.ErrDeadlineExceeded
		case len(h.buf) > 0:
			n := copy(b, h.buf)
			h.buf = h.buf[n:]
			h.changed.Broadcast()
			return n, nil
		case h.ended:
			return 0, io.EOF
		}
		h.changed.Wait()
	}
}

func (h *half) write(b []byte) (n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.ended:
			return n, net.ErrClosed
		case h.deaf:
			return n, io.ErrClosedPipe
		case passed(h.writeBy):
			return n, os.ErrDeadlineExceeded
		}
		m := min(len(b), pipeBuffer-len(h.buf))
		if m > 0 {
			h.buf = append(h.buf, b[:m]...)
			n, b = n+m, b[m:]
			h.changed.Broadcast()
		}
		if len(b) == 0 {
			return n, nil
		}
		h.changed.Wait()
	}
}

func (h *half) close(byReader bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if byReader {
		h.deaf = true
	} else {
		h.ended = true
	}
	h.changed.Broadcast()
}

func (h *half) setDeadline(which *time.Time, t time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	*which = t
	if d := time.Until(t); !t.IsZero() && d > 0 {
		time.AfterFunc(d, h.changed.Broadcast)
	}
	h.changed.Broadcast()
}

// freezer is a connection whose client can fall silent: it neither reads nor writes any more, and the peer is not told.
type freezer struct {
	net.Conn
	frozen atomic.Bool
	thaw   chan struct{}
	once   sync.Once
}

func (f *freezer) freeze() { f.frozen.Store(true) }

func (f *freezer) Read(b []byte) (int, error) {
	n, err := f.Conn.Read(b)
	if f.frozen.Load() {
		<-f.thaw
		return 0, net.ErrClosed
	}
	return n, err
}

func (f *freezer) Write(b []byte) (int, error) {
	if f.frozen.Load() {
		<-f.thaw
		return 0, net.ErrClosed
	}
	return f.Conn.Write(b)
}

func (f *freezer) Close() error {
	f.once.Do(func() { close(f.thaw) })
	return f.Conn.Close()
}
