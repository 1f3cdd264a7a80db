package broker

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"tidemark/internal/natsd"
	"tidemark/schema"
)

// workBench is a node with a broker and a log, and beside them a bare work queue of JetStream on the same node.
type workBench struct {
	*testing.B
	log  *JetStreamLog
	js   jetstream.JetStream
	bare jetstream.Consumer
}

func newWorkBench(b *testing.B, d schema.Durability) *workBench {
	b.Helper()
	node, err := natsd.Start(natsd.Config{DataDir: b.TempDir(), Durability: d})
	if err != nil {
		b.Fatal(err)
	}
	server := Server{InProcess: node, Name: "bench"}
	br, err := NewBroker(BrokerConfig{Server: server, Layout: Layout{Durability: d}, Name: "bench"})
	if err != nil {
		b.Fatal(err)
	}
	l, err := Open(Config{Server: server, Edge: "bench"})
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(b.Context())
	over := make(chan error, 2)
	go func() { over <- br.Run(ctx) }()
	go func() { over <- l.Run(ctx) }()
	w := &workBench{B: b, log: l, js: l.js}
	b.Cleanup(func() {
		ctx := context.WithoutCancel(b.Context())
		_ = l.Close(ctx)
		stop()
		for range 2 {
			if err := <-over; err != nil {
				b.Error(err)
			}
		}
		_ = node.Shutdown(ctx)
	})
	for !l.Status().Ready {
		time.Sleep(10 * time.Millisecond)
	}
	s, err := l.js.CreateStream(ctx, jetstream.StreamConfig{Name: "BARE", Subjects: []string{"bare.>"}, Storage: jetstream.FileStorage, Duplicates: 100 * time.Millisecond})
	if err == nil {
		w.bare, err = s.CreateConsumer(ctx, jetstream.ConsumerConfig{Durable: "bare", AckPolicy: jetstream.AckExplicitPolicy, MaxAckPending: maxInHand})
	}
	if err != nil {
		b.Fatal(err)
	}
	return w
}

// worker joins a group and hands what it is handed to got, which settles it.
func (w *workBench) worker(credit int, got func(i *Item)) Taker {
	w.Helper()
	wake := make(chan struct{}, 1)
	worker, err := w.log.Join(w.Context(), "default", WorkOptions{Group: "bench", Credit: credit, May: func(string) error { return nil }, Wake: func() { signal(wake) }})
	if err != nil {
		w.Fatal(err)
	}
	go func() {
		for range wake {
			for {
				items, err := worker.Take(credit)
				if err != nil {
					return
				}
				if len(items) == 0 {
					break
				}
				for _, i := range items {
					worker.Ack(i.ID)
					got(i)
				}
			}
		}
	}()
	return worker
}

var benchStamp = schema.NewStamp(&schema.Source{Subject: "bench", Role: schema.Role_ROLE_USER})

func benchMessage(text string) schema.Accepted {
	a, err := benchStamp.AcceptEnvelope(&schema.Envelope{Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: text}}}, time.Now())
	if err != nil {
		panic(err)
	}
	return a
}

func quantiles(all []time.Duration) (p50, p99 time.Duration) {
	slices.Sort(all)
	return all[len(all)/2], all[len(all)*99/100]
}

// BenchmarkDispatch is how long an item takes from the call that appends its envelope until a worker has it, at 200 a second over 50 sessions, beside a message that is published to a bare work queue of JetStream until its pull
// consumer has it, by turns on the same node.
func BenchmarkDispatch(b *testing.B) {
	for _, d := range []schema.Durability{schema.Durability_DURABILITY_OS, schema.Durability_DURABILITY_FSYNC} {
		b.Run(schema.DurabilityWord(d), func(b *testing.B) {
			w := newWorkBench(b, d)
			ctx := b.Context()
			came := make(chan time.Time, 1)
			worker := w.worker(10, func(*Item) { came <- time.Now() })
			defer worker.Close()
			it, err := w.bare.Messages(jetstream.PullMaxMessages(10))
			if err != nil {
				b.Fatal(err)
			}
			defer it.Stop()
			bareCame := make(chan time.Time, 1)
			go func() {
				for {
					m, err := it.Next()
					if err != nil {
						return
					}
					_ = m.Ack()
					bareCame <- time.Now()
				}
			}()
			var ours, bare []time.Duration
			for n := 0; b.Loop(); n++ {
				id := schema.SessionID{Tenant: "default", Name: fmt.Sprint("s", n%50)}
				s := Submission{Envelopes: []schema.Accepted{benchMessage("m")}}
				began := time.Now()
				if _, err := Append(ctx, w.log, id, s); err != nil {
					b.Fatal(err)
				}
				ours = append(ours, (<-came).Sub(began))
				time.Sleep(2 * time.Millisecond)
				began = time.Now()
				if _, err := w.js.Publish(ctx, "bare."+strconv.Itoa(n%50), make([]byte, 150)); err != nil {
					b.Fatal(err)
				}
				bare = append(bare, (<-bareCame).Sub(began))
				time.Sleep(2 * time.Millisecond)
			}
			o50, o99 := quantiles(ours)
			b50, b99 := quantiles(bare)
			b.ReportMetric(float64(o50.Microseconds()), "p50-µs")
			b.ReportMetric(float64(o99.Microseconds()), "p99-µs")
			b.ReportMetric(float64(b50.Microseconds()), "bare-p50-µs")
			b.ReportMetric(float64(b99.Microseconds()), "bare-p99-µs")
			b.ReportMetric(float64(o50)/float64(b50), "p50-ratio")
			b.ReportMetric(float64(o99)/float64(b99), "p99-ratio")
		})
	}
}

// BenchmarkWorkThroughput is how many items a second go through, appended to 50 sessions at once and settled by one worker, beside messages through a bare work queue.
func BenchmarkWorkThroughput(b *testing.B) {
	for _, d := range []schema.Durability{schema.Durability_DURABILITY_OS, schema.Durability_DURABILITY_FSYNC} {
		b.Run(schema.DurabilityWord(d)+"/tidemark", func(b *testing.B) {
			w := newWorkBench(b, d)
			done := make(chan struct{}, b.N)
			worker := w.worker(1000, func(*Item) { done <- struct{}{} })
			defer worker.Close()
			b.ResetTimer()
			go func() {
				for n := range b.N {
					s := &Submission{Envelopes: []schema.Accepted{benchMessage("m")}, Done: func(Receipt, error) {}}
					w.log.Publish(b.Context(), schema.SessionID{Tenant: "default", Name: fmt.Sprint("s", n%50)}, s)
				}
			}()
			for range b.N {
				<-done
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "items/s")
		})
		b.Run(schema.DurabilityWord(d)+"/bare", func(b *testing.B) {
			w := newWorkBench(b, d)
			it, err := w.bare.Messages(jetstream.PullMaxMessages(1000))
			if err != nil {
				b.Fatal(err)
			}
			defer it.Stop()
			b.ResetTimer()
			go func() {
				for n := range b.N {
					if _, err := w.js.PublishAsync("bare."+strconv.Itoa(n%50), make([]byte, 150)); err != nil {
						b.Error(err)
						return
					}
				}
			}()
			for range b.N {
				m, err := it.Next()
				if err != nil {
					b.Fatal(err)
				}
				_ = m.Ack()
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "items/s")
		})
	}
}
