package broker

import (
	"context"
	"encoding/json"

	"github.com/nats-io/nats.go"

	"tidemark/schema"
)

// latest is the last message of every subject that the wildcard covers, from some replica, in one request (ADR-31 of NATS, multi_last): keys that were removed are among them, as markers. The stream must be a small one,
// and the subjects at most 1,024: the server answers for no more (nats-server, stream.go, getDirectMulti).
func (r *reader) latest(ctx context.Context, stream, wildcard string) ([]*stored, error) {
	select {
	case r.gets <- struct{}{}:
		defer func() { <-r.gets }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	limited, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	limited, stop := r.nc.untilLost(limited)
	defer stop()
	body, err := json.Marshal(map[string]any{"multi_last": []string{wildcard}})
	if err != nil {
		return nil, err
	}
	inbox := r.nc.NewInbox()
	sub, err := r.nc.SubscribeSync(inbox)
	if err != nil {
		return nil, unreadable(err)
	}
	// It fails where the connection is closed.
	defer func() { _ = sub.Unsubscribe() }()
	if err := r.nc.PublishRequest("$JS.API.DIRECT.GET."+stream, inbox, body); err != nil {
		return nil, unreadable(err)
	}
	var all []*stored
	for {
		m, err := sub.NextMsgWithContext(limited)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if cause := context.Cause(limited); cause != nil {
				err = cause
			}
			return nil, unreadable(err)
		}
		switch status := m.Header.Get("Status"); status {
		case "":
			s, err := storedOf(m)
			if err != nil {
				return nil, err
			}
			all = append(all, s)
		case "204", "404":
			return all, nil
		case "503":
			return nil, unreadable(nats.ErrNoResponders)
		default:
			return nil, schema.Refuse(schema.Code_CODE_INTERNAL, "NATS refused a read with status %s %s.", status, m.Header.Get("Description"))
		}
	}
}
