package edgews

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"

	"tidemark/schema"
)

// tape is a connection whose peer has said everything already. What is written to it is thrown away.
type tape struct {
	net.Conn // nil: what is not here is not called
	rest     []byte
	pieces   *rand.Rand // how much is read at once; nil for all
}

func (c *tape) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		return 0, io.EOF
	}
	n := min(len(p), len(c.rest))
	if c.pieces != nil {
		n = min(n, 1+c.pieces.IntN(700))
	}
	copy(p, c.rest[:n])
	c.rest = c.rest[n:]
	return n, nil
}

func (c *tape) Write(p []byte) (int, error)        { return len(p), nil }
func (c *tape) Close() error                       { return nil }
func (c *tape) SetReadDeadline(t time.Time) error  { return nil }
func (c *tape) SetWriteDeadline(t time.Time) error { return nil }

// hijacked is a response that gives its connection away, with the first bytes already read.
type hijacked struct {
	*httptest.ResponseRecorder
	conn *tape
}

func (h hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	br := bufio.NewReader(h.conn)
	_, _ = br.Peek(1)
	return h.conn, bufio.NewReadWriter(br, bufio.NewWriter(h.conn)), nil
}

// messages receives what is on the tape: the way it is done, or with the library alone. The error's code stands at the end.
func messages(t testing.TB, data []byte, pieces *rand.Rand, alone, text bool) (all []string) {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	for k, v := range map[string]string{
		"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Extensions": "permessage-deflate",
	} {
		r.Header.Set(k, v)
	}
	tr, err := accept(hijacked{httptest.NewRecorder(), &tape{rest: bytes.Clone(data), pieces: pieces}}, r, "", text)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tr.c.CloseNow() }()
	for {
		var b []byte
		var err error
		if alone {
			b, err = tr.receive()
		} else {
			b, err = tr.Receive(t.Context())
		}
		if err != nil {
			return append(all, schema.CodeOf(err).Word())
		}
		all = append(all, string(b))
	}
}

// clientFrame is a frame as a client sends it.
func clientFrame(first byte, key uint32, payload []byte) []byte {
	b := []byte{first}
	switch n := len(payload); {
	case n < 126:
		b = append(b, 0x80|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x80|127), uint64(n))
	}
	b = binary.LittleEndian.AppendUint32(b, key)
	for i, c := range payload {
		b = append(b, c^byte(key>>(8*(i%4))))
	}
	return b
}

// TestMessagesInAnyPieces: whatever the sizes of messages, frames and reads, what comes out is what was sent, in order, with and without the library.
func TestMessagesInAnyPieces(t *testing.T) {
	sizes := []int{0, 1, 3, 7, 8, 9, 80, 125, 126, 127, 300, 505, 506, 507, 512, 1000, 4096, gulp - 9, gulp - 8, gulp - 7, gulp, 65535, 65536, 100_000}
	for seed := range uint64(30) {
		random := rand.New(rand.NewPCG(seed, 1))
		var data []byte
		var sent []string
		for range 200 {
			size := sizes[random.IntN(len(sizes))]
			if random.IntN(4) > 0 {
				size = random.IntN(200)
			}
			payload := make([]byte, size)
			for i := range payload {
				payload[i] = byte('a' + random.IntN(26))
			}
			sent = append(sent, string(payload))
			ping := func() {
				if random.IntN(5) == 0 {
					data = append(data, clientFrame(0x89+byte(random.IntN(2)), random.Uint32(), payload[:min(len(payload), 100)])...)
				}
			}
			ping()
			first := byte(0x82)
			for size > 0 && random.IntN(5) == 0 {
				// A fragment.
				n := random.IntN(len(payload) + 1)
				data = append(data, clientFrame(first&0x0f, random.Uint32(), payload[:n])...)
				payload, first = payload[n:], 0x80
				ping()
			}
			data = append(data, clientFrame(first, random.Uint32(), payload)...)
		}
		sent = append(sent, schema.Code_CODE_INTERNAL.Word()) // the tape ends
		for _, alone := range []bool{false, true} {
			var pieces *rand.Rand
			if seed%3 > 0 {
				pieces = rand.New(rand.NewPCG(seed, 2))
			}
			got := messages(t, data, pieces, alone, false)
			for i, m := range sent {
				if i >= len(got) || got[i] != m {
					t.Fatalf("seed %d, library alone %v: message %d of %d is not what was sent", seed, alone, i, len(sent))
				}
			}
		}
	}
}

// FuzzFrames: for any bytes that a client may send, the way that tokens take and the library read the same messages; nothing panics.
func FuzzFrames(f *testing.F) {
	f.Add(clientFrame(0x82, 1, []byte("hello")), uint64(0), false)
	f.Add(clientFrame(0x81, 0xdeadbeef, []byte(strings.Repeat("x", 200))), uint64(1), true)
	f.Add(clientFrame(0x82, 1, []byte("hello"))[:6], uint64(1), false)
	f.Add(append(clientFrame(0x02, 7, []byte("a")), clientFrame(0x80, 8, []byte("b"))...), uint64(2), false)
	f.Add(append(clientFrame(0x89, 7, []byte("ping")), clientFrame(0x88, 8, []byte("\x03\xe8"))...), uint64(3), false)
	f.Add(clientFrame(0xc2, 1, []byte("\xf2\x48\xcd\xc9\xc9\x07\x00")), uint64(4), false)
	f.Add([]byte{0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, uint64(5), false)
	f.Fuzz(func(t *testing.T, data []byte, seed uint64, text bool) {
		ours := messages(t, data, rand.New(rand.NewPCG(seed, 1)), false, text)
		library := messages(t, data, nil, true, text)
		if text {
			// The library does not look at what text is.
			for i, m := range library {
				if strings.ToValidUTF8(m, "") != m {
					library = append(library[:i:i], schema.Code_CODE_INVALID_MESSAGE.Word())
					break
				}
			}
		}
		// A message whose compression ends before its frames do is whole to the library, which then says that it was not read to its end; we may see before that the connection is over. TestViolations has what must be told.
		if n := len(ours); n == len(library) && ours[n-1] == schema.Code_CODE_INTERNAL.Word() {
			library[n-1] = ours[n-1]
		}
		if fmt.Sprintf("%q", ours) != fmt.Sprintf("%q", library) {
			t.Fatalf("%x: ours reads %q, the library %q", data, ours, library)
		}
	})
}

// TestControlFramesDoNotWait: while a message cannot be written because the peer does not read, pings of the peer are answered behind it, within a bound.
func TestControlFramesDoNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		w := &wire{Conn: here}
		sent := make(chan error)
		go func() { sent <- w.send(appendFrame(nil, 2, []byte("stuck")), false) }()
		synctest.Wait()
		pong := appendFrame(nil, 10, []byte("pong"))
		n := 0
		for ; n < 1_000_000; n++ {
			if _, err := w.Write(pong); err != nil {
				break
			}
		}
		if most := maxBehind / len(pong); n != most {
			t.Errorf("%d pongs were taken, want %d", n, most)
		}
		r := &raw{T: t, Conn: there, br: bufio.NewReader(there)}
		for i := range n + 1 {
			if op, payload, err := r.next(); err != nil || (op == 2) != (i == 0) || len(payload) < 4 {
				t.Fatalf("frame %d: %d %q %v", i, op, payload, err)
			}
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
		// While a control frame is on its way, a message waits for it.
		if _, err := w.Write(pong); err != nil {
			t.Error(err)
		}
		go func() { sent <- w.send(appendFrame(nil, 2, []byte("behind")), false) }()
		for _, wanted := range []byte{10, 2} {
			if op, _, err := r.next(); err != nil || op != wanted {
				t.Errorf("got %d, %v, want %d", op, err, wanted)
			}
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
		// The library's close frame is kept until the connection is left, and messages pass it.
		if _, err := w.Write(closeFrame(websocket.StatusNormalClosure, "")); err != nil {
			t.Error(err)
		}
		_ = w.Close() // as the library does
		go func() { sent <- w.send(appendFrame(nil, 2, []byte("before")), false) }()
		if op, _, err := r.next(); err != nil || op != 2 {
			t.Errorf("got %d, %v", op, err)
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
		parting := w.leave()
		if !bytes.Equal(parting, closeFrame(websocket.StatusNormalClosure, "")) {
			t.Errorf("kept was %x", parting)
		}
		// Nothing follows a close frame.
		go func() { sent <- w.send(parting, true) }()
		if op, _, err := r.next(); err != nil || op != 8 {
			t.Errorf("got %d, %v", op, err)
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
		if err := w.send(appendFrame(nil, 2, []byte("late")), false); err == nil {
			t.Error("a message was sent behind the close frame")
		}
		_ = w.Close()
		_ = there.Close()
	})
}

func TestReason(t *testing.T) {
	if got := reason(schema.Code_CODE_CONFLICT, "Short."); got != "conflict: Short." {
		t.Errorf("got %q", got)
	}
	if got := reason(schema.Code_CODE_UNSPECIFIED, "completed"); got != "completed" {
		t.Errorf("got %q", got)
	}
	for n := range 8 {
		got := reason(schema.Code_CODE_INTERNAL, strings.Repeat("x", n)+strings.Repeat("é", 100))
		if len(got) > maxReason || len(got) < maxReason-3 || strings.ToValidUTF8(got, "") != got || !strings.HasSuffix(got, "é…") {
			t.Errorf("got %q", got)
		}
	}
}
