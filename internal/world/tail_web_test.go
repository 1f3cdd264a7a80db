package world

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"testing"

	"connectrpc.com/connect"

	"tidemark/schema"
	"tidemark/schema/schemaconnect"
)

// TestTail_OverTheWeb tails by what connect-go speaks on HTTP/2: Connect and gRPC, in binary and JSON.
func TestTail_OverTheWeb(t *testing.T) {
	for name, options := range map[string][]connect.ClientOption{
		"connect":         nil,
		"connect in json": {connect.WithProtoJSON()},
		"grpc in json":    {connect.WithGRPC(), connect.WithProtoJSON()},
	} {
		t.Run(name, func(t *testing.T) {
			Run(t, Config{Edges: 1}, func(w *World) {
				p := new(http.Protocols)
				p.SetUnencryptedHTTP2(true)
				transport := &http.Transport{Protocols: p, DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
					_, c, err := w.net.dial(ctx, addr)
					return c, err
				}}
				defer transport.CloseIdleConnections()
				c := schemaconnect.NewSessionServiceClient(&http.Client{Transport: transport}, "http://edge0.grpc", options...)
				ctx, cancel := context.WithTimeout(w.t.Context(), patience)
				defer cancel()
				ctx, info := connect.NewClientContext(ctx)
				info.RequestHeader().Set("Authorization", "Bearer "+w.Token(schema.Role_ROLE_ANALYST, "*"))
				for round := range 2 {
					w.say("s", fmt.Sprint("a", round), fmt.Sprint("b", round))
					s, err := c.Tail(ctx)
					w.must(err)
					w.must(s.Send(&schema.TailRequest{Request: &schema.TailRequest_Open{Open: &schema.TailOpen{Group: "g"}}}))
					for got, want := "", fmt.Sprintf("a%db%d", round, round); got != want; {
						r, err := s.Receive()
						w.must(err)
						for _, f := range r.GetBatch().GetSessions() {
							got += Texts(f.GetEnvelopes())
						}
						if b := r.GetBatch(); b != nil {
							w.must(s.Send(&schema.TailRequest{Request: &schema.TailRequest_Ack{Ack: &schema.TailAck{Partition: b.GetPartition(), Through: b.GetThrough()}}}))
						}
						if len(got) > 4 {
							t.Fatalf("round %d: %q came", round, got)
						}
					}
					w.must(s.CloseRequest())
					for err = nil; err == nil; {
						_, err = s.Receive()
					}
					w.must(s.CloseResponse())
				}
			})
		})
	}
}
