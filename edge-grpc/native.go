package edgegrpc

import (
	"context"
	"errors"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"tidemark/internal/gateway"
	"tidemark/schema"
	"tidemark/schema/schemaconnect"
)

// nativeProtocol is grpc-go's part as metrics name it; the others are connect-go's names.
const nativeProtocol = "grpc"

// description of the service for grpc-go. It is written out, not generated, because the streams carry bytes.
func (e *Edge) description() *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: schemaconnect.SessionServiceName,
		HandlerType: (*any)(nil),
		Metadata:    schema.File_tidemark_v1_service_proto.Path(),
		Methods: []grpc.MethodDesc{
			createSession.native(e), getSession.native(e), listSessions.native(e), deleteSession.native(e), appendOnce.native(e),
			keepRun.native(e), listWorkGroups.native(e), deleteWorkGroup.native(e), listWork.native(e), listDeadLetters.native(e), redrive.native(e),
		},
		Streams: []grpc.StreamDesc{
			appendStream.native(e), follow.native(e), connection.native(e), workers.native(e), tail.native(e),
		},
	}
}

func (c call[Req, Res]) native(e *Edge) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: c.method, Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		req := new(Req)
		if err := decode(req); err != nil {
			return nil, err
		}
		res, f := c.run(ctx, e, nativeProtocol, nativeToken(ctx), req)
		if f != nil {
			// It fails only behind the handler's back, never inside it.
			_ = grpc.SetTrailer(ctx, f.trailer())
			return nil, f.native()
		}
		return res, nil
	}}
}

// nativeToken is the token in the call's metadata.
func nativeToken(ctx context.Context) string {
	if v := metadata.ValueFromIncomingContext(ctx, "authorization"); len(v) > 0 {
		return bearer(v[0])
	}
	return ""
}

func (s stream) native(e *Edge) grpc.StreamDesc {
	return grpc.StreamDesc{StreamName: s.method, ClientStreams: !s.follows, ServerStreams: true, Handler: func(_ any, gs grpc.ServerStream) error {
		f := s.serveNative(e, gs)
		if f == nil {
			e.metrics.calls.WithLabelValues(s.method, nativeProtocol, "ok").Inc()
			return nil
		}
		e.metrics.calls.WithLabelValues(s.method, nativeProtocol, f.refusal.Code.Word()).Inc()
		gs.SetTrailer(f.trailer())
		return f.native()
	}}
}

// serveNative runs one stream. It returns as soon as the stream's status is known, which also lets go whoever is blocked in the stream: grpc-go has no other way. What runs for the stream has
// ended soon after; [Edge.Serve] waits for it.
func (s stream) serveNative(e *Edge, gs grpc.ServerStream) *failure {
	remote := ""
	if p, ok := peer.FromContext(gs.Context()); ok {
		remote = p.Addr.String()
	}
	t := &nativeTransport{stream: gs, closed: make(chan struct{}), receiving: make(chan struct{}, 1)}
	gp, err := s.peer(gs.Context(), e, nativeToken(gs.Context()), remote, func(a *schema.Attach) error {
		if err := gs.RecvMsg(&t.in); err != nil {
			return nativeReceiveError(err)
		}
		return attachOf(&t.in)(a)
	})
	if err != nil {
		r := refusalOf(gs.Context(), err)
		e.cfg.Gateway.Refused(r.Code)
		return failed(r)
	}
	gp.Transport = t
	// Clients wait for the header before they believe in the stream.
	if err := gs.SendHeader(nil); err != nil {
		return failed(schema.AsRefusal(err))
	}
	e.streams.Go(func() {
		ctx, stop := whilePeer(gs.Context(), t.refused)
		defer stop()
		s.run(ctx, e, gp)
	})
	<-t.closed
	return t.failure
}

// whilePeer is a stream's context for the gateway: it ends with the stream, because the peer has left; unless it was refused, which the gateway is told where it receives.
func whilePeer(stream context.Context, refused func() bool) (context.Context, context.CancelFunc) {
	ctx, end := context.WithCancelCause(context.WithoutCancel(stream))
	stop := context.AfterFunc(stream, func() {
		if !refused() {
			end(gateway.ErrPeerLeft)
		}
	})
	return ctx, func() {
		stop()
		end(nil)
	}
}

// nativeTransport carries a connection of the gateway over a stream of grpc-go.
type nativeTransport struct {
	// Static after construction.
	stream grpc.ServerStream
	closed chan struct{} // closed by Close

	in  message // owned by Receive
	out message // owned by Send

	receiving chan struct{} // holds a token while Receive asks the stream
	over      bool          // grpc-go has refused a message, and ended the stream; owned by who has put the token there

	mu    sync.Mutex
	last  farewell
	ended bool
	// failure is set before closed is closed; nil for an end without a fault.
	failure *failure
}

// Receive waits for the client's next message.
func (t *nativeTransport) Receive(context.Context) ([]byte, error) {
	t.receiving <- struct{}{}
	defer func() { <-t.receiving }()
	t.in.bytes = t.in.bytes[:0]
	err := t.stream.RecvMsg(&t.in)
	if err == nil {
		return t.in.bytes, nil
	}
	err = nativeReceiveError(err)
	if r, ok := errors.AsType[*schema.Refusal](err); ok {
		// grpc-go has ended the stream already, with a status of its own.
		t.over = true
		t.end(r.Code, r.Message)
	}
	return nil, err
}

// refused reports whether the stream, which has ended, was ended by grpc-go, which does so before Receive returns.
func (t *nativeTransport) refused() bool {
	t.receiving <- struct{}{}
	defer func() { <-t.receiving }()
	return t.over
}

// nativeReceiveError says what grpc-go's error means to the gateway.
func nativeReceiveError(err error) error {
	if errors.Is(err, io.EOF) {
		return io.EOF
	}
	switch status.Code(err) {
	case codes.Canceled, codes.DeadlineExceeded:
		// The client has cancelled the call, or its connection is gone: the library tells the two alike.
		return gateway.ErrPeerClosed
	case codes.ResourceExhausted:
		return tooLarge(err)
	default:
		return err
	}
}

func tooLarge(err error) error {
	return &schema.Refusal{
		Code: schema.Code_CODE_TOO_LARGE, Err: err,
		Message: "The message is larger than the largest frame; PROTOCOL.md has the limits.",
	}
}

// Send writes the messages. grpc-go gathers what is sent while it writes.
func (t *nativeTransport) Send(_ context.Context, messages [][]byte) error {
	for _, m := range messages {
		t.out.bytes = m
		if err := t.stream.SendMsg(&t.out); err != nil {
			return err
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last.note(messages, false)
	return nil
}

// Close ends the stream with the code's status.
func (t *nativeTransport) Close(code schema.Code, text string) {
	t.end(code, text)
	// The handler returns now, and with it the stream ends.
	<-t.stream.Context().Done()
}

// end fixes the status, unless it is fixed.
func (t *nativeTransport) end(code schema.Code, text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return
	}
	t.ended = true
	t.failure = t.last.failure(code, text)
	close(t.closed)
}
