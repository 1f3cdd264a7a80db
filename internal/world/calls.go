package world

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

const service = "/tidemark.v1.SessionService/"

// calls is a gRPC connection. Its windows are small, so that what a client does not read stays on the way.
type calls struct {
	cc     *grpc.ClientConn
	ctx    context.Context //nolint:containedctx // of the streams, which outlive the call that opens them
	cancel context.CancelFunc
	err    error
}

func newCalls(p path, token string) *calls {
	c := new(calls)
	c.cc, c.err = grpc.NewClient("passthrough:///edge", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return p.dial(ctx) }),
		grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10), grpc.WithDisableRetry(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20), grpc.ForceCodecV2(rawCodec{encoding.GetCodecV2(grpcproto.Name)})))
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if token != "" {
		c.ctx = metadata.AppendToOutgoingContext(c.ctx, "authorization", "Bearer "+token)
	}
	return c
}

// stream opens a stream, which lives as long as the connection. ctx bounds the opening.
func (c *calls) stream(ctx context.Context, method string, clients, servers bool) (grpc.ClientStream, error) {
	if c.err != nil {
		return nil, c.err
	}
	late := context.AfterFunc(ctx, c.cancel)
	defer late()
	return c.cc.NewStream(c.ctx, &grpc.StreamDesc{StreamName: method, ClientStreams: clients, ServerStreams: servers}, service+method)
}

func (c *calls) drop() {
	c.cancel()
	_ = c.cc.Close()
}

// failedCall is an error of a stream, with what came behind it.
type failedCall struct {
	err     error
	trailer metadata.MD
}

func (f *failedCall) Error() string { return f.err.Error() }
func (f *failedCall) Unwrap() error { return f.err }

func (c *calls) ending(err error) Ending {
	e := Ending{Err: err}
	s, ok := status.FromError(err)
	if !ok {
		return e
	}
	e.Status, e.Message = int(s.Code()), s.Message()
	if f, ok := errors.AsType[*failedCall](err); ok {
		s, _ = status.FromError(f.err)
		e.Status, e.Message = int(s.Code()), s.Message()
		for _, word := range f.trailer.Get("tidemark-code") {
			e.Code = codeOf(word)
		}
	}
	return e
}

// receive takes a frame from a stream.
func receive(s grpc.ClientStream) (*schema.ServerFrame, error) {
	f := new(schema.ServerFrame)
	if err := s.RecvMsg(f); err != nil {
		return nil, &failedCall{err, s.Trailer()}
	}
	return f, nil
}

// streamWire is the method Connect, or Work.
type streamWire struct {
	*calls
	method string
	s      grpc.ClientStream
}

func (s *streamWire) open(ctx context.Context, _ *schema.Attach) (err error) {
	s.s, err = s.stream(ctx, s.method, true, true)
	return err
}

func (s *streamWire) send(f *schema.ClientFrame) error { return s.s.SendMsg(f) }
func (s *streamWire) raw(b []byte) error               { return s.s.SendMsg(rawMessage(b)) }

func (s *streamWire) receive() ([]*schema.ServerFrame, error) {
	f, err := receive(s.s)
	return []*schema.ServerFrame{f}, err
}

func (s *streamWire) close() {
	if s.s != nil {
		_ = s.s.CloseSend()
	}
}

// callsWire is the methods Follow and AppendStream.
type callsWire struct {
	*calls
	frames  chan any // *schema.ServerFrame, or the error that ends it
	over    chan struct{}
	once    sync.Once
	readers sync.WaitGroup

	mu      chan struct{} // guards append
	append  grpc.ClientStream
	channel uint32
}

func newCallsWire(c *calls) *callsWire {
	return &callsWire{calls: c, frames: make(chan any), over: make(chan struct{}), mu: make(chan struct{}, 1)}
}

func (s *callsWire) open(ctx context.Context, first *schema.Attach) error {
	if first == nil || first.GetSession() == "" {
		return nil
	}
	f, err := s.stream(ctx, "Follow", false, true)
	if err != nil {
		return err
	}
	s.channel = first.GetChannel()
	a := clone(first)
	a.Channel = 0
	if err := f.SendMsg(a); err != nil {
		return err
	}
	if err := f.CloseSend(); err != nil {
		return err
	}
	s.read(f)
	return nil
}

// read hands on what comes from a stream.
func (s *callsWire) read(from grpc.ClientStream) {
	s.readers.Go(func() {
		for {
			var what any
			f, err := receive(from)
			if what = f; err != nil {
				what = err
			}
			select {
			case s.frames <- what:
			case <-s.over:
				return
			}
			if err != nil {
				return
			}
		}
	})
}

func (s *callsWire) send(f *schema.ClientFrame) error {
	if f.GetPublish() == nil {
		return errNotThisWay
	}
	return s.publish(f.GetPublish())
}

func (s *callsWire) raw(b []byte) error { return s.publish(rawMessage(b)) }

func (s *callsWire) publish(m any) error {
	s.mu <- struct{}{}
	defer func() { <-s.mu }()
	if s.append == nil {
		a, err := s.stream(context.Background(), "AppendStream", true, true)
		if err != nil {
			// No stream will say that there is none; whoever receives must hear of it all the same.
			s.fail(err)
			return err
		}
		s.append = a
		s.read(a)
	}
	return s.append.SendMsg(m)
}

// fail hands on the error of a stream that never began.
func (s *callsWire) fail(err error) {
	s.readers.Go(func() {
		select {
		case s.frames <- err:
		case <-s.over:
		}
	})
}

func (s *callsWire) receive() ([]*schema.ServerFrame, error) {
	select {
	case what := <-s.frames:
		if err, failed := what.(error); failed {
			return nil, err
		}
		return []*schema.ServerFrame{setChannel(what.(*schema.ServerFrame), s.channel)}, nil //nolint:errcheck // the one or the other
	case <-s.over:
		return nil, io.ErrClosedPipe
	}
}

func (s *callsWire) close() { s.drop() }

func (s *callsWire) drop() {
	s.calls.drop()
	s.once.Do(func() { close(s.over) })
	// Who publishes just now starts a reader, perhaps.
	s.mu <- struct{}{}
	defer func() { <-s.mu }()
	s.readers.Wait()
}

// rawMessage is sent as its bytes.
type rawMessage []byte

type rawCodec struct{ encoding.CodecV2 }

func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if raw, ok := v.(rawMessage); ok {
		return mem.BufferSlice{mem.SliceBuffer(raw)}, nil
	}
	return c.CodecV2.Marshal(v)
}

// CallAs is [World.Call] with another token, or over a link that the test wants to know.
func (w *World) CallAs(e *Edge, d Dial, method string, req, res proto.Message) error {
	token := d.Token
	if token == "" && !d.Anonymous {
		token = w.Token(schema.Role_ROLE_AGENT, "*")
	}
	c := newCalls(path{net: w.net, addr: e.Name + ".grpc", told: d.Link}, token)
	defer c.drop()
	if c.err != nil {
		return c.err
	}
	ctx, cancel := context.WithTimeout(c.ctx, patience)
	defer cancel()
	var trailer metadata.MD
	err := c.cc.Invoke(ctx, service+method, req, res, grpc.Trailer(&trailer))
	if err == nil {
		return nil
	}
	end := c.ending(&failedCall{err, trailer})
	if end.Code == schema.Code_CODE_UNSPECIFIED {
		return err
	}
	r := &schema.Refusal{Code: end.Code, Message: end.Message, Err: err}
	s, _ := status.FromError(err)
	for _, d := range s.Details() {
		switch d := d.(type) {
		case *schema.ErrorFrame:
			r.Head, r.Epoch = d.GetHeadSeq(), d.GetEpoch()
		case *schema.Rejected:
			r.Head, r.Expected = d.GetHeadSeq(), d.GetExpected()
		}
	}
	return r
}
