package broker

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// A busy writer wins nearly every race for its session, because its next frame leaves the moment its last is stored. So that it cannot starve a writer on another edge, the loser hands
// its submissions to the winner's edge, which appends them among its own (DESIGN section 4; ADR 0004).
//
// A hand-over that is not answered leaves open whether the envelopes are stored. Both sides find out alike: each folds every frame of the other before it writes, and answers what it
// has waiting by the ids in it (appender.answerStored). What reaches the winner late carries the place up to which the loser knows that nothing is stored; the winner takes it only if it remembers every
// id behind that place.

const (
	// handOverTimeout is how long the loser waits for the winner.
	handOverTimeout = 2 * time.Second
	// leanFor is how long an appender goes on handing over after it last saw the other edge write.
	leanFor = time.Second
	// maxHandOvers bounds the hand-overs that an edge works on at once; more are refused, and their senders race.
	maxHandOvers = 256
)

// leaning returns the edge to hand the batch to; empty to append it here.
func (a *appender) leaning(batch []*Submission, losses int) string {
	if losses >= lossesBeforeHandOver {
		a.lean = a.rival
	}
	if a.lean != a.rival || time.Since(a.rivalAt) > leanFor {
		a.lean = ""
	}
	if a.lean == "" {
		return ""
	}
	for _, s := range batch {
		// What was handed to us stays here, or two edges could send it to and fro.
		if s.base != nil {
			return ""
		}
	}
	return a.lean
}

// saw notes who else writes to the session.
func (a *appender) saw(f *frame) {
	if f.Edge != a.log.edge {
		a.rival, a.rivalAt = f.Edge, time.Now()
	}
}

// handOver asks edge to append the first submissions of the batch, as many as make a frame, and answers them. It returns those that are still open; with an error, none was answered.
func (a *appender) handOver(ctx context.Context, edge string, batch []*Submission) ([]*Submission, error) {
	a.log.metrics.handOvers.Inc()
	results, err := handOver(ctx, a.log.conn, edge, a.id, Cursor{Epoch: a.st.epoch, Seq: a.st.head}, batch)
	if err != nil {
		return batch, err
	}
	for i, r := range results {
		if r.GetCode() == schema.Code_CODE_UNSPECIFIED {
			batch[i].finish(Receipt{Epoch: r.GetEpoch(), First: r.GetFirstSeq(), Last: r.GetLastSeq(), Duplicate: r.GetDuplicate()}, nil)
			continue
		}
		batch[i].finish(Receipt{}, &schema.Refusal{Code: r.GetCode(), Message: r.GetDetail(), Head: r.GetHeadSeq(), Expected: r.GetExpected()})
	}
	// Our state is behind now; the tail or the fence will tell.
	return batch[len(results):], nil
}

// handOver asks edge to append the first submissions of the batch, as many as make a frame, and returns what became of them. Nothing of the batch is stored up to base. After an error it is not known.
func handOver(ctx context.Context, nc *connection, edge string, id schema.SessionID, base Cursor, batch []*Submission) ([]*schema.HandOverResult, error) {
	data := appendString(nil, 1, id.Tenant)
	data = appendString(data, 2, id.Name)
	data = appendString(data, 3, base.Epoch)
	data = appendUint(data, 4, base.Seq)
	sent, size := 0, 0
	for _, s := range batch {
		if size += s.size; sent > 0 && size > maxFrameBytes {
			break
		}
		data = protowire.AppendTag(data, 5, protowire.BytesType)
		data = protowire.AppendBytes(data, s.handOverRequest())
		sent++
	}
	ctx, cancel := context.WithTimeout(ctx, handOverTimeout)
	defer cancel()
	msg, err := nc.roundTrip(ctx, &nats.Msg{Subject: edgeSubject(edge), Data: data})
	if err != nil {
		return nil, err
	}
	var reply schema.HandOverReply
	if err := proto.Unmarshal(msg.Data, &reply); err != nil {
		return nil, err
	}
	if reply.GetRefused() != "" || len(reply.GetResults()) != sent {
		return nil, fmt.Errorf("broker: edge %s took %d of %d submissions: %s", edge, len(reply.GetResults()), sent, reply.GetRefused())
	}
	return reply.GetResults(), nil
}

// handOverRequest encodes the submission as a schema.HandOverRequest, its envelopes as they are.
func (s *Submission) handOverRequest() []byte {
	var b []byte
	if s.Expected != nil {
		b = appendVarint(b, 1, *s.Expected)
	}
	b = appendUint(b, 2, uint64(s.Kind))
	for _, e := range s.Envelopes {
		b = protowire.AppendBytes(protowire.AppendTag(b, frameEnvelopes, protowire.BytesType), e.Bytes)
	}
	return b
}

// parseHandOver reads a schema.HandOver; the envelopes stay encoded.
func parseHandOver(data []byte) (id schema.SessionID, batch []*Submission, err error) {
	// Decoded as a whole first: that checks every byte, and the names.
	var m schema.HandOver
	if err := proto.Unmarshal(data, &m); err != nil {
		return id, nil, err
	}
	if id, err = schema.ParseSessionID(m.GetTenant(), m.GetSession()); err != nil {
		return id, nil, err
	}
	base := &Cursor{Epoch: m.GetBaseEpoch(), Seq: m.GetBaseSeq()}
	i := 0
	for b := data; len(b) > 0; {
		num, typ, n := protowire.ConsumeTag(b)
		l := protowire.ConsumeFieldValue(num, typ, b[n:])
		if num == 5 && typ == protowire.BytesType {
			body, _ := protowire.ConsumeBytes(b[n:])
			s := &Submission{base: base, Expected: m.GetRequests()[i].ExpectedSeq, Kind: m.GetRequests()[i].GetKind()}
			if err := s.parseRequest(body); err != nil {
				return id, nil, err
			}
			batch = append(batch, s)
			i++
		}
		b = b[n+l:]
	}
	return id, batch, nil
}

func (s *Submission) parseRequest(b []byte) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		l := protowire.ConsumeFieldValue(num, typ, b[n:])
		if num == frameEnvelopes && typ == protowire.BytesType {
			body, _ := protowire.ConsumeBytes(b[n:])
			e, err := schema.Stored(body)
			if err != nil {
				return err
			}
			s.Envelopes = append(s.Envelopes, e)
		}
		b = b[n+l:]
	}
	if len(s.Envelopes) == 0 {
		return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "A hand-over holds a publish without envelopes.")
	}
	return nil
}

// takeHandOver appends what another edge hands over, and replies once all of it is answered.
func (l *JetStreamLog) takeHandOver(msg *nats.Msg) {
	id, batch, err := parseHandOver(msg.Data)
	if err != nil {
		l.reply(msg, &schema.HandOverReply{Refused: "it cannot be read: " + err.Error()})
		return
	}
	select {
	case l.handOvers <- struct{}{}:
	default:
		l.reply(msg, &schema.HandOverReply{Refused: "this edge has as many hand-overs in hand as it takes"})
		return
	}
	l.appending.Go(func() {
		defer func() { <-l.handOvers }()
		results := make([]*schema.HandOverResult, len(batch))
		var open sync.WaitGroup
		var refused error
		for i, s := range batch {
			open.Add(1)
			s.Done = func(r Receipt, err error) {
				defer open.Done()
				results[i] = &schema.HandOverResult{Epoch: r.Epoch, FirstSeq: r.First, LastSeq: r.Last, Duplicate: r.Duplicate}
				if err != nil {
					f := schema.AsRefusal(err)
					results[i] = &schema.HandOverResult{Code: f.Code, Detail: f.Message, HeadSeq: f.Head, Expected: f.Expected}
				}
			}
			if refused = l.submit(l.storing, id, s); refused != nil {
				// There is no room for it, and what comes behind it must not get in front.
				open.Done()
				break
			}
		}
		open.Wait()
		if refused != nil {
			l.reply(msg, &schema.HandOverReply{Refused: schema.AsRefusal(refused).Message})
			return
		}
		for _, r := range results {
			// Not stored here for a reason that is ours alone: the loser goes on by itself.
			if r.GetCode() == schema.Code_CODE_UNAVAILABLE {
				l.reply(msg, &schema.HandOverReply{Refused: r.GetDetail()})
				return
			}
		}
		l.reply(msg, &schema.HandOverReply{Results: results})
	})
}

func (l *JetStreamLog) reply(msg *nats.Msg, m *schema.HandOverReply) {
	data, err := proto.Marshal(m)
	if err == nil {
		err = msg.Respond(data)
	}
	if err != nil {
		l.logger.Warn("the reply to a hand-over was not sent; its sender will find out from the log", "error", err)
	}
}
