package broker

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// Work and dead letters are listed as the registry is: their streams are read in their own order and filtered here, a bounded part at a time, and a token is the place, sealed because it counts all tenants' (I9).

// Items implements [Queue].
func (l *JetStreamLog) Items(ctx context.Context, tenant string, q ItemQuery) (ItemPage, error) {
	if _, err := l.ready(ctx); err != nil {
		return ItemPage{}, err
	}
	var page ItemPage
	want := func(*workItem) bool { return true }
	delivered := uint64(0)
	first := uint64(1)
	if q.Group != "" {
		cons, err := l.js.Consumer(ctx, workStream, groupKey{tenant, q.Group}.consumer())
		if errors.Is(err, jetstream.ErrConsumerNotFound) {
			return page, schema.Refuse(schema.Code_CODE_WORK_NOT_FOUND, "There is no group %q; list the groups to see which there are.", q.Group)
		}
		if err != nil {
			return page, unreadable(err)
		}
		info := cons.CachedInfo()
		_, s, err := settingsOf(info.Config)
		if err != nil {
			return page, badItem(err)
		}
		delivered, first = info.Delivered.Stream, info.AckFloor.Stream+1
		hash := groupHash(q.Group)
		want = func(w *workItem) bool {
			if w.GetRedrivenFrom() > 0 {
				return w.group == hash
			}
			return s.wants(w.GetSession()) && slices.Contains(s.kinds, w.kind)
		}
	}
	next, err := l.list(ctx, workStream, tenant, q.Token, first, q.Limit, func(m *stored) bool {
		w, err := parseWorkItem(m.data)
		if err != nil || w.GetTenant() != tenant || q.Session != "" && w.GetSession() != q.Session || q.May != nil && !q.May(w.GetSession()) {
			return false
		}
		if parts := strings.Split(m.subject, "."); parts[0] == "redrive" {
			w.group = parts[2]
		}
		if !want(w) {
			return false
		}
		item := &schema.ListedWork{Session: w.GetSession(), Epoch: w.GetEpoch(), Seq: w.GetSeq(), Kind: w.kind.String(), Stored: w.GetStored()}
		switch {
		case q.Group == "":
		case m.seq <= delivered:
			item.State = schema.WorkItemState_WORK_ITEM_STATE_HANDED_OUT
		default:
			item.State = schema.WorkItemState_WORK_ITEM_STATE_WAITING
		}
		page.Items = append(page.Items, item)
		return true
	})
	page.Next = next
	return page, err
}

// DeadLetters implements [Queue].
func (l *JetStreamLog) DeadLetters(ctx context.Context, tenant string, q DeadQuery) (DeadPage, error) {
	if _, err := l.ready(ctx); err != nil {
		return DeadPage{}, err
	}
	if q.ID != "" {
		return l.oneLetter(ctx, tenant, q)
	}
	var page DeadPage
	prefix := "dead." + schema.EscapeToken(tenant) + "."
	next, err := l.list(ctx, deadStream, tenant, q.Token, 1, q.Limit, func(m *stored) bool {
		if !strings.HasPrefix(m.subject, prefix) {
			return false
		}
		rec := new(schema.DeadRecord)
		if proto.Unmarshal(m.data, rec) != nil || q.Group != "" && rec.GetGroup() != q.Group || !q.Redriven && rec.Redriven != nil {
			return false
		}
		session := rec.GetItem().GetSession()
		if q.Session != "" && session != q.Session || q.May != nil && !q.May(session) {
			return false
		}
		page.Letters = append(page.Letters, deadLetter(m.subject, rec, false))
		return true
	})
	page.Next = next
	return page, err
}

func (l *JetStreamLog) oneLetter(ctx context.Context, tenant string, q DeadQuery) (DeadPage, error) {
	subject, session, ok := letterOf(tenant, q.ID)
	if !ok || q.May != nil && !q.May(session) {
		return DeadPage{}, noLetter(q.ID)
	}
	rec, _, err := l.letter(ctx, subject)
	if err != nil {
		return DeadPage{}, err
	}
	if rec == nil {
		return DeadPage{}, noLetter(q.ID)
	}
	return DeadPage{Letters: []*schema.DeadLetter{deadLetter(subject, rec, true)}}, nil
}

// list reads a stream from a token's place, or from first, and shows take its messages until that has taken limit of them. It returns the token of what comes behind; empty at the end.
func (l *JetStreamLog) list(ctx context.Context, stream, tenant, token string, first uint64, limit int, take func(*stored) bool) (next string, err error) {
	if limit < 1 || limit > maxListed {
		return "", schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A listing has 1 to %d rows, not %d.", maxListed, limit)
	}
	sealer, err := l.reader.sealer(ctx)
	if err != nil {
		return "", err
	}
	from := max(first, 1)
	if token != "" {
		at, err := sealer.open(tenant+"\x00"+stream, token)
		if err != nil {
			return "", err
		}
		from = max(from, at)
	}
	taken := 0
	for scanned := 0; scanned < maxScanned; {
		batch, more, err := l.reader.scan(ctx, stream, from)
		if err != nil {
			return "", err
		}
		scanned += len(batch)
		for _, m := range batch {
			from = m.seq + 1
			if take(m) {
				taken++
			}
			if taken == limit {
				return sealer.seal(tenant+"\x00"+stream, from), nil
			}
		}
		if !more {
			return "", nil
		}
	}
	return sealer.seal(tenant+"\x00"+stream, from), nil
}
