package gateway

import (
	"context"
	"io"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/schema"
)

// endless sends one message again and again, as often as it is told, and throws away what it gets.
type endless struct {
	msg   []byte
	left  int
	bytes int64
}

func (e *endless) Receive(context.Context) ([]byte, error) {
	if e.left == 0 {
		return nil, io.EOF
	}
	e.left--
	return e.msg, nil
}

func (e *endless) Send(_ context.Context, messages [][]byte) error {
	for _, m := range messages {
		e.bytes += int64(len(m))
	}
	return nil
}

func (e *endless) Close(schema.Code, string) {}

// quickLog stores nothing and says yes.
type quickLog struct {
	broker.Log
	seq uint64
}

func (l *quickLog) Publish(_ context.Context, _ schema.SessionID, s *broker.Submission) {
	l.seq++
	s.Done(broker.Receipt{Epoch: "01ARZ3NDEKTSV4RRFFQ69G5FAV", First: l.seq, Last: l.seq}, nil)
}

// BenchmarkPublish is what the gateway itself spends on a token that comes in a frame of its own: from the message to the acknowledgement, without transport and log.
func BenchmarkPublish(b *testing.B) {
	for _, c := range []struct {
		name   string
		limits Limits
		e      *schema.Envelope
	}{
		{"token", Limits{}, tokenOf(" example")},
		{"with a rate", Limits{Agent: Rate{1e9, 1e9}}, tokenOf(" example")},
		{"with producer", Limits{}, &schema.Envelope{Producer: &schema.Producer{Id: "p", Epoch: 1, Seq: 9}, Payload: tokenOf(" example").Payload}},
	} {
		b.Run(c.name, func(b *testing.B) {
			g, err := New(Config{Log: &quickLog{Log: broker.NewMemoryLog()}, Verify: verify, Limits: c.limits})
			if err != nil {
				b.Fatal(err)
			}
			msg, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: &schema.Publish{
				PublishId: 12345, Session: "a-session-of-usual-length", Envelopes: []*schema.Envelope{c.e},
			}}})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			b.ResetTimer()
			if err := g.Serve(b.Context(), Peer{Transport: &endless{msg: msg, left: b.N}, Protocol: Proto, Principal: principal("agent", "*")}); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkEvents is what the writer spends on a token that a follower gets, by how many are ready at once.
func BenchmarkEvents(b *testing.B) {
	for _, c := range []struct {
		name  string
		codec codec
	}{{"proto", protoCodec{}}, {"json", protoJSONCodec{}}, {"session", sessionCodec{}}} {
		b.Run(c.name, func(b *testing.B) {
			stamp := schema.NewStamp(&schema.Source{Subject: "writer", Role: schema.Role_ROLE_AGENT})
			block := &broker.Block{Epoch: "01ARZ3NDEKTSV4RRFFQ69G5FAV", First: 1, Count: 64}
			for seq := range uint64(64) {
				a, err := stamp.AcceptEnvelope(tokenOf(" example"), time.Now())
				if err != nil {
					b.Fatal(err)
				}
				block.Region = a.AppendRecord(block.Region, seq+1)
			}
			g, err := New(Config{Log: broker.NewMemoryLog(), Verify: verify})
			if err != nil {
				b.Fatal(err)
			}
			w := &writer{c: &conn{g: g, codec: c.codec}, out: new(outgoing)}
			a := &attachment{channel: 1}
			b.ReportAllocs()
			for b.Loop() {
				batch := broker.Batch{Views: []broker.View{block.All()}, Through: 64}
				w.emit(a, &batch)
				w.out.reset()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/64, "ns/token")
		})
	}
}
