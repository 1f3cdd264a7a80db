package broker

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// BenchmarkProjectorSource reads a log stream of 200,000 frames in the two ways that a projector could (docs/adr/0003): by an ordered consumer, with a checkpoint of its own every two seconds' worth; and by a durable
// AckAll consumer with a pinned priority group, acknowledged as often, which holds the messages of ten seconds unacknowledged. cpu-us/frame is what client and server take together.
func BenchmarkProjectorSource(b *testing.B) {
	const frames, ackEvery, unacked = 200_000, 20_000, 100_000
	s := newShelf(b, 1, 1)
	s.scatter(b, 1, frames)
	ctx := b.Context()
	read := func(b *testing.B, cons jetstream.Consumer, opts []jetstream.PullMessagesOpt, each func(n int, m jetstream.Msg)) {
		b.Helper()
		it, err := cons.Messages(opts...)
		if err != nil {
			b.Fatal(err)
		}
		defer it.Stop()
		for n := 1; n <= frames; n++ {
			m, err := it.Next()
			if err != nil {
				b.Fatal(err)
			}
			each(n, m)
		}
	}
	limit := jetstream.PullMaxMessagesWithBytesLimit(pullMessages, pullBytes)
	ways := map[string]func(b *testing.B, round int){
		"ordered": func(b *testing.B, _ int) {
			cons, err := s.js.OrderedConsumer(ctx, "LOG_00", jetstream.OrderedConsumerConfig{})
			if err != nil {
				b.Fatal(err)
			}
			kv, err := s.js.KeyValue(ctx, projectionBucket)
			if err != nil {
				b.Fatal(err)
			}
			l := newLease(kv, "bench", "bench", testLogger(b))
			if err := l.acquire(ctx); err != nil {
				b.Fatal(err)
			}
			read(b, cons, []jetstream.PullMessagesOpt{limit}, func(n int, _ jetstream.Msg) {
				if n%ackEvery == 0 {
					if err := l.renew(ctx, uint64(n)); err != nil {
						b.Fatal(err)
					}
				}
			})
		},
		"ackall-pinned": func(b *testing.B, round int) {
			cons, err := s.js.CreateConsumer(ctx, "LOG_00", jetstream.ConsumerConfig{
				Durable: fmt.Sprintf("projector-%d-%d", time.Now().UnixNano(), round), AckPolicy: jetstream.AckAllPolicy, MaxAckPending: -1, AckWait: time.Hour,
				PriorityPolicy: jetstream.PriorityPolicyPinned, PriorityGroups: []string{"p"}, PinnedTTL: time.Minute,
			})
			if err != nil {
				b.Fatal(err)
			}
			var held []jetstream.Msg // each ackEvery-th
			read(b, cons, []jetstream.PullMessagesOpt{limit, jetstream.PullPriorityGroup("p")}, func(n int, m jetstream.Msg) {
				if n%ackEvery > 0 {
					return
				}
				if held = append(held, m); len(held) > unacked/ackEvery {
					if err := held[len(held)-1-unacked/ackEvery].Ack(); err != nil {
						b.Fatal(err)
					}
				}
			})
		},
	}
	for name, way := range ways {
		b.Run(name, func(b *testing.B) {
			before := cpu(b)
			rounds := 0
			for b.Loop() {
				rounds++
				way(b, rounds)
			}
			b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(rounds*frames), "cpu-us/frame")
		})
	}
}

// cpu is what the process has used.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
