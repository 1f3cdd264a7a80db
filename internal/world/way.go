package world

import (
	"context"
	"errors"
	"fmt"
	"net"

	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// Way is a way into the system.
type Way int

// The ways in.
const (
	// ProtoSocket is the multiplexed WebSocket in binary.
	ProtoSocket Way = iota
	// JSONSocket is the multiplexed WebSocket in protobuf's JSON form.
	JSONSocket
	// SessionSocket is the JSON socket of one session. It has neither a hello nor detach, caught_up or expected_seq, and takes one envelope at a time.
	SessionSocket
	// GRPC is the gRPC method Connect.
	GRPC
	// Calls are the gRPC methods Follow, for attach, and AppendStream, for publish. It follows one session.
	Calls
	// WorkStream is the gRPC method Work, for workers alone: it has neither hello, attach nor detach, so it is not among Ways.
	WorkStream
)

// Ways are all of them.
func Ways() []Way { return []Way{ProtoSocket, JSONSocket, SessionSocket, GRPC, Calls} }

// WorkWays are those on which workers work. A session socket works for its session alone.
func WorkWays() []Way { return []Way{ProtoSocket, JSONSocket, SessionSocket, GRPC, WorkStream} }

func (y Way) String() string {
	return [...]string{"proto", "json", "session", "grpc", "calls", "work"}[y]
}

// Single says that a connection of this way follows one session.
func (y Way) Single() bool { return y == SessionSocket || y == Calls }

// Dial says how to connect, beside where to and which way.
type Dial struct {
	// Token is what to say; by default that of an agent that may use every session.
	Token string
	// Anonymous: say no token.
	Anonymous bool
	// Link is told of the link as soon as there is one.
	Link func(*Link)
}

// wire is a connection as the way's protocol has it, in the words of the multiplexed one. send, receive and close may be called concurrently with each other.
type wire interface {
	// open connects. first is the first attach, for ways that need it to connect; nil otherwise.
	open(ctx context.Context, first *schema.Attach) error
	send(f *schema.ClientFrame) error
	// raw sends a message as it is.
	raw(b []byte) error
	// receive returns the next frames. The error ends the connection.
	receive() ([]*schema.ServerFrame, error)
	// ending is what the error of open, send or receive says.
	ending(err error) Ending
	// close ends the connection in good order.
	close()
	// drop lets go of everything at once.
	drop()
}

// Ending is how a connection ended.
type Ending struct {
	// Code and Message are what the server said, in the way's manner; unspecified where it said nothing, as after a cut.
	Code    schema.Code
	Message string
	// Status is the close code of the WebSocket, the code of the gRPC status, or the HTTP status of an upgrade that was refused; 0 for a connection that was lost.
	Status int
	// Err is what the client's library returned.
	Err error
}

func (e Ending) String() string {
	return fmt.Sprintf("%s (%d) %q: %v", e.Code.Word(), e.Status, e.Message, e.Err)
}

var errNotThisWay = errors.New("world: this way in has no such frame")

// path is how a wire reaches an edge.
type path struct {
	net  *network
	addr string
	told func(*Link)
}

func (p path) dial(ctx context.Context) (net.Conn, error) {
	l, c, err := p.net.dial(ctx, p.addr)
	if err == nil && p.told != nil {
		p.told(l)
	}
	return c, err
}

// wireTo makes a wire that is not open yet.
func (w *World) wireTo(e *Edge, way Way, d Dial) wire {
	token := d.Token
	if token == "" && !d.Anonymous {
		token = w.Token(schema.Role_ROLE_AGENT, "*")
	}
	p := path{net: w.net, addr: e.Name + ".http", told: d.Link}
	switch way {
	case SessionSocket:
		return &sessionWire{socket: newSocket(p, token), published: make(map[string]uint64)}
	case GRPC:
		p.addr = e.Name + ".grpc"
		return &streamWire{calls: newCalls(p, token), method: "Connect"}
	case WorkStream:
		p.addr = e.Name + ".grpc"
		return &streamWire{calls: newCalls(p, token), method: "Work"}
	case Calls:
		p.addr = e.Name + ".grpc"
		return newCallsWire(newCalls(p, token))
	default:
		return &socketWire{socket: newSocket(p, token), json: way == JSONSocket}
	}
}

// setChannel gives frames of a way that follows one session the channel that the test chose.
func setChannel(f *schema.ServerFrame, channel uint32) *schema.ServerFrame {
	switch m := f.GetFrame().(type) {
	case *schema.ServerFrame_Attached:
		m.Attached.Channel = channel
	case *schema.ServerFrame_Events:
		m.Events.Channel = channel
	case *schema.ServerFrame_CaughtUp:
		m.CaughtUp.Channel = channel
	case *schema.ServerFrame_Truncated:
		m.Truncated.Channel = channel
	}
	return f
}

// clone is a copy that shares nothing.
func clone[M proto.Message](m M) M {
	c, _ := proto.Clone(m).(M)
	return c
}
