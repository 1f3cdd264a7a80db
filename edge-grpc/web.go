package edgegrpc

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net/http"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"connectrpc.com/grpcreflect"
	"google.golang.org/protobuf/encoding/protojson"

	"tidemark/internal/gateway"
	"tidemark/schema"
	"tidemark/schema/schemaconnect"
)

// maxWebMessage bounds what connect-go reads as one message. It is above [schema.MaxFrameBytes], so that what is a little too large is refused by us, with our code and sentence, and not by the
// library.
const maxWebMessage = 4 << 20

// webHandler is what net/http serves: gRPC, gRPC-Web and Connect by connect-go.
func (e *Edge) webHandler() http.Handler {
	mux := http.NewServeMux()
	mount := func(method string, h *connect.Handler) {
		mux.Handle("/"+schemaconnect.SessionServiceName+"/"+method, h)
	}
	mount(createSession.web(e))
	mount(getSession.web(e))
	mount(listSessions.web(e))
	mount(deleteSession.web(e))
	mount(appendOnce.web(e))
	mount(appendStream.web(e))
	mount(follow.web(e))
	mount(connection.web(e))
	mount(workers.web(e))
	mount(keepRun.web(e))
	mount(listWorkGroups.web(e))
	mount(deleteWorkGroup.web(e))
	mount(listWork.web(e))
	mount(listDeadLetters.web(e))
	mount(redrive.web(e))
	mount(tail.web(e))
	e.health.mount(mux)
	reflector := grpcreflect.NewStaticReflector(schemaconnect.SessionServiceName, healthService)
	for _, mount := range []func(*grpcreflect.Reflector, ...connect.HandlerOption) (string, http.Handler){grpcreflect.NewHandlerV1, grpcreflect.NewHandlerV1Alpha} {
		path, h := mount(reflector)
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			unhurried(r.Context())
			h.ServeHTTP(w, r)
		})
	}
	return e.allowOrigins(decodeText(withController(mux)))
}

// webOptions are those of every handler. Compressed requests are understood, but answers are not compressed: connect-go's clients ask for it without being told to, and gzip costs some 25 µs a
// KiB, many times what all else costs.
func webOptions() connect.HandlerOption {
	return connect.WithHandlerOptions(webCodecs(), connect.WithReadMaxBytes(maxWebMessage), connect.WithCompressMinBytes(math.MaxInt))
}

func (c call[Req, Res]) web(e *Edge) (string, *connect.Handler) {
	return c.method, connect.NewUnaryHandler(procedure(c.method), func(ctx context.Context, req *connect.Request[Req]) (*connect.Response[Res], error) {
		unhurried(ctx)
		res, f := c.run(ctx, e, req.Peer().Protocol, bearer(req.Header().Get("Authorization")), req.Msg)
		if f != nil {
			return nil, f.web()
		}
		return connect.NewResponse(res), nil
	}, webOptions())
}

func procedure(method string) string {
	return "/" + schemaconnect.SessionServiceName + "/" + method
}

func (s stream) web(e *Edge) (string, *connect.Handler) {
	if s.follows {
		return s.method, connect.NewServerStreamHandler(procedure(s.method), func(ctx context.Context, req *connect.Request[message], out *connect.ServerStream[message]) error {
			return s.serveWeb(e, ctx, out.Conn(), req.Msg)
		}, webOptions())
	}
	return s.method, connect.NewBidiStreamHandler(procedure(s.method), func(ctx context.Context, both *connect.BidiStream[message, message]) error {
		return s.serveWeb(e, ctx, both.Conn(), nil)
	}, webOptions())
}

// serveWeb runs one stream; first is its message where there is only one.
func (s stream) serveWeb(e *Edge, ctx context.Context, c connect.StreamingHandlerConn, first *message) error {
	unhurried(ctx)
	isJSON := strings.Contains(c.RequestHeader().Get("Content-Type"), "json")
	gp, err := s.peer(ctx, e, bearer(c.RequestHeader().Get("Authorization")), c.Peer().Addr, func(a *schema.Attach) error {
		if !isJSON {
			return attachOf(first)(a)
		}
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(first.bytes, a); err != nil {
			return &schema.Refusal{Code: schema.Code_CODE_INVALID_MESSAGE, Message: "The message is not an Attach in JSON.", Err: err}
		}
		return nil
	})
	if err == nil {
		t := newWebTransport(ctx, c, s)
		gp.Transport = t
		if isJSON {
			t.json, gp.Protocol = true, gateway.ProtoJSON
			t.wrap = s.protocol == gateway.ProtoPublish
		}
		// Nil sends the header alone: clients wait for it before they believe in the stream.
		if err := c.Send(nil); err != nil {
			return err
		}
		serving, stop := whilePeer(ctx, func() bool { return false })
		s.run(serving, e, gp)
		stop()
		if t.failure == nil {
			e.metrics.calls.WithLabelValues(s.method, c.Peer().Protocol, "ok").Inc()
			return nil
		}
		e.metrics.calls.WithLabelValues(s.method, c.Peer().Protocol, t.failure.refusal.Code.Word()).Inc()
		return t.failure.web()
	}
	r := refusalOf(ctx, err)
	e.cfg.Gateway.Refused(r.Code)
	e.metrics.calls.WithLabelValues(s.method, c.Peer().Protocol, r.Code.Word()).Inc()
	return failed(r).web()
}

// controllerKey is where withController puts the request's controller.
type controllerKey struct{}

// bodyTimeout is how long the message of a call may take to come, and what the handler leaves of it to be passed over: it is read before anybody knows whose it is, so it must not hold a connection.
const bodyTimeout = 15 * time.Second

// withController hands the deadlines of a request's connection on to its stream: nothing else lets go of a read or write that is blocked. A handler has [bodyTimeout] to read in, until it is
// [unhurried].
func withController(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		hurry := func() { _ = c.SetReadDeadline(time.Now().Add(bodyTimeout)) } // it fails where the connection is closed
		hurry()
		defer hurry()
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), controllerKey{}, c)))
	})
}

// unhurried takes the deadline for the body away: it has come, or its messages may come whenever they like.
func unhurried(ctx context.Context) {
	if c, ok := ctx.Value(controllerKey{}).(*http.ResponseController); ok {
		_ = c.SetReadDeadline(time.Time{}) // it fails where the connection is closed
	}
}

// webTransport carries a connection of the gateway over a stream of connect-go.
type webTransport struct {
	// Static after construction.
	ctx        context.Context
	conn       connect.StreamingHandlerConn
	controller *http.ResponseController
	oneMessage bool          // the client sends one message, which was read
	json       bool          // the messages are text
	wrap       bool          // each message is a Publish in JSON, which becomes a ClientFrame
	closed     chan struct{} // closed by Close

	in  message // owned by Receive
	out message // owned by Send

	mu      sync.Mutex
	last    farewell
	sending bool
	ended   bool
	failure *failure // set once, before closed is closed
}

func newWebTransport(ctx context.Context, c connect.StreamingHandlerConn, s stream) *webTransport {
	t := &webTransport{ctx: ctx, conn: c, oneMessage: s.follows, closed: make(chan struct{})}
	t.controller, _ = ctx.Value(controllerKey{}).(*http.ResponseController)
	return t
}

// Receive waits for the client's next message.
func (t *webTransport) Receive(context.Context) ([]byte, error) {
	if t.oneMessage {
		select {
		case <-t.ctx.Done():
			return nil, gateway.ErrPeerClosed
		case <-t.closed:
			return nil, io.ErrClosedPipe
		}
	}
	// An empty message is handed over without asking the codec.
	t.in.bytes = t.in.bytes[:0]
	if err := t.conn.Receive(&t.in); err != nil {
		return nil, t.receiveError(err)
	}
	if t.wrap {
		return wrapped(t.in.bytes)
	}
	return t.in.bytes, nil
}

func (t *webTransport) receiveError(err error) error {
	switch {
	case errors.Is(err, io.EOF):
		return io.EOF
	case t.ctx.Err() != nil, connect.CodeOf(err) == connect.CodeCanceled, connect.CodeOf(err) == connect.CodeDeadlineExceeded:
		return gateway.ErrPeerClosed
	case connect.CodeOf(err) == connect.CodeResourceExhausted:
		return tooLarge(err)
	default:
		return err
	}
}

// wrapped makes a ClientFrame in JSON of a Publish in JSON.
func wrapped(publish []byte) ([]byte, error) {
	if !json.Valid(publish) {
		return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The message is not JSON.")
	}
	return append(append([]byte(`{"publish":`), publish...), '}'), nil
}

// Send writes the messages.
func (t *webTransport) Send(_ context.Context, messages [][]byte) error {
	if !t.begin() {
		return io.ErrClosedPipe
	}
	defer t.end()
	for _, m := range messages {
		t.out.bytes = m
		if err := t.conn.Send(&t.out); err != nil {
			return err
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last.note(messages, t.json)
	return nil
}

func (t *webTransport) begin() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sending = !t.ended
	return t.sending
}

func (t *webTransport) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sending = false
}

// Close says how the stream ends, and lets go whoever is blocked in it. The status is written when the handler returns, unless a message is stuck in front of it.
func (t *webTransport) Close(code schema.Code, text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return
	}
	t.ended = true
	t.failure = t.last.failure(code, text)
	close(t.closed)
	if t.controller == nil {
		return
	}
	// Deadlines that have passed; where one cannot be set, the connection has ended.
	if !t.oneMessage {
		_ = t.controller.SetReadDeadline(time.Unix(1, 0))
	}
	if t.sending {
		_ = t.controller.SetWriteDeadline(time.Unix(1, 0))
	}
}

// requestHeaders are what the clients of gRPC-Web and Connect set, responseHeaders what they read.
var (
	requestHeaders = strings.Join([]string{ //nolint:gochecknoglobals // a table that nothing writes
		"Authorization", "Content-Type", "Connect-Protocol-Version", "Connect-Timeout-Ms", "Grpc-Timeout", "X-Grpc-Web", "X-User-Agent",
	}, ", ")
	responseHeaders = strings.Join([]string{ //nolint:gochecknoglobals // a table that nothing writes
		"Content-Encoding", "Connect-Content-Encoding", "Grpc-Status", "Grpc-Message", "Grpc-Status-Details-Bin", http.CanonicalHeaderKey(codeTrailer),
	}, ", ")
)

// allowOrigins answers browsers that ask whether a page of another origin may call (the fetch standard's CORS protocol). Tokens come in a header that no browser sends on its own, so a page that
// is not allowed can do nothing here.
func (e *Edge) allowOrigins(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Add("Vary", "Origin")
		origin := r.Header.Get("Origin")
		allowed := origin != "" && e.originAllowed(origin)
		if allowed {
			header.Set("Access-Control-Allow-Origin", origin)
			header.Set("Access-Control-Expose-Headers", responseHeaders)
		}
		if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
			h.ServeHTTP(w, r)
			return
		}
		if !allowed {
			// A page of the edge's own origin does not ask.
			refuseOrigin(w, e.cfg.Gateway.RefuseOrigin())
			return
		}
		header.Set("Access-Control-Allow-Methods", "POST, GET")
		header.Set("Access-Control-Allow-Headers", requestHeaders)
		header.Set("Access-Control-Max-Age", "7200")
		w.WriteHeader(http.StatusNoContent)
	})
}

// refuseOrigin tells a browser that its page may not call, as the WebSocket edge says it.
func refuseOrigin(w http.ResponseWriter, r *schema.Refusal) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusForbidden)
	_ = json.NewEncoder(w).Encode(map[string]string{"error": http.StatusText(http.StatusUnauthorized), "details": r.Message, "code": r.Code.Word()}) // the browser is gone, or reads it
}

func (e *Edge) originAllowed(origin string) bool {
	for _, o := range e.cfg.AllowedOrigins {
		if o == "*" || strings.EqualFold(o, origin) {
			return true
		}
	}
	return false
}
