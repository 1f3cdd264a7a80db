package gateway

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/schema"
)

func TestAttachStarts(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", texts(5)...)
		time.Sleep(time.Minute)
		since := time.Now()
		w.fill("s", "t6", "t7")
		for _, c := range []struct {
			name  string
			a     *schema.Attach
			after uint64
		}{
			{"beginning", &schema.Attach{}, 0},
			{"after 0", &schema.Attach{Start: &schema.Attach_AfterSeq{}}, 0},
			{"after 3", &schema.Attach{Start: &schema.Attach_AfterSeq{AfterSeq: 3}}, 3},
			{"after the head", &schema.Attach{Start: &schema.Attach_AfterSeq{AfterSeq: 7}}, 7},
			{"head", &schema.Attach{Start: &schema.Attach_Head{Head: true}}, 7},
			{"last 2", &schema.Attach{Start: &schema.Attach_Last{Last: 2}}, 5},
			{"last 100", &schema.Attach{Start: &schema.Attach_Last{Last: 100}}, 0},
			{"since", &schema.Attach{Start: &schema.Attach_Since{Since: timestamppb.New(since)}}, 5},
		} {
			p := w.connect(principal("user", "s"))
			c.a.Channel, c.a.Session = 3, "s"
			p.attach(c.a)
			a := p.wantAttached(3, 7)
			if a.GetSession() != "s" || a.GetEpoch() == "" || a.GetFirstSeq() != 1 || a.GetStatus() != schema.Status_STATUS_OPEN || a.GetAfterSeq() != c.after {
				t.Errorf("%s: attached says %v, want after seq %d", c.name, a, c.after)
			}
			p.wantTexts(3, c.after+1, texts(7)[c.after:]...)
			p.wantCaughtUp(3, 7)
			p.wantNothing()
			p.leave()
		}
	})
}

func TestAttachRefused(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", texts(5)...)
		p := w.connect(principal("user", "s", "none", strings.Repeat("n", 201)))
		for _, c := range []struct {
			a    *schema.Attach
			code schema.Code
			says string
		}{
			{&schema.Attach{Session: ""}, schema.Code_CODE_INVALID_MESSAGE, "empty"},
			{&schema.Attach{Session: strings.Repeat("n", 201)}, schema.Code_CODE_INVALID_MESSAGE, "201 bytes"},
			{&schema.Attach{Session: "other"}, schema.Code_CODE_FORBIDDEN, "no access"},
			{&schema.Attach{Session: "none", MustExist: true}, schema.Code_CODE_SESSION_NOT_FOUND, "none"},
			{&schema.Attach{Session: "s", Start: &schema.Attach_AfterSeq{AfterSeq: 6}}, schema.Code_CODE_SEQ_BEYOND_HEAD, "seq 5"},
			{&schema.Attach{Session: "s", Epoch: "another"}, schema.Code_CODE_EPOCH_MISMATCH, "history"},
			{&schema.Attach{Session: "s", Start: &schema.Attach_Last{}}, schema.Code_CODE_INVALID_MESSAGE, "last 0"},
			{&schema.Attach{Session: "s", Start: &schema.Attach_Since{Since: &timestamppb.Timestamp{Nanos: -1}}}, schema.Code_CODE_INVALID_MESSAGE, "time that there is not"},
			{&schema.Attach{Session: "s", Types: []string{"token", "nonsense"}}, schema.Code_CODE_UNKNOWN_TYPE, "nonsense"},
			{&schema.Attach{Session: "s", Types: make([]string, 33)}, schema.Code_CODE_INVALID_MESSAGE, "33 types"},
		} {
			c.a.Channel = 4
			p.attach(c.a)
			e := p.wantError(4, c.code, c.says)
			switch c.code {
			case schema.Code_CODE_SEQ_BEYOND_HEAD:
				if e.GetHeadSeq() != 5 {
					t.Errorf("got %v", e)
				}
			case schema.Code_CODE_EPOCH_MISMATCH:
				if e.GetEpoch() == "" || e.GetReconnect() != schema.Reconnect_RECONNECT_BEGINNING {
					t.Errorf("got %v", e)
				}
			default:
			}
		}
		// The number is free again, and the connection untouched.
		p.attach(&schema.Attach{Channel: 4, Session: "s"})
		p.wantAttached(4, 5)
		p.wantTexts(4, 1, texts(5)...)
		p.wantCaughtUp(4, 5)
		p.attach(&schema.Attach{Channel: 4, Session: "s"})
		p.wantFailed(schema.Code_CODE_INVALID_MESSAGE, "Channel 4 is open already")
	})
}

// TestFirstEnvelopeOfASession: a follower that waits for it gets it, and the epoch with it.
func TestFirstEnvelopeOfASession(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s"})
		if a := p.wantAttached(1, 0); a.GetEpoch() != "" || a.GetFirstSeq() != 0 {
			t.Errorf("got %v", a)
		}
		p.wantCaughtUp(1, 0)
		w.fill("s", "one")
		e := want[*schema.ServerFrame_Events](p).Events
		s, err := w.log.Session(w.Context(), schema.SessionID{Tenant: "default", Name: "s"})
		if err != nil || e.GetEpoch() != s.GetEpoch() {
			t.Errorf("events say epoch %q, the session %q, %v", e.GetEpoch(), s.GetEpoch(), err)
		}
		w.fill("s", "two")
		if e := want[*schema.ServerFrame_Events](p).Events; e.GetEpoch() != "" {
			t.Errorf("the epoch is said again")
		}
		p.leave()
	})
}

func TestDetach(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", texts(3)...)
		p := w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s"})
		p.wantAttached(1, 3)
		p.wantTexts(1, 1, texts(3)...)
		p.wantCaughtUp(1, 3)
		p.detach(1)
		if d := want[*schema.ServerFrame_Detached](p).Detached; d.GetChannel() != 1 || d.GetThroughSeq() != 3 {
			t.Errorf("got %v", d)
		}
		w.fill("s", "t4")
		p.wantNothing()
		p.publish(&schema.Publish{PublishId: 1, Channel: 1, Envelopes: []*schema.Envelope{tokenOf("x")}})
		p.wantRejected(1, schema.Code_CODE_INVALID_MESSAGE, "Channel 1 is no open attachment")
		// Again, and of one that never was: nobody is left waiting.
		p.detach(1)
		want[*schema.ServerFrame_Detached](p)
		p.detach(77)
		want[*schema.ServerFrame_Detached](p)
		p.attach(&schema.Attach{Channel: 1, Session: "s", Start: &schema.Attach_AfterSeq{AfterSeq: 3}})
		p.wantAttached(1, 4)
		p.wantTexts(1, 4, "t4")
		p.wantCaughtUp(1, 4)
		p.leave()
	})
}

// TestDetachBeforeItIsOpen: the log takes its time to say where the session stands, and the client changes its mind.
func TestDetachBeforeItIsOpen(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", texts(3)...)
		slow := &slowLog{Log: w.log, follow: make(chan struct{})}
		w.g.cfg.Log = slow
		p := w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s", Start: &schema.Attach_AfterSeq{AfterSeq: 2}})
		p.detach(1)
		p.publish(&schema.Publish{PublishId: 9, Channel: 1, Envelopes: []*schema.Envelope{tokenOf("x")}})
		p.wantRejected(9, schema.Code_CODE_INVALID_MESSAGE, "Channel 1 is no open attachment")
		// What the connection does meanwhile is not delayed.
		p.token(1, "s", "t4")
		p.wantAck(1, 4, 4)
		close(slow.follow)
		if d := want[*schema.ServerFrame_Detached](p).Detached; d.GetChannel() != 1 || d.GetThroughSeq() != 2 {
			t.Errorf("got %v", d)
		}
		p.wantNothing()
		p.leave()
	})
}

// TestI4_DetachedBehindWhatWasWritten: what was fetched and not written any more is not passed over by the cursor that the client resumes from.
func TestI4_DetachedBehindWhatWasWritten(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", texts(9)...)
		f, err := w.log.Follow(w.Context(), schema.SessionID{Tenant: "default", Name: "s"}, broker.FollowOptions{})
		if err != nil {
			t.Fatal(err)
		}
		c := newConn(w.Context(), w.g, Peer{Protocol: Proto})
		defer c.stop()
		wr := newWriter(c)
		wr.out = new(outgoing)
		a := &attachment{c: c, channel: 1, follower: f}
		a.back.Store(true)
		wr.turn(a) // attached, and all nine
		w.fill("s", "t10")
		a.phase = fetching
		if a.batch, a.err = f.Fetch(w.Context(), fetchBytes); a.err != nil || a.batch.Through != 10 {
			t.Fatalf("fetched through %d, %v", a.batch.Through, a.err)
		}
		a.back.Store(true)
		a.detach.Store(true)
		wr.out.reset()
		wr.turn(a)
		last := new(schema.ServerFrame)
		if messages := wr.out.all(); len(messages) != 1 || proto.Unmarshal(messages[0], last) != nil || last.GetDetached().GetThroughSeq() != 9 {
			t.Errorf("got %d messages, %v; want detached through 9", len(messages), last)
		}
	})
}

// slowLog opens no follower until follow is closed.
type slowLog struct {
	broker.Log
	follow chan struct{}
}

func (l *slowLog) Follow(ctx context.Context, id schema.SessionID, o broker.FollowOptions) (*broker.Follower, error) {
	select {
	case <-l.follow:
		return l.Log.Follow(ctx, id, o)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func TestLeaveBeforeItIsOpen(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.g.cfg.Log = &slowLog{Log: w.log, follow: make(chan struct{})}
		p := w.agent()
		for i := range 2 * maxOpening {
			select {
			case p.in <- attachFrame(&schema.Attach{Channel: uint32(i + 1), Session: fmt.Sprint(i)}):
			case <-time.After(time.Second):
			}
		}
		p.cancel()
		if err := p.wantClosed(schema.Code_CODE_GOING_AWAY, ""); err == nil {
			t.Error("Serve returned nil")
		}
		if n := gauge(t, w.g.metrics.attachments); n != 0 {
			t.Errorf("%v attachments are left", n)
		}
	})
}

func TestSessionDeleted(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", "one")
		p := w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s"})
		p.wantAttached(1, 1)
		p.wantTexts(1, 1, "one")
		p.wantCaughtUp(1, 1)
		if err := w.log.Delete(w.Context(), schema.SessionID{Tenant: "default", Name: "s"}); err != nil {
			t.Fatal(err)
		}
		p.wantError(1, schema.Code_CODE_SESSION_DELETED, "deleted")
		p.attach(&schema.Attach{Channel: 1, Session: "s"})
		p.wantAttached(1, 0)
		p.wantCaughtUp(1, 0)
		w.fill("s", "new")
		p.wantTexts(1, 1, "new")
		p.leave()
	})
}

// TestI4_Truncated: what retention took is told before what is left.
func TestI4_Truncated(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", texts(9)...)
		id := schema.SessionID{Tenant: "default", Name: "s"}
		if first := w.log.Truncate(id, 5); first != 5 {
			t.Fatalf("the log begins at %d", first)
		}
		p := w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s", Start: &schema.Attach_AfterSeq{AfterSeq: 2}})
		if a := p.wantAttached(1, 9); a.GetFirstSeq() != 5 {
			t.Errorf("got %v", a)
		}
		if m := want[*schema.ServerFrame_Truncated](p).Truncated; m.GetChannel() != 1 || m.GetWantedSeq() != 3 || m.GetFirstSeq() != 5 {
			t.Errorf("got %v", m)
		}
		p.wantTexts(1, 5, texts(9)[4:]...)
		p.wantCaughtUp(1, 9)
		if n := counter(t, w.g.metrics.fetches); n != 1 {
			t.Errorf("%v fetches were counted", n)
		}
		p.leave()
	})
}

// TestAttachTypes: a filter lets through what it names, and the cursor moves over the rest.
func TestAttachTypes(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.agent()
		n := uint64(0)
		message := func(text string) {
			n++
			p.publish(&schema.Publish{PublishId: n, Session: "s", Envelopes: []*schema.Envelope{
				{Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: text}}},
			}})
			p.wantAck(n, n, n)
		}
		tokens := func(count int) {
			for range count {
				n++
				p.token(n, "s", "x")
				p.wantAck(n, n, n)
			}
		}
		message("one")
		tokens(1)
		message("two")
		tokens(300)
		f := w.connect(principal("user", "s"))
		f.attach(&schema.Attach{Channel: 1, Session: "s", Types: []string{"user_message", "waiting_for_input"}})
		f.wantAttached(1, 303)
		e := want[*schema.ServerFrame_Events](f).Events
		if len(e.GetEnvelopes()) != 2 || e.GetEnvelopes()[1].GetUserMessage().GetMessage() != "two" || e.GetThroughSeq() != 303 {
			t.Errorf("got %v", e)
		}
		f.wantCaughtUp(1, 303)
		// The cursor is told now and then while nothing matches, and when it ends.
		tokens(tellThrough - 1)
		f.wantNothing()
		tokens(1)
		if e := want[*schema.ServerFrame_Events](f).Events; len(e.GetEnvelopes()) != 0 || e.GetThroughSeq() != n {
			t.Errorf("got %v", e)
		}
		tokens(10)
		synctest.Wait()
		f.detach(1)
		if d := want[*schema.ServerFrame_Detached](f).Detached; d.GetThroughSeq() != n {
			t.Errorf("detached at %d, want %d", d.GetThroughSeq(), n)
		}
		f.leave()
		p.leave()
	})
}

// TestFilteredBehindALot: a filter that lets nothing through for longer than one read does not end the reading.
func TestFilteredBehindALot(t *testing.T) {
	bubble(t, nil, func(w *world) {
		long := strings.Repeat("x", roundBytes/4)
		for range 20 {
			w.fill("s", long)
		}
		p := w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s", Types: []string{"user_message"}})
		p.wantAttached(1, 20)
		p.wantCaughtUp(1, 20)
		p.leave()
	})
}

func TestMergeTokens(t *testing.T) {
	bubble(t, nil, func(w *world) {
		w.fill("s", texts(50)...)
		p := w.agent()
		p.attach(&schema.Attach{Channel: 1, Session: "s", MergeTokens: true})
		p.wantAttached(1, 50)
		e := want[*schema.ServerFrame_Events](p).Events
		if len(e.GetEnvelopes()) != 1 || e.GetEnvelopes()[0].GetToken().GetText() != strings.Join(texts(50), "") || e.GetEnvelopes()[0].GetFirstSeq() != 1 || e.GetThroughSeq() != 50 {
			t.Errorf("got %v", e)
		}
		p.wantCaughtUp(1, 50)
		p.leave()
	})
}

// TestI4_ResumeFromAnyCut: a follower that is cut anywhere and comes again after what it saw sees every envelope once, in order, while the session grows.
func TestI4_ResumeFromAnyCut(t *testing.T) {
	bubble(t, nil, func(w *world) {
		const total = 400
		done := make(chan struct{})
		go func() {
			defer close(done)
			for _, text := range texts(total) {
				w.fill("s", text)
				time.Sleep(time.Millisecond)
			}
		}()
		random := rand.New(rand.NewPCG(1, 2))
		cursor, epoch, cuts := uint64(0), "", 0
		for cursor < total {
			cuts++
			p := w.connect(principal("user", "s"))
			p.attach(&schema.Attach{Channel: 1, Session: "s", Epoch: epoch, Start: &schema.Attach_AfterSeq{AfterSeq: cursor}})
			for range 1 + random.IntN(8) {
				f := p.next()
				if a := f.GetAttached(); a.GetEpoch() != "" {
					epoch = a.GetEpoch()
				}
				if e := f.GetEvents(); e.GetEpoch() != "" {
					epoch = e.GetEpoch()
				}
				for _, e := range f.GetEvents().GetEnvelopes() {
					cursor++
					if e.GetSeq() != cursor || e.GetToken().GetText() != fmt.Sprint("t", cursor) {
						t.Fatalf("got seq %d %q, want %d", e.GetSeq(), e.GetToken().GetText(), cursor)
					}
				}
				if cursor == total {
					break
				}
			}
			p.cancel()
			if err := <-p.served; err == nil {
				t.Error("a connection that was cut ended well")
			}
		}
		<-done
		if cuts < 10 {
			t.Errorf("it was cut %d times only", cuts)
		}
	})
}

// TestI8_SlowReaderCostsOnlyItself: one follower does not read; another and the writer notice nothing, and it misses nothing when it reads again.
func TestI8_SlowReaderCostsOnlyItself(t *testing.T) {
	bubble(t, func(c *Config) { c.WriteTimeout = time.Hour }, func(w *world) {
		slow, quick, agent := w.agent(), w.agent(), w.agent()
		for _, p := range []*peer{slow, quick} {
			p.attach(&schema.Attach{Channel: 1, Session: "s"})
			p.wantAttached(1, 0)
			p.wantCaughtUp(1, 0)
		}
		const n = 1000
		began := time.Now()
		for i, text := range texts(n) {
			agent.token(uint64(i)+1, "s", text)
			agent.wantAck(uint64(i)+1, uint64(i)+1, uint64(i)+1)
			quick.wantTexts(1, uint64(i)+1, text)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the others waited for %s", took)
		}
		before := slow.sends.Load()
		slow.wantTexts(1, 1, texts(n)...)
		if frames := slow.sends.Load() - before; frames > 3 {
			t.Errorf("what had gathered came in %d writes", frames)
		}
		for _, p := range []*peer{slow, quick, agent} {
			p.leave()
		}
	})
}

// TestI8_ManySessionsOnOneConnection: a hundred sessions over one connection, each in order, none starved by the one that floods.
func TestI8_ManySessionsOnOneConnection(t *testing.T) {
	bubble(t, nil, func(w *world) {
		const sessions, each = 100, 20
		flood := strings.Repeat("x", 10<<10)
		for range 200 {
			w.fill("s0", flood)
		}
		for i := 1; i < sessions; i++ {
			w.fill(fmt.Sprint("s", i), texts(each-1)...)
			w.fill(fmt.Sprint("s", i), flood)
		}
		p := w.agent()
		for i := range sessions {
			p.attach(&schema.Attach{Channel: uint32(i + 1), Session: fmt.Sprint("s", i)})
		}
		synctest.Wait()
		seqs := map[uint32]uint64{}
		open, frames := sessions, 0
		for open > 0 {
			f := p.next()
			frames++
			if c := f.GetCaughtUp(); c != nil {
				if open--; c.GetChannel() == 1 && open > 0 && frames < 2*sessions {
					t.Errorf("the flood was caught up while %d others were not", open)
				}
			}
			if e := f.GetEvents(); e != nil {
				for _, env := range e.GetEnvelopes() {
					if seqs[e.GetChannel()]++; env.GetSeq() != seqs[e.GetChannel()] {
						t.Fatalf("channel %d: seq %d after %d", e.GetChannel(), env.GetSeq(), seqs[e.GetChannel()]-1)
					}
				}
			}
		}
		for i := range sessions {
			if want := map[bool]uint64{true: 200, false: each}[i == 0]; seqs[uint32(i+1)] != want {
				t.Errorf("session s%d came to %d, want %d", i, seqs[uint32(i+1)], want)
			}
		}
		if n := p.largest.Load(); n > 3*roundBytes {
			t.Errorf("%d bytes were gathered for one write", n)
		}
		// Live, all of them.
		for i := range sessions {
			w.fill(fmt.Sprint("s", i), "live")
		}
		for range sessions {
			if e := want[*schema.ServerFrame_Events](p).Events; e.GetEnvelopes()[0].GetToken().GetText() != "live" {
				t.Errorf("got %v", e)
			}
		}
		p.leave()
		if n := gauge(t, w.g.metrics.attachments); n != 0 {
			t.Errorf("%v attachments are left", n)
		}
	})
}

func TestMaxAttachedSessions(t *testing.T) {
	bubble(t, nil, func(w *world) {
		p := w.agent()
		open := func(channel uint32) {
			p.attach(&schema.Attach{Channel: channel, Session: fmt.Sprint("s", channel)})
			p.wantAttached(channel, 0)
			p.wantCaughtUp(channel, 0)
		}
		for i := range uint32(schema.MaxAttachedSessions) {
			open(i + 1)
		}
		p.attach(&schema.Attach{Channel: 5000, Session: "one more"})
		p.wantError(5000, schema.Code_CODE_TOO_MANY_SESSIONS, "at most 1000")
		// What ends makes room, for ever.
		for i := range uint32(3 * schema.MaxAttachedSessions) {
			p.detach(i + 1)
			want[*schema.ServerFrame_Detached](p)
			open(i + 1 + schema.MaxAttachedSessions)
		}
		synctest.Wait()
		for c := range w.g.conns {
			if n := len(c.channels); n > 2*schema.MaxAttachedSessions+1 {
				t.Errorf("%d attachments are remembered", n)
			}
		}
		p.leave()
	})
}

// TestLargeBatches: what a fetch brings at once is cut into messages that clients take.
func TestLargeBatches(t *testing.T) {
	bubble(t, nil, func(w *world) {
		stamp := schema.NewStamp(&schema.Source{Subject: "writer"})
		var all []schema.Accepted
		for range 30 {
			a, err := stamp.AcceptEnvelope(tokenOf(strings.Repeat("x", 30<<10)), time.Now())
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, a)
		}
		id := schema.SessionID{Tenant: "default", Name: "s"}
		if _, err := broker.Append(w.Context(), w.log, id, broker.Submission{Envelopes: all}); err != nil {
			t.Fatal(err)
		}
		f, err := w.log.Follow(w.Context(), id, broker.FollowOptions{})
		if err != nil {
			t.Fatal(err)
		}
		b, err := f.Take(2 << 20)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []codec{protoCodec{}, protoJSONCodec{}} {
			wr := &writer{c: &conn{g: w.g, codec: c}, out: new(outgoing)}
			wr.emit(&attachment{channel: 1}, &b)
			messages := wr.out.all()
			if len(messages) < 6 || wr.envelopes != 30 {
				t.Errorf("%T made %d messages of %d envelopes", c, len(messages), wr.envelopes)
			}
			for _, m := range messages {
				if len(m) > 3*roundBytes {
					t.Errorf("%T made a message of %d bytes", c, len(m))
				}
			}
		}
	})
}
