package edgegrpc

import (
	"errors"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/schema"
)

// TestTailEncoding: what is put together by hand is what protobuf would have made.
func TestTailEncoding(t *testing.T) {
	stored := time.Date(2025, 11, 4, 10, 0, 15, 7, time.UTC)
	envelopes := []*schema.Envelope{tokenOf("a"), tokenOf("b")}
	var records []byte
	for _, e := range envelopes {
		b, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		records = protowire.AppendBytes(protowire.AppendTag(records, 15, protowire.BytesType), b)
	}
	for _, tt := range []struct {
		event broker.TailEvent
		want  *schema.TailResponse
	}{
		{broker.TailEvent{Of: 4}, &schema.TailResponse{Response: &schema.TailResponse_Assigned{Assigned: &schema.TailAssigned{Of: 4}}}},
		{broker.TailEvent{Partitions: []uint32{0, 3}, Of: 4}, &schema.TailResponse{Response: &schema.TailResponse_Assigned{Assigned: &schema.TailAssigned{Partitions: []uint32{0, 3}, Of: 4}}}},
		{
			broker.TailEvent{Batch: &broker.TailBatch{Partition: 3, Through: 99, Frames: []broker.TailFrame{
				{Session: "s", Epoch: "e", Stored: stored, Records: records}, {Session: "ü", Epoch: "f", Stored: stored, Records: records},
			}}},
			&schema.TailResponse{Response: &schema.TailResponse_Batch{Batch: &schema.TailBatch{Partition: 3, Through: 99, Sessions: []*schema.TailEnvelopes{
				{Session: "s", Epoch: "e", Stored: timestamppb.New(stored), Envelopes: envelopes}, {Session: "ü", Epoch: "f", Stored: timestamppb.New(stored), Envelopes: envelopes},
			}}}},
		},
	} {
		b, err := encodeTail(tt.event)
		got := new(schema.TailResponse)
		if err != nil || proto.Unmarshal(b, got) != nil || !proto.Equal(got, tt.want) {
			t.Errorf("%v became %v, %v", tt.want, got, err)
		}
	}
}

// TestTailRefusals: what an edge does not do for a client it says by every dialect that carries streams in both directions, whoever still reads or writes then. This edge has no groups.
func TestTailRefusals(t *testing.T) {
	open := func(prefix string) *schema.TailRequest {
		return &schema.TailRequest{Request: &schema.TailRequest_Open{Open: &schema.TailOpen{Group: "g", SessionPrefix: prefix}}}
	}
	eachBidi(t, func(w *world, d dialect) {
		for what, tt := range map[string]struct {
			first *schema.TailRequest
			want  schema.Code
		}{
			"no groups":          {open("chat-"), schema.Code_CODE_UNSUPPORTED_PROTOCOL},
			"a prefix too short": {open("c"), schema.Code_CODE_FORBIDDEN},
			"no open":            {&schema.TailRequest{Request: &schema.TailRequest_Ack{Ack: &schema.TailAck{}}}, schema.Code_CODE_INVALID_MESSAGE},
			"nothing":            {nil, schema.Code_CODE_INVALID_MESSAGE},
		} {
			c := w.dial(d, w.token(schema.Role_ROLE_ANALYST, "chat-*")).open("Tail", true)
			if tt.first != nil {
				c.say(tt.first)
			}
			_, err := c.recv()
			p, ok := errors.AsType[*problem](err)
			if !ok || p.word != tt.want.Word() {
				w.Errorf("%s: %v, want %s", what, err, tt.want.Word())
			}
			c.cancel()
		}
		c := w.dial(d, "").open("Tail", true)
		if p, ok := errors.AsType[*problem](second(c.recv())); !ok || p.word != schema.Code_CODE_UNAUTHENTICATED.Word() {
			w.Errorf("without a token: %v", p)
		}
		c.cancel()
	})
}

func second[A any](_ A, err error) error { return err }
