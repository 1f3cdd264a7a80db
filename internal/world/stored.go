package world

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/schema"
)

// Stored is the session as the edge's log has it, past the gateway: from the oldest that can be read to the head.
func (e *Edge) Stored(session string) []*schema.Envelope {
	e.w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := e.Log.Session(ctx, Session(session))
	for schema.CodeOf(err) == schema.Code_CODE_UNAVAILABLE && ctx.Err() == nil {
		// Its connection for reads is on its way back.
		time.Sleep(10 * time.Millisecond)
		s, err = e.Log.Session(ctx, Session(session))
	}
	if r := refused(err); r != nil && r.Code == schema.Code_CODE_SESSION_NOT_FOUND {
		return nil
	}
	e.w.must(err)
	f, err := e.Log.Follow(ctx, Session(session), broker.FollowOptions{})
	e.w.must(err)
	defer f.Close()
	var all []*schema.Envelope
	for f.Cursor().Seq < s.GetHeadSeq() {
		b, err := f.Next(ctx, 256<<10)
		e.w.must(err)
		for _, v := range b.Views {
			for seq, raw := range v.Each() {
				m := new(schema.Envelope)
				e.w.must(proto.Unmarshal(raw, m))
				if m.GetSeq() != seq || len(all) > 0 && seq != all[len(all)-1].GetSeq()+1 {
					e.w.t.Fatalf("session %q: seq %d stands at %d, behind %d others", session, m.GetSeq(), seq, len(all))
				}
				all = append(all, m)
			}
		}
	}
	return all
}

// WantStored wants the session to hold what the writers sent and were told, and returns it: every publish at the place in its acknowledgement, each writer's in the order in which it sent them, all of it
// once, and nothing else (I1, I2, I3). A writer without a producer that came back may find that something was refused for now, and what it sent behind it was stored. Where a writer was stopped, what it has no acknowledgement of may be there or not.
func (e *Edge) WantStored(session string, writers ...*Writer) []*schema.Envelope {
	e.w.t.Helper()
	all := e.Stored(session)
	known := make(map[string]string) // by id, what it is
	at := make(map[string]uint64)
	for _, v := range all {
		if twice := at[v.GetId()]; twice != 0 {
			e.w.t.Errorf("session %q: %s is stored at %d and at %d", session, v.GetId(), twice, v.GetSeq())
		}
		at[v.GetId()] = v.GetSeq()
	}
	for n, x := range writers {
		last := uint64(0)
		for i, s := range x.Sent() {
			for k, v := range s.Envelopes {
				known[v.GetId()] = fmt.Sprintf("publish %d of writer %d", i+1, n)
				seq := at[v.GetId()]
				switch {
				case s.Acked && seq != s.Ack.First+uint64(k):
					e.w.t.Errorf("session %q: publish %d of writer %d was acknowledged at %d and is stored at %d (0: not at all)", session, i+1, n, s.Ack.First+uint64(k), seq)
				case seq != 0 && k > 0 && seq != at[s.Envelopes[0].GetId()]+uint64(k), seq == 0 && at[s.Envelopes[0].GetId()] != 0:
					e.w.t.Errorf("session %q: publish %d of writer %d is not stored as one", session, i+1, n)
				case seq != 0 && seq <= last && (x.o.Producer != "" || x.Lost() == 0):
					e.w.t.Errorf("session %q: publish %d of writer %d is at %d, an earlier one at %d", session, i+1, n, seq, last)
				case seq != 0 && Text(all[seq-all[0].GetSeq()]) != Text(v):
					e.w.t.Errorf("session %q: seq %d reads %q and was sent as %q", session, seq, Text(all[seq-all[0].GetSeq()]), Text(v))
				}
				last = max(last, seq)
			}
		}
	}
	for _, v := range all {
		if known[v.GetId()] == "" && len(writers) > 0 {
			e.w.t.Errorf("session %q: seq %d was sent by none of the writers: %v", session, v.GetSeq(), v)
		}
	}
	return all
}

// WantSame wants a reader to have got what is stored, byte for byte.
func (r *Reader) WantSame(stored []*schema.Envelope) {
	r.w.t.Helper()
	if len(stored) > 0 {
		r.Wait(stored[len(stored)-1].GetSeq())
	}
	got := r.Got()
	if len(got) != len(stored) {
		r.w.t.Errorf("reader of %q by %v has %d envelopes, the log %d", r.session, r.o.Ways, len(got), len(stored))
		return
	}
	for i, v := range stored {
		if !proto.Equal(got[i], v) {
			r.w.t.Errorf("reader of %q by %v got at %d\n%v\nand stored is\n%v", r.session, r.o.Ways, v.GetSeq(), got[i], v)
			return
		}
	}
}
