package broker

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"tidemark/internal/natsd"
	"tidemark/schema"
)

// presenceOf opens a log in a bubble, on a deployment without a broker, and hands it to the test before it runs; run lets it.
func presenceOf(t *testing.T, test func(t *testing.T, l *JetStreamLog, run func())) {
	t.Helper()
	presenceLogged(t, io.Discard, test)
}

// presenceLogged is presenceOf with somewhere to write what the log says.
func presenceLogged(t *testing.T, log io.Writer, test func(t *testing.T, l *JetStreamLog, run func())) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		node, err := natsd.Start(natsd.Config{DataDir: t.TempDir(), Durability: schema.Durability_DURABILITY_OS})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := node.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
		}()
		server := Server{InProcess: node, Name: "test"}
		if err := Provision(t.Context(), server, Layout{Streams: 1, Durability: schema.Durability_DURABILITY_OS}); err != nil {
			t.Fatal(err)
		}
		l, err := Open(Config{Server: server, Edge: "an edge", Logger: slog.New(slog.NewTextHandler(log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		var over chan error
		defer func() {
			if err := l.Close(t.Context()); err != nil {
				t.Error(err)
			}
			if stop(); over != nil {
				if err := <-over; err != nil {
					t.Error(err)
				}
			}
		}()
		test(t, l, func() {
			over = make(chan error, 1)
			go func() { over <- l.Run(ctx) }()
		})
	})
}

// An edge that has no lease yet lets nobody in: others would take the seat for one of an edge that died.
func TestPresenceWaitsForTheLease(t *testing.T) {
	presenceOf(t, func(t *testing.T, l *JetStreamLog, run func()) {
		id := schema.SessionID{Tenant: "default", Name: "s"}
		began := time.Now()
		_, err := l.Enter(t.Context(), id, "ada", 1)
		if took := time.Since(began); schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE || took != enterWithin {
			t.Errorf("an edge without a lease answered after %s: %v", took, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := l.Enter(ctx, id, "ada", 1); err == nil || ctx.Err() != err { //nolint:errorlint // the context's error itself
			t.Errorf("whoever gave up was answered %v", err)
		}
		// Who waits gets in as soon as there is one.
		entered := make(chan error, 1)
		go func() {
			_, err := l.Enter(t.Context(), id, "ada", 1)
			entered <- err
		}()
		synctest.Wait()
		run()
		if err := <-entered; err != nil {
			t.Errorf("who waited for the lease: %v", err)
		}
		if m, err := l.presence.get(t.Context(), "edge."+l.presence.holder); err != nil || m == nil || removed(m) {
			t.Errorf("the edge's lease is %v, %v", m, err)
		}
	})
}

// Whoever runs an edge on a server that does not take what presence writes finds the reason in the log: once, however often it is tried, and once more when it is over.
func TestPresenceSaysWhatFails(t *testing.T) {
	var log strings.Builder
	presenceLogged(t, &log, func(t *testing.T, l *JetStreamLog, run func()) {
		run()
		id := schema.SessionID{Tenant: "default", Name: "s"}
		leave, err := l.Enter(t.Context(), id, "ada", 1)
		if err != nil {
			t.Fatal(err)
		}
		resize := func(bytes int32) {
			s, err := l.js.Stream(t.Context(), presenceStream)
			if err != nil {
				t.Fatal(err)
			}
			c := s.CachedInfo().Config
			c.MaxMsgSize = bytes
			if _, err := l.js.UpdateStream(t.Context(), c); err != nil {
				t.Fatal(err)
			}
		}
		said := func(when, cause string, want ...string) {
			t.Helper()
			synctest.Wait()
			lines := strings.Split(strings.TrimSpace(log.String()), "\n")
			log.Reset()
			for _, w := range want {
				if n := len(slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return !strings.Contains(l, w) || !strings.Contains(l, cause) })); n != 1 {
					t.Errorf("%s the log says %d times, want once: %s", when, n, w)
				}
			}
			if len(lines) != len(want) {
				t.Errorf("%s the log says\n%s\nwant %d lines", when, strings.Join(lines, "\n"), len(want))
			}
		}
		synctest.Wait()
		log.Reset()
		resize(1)
		leave()
		time.Sleep(20 * time.Second)
		if _, err := l.Enter(t.Context(), id, "ada", 1); schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE || strings.Contains(schema.AsRefusal(err).Message, "NATS") {
			t.Errorf("a user was answered %v", err)
		}
		said("while nothing can be written", "message size exceeds", `WARN msg="presence cannot be written" what="this edge's lease"`, `WARN msg="presence cannot be written" what="the connections of users to this edge"`)
		resize(-1)
		time.Sleep(edgeBeatEvery)
		said("when it can be written again", "", `INFO msg="presence is written again" what="this edge's lease"`, `INFO msg="presence is written again" what="the connections of users to this edge"`)
		if leave, err = l.Enter(t.Context(), id, "ada", 1); err != nil {
			t.Fatal(err)
		}
		leave()
	})
}

// A closed log lets nobody in, and says that it is this edge alone.
func TestPresenceClosed(t *testing.T) {
	presenceOf(t, func(t *testing.T, l *JetStreamLog, run func()) {
		run()
		id := schema.SessionID{Tenant: "default", Name: "s"}
		leave, err := l.Enter(t.Context(), id, "ada", 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Enter(t.Context(), id, "ada", 5); schema.CodeOf(err) != schema.Code_CODE_GOING_AWAY {
			t.Errorf("a closed log answered %v", err)
		}
		leave()
	})
}

// Who left is not remembered (I8).
func TestPresenceForgets(t *testing.T) {
	presenceOf(t, func(t *testing.T, l *JetStreamLog, run func()) {
		run()
		for i := range 100 {
			leave, err := l.Enter(t.Context(), schema.SessionID{Tenant: "default", Name: string(rune('A' + i))}, "ada", 1)
			if err != nil {
				t.Fatal(err)
			}
			defer leave()
			other, err := l.Enter(t.Context(), schema.SessionID{Tenant: "default", Name: "s"}, string(rune('A'+i)), 1)
			if err != nil {
				t.Fatal(err)
			}
			other()
		}
		time.Sleep(time.Second)
		p := l.presence
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.seats) != 100 || len(p.dirty) != 0 {
			t.Errorf("the edge remembers %d seats of the 100 that are held, and has %d to write", len(p.seats), len(p.dirty))
		}
	})
}

// When NATS lost the bucket, another has revisions of its own, which may be the same as the old one's. What an edge remembers of the old one is not written over what another edge wrote into the new.
func TestPresenceInAnotherBucket(t *testing.T) {
	presenceOf(t, func(t *testing.T, l *JetStreamLog, run func()) {
		run()
		u := party{session: schema.SessionID{Tenant: "default", Name: "s"}, name: "ada"}
		leave, err := l.Enter(t.Context(), u.session, u.name, 5)
		if err != nil {
			t.Fatal(err)
		}
		defer leave()
		p := l.presence
		rev := p.seats[u].record.rev
		if err := l.js.DeleteKeyValue(t.Context(), presenceBucket); err != nil {
			t.Fatal(err)
		}
		if err := provisionPresence(t.Context(), l.js, 1); err != nil {
			t.Fatal(err)
		}
		kv, err := l.js.KeyValue(t.Context(), presenceBucket)
		if err != nil {
			t.Fatal(err)
		}
		for range rev - 1 {
			if _, err := kv.PutString(t.Context(), "edge.another.1", ""); err != nil {
				t.Fatal(err)
			}
		}
		data, err := json.Marshal(seatsRecord{Seats: map[string]int{"another.1": 2}})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := kv.Create(t.Context(), u.key(), data); err != nil || got != rev {
			t.Fatalf("the other edge's record has revision %d, %v; the test wants %d", got, err, rev)
		}
		// The next beat has it.
		time.Sleep(edgeBeatEvery + time.Second)
		if got, want := seatsIn(t, kv, u), map[string]int{"another.1": 2, p.holder: 1}; !maps.Equal(got, want) {
			t.Errorf("the record says %v, want %v", got, want)
		}
		if _, err := l.Enter(t.Context(), u.session, u.name, 3); schema.CodeOf(err) != schema.Code_CODE_TOO_MANY_CONNECTIONS {
			t.Errorf("with three of three seats taken: %v", err)
		}
		// Nonsense counts for nothing, and is written over.
		if _, err := kv.PutString(t.Context(), u.key(), "[]"); err != nil {
			t.Fatal(err)
		}
		second, err := l.Enter(t.Context(), u.session, u.name, 2)
		if err != nil {
			t.Fatal(err)
		}
		defer second()
		if got, want := seatsIn(t, kv, u), map[string]int{p.holder: 2}; !maps.Equal(got, want) {
			t.Errorf("the record says %v, want %v", got, want)
		}
	})
}

func seatsIn(t *testing.T, kv jetstream.KeyValue, u party) map[string]int {
	t.Helper()
	e, err := kv.Get(t.Context(), u.key())
	if err != nil {
		t.Fatal(err)
	}
	var rec seatsRecord
	if err := json.Unmarshal(e.Value(), &rec); err != nil {
		t.Fatal(err)
	}
	return rec.Seats
}
