package broker_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/broker"
	"tidemark/internal/natsd"
	"tidemark/schema"
)

// bench is a substrate outside a bubble: real time, real disk.
func bench(b *testing.B, d schema.Durability) (*natsd.Server, *broker.JetStreamLog) {
	b.Helper()
	node, err := natsd.Start(natsd.Config{DataDir: b.TempDir(), Durability: d, Listen: "127.0.0.1:0"})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = node.Shutdown(context.WithoutCancel(b.Context())) })
	server := broker.Server{InProcess: node, Name: "bench"}
	if err := broker.Provision(b.Context(), server, broker.Layout{Durability: d}); err != nil {
		b.Fatal(err)
	}
	l, err := broker.Open(broker.Config{Server: server})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := l.Run(ctx); err != nil {
			b.Error(err)
		}
	})
	b.Cleanup(func() {
		_ = l.Close(context.WithoutCancel(b.Context()))
		cancel()
		wg.Wait()
	})
	for !l.Status().Ready {
		time.Sleep(time.Millisecond)
	}
	return node, l
}

var classes = []schema.Durability{schema.Durability_DURABILITY_OS, schema.Durability_DURABILITY_FSYNC}

// benchToken is a token as a model streams them, accepted.
func benchToken(b *testing.B, stamp schema.Stamp, i int) schema.Accepted {
	a, err := stamp.AcceptEnvelope(&schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m1", Text: fmt.Sprint(" word", i)}}}, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	return a
}

// BenchmarkAppend stores b.N tokens, one in a publish, spread over sessions at full speed with 256 in flight in each.
func BenchmarkAppend(b *testing.B) {
	for _, class := range classes {
		for _, sessions := range []int{1, 50, 200} {
			b.Run(fmt.Sprintf("class=%s/sessions=%d", schema.DurabilityWord(class), sessions), func(b *testing.B) {
				_, l := bench(b, class)
				stamp := schema.NewStamp(&schema.Source{Subject: "bench", Role: schema.Role_ROLE_AGENT})
				b.ReportAllocs()
				b.ResetTimer()
				var wg sync.WaitGroup
				for s := range sessions {
					id := schema.SessionID{Tenant: "default", Name: fmt.Sprint("bench-", s)}
					wg.Go(func() {
						window := make(chan struct{}, 256)
						for i := s; i < b.N; i += sessions {
							window <- struct{}{}
							l.Publish(b.Context(), id, &broker.Submission{
								Envelopes: []schema.Accepted{benchToken(b, stamp, i)},
								Done: func(_ broker.Receipt, err error) {
									if err != nil {
										b.Error(err)
									}
									<-window
								},
							})
						}
						for range cap(window) {
							window <- struct{}{}
						}
					})
				}
				wg.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "tokens/s")
			})
		}
	}
}

// BenchmarkTailDelivery measures one token from its publish to a follower that waits for it: append, fsync, tail, follower. The baseline is one raw JetStream publish to an ordered consumer.
func BenchmarkTailDelivery(b *testing.B) {
	for _, class := range classes {
		b.Run("class="+schema.DurabilityWord(class), func(b *testing.B) {
			_, l := bench(b, class)
			id := schema.SessionID{Tenant: "default", Name: "bench"}
			stamp := schema.NewStamp(&schema.Source{Subject: "bench", Role: schema.Role_ROLE_AGENT})
			f, err := l.Follow(b.Context(), id, broker.FollowOptions{})
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			for i := 0; b.Loop(); i++ {
				l.Publish(b.Context(), id, &broker.Submission{Envelopes: []schema.Accepted{benchToken(b, stamp, i)}, Done: func(broker.Receipt, error) {}})
				for f.Cursor().Seq <= uint64(i) {
					if _, err := f.Next(b.Context(), 1<<20); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
		b.Run("raw/class="+schema.DurabilityWord(class), func(b *testing.B) {
			node, _ := bench(b, class)
			nc, err := nats.Connect("", nats.InProcessServer(node))
			if err != nil {
				b.Fatal(err)
			}
			defer nc.Close()
			js, err := jetstream.New(nc)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := js.CreateStream(b.Context(), jetstream.StreamConfig{Name: "RAW", Subjects: []string{"raw"}}); err != nil {
				b.Fatal(err)
			}
			cons, err := js.OrderedConsumer(b.Context(), "RAW", jetstream.OrderedConsumerConfig{})
			if err != nil {
				b.Fatal(err)
			}
			it, err := cons.Messages()
			if err != nil {
				b.Fatal(err)
			}
			defer it.Stop()
			data := make([]byte, 128)
			for b.Loop() {
				if _, err := js.PublishAsync("raw", data); err != nil {
					b.Fatal(err)
				}
				if _, err := it.Next(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
