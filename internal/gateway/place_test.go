package gateway

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/schema"
)

// slowFollows is a log that says where sessions stand when held is closed.
type slowFollows struct {
	broker.Log
	held chan struct{}
}

func (l *slowFollows) Follow(ctx context.Context, id schema.SessionID, o broker.FollowOptions) (*broker.Follower, error) {
	<-l.held
	return l.Log.Follow(ctx, id, o)
}

// doorLog counts who enters and leaves.
type doorLog struct {
	broker.Log
	asked, inside atomic.Int64
	// held, where not nil, keeps whoever asks waiting until it is closed.
	held chan struct{}
	// away, where not nil, is the answer.
	away error
}

func (l *doorLog) Enter(ctx context.Context, id schema.SessionID, subject string, limit int) (func(), error) {
	l.asked.Add(1)
	if l.held != nil {
		select {
		case <-l.held:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if l.away != nil {
		return nil, l.away
	}
	leave, err := l.Log.Enter(ctx, id, subject, limit)
	if err != nil {
		return nil, err
	}
	l.inside.Add(1)
	return sync.OnceFunc(func() {
		l.inside.Add(-1)
		leave()
	}), nil
}

// behindDoor runs a test with a log that counts, and places for two connections.
func behindDoor(t *testing.T, test func(w *world, door *doorLog)) {
	t.Helper()
	bubble(t, func(c *Config) { c.Limits.UserConnections = 2 }, func(w *world) {
		door := &doorLog{Log: w.log}
		w.g.cfg.Log = door
		test(w, door)
		synctest.Wait()
		if n := door.inside.Load(); n != 0 {
			t.Errorf("%d places are left", n)
		}
	})
}

func (l *doorLog) wantInside(t *testing.T, n int64) {
	t.Helper()
	synctest.Wait()
	if got := l.inside.Load(); got != n {
		t.Errorf("%d places are held, want %d", got, n)
	}
}

func (p *peer) open(channel uint32, session string) {
	p.Helper()
	p.attach(&schema.Attach{Channel: channel, Session: session, Start: &schema.Attach_Head{Head: true}})
	want[*schema.ServerFrame_Attached](p)
	want[*schema.ServerFrame_CaughtUp](p)
}

// TestUserConnections: a user follows a session with so many connections, and no more; who is refused may come when another has gone, and nobody else is touched.
func TestUserConnections(t *testing.T) {
	behindDoor(t, func(w *world, door *doorLog) {
		ada := principal("user", "*")
		bob := &auth.Principal{Subject: "bob", Tenant: "default", Role: schema.Role_ROLE_USER, Sessions: []string{"*"}}
		foreigner := &auth.Principal{Subject: ada.Subject, Tenant: "acme", Role: schema.Role_ROLE_USER, Sessions: []string{"*"}}
		p, q, r := w.connect(ada), w.connect(ada), w.connect(ada)
		p.open(1, "s")
		q.open(1, "s")
		r.attach(&schema.Attach{Channel: 1, Session: "s"})
		r.wantError(1, schema.Code_CODE_TOO_MANY_CONNECTIONS, "s")
		r.open(2, "t") // another session
		for _, other := range []*auth.Principal{bob, foreigner, principal("agent", "*"), principal("analyst", "*")} {
			o := w.connect(other)
			o.open(1, "s")
			o.leave()
		}
		// The session socket is a connection like any other, and ends for it.
		s := w.dial(Peer{Protocol: SessionJSON, Principal: ada, Session: "s", Follow: &schema.Attach{Session: "s"}})
		if said := <-s.listen(); fmt.Sprint(said) != "[error too_many_connections]" {
			t.Errorf("it said %v", said)
		}
		if err := s.wantClosed(schema.Code_CODE_TOO_MANY_CONNECTIONS, ""); err == nil {
			t.Error("Serve returned nil")
		}
		// It may publish all the same.
		r.say(9, "s", 1)
		r.wantFate(9, schema.Code_CODE_UNSPECIFIED)
		want[*schema.ServerFrame_Events](p)
		want[*schema.ServerFrame_Events](q)

		door.wantInside(t, 3)
		q.leave()
		r.open(1, "s")
		door.wantInside(t, 3)
		p.leave()
		r.leave()
	})
}

// TestPlaceOfAConnection: a connection holds one place for a session, from its first attachment until its last.
func TestPlaceOfAConnection(t *testing.T) {
	behindDoor(t, func(w *world, door *doorLog) {
		p := w.connect(principal("user", "*"))
		for channel := range uint32(5) {
			p.open(channel+1, "s")
		}
		if n := door.asked.Load(); n != 1 {
			t.Errorf("the log was asked %d times", n)
		}
		for channel := range uint32(4) {
			p.detach(channel + 1)
			want[*schema.ServerFrame_Detached](p)
			door.wantInside(t, 1)
		}
		p.detach(5)
		want[*schema.ServerFrame_Detached](p)
		door.wantInside(t, 0)
		p.open(6, "s")
		door.wantInside(t, 1)
		// An attachment that the log refuses, or ends, gives its part back.
		p.attach(&schema.Attach{Channel: 7, Session: "s", Epoch: "another"})
		want[*schema.ServerFrame_Error](p)
		p.attach(&schema.Attach{Channel: 8, Session: "none", MustExist: true})
		p.wantError(8, schema.Code_CODE_SESSION_NOT_FOUND, "")
		door.wantInside(t, 1)
		w.fill("gone", "x")
		p.open(9, "gone")
		door.wantInside(t, 2)
		if err := w.log.Delete(w.Context(), schema.SessionID{Tenant: "default", Name: "gone"}); err != nil {
			w.Fatal(err)
		}
		p.wantError(9, schema.Code_CODE_SESSION_DELETED, "")
		door.wantInside(t, 1)
		p.leave()
	})
}

// TestPlacesOfMany: attachments that open at once share one question and its answer.
func TestPlacesOfMany(t *testing.T) {
	behindDoor(t, func(w *world, door *doorLog) {
		door.held = make(chan struct{})
		door.away = schema.Refuse(schema.Code_CODE_UNAVAILABLE, "NATS is away.")
		p := w.connect(principal("user", "*"))
		attach := func() {
			for channel := range uint32(5) {
				p.attach(&schema.Attach{Channel: channel + 1, Session: "s"})
			}
		}
		attach()
		synctest.Wait()
		close(door.held)
		for range 5 {
			if e := want[*schema.ServerFrame_Error](p).Error; e.GetCode() != schema.Code_CODE_UNAVAILABLE {
				t.Errorf("got %v", e)
			}
		}
		if n := door.asked.Load(); n != 1 {
			t.Errorf("the log was asked %d times", n)
		}
		// Who comes again asks again.
		door.away = nil
		attach()
		for range 10 {
			if f := p.next(); f.GetAttached() == nil && f.GetCaughtUp() == nil {
				t.Errorf("got %v", f)
			}
		}
		if n := door.asked.Load(); n != 2 {
			t.Errorf("the log was asked %d times", n)
		}
		door.wantInside(t, 1)
		// A connection that is cut while it asks holds nothing, see behindDoor.
		q := w.connect(principal("user", "*"))
		door.held = make(chan struct{})
		q.attach(&schema.Attach{Channel: 1, Session: "s"})
		synctest.Wait()
		q.leave()
		door.held = nil
		p.leave()
	})
}

// TestPlaceOfANarrowedToken: what ends for a new token gives its place back.
func TestPlaceOfANarrowedToken(t *testing.T) {
	bubble(t, func(c *Config) {
		tickets(c)
		c.Limits.UserConnections = 1
	}, func(w *world) {
		door := &doorLog{Log: w.log}
		w.g.cfg.Log = door
		p := w.connect(adas.principal())
		p.open(1, "s1")
		p.open(2, "s2")
		door.wantInside(t, 2)
		k := adas
		k.Sessions = []string{"s2"}
		p.renew(k.token())
		want[*schema.ServerFrame_Refreshed](p)
		p.wantError(1, schema.Code_CODE_FORBIDDEN, "")
		door.wantInside(t, 1)
		p.leave()
		door.wantInside(t, 0)
	})
}

// TestPlacesAreNotAskedFor: without a limit, and for roles that have none, nobody is asked.
func TestPlacesAreNotAskedFor(t *testing.T) {
	for role, limits := range map[string]Limits{"user": {}, "agent": {UserConnections: 1}, "worker": {UserConnections: 1}, "analyst": {UserConnections: 1}, "admin": {UserConnections: 1}} {
		bubble(t, func(c *Config) { c.Limits = limits }, func(w *world) {
			door := &doorLog{Log: w.log}
			w.g.cfg.Log = door
			for range 3 {
				w.connect(principal(role, "*")).open(1, "s")
			}
			if n := door.asked.Load(); n != 0 {
				t.Errorf("%s: the log was asked %d times", role, n)
			}
		})
	}
}
