package world

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// intruder is a client that tries what it may not. It writes down all that it is answered, every code, header and byte, so that the answers to two attempts can be compared. Its verbs belong to one goroutine.
type intruder struct {
	w *World
	e *Edge

	knows []string

	mu   sync.Mutex // guards all below
	said []string
	deaf bool // it has left: what comes now is not an answer
}

// quiet is how long an intruder waits for more. In a bubble that is until nothing more can come.
const quiet = 50 * time.Millisecond

// newIntruder makes an intruder who goes to this edge.
func (w *World) newIntruder(e *Edge) *intruder { return &intruder{w: w, e: e} }

func (x *intruder) note(format string, args ...any) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.deaf {
		x.said = append(x.said, fmt.Sprintf(format, args...)+"\n")
	}
}

// Knows says that the intruder knows something already and says it himself, so that to be told it again is no news.
func (x *intruder) Knows(what string) { x.knows = append(x.knows, what) }

// news is an answer without what the intruder knew.
func (x *intruder) news(said string) string {
	said = plain(said)
	for _, known := range x.knows {
		said = strings.ReplaceAll(said, known, "KNOWN")
	}
	return said
}

// Said is everything that was answered.
func (x *intruder) Said() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return strings.Join(x.said, "")
}

// sorted is everything that was answered, in an order that does not say which of two frames came first: an acknowledgement and the event of it go their own ways.
func (x *intruder) sorted() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return strings.Join(slices.Sorted(slices.Values(x.said)), "")
}

// HTTP makes a request at a port of the edge, ".http" or ".grpc", as a page or curl does. The target is taken as it is: nothing cleans it up.
func (x *intruder) HTTP(port, method, target string, h http.Header, body []byte) {
	ctx, cancel := context.WithTimeout(x.w.t.Context(), patience)
	defer cancel()
	p := path{net: x.w.net, addr: x.e.Name + port}
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx) }, DisableKeepAlives: true}
	defer t.CloseIdleConnections()
	r, err := http.NewRequestWithContext(ctx, method, "http://edge/", bytes.NewReader(body))
	x.w.must(err)
	r.URL.Opaque = "//edge" + target
	r.Header = h.Clone()
	res, err := t.RoundTrip(r)
	if err != nil {
		x.note("no answer: %v", err)
		return
	}
	defer res.Body.Close()
	// A stream has no end of its own.
	late := time.AfterFunc(quiet, cancel)
	defer late.Stop()
	answer, _ := io.ReadAll(res.Body)
	x.response(res, answer)
}

// response writes down an answer of HTTP, with every header but the clock's and those that say how it was cut into pieces.
func (x *intruder) response(res *http.Response, body []byte) {
	x.note("HTTP %d", res.StatusCode)
	for _, h := range []http.Header{res.Header, res.Trailer} {
		var names []string
		for name := range h {
			if name != "Date" && name != "Sec-Websocket-Accept" {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		for _, name := range names {
			x.note("%s: %q", name, h[name])
		}
	}
	x.note("%q", body)
}

// Socket makes a WebSocket, says the messages one after the other, waiting each time until nothing more is answered, and leaves. A message is a text, a [*schema.ClientFrame] for a binary one, or a func
// to be called in between.
func (x *intruder) Socket(target string, h http.Header, subprotocols []string, messages ...any) {
	ctx, cancel := context.WithTimeout(x.w.t.Context(), patience)
	defer cancel()
	p := path{net: x.w.net, addr: x.e.Name + ".http"}
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx) }}
	defer t.CloseIdleConnections()
	c, res, err := websocket.Dial(ctx, "ws://edge"+target, &websocket.DialOptions{HTTPClient: &http.Client{Transport: t}, HTTPHeader: h, Subprotocols: subprotocols})
	if err != nil {
		if res == nil {
			x.note("no answer: %v", err)
			return
		}
		body, _ := io.ReadAll(res.Body)
		x.response(res, body)
		return
	}
	c.SetReadLimit(-1)
	x.response(res, nil)
	x.converse(messages, func(m any) error {
		if f, ok := m.(*schema.ClientFrame); ok {
			b, err := proto.Marshal(f)
			x.w.must(err)
			return c.Write(ctx, websocket.MessageBinary, b)
		}
		return c.Write(ctx, websocket.MessageText, []byte(m.(string)))
	}, func() (string, error) {
		typ, b, err := c.Read(ctx)
		if err != nil {
			return "", err
		}
		if typ == websocket.MessageText {
			return string(b), nil
		}
		return frame(b)
	}, func(err error) string {
		if closed, ok := errors.AsType[websocket.CloseError](err); ok {
			return fmt.Sprintf("closed %d %q", closed.Code, closed.Reason)
		}
		return "lost"
	}, func() { _ = c.CloseNow() })
}

// frame is a server's frame as text.
func frame(b []byte) (string, error) {
	f := new(schema.ServerFrame)
	if err := proto.Unmarshal(b, f); err != nil {
		return "", err
	}
	return protojson.Format(f), nil
}

// converse says messages and writes down what is heard.
func (x *intruder) converse(messages []any, say func(any) error, hear func() (string, error), end func(error) string, leave func()) {
	var hearing sync.WaitGroup
	hearing.Go(func() {
		for {
			s, err := hear()
			if err != nil {
				x.note("%s", end(err))
				return
			}
			x.note("%s", s)
		}
	})
	time.Sleep(quiet)
	for _, m := range messages {
		if do, ok := m.(func()); ok {
			do()
		} else if say(m) != nil {
			break // it has ended, which is heard
		}
		time.Sleep(quiet)
	}
	x.mu.Lock()
	x.deaf = true
	x.mu.Unlock()
	leave()
	hearing.Wait()
	x.mu.Lock()
	x.deaf = false
	x.mu.Unlock()
}

// Call makes a gRPC call that is answered once.
func (x *intruder) Call(token, method string, req, res proto.Message) {
	c := newCalls(path{net: x.w.net, addr: x.e.Name + ".grpc"}, token)
	defer c.drop()
	x.w.must(c.err)
	ctx, cancel := context.WithTimeout(c.ctx, patience)
	defer cancel()
	var header, trailer metadata.MD
	err := c.cc.Invoke(ctx, service+method, req, res, grpc.Header(&header), grpc.Trailer(&trailer))
	x.note("header %v trailer %v", header, trailer)
	if err != nil {
		x.status(err)
		return
	}
	x.note("%s", protojson.Format(res))
}

// Stream opens a gRPC stream and says the messages as Socket does.
func (x *intruder) Stream(token, method string, follows bool, messages ...any) {
	c := newCalls(path{net: x.w.net, addr: x.e.Name + ".grpc"}, token)
	defer c.drop()
	ctx, cancel := context.WithTimeout(x.w.t.Context(), patience)
	defer cancel()
	s, err := c.stream(ctx, method, !follows, true)
	x.w.must(err)
	say := func(m any) error {
		err := s.SendMsg(m)
		if err == nil && follows {
			err = s.CloseSend()
		}
		return err
	}
	if follows {
		// The answer comes behind the request, which is the only one.
		x.w.must(say(messages[0]))
		messages = messages[1:]
	}
	x.converse(messages, say, func() (string, error) {
		f, err := receive(s)
		if err != nil {
			return "", err
		}
		return protojson.Format(f), nil
	}, func(err error) string {
		x.status(err)
		return fmt.Sprint("trailer ", s.Trailer())
	}, c.drop)
}

func (x *intruder) status(err error) {
	s, _ := status.FromError(err)
	if f, ok := errors.AsType[*failedCall](err); ok {
		s, _ = status.FromError(f.err)
	}
	x.note("status %d %q", s.Code(), s.Message())
	for _, d := range s.Details() {
		m, _ := d.(proto.Message)
		x.note("%s", protojson.Format(m))
	}
}

var (
	anyULID = regexp.MustCompile(`[0-7][0-9A-HJKMNP-TV-Z]{25}`)
	anyPage = regexp.MustCompile(`"nextPageToken": *"[^"]+"`) // it is sealed, and never the same
	anyTime = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`)
	// A gRPC status with its details, and one of Connect's.
	anyDetail = regexp.MustCompile(`((?i:grpc-status-details-bin): ?\[?\\*"?|\\*"value\\*": ?\\*")([A-Za-z0-9+/_=-]+)`)
)

// plain is an answer with what is in base64 laid open.
func plain(said string) string {
	return anyDetail.ReplaceAllStringFunc(said, func(s string) string {
		m := anyDetail.FindStringSubmatch(s)
		b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(m[2], "="))
		if err != nil {
			return s
		}
		return m[1] + string(b)
	})
}

// alike is an answer with all taken out that differs between two attempts which are treated the same: what is made anew each time, and the part in which the names differ that were asked for, in
// whatever letters.
func alike(said, part string) string {
	said = anyPage.ReplaceAllString(anyTime.ReplaceAllString(anyULID.ReplaceAllString(plain(said), "ULID"), "TIME"), "PAGE")
	return regexp.MustCompile("(?i)"+regexp.QuoteMeta(part)).ReplaceAllString(said, "NAME")
}
