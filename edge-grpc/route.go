package edgegrpc

import (
	"bufio"
	"encoding/binary"
	"errors"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2/hpack"
)

const (
	// routeTimeout is how long a connection may take to say what it speaks. A gRPC client that connects ahead of its first call says nothing at all: it is taken for what it is.
	routeTimeout = 10 * time.Second
	// routeBytes bounds what is looked at. A request with a token of the largest size fits well.
	routeBytes = 32 << 10
)

// What RFC 9113 fixes (sections 3.4, 4.1, 6.2, 6.5, 6.10).
const (
	http2Preface       = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	frameHeaderBytes   = 9
	frameHeaders       = 0x1
	frameSettings      = 0x4
	frameContinuation  = 0x9
	flagAck            = 0x1
	flagEndHeaders     = 0x4
	flagPadded         = 0x8
	flagPriority       = 0x20
	settingMaxStreams  = 0x3
	settingsFrameBytes = frameHeaderBytes + 6
)

// conn is a client's connection whose beginning was looked at; reading it starts from the first byte again.
//
// Where the router answered an HTTP/2 client's preface, the acknowledgement of that answer is taken out of what the client sends: the server behind it did not ask for one, and net/http hangs
// up on a client that acknowledges what it never sent.
type conn struct {
	net.Conn

	// Owned by whoever reads.
	r *bufio.Reader // nil once it is drained
	// ack: an acknowledgement is to be taken out; skip bytes, to the next frame, are handed through before the next look.
	ack  bool
	skip int
}

// route reads the beginning of c and says whether it is a native gRPC client's. It blocks for [routeTimeout] at most. The error is that of a connection which is of no use.
//
// HTTP/1 is for net/http. An HTTP/2 connection is native where its first request has the content type of gRPC with protobuf. Clients of grpc-go send no request before the server has sent its
// settings, so the router sends the first settings itself (a server may send them as often as it likes).
func route(c net.Conn, maxStreams int) (_ *conn, native bool, err error) {
	rc := &conn{Conn: c, r: bufio.NewReaderSize(c, routeBytes)}
	if err := c.SetDeadline(time.Now().Add(routeTimeout)); err != nil {
		return nil, false, err
	}
	defer func() {
		if e := c.SetDeadline(time.Time{}); err == nil {
			err = e
		}
	}()
	for n := 1; n <= len(http2Preface); n++ {
		b, err := rc.r.Peek(n)
		if err != nil {
			return nil, false, err
		}
		if b[n-1] != http2Preface[n-1] {
			return rc, false, nil
		}
	}
	settings := make([]byte, 0, settingsFrameBytes)
	settings = append(settings, 0, 0, 6, frameSettings, 0, 0, 0, 0, 0, 0, settingMaxStreams)
	settings = binary.BigEndian.AppendUint32(settings, uint32(maxStreams))
	if _, err := c.Write(settings); err != nil {
		return nil, false, err
	}
	rc.ack, rc.skip = true, len(http2Preface)
	native, err = rc.firstRequestIsNative()
	return rc, native, err
}

// firstRequestIsNative looks at the frames behind the preface up to the first request's content type. Whatever it does not understand is for grpc-go to answer.
func (c *conn) firstRequestIsNative() (bool, error) {
	contentType := ""
	fields := hpack.NewDecoder(4096, func(f hpack.HeaderField) {
		if f.Name == "content-type" {
			contentType = f.Value
		}
	})
	for at := len(http2Preface); ; {
		head, err := c.r.Peek(at + frameHeaderBytes)
		if err != nil {
			return undecided(err)
		}
		size, typ, flags := frameHeader(head[at:])
		at += frameHeaderBytes
		if typ != frameHeaders && typ != frameContinuation {
			at += size
			continue
		}
		b, err := c.r.Peek(at + size)
		if err != nil {
			return undecided(err)
		}
		fragment := b[at : at+size]
		at += size
		if typ == frameHeaders {
			fragment = headerFragment(fragment, flags)
		}
		if _, err := fields.Write(fragment); err != nil {
			return true, nil
		}
		if contentType != "" || flags&flagEndHeaders != 0 {
			return nativeContentType(contentType), nil
		}
	}
}

// undecided is the verdict on a connection whose first request did not show itself: it said nothing in time, or too much.
func undecided(err error) (bool, error) {
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() || errors.Is(err, bufio.ErrBufferFull) {
		return true, nil
	}
	return false, err
}

// nativeContentType says whether grpc-go serves this content type: application/grpc with protobuf. Other codecs of gRPC, gRPC-Web and Connect are served by connect-go.
func nativeContentType(s string) bool {
	s, _, _ = strings.Cut(s, ";")
	s = strings.ToLower(strings.TrimSpace(s))
	return s == "application/grpc" || s == "application/grpc+proto"
}

func frameHeader(b []byte) (size int, typ, flags byte) {
	return int(b[0])<<16 | int(b[1])<<8 | int(b[2]), b[3], b[4]
}

// headerFragment is the field block in a HEADERS frame's payload, without padding and priority; empty where they do not fit, which is an error that the server reports.
func headerFragment(b []byte, flags byte) []byte {
	pad := 0
	if flags&flagPadded != 0 {
		if len(b) == 0 {
			return nil
		}
		pad, b = int(b[0]), b[1:]
	}
	if flags&flagPriority != 0 {
		if len(b) < 5 {
			return nil
		}
		b = b[5:]
	}
	if pad > len(b) {
		return nil
	}
	return b[:len(b)-pad]
}

// Read hands through what the client sends, from the first byte on.
func (c *conn) Read(p []byte) (int, error) {
	if c.r == nil {
		return c.Conn.Read(p)
	}
	if c.ack && c.skip == 0 {
		b, err := c.r.Peek(frameHeaderBytes)
		if err != nil {
			return 0, err
		}
		size, typ, flags := frameHeader(b)
		c.skip = frameHeaderBytes + size
		if typ == frameSettings && flags&flagAck != 0 {
			if _, err := c.r.Discard(c.skip); err != nil {
				return 0, err
			}
			c.ack, c.skip = false, 0
		}
	}
	if c.ack {
		n, err := c.r.Read(p[:min(len(p), c.skip)])
		c.skip -= n
		return n, err
	}
	if c.r.Buffered() > 0 {
		return c.r.Read(p)
	}
	c.r = nil
	return c.Conn.Read(p)
}

// handed is the listener of a server that gets its connections from the router.
type handed struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newHanded(addr net.Addr) *handed {
	return &handed{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

// hand gives the connection to the server, or closes it where the server takes no more.
func (h *handed) hand(c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.done:
		_ = c.Close()
	}
}

// Accept waits for a connection.
func (h *handed) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept and hand.
func (h *handed) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

// Addr is the address of the port.
func (h *handed) Addr() net.Addr { return h.addr }
