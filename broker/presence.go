package broker

import (
	"context"
	"sync"

	"tidemark/schema"
)

// user is whose places are counted together.
type user struct {
	session schema.SessionID
	subject string
}

func tooManyConnections(u user, limit int) error {
	return schema.Refuse(schema.Code_CODE_TOO_MANY_CONNECTIONS,
		"The user has %d connections to session %s, as many as are allowed; close one of them, then try again.", limit, u.session)
}

// presence counts the places that users have taken through this edge.
type presence struct {
	mu     sync.Mutex
	places map[user]int
}

func newPresence(*JetStreamLog) *presence { return &presence{places: map[user]int{}} }

// Enter implements [Log].
func (l *JetStreamLog) Enter(_ context.Context, id schema.SessionID, subject string, limit int) (func(), error) {
	if limit <= 0 {
		return func() {}, nil
	}
	p, u := l.presence, user{id, subject}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.places[u] >= limit {
		return nil, tooManyConnections(u, limit)
	}
	p.places[u]++
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.places[u]--; p.places[u] == 0 {
			delete(p.places, u)
		}
	}), nil
}
