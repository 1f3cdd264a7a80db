package world

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Link is a connection in memory. It has what a socket has and net.Pipe lacks, a buffer in each direction; and it has the faults of networks.
//
// Its methods may be called concurrently.
type Link struct {
	down, up *stream // towards the client, towards the server
	once     sync.Once
	onCut    func()
}

func newLink(buffer int) (l *Link, client, server net.Conn) {
	l = &Link{down: newStream(buffer), up: newStream(buffer)}
	l.down.full, l.up.full = l.Cut, l.Cut
	return l, &end{l, l.down, l.up}, &end{l, l.up, l.down}
}

// Cut breaks the connection: both sides get an error, and what was on its way is lost.
func (l *Link) Cut() {
	l.once.Do(func() {
		l.down.cut()
		l.up.cut()
		if l.onCut != nil {
			l.onCut()
		}
	})
}

// CutDown cuts the link once so many more bytes have gone to the client, which gets to read them: a cut inside a frame.
func (l *Link) CutDown(bytes int) { l.down.cutAfter(bytes) }

// CutUp cuts the link once so many more bytes have gone to the server, which gets to read them.
func (l *Link) CutUp(bytes int) { l.up.cutAfter(bytes) }

// FreezeReader lets nothing more reach the client, as if its process did not read: what the server sends stays in the link's buffer, and once that is full the server's writes block.
func (l *Link) FreezeReader() { l.down.freeze(true) }

// ThawReader ends FreezeReader.
func (l *Link) ThawReader() { l.down.freeze(false) }

// FreezeWriter lets nothing more reach the server.
func (l *Link) FreezeWriter() { l.up.freeze(true) }

// ThawWriter ends FreezeWriter.
func (l *Link) ThawWriter() { l.up.freeze(false) }

// Taken is how many bytes the server has read.
func (l *Link) Taken() int64 { return l.up.count() }

// Given is how many bytes the client has read.
func (l *Link) Given() int64 { return l.down.count() }

// end is one side of a link.
type end struct {
	l       *Link
	in, out *stream
}

func (e *end) Read(b []byte) (int, error)  { return e.in.read(b) }
func (e *end) Write(b []byte) (int, error) { return e.out.write(b) }
func (e *end) LocalAddr() net.Addr         { return address{} }
func (e *end) RemoteAddr() net.Addr        { return address{} }

// Close ends what this side reads, and lets the other side read what was written.
func (e *end) Close() error {
	e.in.leave()
	e.out.finish()
	return nil
}

func (e *end) SetDeadline(t time.Time) error {
	e.in.setDeadline(&e.in.readBy, t)
	e.out.setDeadline(&e.out.writeBy, t)
	return nil
}

func (e *end) SetReadDeadline(t time.Time) error {
	e.in.setDeadline(&e.in.readBy, t)
	return nil
}

func (e *end) SetWriteDeadline(t time.Time) error {
	e.out.setDeadline(&e.out.writeBy, t)
	return nil
}

type address struct{}

func (address) Network() string { return "memory" }
func (address) String() string  { return "memory" }

// stream is one direction of a link.
type stream struct {
	size int    // of the buffer, in bytes
	full func() // called when the last byte before a cut has been read

	mu              sync.Mutex
	changed         sync.Cond
	buf             []byte
	passed          int64 // bytes read
	left            int   // bytes that may still be read before the cut; negative for no bound
	frozen          bool
	finished        bool // the writer has closed
	gone            bool // the reader has closed
	broken          bool
	readBy, writeBy time.Time
}

func newStream(size int) *stream {
	s := &stream{size: size, left: -1}
	s.changed.L = &s.mu
	return s
}

var errReset = &net.OpError{Op: "read", Net: "memory", Err: syscall.ECONNRESET}

func past(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (s *stream) read(b []byte) (int, error) {
	s.mu.Lock()
	for {
		switch {
		case s.broken:
			s.mu.Unlock()
			return 0, errReset
		case s.gone:
			s.mu.Unlock()
			return 0, net.ErrClosed
		case past(s.readBy):
			s.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case s.frozen:
		case len(s.buf) > 0:
			if s.left >= 0 && len(b) > s.left {
				b = b[:s.left]
			}
			n := copy(b, s.buf)
			s.buf = s.buf[n:]
			s.passed += int64(n)
			cut := false
			if s.left >= 0 {
				s.left -= n
				cut = s.left == 0
			}
			s.changed.Broadcast()
			s.mu.Unlock()
			if cut {
				s.full()
			}
			return n, nil
		case s.finished:
			s.mu.Unlock()
			return 0, io.EOF
		}
		s.changed.Wait()
	}
}

func (s *stream) write(b []byte) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.broken:
			return n, errReset
		case s.finished:
			return n, net.ErrClosed
		case s.gone:
			return n, errReset
		case past(s.writeBy):
			return n, os.ErrDeadlineExceeded
		}
		if m := min(len(b), s.size-len(s.buf)); m > 0 {
			s.buf = append(s.buf, b[:m]...)
			n, b = n+m, b[m:]
			s.changed.Broadcast()
		}
		if len(b) == 0 {
			return n, nil
		}
		s.changed.Wait()
	}
}

func (s *stream) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	s.changed.Broadcast()
}

func (s *stream) leave()           { s.set(func() { s.gone = true }) }
func (s *stream) finish()          { s.set(func() { s.finished = true }) }
func (s *stream) cut()             { s.set(func() { s.broken, s.buf = true, nil }) }
func (s *stream) freeze(yes bool)  { s.set(func() { s.frozen = yes }) }
func (s *stream) cutAfter(n int)   { s.set(func() { s.left = max(n, 1) }) }
func (s *stream) count() (n int64) { s.set(func() { n = s.passed }); return n }

func (s *stream) setDeadline(which *time.Time, t time.Time) {
	s.set(func() { *which = t })
	if d := time.Until(t); !t.IsZero() && d > 0 {
		time.AfterFunc(d, func() { s.set(func() {}) })
	}
}
