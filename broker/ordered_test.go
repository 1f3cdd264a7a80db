package broker

import (
	"errors"
	"math/rand/v2"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// ordered begins to read a stream on a connection of its own.
func (s *shelf) ordered(stream string, at uint64) *ordered {
	s.Helper()
	nc, err := s.server().connect(testLogger(s), "ordered")
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(nc.Close)
	js, err := jetstream.New(nc.Conn)
	if err != nil {
		s.Fatal(err)
	}
	st, err := js.Stream(s.Context(), stream)
	if err != nil {
		s.Fatal(err)
	}
	o, err := nc.readOrdered(s.Context(), st, at, nil)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(o.close)
	return o
}

// TestOrdered_ReadsOn: every message comes once and in order, however often the connection breaks, also in the middle of what it is asked to make good, and the consumer goes; and soon.
func TestOrdered_ReadsOn(t *testing.T) {
	for seed := range uint64(8) {
		// Timers that the client library pools belong to one bubble.
		runtime.GC()
		runtime.GC()
		synctest.Test(t, func(t *testing.T) {
			s := newShelf(t, 1, seed)
			a := s.scribe("default", "a")
			a.some(3)
			const behind = 2
			o := s.ordered("LOG_00", behind)
			rng := rand.New(rand.NewPCG(seed, 7))
			allowed := time.Second
			for next := uint64(behind + 1); next < 600; {
				if next > s.lastSeq("LOG_00") {
					a.some(1 + rng.IntN(50))
				}
				switch rng.IntN(8) {
				case 0:
					if err := o.nc.ForceReconnect(); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
				case 1:
					if o.it == nil {
						break
					}
					if err := s.js.DeleteConsumer(t.Context(), "LOG_00", o.cons.CachedInfo().Name); err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
						t.Fatal(err)
					}
					// Where nothing had been asked of it, nobody is told.
					allowed = time.Second + orderedSilent
				case 2:
					// A message is lost on its way; the next shows it.
					if o.it != nil && next < s.lastSeq("LOG_00") {
						_, _ = o.it.Next(jetstream.NextMaxWait(time.Millisecond))
					}
				}
				most := time.Duration(rng.IntN(3)) * 5 * time.Millisecond
				began := time.Now()
				_, meta, err := o.next(t.Context(), most)
				if took := time.Since(began); took > allowed || most > 0 && took > most+time.Millisecond {
					t.Fatalf("seed %d: at %d it took %s, of %s", seed, next, took, most)
				}
				if errors.Is(err, nats.ErrTimeout) && most > 0 {
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				if meta.Sequence.Stream != next {
					t.Fatalf("seed %d: %d came where %d was due", seed, meta.Sequence.Stream, next)
				}
				next, allowed = next+1, time.Second
			}
		})
	}
}

// TestOrdered_MissesItsConsumer: a consumer that is gone without a word is noticed, also by who never waits for long.
func TestOrdered_MissesItsConsumer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 1)
		o := s.ordered("LOG_00", 0)
		// As it is where the server that had the consumer is gone, and the connection was to another.
		lost, err := o.stream.CreateConsumer(t.Context(), jetstream.ConsumerConfig{AckPolicy: jetstream.AckNonePolicy})
		if err != nil {
			t.Fatal(err)
		}
		if err := o.stream.DeleteConsumer(t.Context(), lost.CachedInfo().Name); err != nil {
			t.Fatal(err)
		}
		o.cons = lost
		s.scribe("default", "a")
		for began := time.Now(); o.cons == lost; {
			if _, _, err := o.next(t.Context(), 100*time.Millisecond); !errors.Is(err, nats.ErrTimeout) {
				t.Fatal(err)
			}
			if time.Since(began) > orderedSilent+time.Second {
				t.Fatal("nobody noticed")
			}
		}
	})
}

// TestOrdered_SaysThatItWentBack: what is stored anew under the old numbers must not be taken for what comes behind them.
func TestOrdered_SaysThatItWentBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 1)
		a := s.scribe("default", "a")
		a.some(100)
		o := s.ordered("LOG_00", s.lastSeq("LOG_00")-3)
		for range 3 {
			if _, _, err := o.next(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
		}
		cfg := o.stream.CachedInfo().Config
		if err := s.js.DeleteStream(t.Context(), "LOG_00"); err != nil {
			t.Fatal(err)
		}
		if _, err := s.js.CreateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		var err error
		for err == nil {
			_, _, err = o.next(t.Context(), 0)
		}
		if !errors.Is(err, errWentBack) {
			t.Error(err)
		}
	})
}

// TestOrdered_MissesItsRequest: a request for messages that is lost on its way, while the connection and the consumer live, is noticed, also by who never waits for long.
func TestOrdered_MissesItsRequest(t *testing.T) {
	for _, most := range []time.Duration{0, 100 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			s := newShelf(t, 1, 1)
			a := s.scribe("default", "a")
			o := s.ordered("LOG_00", 0)
			gone, err := o.stream.CreateConsumer(t.Context(), jetstream.ConsumerConfig{AckPolicy: jetstream.AckNonePolicy})
			if err != nil {
				t.Fatal(err)
			}
			if err := o.stream.DeleteConsumer(t.Context(), gone.CachedInfo().Name); err != nil {
				t.Fatal(err)
			}
			// What asks now asks nobody, as where a route between servers of a cluster broke.
			o.it.Stop()
			if o.it, err = gone.Messages(o.pull...); err != nil {
				t.Fatal(err)
			}
			a.some(1)
			for began := time.Now(); ; {
				_, _, err := o.next(t.Context(), most)
				if err == nil {
					return
				}
				if !errors.Is(err, nats.ErrTimeout) {
					t.Fatal(err)
				}
				if time.Since(began) > orderedSilent+time.Second {
					t.Fatalf("nobody noticed within %s, with waits of %s", time.Since(began), most)
				}
			}
		})
	}
}
