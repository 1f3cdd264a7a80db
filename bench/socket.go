package bench

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"
)

// Opcodes of RFC 6455, section 5.2.
const (
	opContinuation = 0x0
	opBinary       = 0x2
	opClose        = 0x8
	opPing         = 0x9
	opPong         = 0xa
)

const (
	// maxMessage bounds a message of the server, in bytes.
	maxMessage = 8 << 20
	// readBuffer is what a socket reads at once, in bytes.
	readBuffer = 64 << 10
	// dialTimeout bounds the handshake.
	dialTimeout = 10 * time.Second
)

// socket is a WebSocket as a client has it that wants to spend little on it: frames are gathered in out and written with one system call, messages are read in place. It belongs to one
// goroutine, or to one that reads and one that writes; close may be called by anyone.
type socket struct {
	conn net.Conn
	// in[from:to] is read and not yet taken. Owned by the reader.
	in       []byte
	from, to int
	// joined gathers the parts of a message that came in more than one frame. Owned by the reader.
	joined []byte
}

// dial opens /v1/connect in binary.
func dial(ctx context.Context, edge *url.URL, token string) (*socket, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var d interface {
		DialContext(ctx context.Context, network, addr string) (net.Conn, error)
	} = new(net.Dialer)
	port := "80"
	if edge.Scheme == "https" {
		d, port = new(tls.Dialer), "443"
	}
	addr := edge.Host
	if edge.Port() == "" {
		addr = net.JoinHostPort(edge.Hostname(), port)
	}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("bench: the edge cannot be reached: %w", err)
	}
	s := &socket{conn: conn, in: make([]byte, readBuffer)}
	defer context.AfterFunc(ctx, s.close)()
	if err := s.handshake(edge, token); err != nil {
		s.close()
		return nil, errors.Join(err, ctx.Err())
	}
	return s, nil
}

// handshake is that of RFC 6455, section 4.1.
func (s *socket) handshake(edge *url.URL, token string) error {
	key := make([]byte, 16)
	_, _ = rand.Read(key)
	nonce := base64.StdEncoding.EncodeToString(key)
	req := &http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: edge.Scheme, Host: edge.Host, Path: "/v1/connect"}, Host: edge.Host, Header: http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {nonce},
		"Sec-Websocket-Protocol": {"tidemark.v1.proto"}, "Authorization": {"Bearer " + token},
	}}
	if err := req.Write(s.conn); err != nil {
		return fmt.Errorf("bench: the edge took no request: %w", err)
	}
	r := bufio.NewReader(s.conn)
	res, err := http.ReadResponse(r, req)
	if err != nil {
		return fmt.Errorf("bench: the edge gave no answer: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		said, _ := io.ReadAll(io.LimitReader(res.Body, 1<<10))
		return fmt.Errorf("bench: the edge refused the connection: %s %s", res.Status, said)
	}
	sum := sha1.Sum([]byte(nonce + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	if res.Header.Get("Sec-Websocket-Accept") != base64.StdEncoding.EncodeToString(sum[:]) || res.Header.Get("Sec-Websocket-Protocol") != "tidemark.v1.proto" {
		return errors.New("bench: the edge does not speak the protocol tidemark.v1.proto")
	}
	// What came behind the answer is the first frames.
	s.to, _ = io.ReadFull(r, s.in[:r.Buffered()])
	return nil
}

// appendHeader appends the header of a client's frame. Its masking key is zero, so that the payload stands as it is: the server unmasks all the same, and there is no proxy here to be fooled.
func appendHeader(out []byte, op byte, size int) []byte {
	out = append(out, 0x80|op)
	switch {
	case size < 126:
		out = append(out, 0x80|byte(size))
	case size <= 0xffff:
		out = binary.BigEndian.AppendUint16(append(out, 0x80|126), uint16(size))
	default:
		out = binary.BigEndian.AppendUint64(append(out, 0x80|127), uint64(size))
	}
	return append(out, 0, 0, 0, 0)
}

// write sends frames, headers and all.
func (s *socket) write(frames []byte) error {
	_, err := s.conn.Write(frames)
	return err
}

// send sends one message.
func (s *socket) send(msg []byte) error {
	return s.write(append(appendHeader(nil, opBinary, len(msg)), msg...))
}

// next returns the next message, valid until the next call. Pings are answered on the way.
func (s *socket) next() ([]byte, error) {
	s.joined = s.joined[:0]
	for {
		fin, op, payload, err := s.frame()
		if err != nil {
			return nil, err
		}
		switch op {
		case opBinary, opContinuation:
			if fin && len(s.joined) == 0 {
				return payload, nil
			}
			if s.joined = append(s.joined, payload...); len(s.joined) > maxMessage {
				return nil, errMalformed
			}
			if fin {
				return s.joined, nil
			}
		case opPing:
			if err := s.write(append(appendHeader(nil, opPong, len(payload)), payload...)); err != nil {
				return nil, err
			}
		case opPong:
		case opClose:
			if len(payload) > 2 {
				return nil, fmt.Errorf("bench: the edge closed the connection: %d %s", binary.BigEndian.Uint16(payload), payload[2:])
			}
			return nil, errors.New("bench: the edge closed the connection")
		default:
			return nil, errMalformed
		}
	}
}

// frame reads one frame.
func (s *socket) frame() (fin bool, op byte, payload []byte, err error) {
	if err = s.fill(2); err != nil {
		return
	}
	head, small := s.in[s.from], int(s.in[s.from+1])
	size, skip := uint64(small&0x7f), 2
	switch small {
	case 126:
		if err = s.fill(4); err != nil {
			return
		}
		size, skip = uint64(binary.BigEndian.Uint16(s.in[s.from+2:])), 4
	case 127:
		if err = s.fill(10); err != nil {
			return
		}
		size, skip = binary.BigEndian.Uint64(s.in[s.from+2:]), 10
	}
	if small&0x80 != 0 || head&0x70 != 0 || size > maxMessage {
		// A server's frame has no mask, and nothing that was not agreed on.
		return false, 0, nil, errMalformed
	}
	whole := skip + int(size)
	if err = s.fill(whole); err != nil {
		return
	}
	payload = s.in[s.from+skip : s.from+whole]
	s.from += whole
	return head&0x80 != 0, head & 0xf, payload, nil
}

// fill reads until there are n bytes behind from.
func (s *socket) fill(n int) error {
	for s.to-s.from < n {
		if s.from == s.to {
			s.from, s.to = 0, 0
		}
		if s.from+n > len(s.in) {
			to := s.in
			if n > len(to) {
				to = make([]byte, n+readBuffer)
			}
			s.to = copy(to, s.in[s.from:s.to])
			s.from, s.in = 0, to
		}
		m, err := s.conn.Read(s.in[s.to:])
		s.to += m
		if err != nil {
			return err
		}
	}
	return nil
}

// close breaks the connection off.
func (s *socket) close() { _ = s.conn.Close() }
