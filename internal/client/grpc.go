package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// service is the name of the edges' gRPC service.
const service = "/tidemark.v1.SessionService/"

// codeTrailer is where an edge names the code of a failed call.
const codeTrailer = "tidemark-code"

// grpcConn is a stream of a method, Connect or Tail, on a connection of its own.
type grpcConn struct {
	cc     *grpc.ClientConn
	stream grpc.ClientStream
	cancel context.CancelFunc

	mu  sync.Mutex
	net net.Conn // nil until connected

	in frameBytes
}

// dialGRPC opens the stream. What the edge says to the token comes with the first receive.
func (c *Client) dialGRPC(ctx context.Context, e edge, method string) (conn, error) {
	g := new(grpcConn)
	cc, err := c.grpcClient(e, func(n net.Conn) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.net = n
	})
	if err != nil {
		return nil, err
	}
	// The stream outlives the attempt to open it.
	streaming, cancel := context.WithCancel(context.WithoutCancel(ctx))
	g.cc, g.cancel = cc, cancel
	late := context.AfterFunc(ctx, cancel)
	desc := &grpc.StreamDesc{StreamName: method, ServerStreams: true, ClientStreams: true}
	g.stream, err = cc.NewStream(c.withToken(streaming), desc, service+method, grpc.ForceCodecV2(rawCodec{encoding.GetCodecV2(grpcproto.Name)}))
	if !late() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		cancel()
		return nil, errors.Join(refusalOf(err, nil), cc.Close())
	}
	return g, nil
}

// grpcClient makes a connection that is not made yet; made is told of it.
func (c *Client) grpcClient(e edge, made func(net.Conn)) (*grpc.ClientConn, error) {
	creds := insecure.NewCredentials()
	if e.secure {
		creds = credentials.NewTLS(c.cfg.TLS)
	}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			n, err := c.cfg.Dial(ctx, "tcp", addr)
			if err == nil && made != nil {
				made(n)
			}
			return n, err
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: silence, Timeout: deadAfter}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxServerFrame)),
		// Connecting again is this package's part.
		grpc.WithDisableRetry(),
		grpc.WithStaticStreamWindowSize(512 << 10),
		grpc.WithStaticConnWindowSize(1 << 20),
	}
	if c.cfg.Name != "" {
		opts = append(opts, grpc.WithUserAgent(c.cfg.Name))
	}
	return grpc.NewClient("passthrough:///"+e.url.Host, opts...)
}

func (c *Client) withToken(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.cfg.Token)
}

func (g *grpcConn) send(_ context.Context, frame []byte) error {
	err := g.stream.SendMsg(&frameBytes{frame})
	if errors.Is(err, io.EOF) {
		// The stream is over; receive says why.
		return errStreamOver
	}
	return err
}

var errStreamOver = errors.New("client: the edge has ended the stream")

func (g *grpcConn) receive(ctx context.Context) ([]byte, error) {
	stop := context.AfterFunc(ctx, g.cut)
	err := g.stream.RecvMsg(&g.in)
	if !stop() {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, refusalOf(err, g.stream.Trailer())
	}
	return g.in.bytes, nil
}

// closeSend says that no frame comes any more; the edge ends the stream then.
func (g *grpcConn) closeSend() { _ = g.stream.CloseSend() }

func (g *grpcConn) cut() {
	g.mu.Lock()
	n := g.net
	g.mu.Unlock()
	if n != nil {
		_ = n.Close()
	}
	g.cancel()
	_ = g.cc.Close()
}

func (g *grpcConn) close() {
	// The library says goodbye to the server before it closes.
	_ = g.cc.Close()
	g.cancel()
}

// call makes a call that is answered once.
func (c *Client) call(ctx context.Context, method string, req, res proto.Message) error {
	l := link{c: c}
	for range len(c.edges) {
		e := c.edges[l.next%len(c.edges)]
		l.next++
		if !e.grpc {
			continue
		}
		cc, err := c.grpcClient(e, nil)
		if err != nil {
			return err
		}
		var trailer metadata.MD
		err = cc.Invoke(c.withToken(ctx), service+method, req, res, grpc.Trailer(&trailer))
		if cerr := cc.Close(); err == nil {
			return cerr
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err = refusalOf(err, trailer)
		if _, said := errors.AsType[*schema.Refusal](err); said {
			return err
		}
		if l.next == len(c.edges) {
			return &schema.Refusal{
				Code: schema.Code_CODE_UNAVAILABLE, Err: err, Message: fmt.Sprintf("The edge %s cannot be reached; check that it is running and its address.", e.url),
			}
		}
	}
	return schema.Refuse(schema.Code_CODE_UNSUPPORTED_PROTOCOL, "This needs an edge that speaks gRPC; name one as grpc://HOST:PORT.")
}

// refusalOf is what the edge said with a status, otherwise err.
func refusalOf(err error, trailer metadata.MD) error {
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	r := &schema.Refusal{Message: s.Message()}
	if words := trailer.Get(codeTrailer); len(words) > 0 {
		r.Code = parseCode(words[0])
	}
	for _, d := range s.Details() {
		switch d := d.(type) {
		case *schema.ErrorFrame:
			r.Code, r.Head, r.Epoch = d.GetCode(), d.GetHeadSeq(), d.GetEpoch()
		case *schema.Rejected:
			r.Code, r.Head, r.Expected = d.GetCode(), d.GetHeadSeq(), d.GetExpected()
		}
	}
	if r.Code != schema.Code_CODE_UNSPECIFIED {
		return r
	}
	// What has no code of ours was not said by an edge, but by the library or something in between.
	switch s.Code() {
	case codes.Unauthenticated:
		r.Code = schema.Code_CODE_UNAUTHENTICATED
	case codes.PermissionDenied:
		r.Code = schema.Code_CODE_FORBIDDEN
	case codes.Unimplemented:
		r.Code = schema.Code_CODE_UNSUPPORTED_PROTOCOL
	default:
		return &transportError{err, transportWords(s.Message())}
	}
	return r
}

// transportError is what the library says of a connection, in the words of what it was told.
type transportError struct {
	error
	words string
}

func (e *transportError) Error() string { return e.words }
func (e *transportError) Unwrap() error { return e.error }

// transportWords strips what the library wraps around what it was told by the network.
func transportWords(s string) string {
	if _, cause, dialing := strings.Cut(s, "Error while dialing: "); dialing {
		return strings.TrimSuffix(cause, `"`)
	}
	return s
}

// frameBytes is a frame as its bytes.
type frameBytes struct{ bytes []byte }

// rawCodec hands frames through as bytes.
type rawCodec struct{ encoding.CodecV2 }

func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(*frameBytes); ok {
		// The sender does not change a frame that it gave away.
		return mem.BufferSlice{mem.SliceBuffer(f.bytes)}, nil
	}
	return c.CodecV2.Marshal(v)
}

func (c rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frameBytes)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	if n := data.Len(); cap(f.bytes) < n {
		f.bytes = make([]byte, n, n+n/4)
	} else {
		f.bytes = f.bytes[:n]
	}
	data.CopyTo(f.bytes)
	return nil
}
