package edgegrpc

import (
	"fmt"

	"connectrpc.com/connect"
	"google.golang.org/grpc/encoding"
	// Registers protobuf's codec, which nativeCodec stands on.
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// message is a message of a stream as its bytes: what the gateway reads and writes itself.
type message struct {
	bytes []byte
}

// keepBytes is the largest buffer that an idle stream keeps for its next message.
const keepBytes = 16 << 10

// room returns a buffer of n bytes for the next message, the last one's where it fits: a message is valid until the next is received.
func (m *message) room(n int) []byte {
	if cap(m.bytes) < n || cap(m.bytes) > keepBytes && n <= keepBytes {
		m.bytes = make([]byte, n, max(n, 512))
	}
	m.bytes = m.bytes[:n]
	return m.bytes
}

// nativeCodec is grpc-go's codec for protobuf, which hands the messages of streams through as bytes.
type nativeCodec struct {
	encoding.CodecV2
}

func newNativeCodec() nativeCodec {
	return nativeCodec{encoding.GetCodecV2(grpcproto.Name)}
}

// sendBuffers hold the messages that wait for a peer to read them. grpc-go's own pool steps from 32 KiB to 1 MiB, and the gateway's messages are at most about 64 KiB, or 128 KiB while a follower catches
// up: a peer that does not read would hold megabytes (I8), and each message would cost the clearing of one.
var sendBuffers = mem.NewTieredBufferPool(1<<10, 4<<10, 16<<10, 72<<10, 144<<10, 1<<20) //nolint:gochecknoglobals // a pool has no state of its own

// Marshal copies the bytes: grpc-go writes them after SendMsg has returned, when the gateway uses its buffer again.
func (c nativeCodec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*message); ok {
		return mem.BufferSlice{mem.Copy(m.bytes, sendBuffers)}, nil
	}
	return c.CodecV2.Marshal(v)
}

func (c nativeCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if m, ok := v.(*message); ok {
		data.CopyTo(m.room(data.Len()))
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}

// webCodec is connect-go's codec for protobuf or its JSON form, which hands the messages of streams through as bytes.
type webCodec struct {
	name string
	json bool
}

// webCodecs replace connect-go's own.
func webCodecs() connect.HandlerOption {
	return connect.WithHandlerOptions(
		connect.WithCodec(webCodec{name: "proto"}),
		connect.WithCodec(webCodec{name: "json", json: true}),
		connect.WithCodec(webCodec{name: "json; charset=utf-8", json: true}),
	)
}

func (c webCodec) Name() string { return c.name }

func (c webCodec) Marshal(v any) ([]byte, error) { return c.MarshalAppend(nil, v) }

// MarshalAppend is what connect-go calls where a codec has it, with a pooled buffer.
func (c webCodec) MarshalAppend(b []byte, v any) ([]byte, error) {
	switch m := v.(type) {
	case *message:
		return append(b, m.bytes...), nil
	case proto.Message:
		if c.json {
			return protojson.MarshalOptions{}.MarshalAppend(b, m)
		}
		return proto.MarshalOptions{}.MarshalAppend(b, m)
	default:
		return nil, fmt.Errorf("edgegrpc: %T is no message", v)
	}
}

func (c webCodec) Unmarshal(b []byte, v any) error {
	switch m := v.(type) {
	case *message:
		copy(m.room(len(b)), b)
		return nil
	case proto.Message:
		if c.json {
			// As connect-go's own: a client newer than the server is understood as far as that goes.
			return protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(b, m)
		}
		return proto.Unmarshal(b, m)
	default:
		return fmt.Errorf("edgegrpc: %T is no message", v)
	}
}
