package gateway

import (
	"context"
	"errors"

	"tidemark/internal/auth"
	"tidemark/schema"
)

// ErrPeerLeft is the cause of a context that ends because its peer has gone, for transports whose streams have contexts; any other end of [Gateway.Serve]'s context means that the edge stops.
var ErrPeerLeft = errors.New("gateway: the peer has left")

// Transport moves whole messages over one connection and knows nothing of what they say.
//
// Receive is called by one goroutine and Send by one other, so the two run concurrently with each other, never with themselves. Close may be called at any time, by anyone, more than once.
type Transport interface {
	// Receive waits for the peer's next message, which is valid until the next call. The transport bounds it: at most [schema.MaxFrameBytes].
	//
	// Errors: [io.EOF] where the peer will send no more but may still read; [ErrPeerClosing] where it closes and waits for Close; [ErrPeerClosed] where it closed in good order; a [*schema.Refusal] for something that the peer did wrong and
	// is to be told (too_large, invalid_message, peer_dead); anything else where the connection is lost. After an error Receive is not called again.
	Receive(ctx context.Context) ([]byte, error)

	// Send writes the messages one behind the other, with one flush where that is possible. It may block for as long as the peer does not read; the gateway calls Close when that has
	// lasted for [Config.WriteTimeout]. It keeps neither the slice nor the messages. After an error Send is not called again.
	Send(ctx context.Context, messages [][]byte) error

	// Close ends the connection: it tells the peer the code and the sentence, in the way the transport has for that, and returns when the connection is closed, after seconds at the most. The
	// zero code is an end without a fault, about which the message may say a word. A Receive or Send that is blocked returns; where a Send is under way there is nothing to be told, and the
	// connection is cut. Only the first call counts.
	Close(code schema.Code, message string)
}

// What [Transport.Receive] returns when the peer closed the connection in good order.
var (
	// ErrPeerClosed: it is gone, and reads no more.
	ErrPeerClosed = errors.New("gateway: the peer closed the connection")
	// ErrPeerClosing: it sends no more, and reads until Close has answered it. What was accepted is answered before, within [Config.CloseTimeout]; what it follows ends.
	ErrPeerClosing = errors.New("gateway: the peer closes the connection")
)

// Protocol is what the messages of a connection are.
type Protocol int

// The protocols.
const (
	// Proto: [schema.ClientFrame] in, [schema.ServerFrame] out, in protobuf's binary form.
	Proto Protocol = iota + 1
	// ProtoJSON: the same frames in protobuf's JSON form, as UTF-8 text.
	ProtoJSON
	// ProtoPublish: [schema.Publish] in, [schema.ServerFrame] out, binary.
	ProtoPublish
	// SessionJSON: the session socket. One envelope in JSON a message, both ways, and control frames of the same shape without a seq. It needs Peer.Session and Peer.Follow.
	SessionJSON
)

// String is the protocol as metrics and logs name it.
func (p Protocol) String() string {
	switch p {
	case Proto:
		return "proto"
	case ProtoJSON:
		return "json"
	case ProtoPublish:
		return "append"
	case SessionJSON:
		return "session"
	default:
		return "unknown"
	}
}

// Peer is a connection as its edge hands it over.
type Peer struct {
	Transport Transport
	Protocol  Protocol
	// Principal is who the peer is, where the transport brought its token. Nil: the first message must be hello with a token ([Proto] and [ProtoJSON] only).
	Principal *auth.Principal
	// Follow, where not nil, is attached at once, with the channel left out (0) in all frames about it. The connection ends with it. The gateway keeps it.
	Follow *schema.Attach
	// Session is where publishes go that name neither a session nor a channel; empty where each must name one.
	Session string
	// Work: the connection is for workers alone, and carries neither hello, attach nor detach. Its token was brought by the transport.
	Work bool
	// Remote is the peer's address, for the log. Optional.
	Remote string
}
