package bench

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/protobuf/proto"

	"tidemark/broker"
	"tidemark/schema"
)

func TestLoadCountsEveryToken(t *testing.T) {
	for name, l := range map[string]Load{
		"at full speed": {Sessions: 5, Window: 32, TokenBytes: 110, Warmup: 50 * time.Millisecond, Measure: 200 * time.Millisecond},
		"at a rate":     {Sessions: 3, Rate: 500, TokenBytes: 110, Warmup: 50 * time.Millisecond, Measure: 400 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			log := broker.NewMemoryLog()
			s := edgeOn(t, log)
			began := time.Now()
			out, err := l.run(t.Context(), s.Edge, s.Token, SessionPrefix+"x")
			if err != nil {
				t.Fatal(err)
			}
			if out.Faults != (Faults{}) || out.Tokens == 0 || out.Elapsed < l.Measure || uint64(out.Latency.TotalCount()) != out.Tokens {
				t.Errorf("%+v, %d latencies", out, out.Latency.TotalCount())
			}
			stored := uint64(0)
			for i := range l.Sessions {
				session, err := log.Session(t.Context(), schema.SessionID{Tenant: "default", Name: SessionPrefix + "x-000" + string(rune('0'+i))})
				if err != nil {
					t.Fatal(err)
				}
				stored += session.GetHeadSeq()
			}
			if stored != out.Sent {
				t.Errorf("%d tokens were sent, %d are stored", out.Sent, stored)
			}
			if most := l.most(time.Since(began)); l.Rate > 0 && out.Sent > most {
				t.Errorf("%d tokens were sent, want at most %d", out.Sent, most)
			}
			if _, err := l.run(t.Context(), s.Edge, s.Token, SessionPrefix+"x"); err == nil || !strings.Contains(err.Error(), "must be new") {
				t.Errorf("on sessions that are there: %v", err)
			}
		})
	}
}

// most is how many tokens a load at a rate may send in a time, with the last of each session. How few is for the system to say, and for the machine: what the pace itself does is tested on a clock
// that nobody is late for.
func (l Load) most(in time.Duration) uint64 {
	return uint64(l.Sessions) * (uint64(in.Seconds()*float64(l.Rate)) + 1)
}

// TestPaceKeepsTheRate: every number is sent once and in its turn, when it is due or, where a send took its time, right behind it, and no sooner.
func TestPaceKeepsTheRate(t *testing.T) {
	for _, rate := range []int{50, 500, 1000, 3000} {
		synctest.Test(t, func(t *testing.T) {
			m := newMeter()
			var (
				mu               sync.Mutex
				sent, most, ends uint64
			)
			paced := make(chan error, 1)
			go func() {
				paced <- m.pace(t.Context(), rate, func(from, to uint64, last bool) error {
					mu.Lock()
					defer mu.Unlock()
					if from != sent+1 || to < from || ends > 0 {
						t.Errorf("at %d a second: %d to %d behind %d", rate, from, to, sent)
					}
					if last {
						ends++
					}
					most = max(most, to-from+1)
					if sent < uint64(rate)/2 && to >= uint64(rate)/2 {
						time.Sleep(100 * time.Millisecond)
					}
					sent = to
					return nil
				})
			}()
			for second := range uint64(3) {
				// Not in the moment of a tick.
				time.Sleep(time.Until(m.began.Add(time.Duration(second+1)*time.Second + time.Millisecond/2)))
				synctest.Wait()
				mu.Lock()
				if want := (second + 1) * uint64(rate); sent != want {
					t.Errorf("at %d a second: %d after %d s, want %d", rate, sent, second+1, want)
				}
				mu.Unlock()
			}
			m.stopped.Store(true)
			if err := <-paced; err != nil || ends != 1 {
				t.Errorf("at %d a second: %v, %d last ones", rate, err, ends)
			}
			if want := uint64(rate) / 10; most != want {
				t.Errorf("at %d a second: at most %d at once, want the %d of the 100 ms that a send took", rate, most, want)
			}
		})
	}
}

// TestMeterWaitsForAToken: where none came in Measure the first one ends the measurement, and none within firstTime is none.
func TestMeterWaitsForAToken(t *testing.T) {
	for name, tt := range map[string]struct {
		first, elapsed time.Duration // since the beginning
		tokens         uint64
	}{
		"in the warm-up":    {999 * time.Millisecond, time.Second + firstTime, 0},
		"in Measure":        {1500 * time.Millisecond, time.Second, 2},
		"late":              {20 * time.Second, 19 * time.Second, 2},
		"never":             {time.Hour, time.Second + firstTime, 0},
		"right at the last": {2*time.Second + firstTime - 1, time.Second + firstTime - 1, 2},
	} {
		synctest.Test(t, func(t *testing.T) {
			m := newMeter()
			time.AfterFunc(tt.first, func() {
				m.received(nil)
				m.received([]uint64{m.clock(), m.clock()})
			})
			elapsed, err := m.phases(t.Context(), Load{Warmup: time.Second, Measure: time.Second})
			synctest.Wait()
			if out := m.outcome(elapsed); err != nil || elapsed != tt.elapsed || out.Tokens != tt.tokens || !m.stopped.Load() || m.measuring.Load() {
				t.Errorf("%s: %d tokens in %v, want %d in %v; %v", name, out.Tokens, elapsed, tt.tokens, tt.elapsed, err)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		m := newMeter()
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(5*time.Second, func() { cancel(errStuck) })
		if _, err := m.phases(ctx, Load{Measure: time.Second}); !errors.Is(err, errStuck) || time.Since(m.began) != 5*time.Second || !m.stopped.Load() {
			t.Errorf("cancelled after 5 s: %v after %v", err, time.Since(m.began))
		}
	})
}

func TestChecker(t *testing.T) {
	for name, tt := range map[string]struct {
		seqs, numbers []uint64
		want          Faults
	}{
		"nothing amiss": {[]uint64{1, 2, 3}, []uint64{1, 2, 3}, Faults{}},
		"lost":          {[]uint64{1, 4, 5}, []uint64{1, 4, 5}, Faults{Lost: 2}},
		"lost at first": {[]uint64{2, 3}, []uint64{2, 3}, Faults{Lost: 1}},
		"repeated":      {[]uint64{1, 2, 2, 1, 3}, []uint64{1, 2, 2, 1, 3}, Faults{Repeated: 2}},
		"swapped":       {[]uint64{1, 3, 2, 4}, []uint64{1, 3, 2, 4}, Faults{Lost: 1, Repeated: 1}},
		"another's":     {[]uint64{1, 2, 3}, []uint64{1, 3, 2}, Faults{Wrong: 2}},
	} {
		var c checker
		for i := range tt.seqs {
			c.see(tt.seqs[i], tt.numbers[i])
		}
		if c.Faults != tt.want {
			t.Errorf("%s: %+v, want %+v", name, c.Faults, tt.want)
		}
	}
}

// spoilt is how many tokens a liar has taken before it tells of the first: those behind which its lies are. A load ends with a token that came, and so with no fewer.
const spoilt = 12

// liar is an edge that breaks what edges promise: it answers every publish, and tells followers what spoil makes of it.
type liar struct {
	t     *testing.T
	spoil func(n uint64, e *schema.Envelope) []*schema.Envelope
	// off is added to the seq of every acknowledgement.
	off uint64
	// tell carries the frames for the one follower.
	tell chan []byte
}

func (l *liar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"tidemark.v1.proto"}})
	if err != nil {
		l.t.Error(err)
		return
	}
	defer func() { _ = c.CloseNow() }()
	var held [][]byte
	for n := uint64(1); ; {
		_, msg, err := c.Read(r.Context())
		if err != nil {
			return
		}
		f := new(schema.ClientFrame)
		if err := proto.Unmarshal(msg, f); err != nil {
			l.t.Error(err)
			return
		}
		if f.GetAttach() != nil {
			_ = c.Write(r.Context(), websocket.MessageBinary, encode(l.t, &schema.ServerFrame{Frame: &schema.ServerFrame_Attached{Attached: &schema.Attached{Channel: 1}}}))
			for msg := range l.tell {
				_ = c.Write(r.Context(), websocket.MessageBinary, msg)
			}
			return
		}
		e := f.GetPublish().GetEnvelopes()[0]
		e.Seq = n
		if told := l.spoil(n, e); len(told) > 0 {
			held = append(held, encode(l.t, events(told...)))
		}
		if n >= spoilt {
			for _, msg := range held {
				l.tell <- msg
			}
			held = nil
		}
		_ = c.Write(r.Context(), websocket.MessageBinary, encode(l.t, &schema.ServerFrame{Frame: &schema.ServerFrame_Published{Published: &schema.Published{
			Acks: []*schema.Ack{{PublishId: n, FirstSeq: n + l.off, LastSeq: n + l.off}},
		}}}))
		n++
	}
}

func honest(_ uint64, e *schema.Envelope) []*schema.Envelope { return []*schema.Envelope{e} }

func TestLoadFindsOutALiar(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(n uint64, e *schema.Envelope) []*schema.Envelope
		want  Faults
	}{
		"an honest edge":                  {honest, Faults{}},
		"one that acknowledges elsewhere": {honest, Faults{Wrong: 1}}, // and one for each
		"one that loses": {func(n uint64, e *schema.Envelope) []*schema.Envelope {
			if n == 10 || n == 11 {
				return nil
			}
			return []*schema.Envelope{e}
		}, Faults{Lost: 2}},
		"one that repeats": {func(n uint64, e *schema.Envelope) []*schema.Envelope {
			if n == 10 {
				return []*schema.Envelope{e, e}
			}
			return []*schema.Envelope{e}
		}, Faults{Repeated: 1}},
		"one that loses and hides it": {func(n uint64, e *schema.Envelope) []*schema.Envelope {
			if n == 10 {
				return nil
			}
			if n > 10 {
				e.Seq--
			}
			return []*schema.Envelope{e}
		}, Faults{Wrong: 1}}, // and one for each behind it
	} {
		t.Run(name, func(t *testing.T) {
			l := &liar{t: t, spoil: tt.spoil, tell: make(chan []byte, 1<<16)}
			if strings.Contains(name, "acknowledges") {
				l.off = 1
			}
			edge := serve(t, l)
			out, err := Load{Sessions: 1, Window: 4, TokenBytes: 110, Warmup: time.Millisecond, Measure: 50 * time.Millisecond}.run(t.Context(), edge, "", "s")
			close(l.tell)
			if err != nil {
				t.Fatal(err)
			}
			if tt.want.Wrong > 0 && out.Wrong > tt.want.Wrong {
				out.Wrong = tt.want.Wrong
			}
			if out.Sent < spoilt || out.Faults != tt.want {
				t.Errorf("%+v of %d, want %+v", out.Faults, out.Sent, tt.want)
			}
		})
	}
}

// publishing is a log that says when something is published.
type publishing struct {
	broker.Log
	told func()
}

func (p publishing) Publish(ctx context.Context, id schema.SessionID, s *broker.Submission) {
	p.told()
	p.Log.Publish(ctx, id, s)
}

func TestLoadSaysWhatIsInTheWay(t *testing.T) {
	// Cancelled once tokens flow, because a dial that is cancelled says so in words of its own.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := edgeOn(t, publishing{broker.NewMemoryLog(), cancel})
	l := Load{Sessions: 2, Window: 4, TokenBytes: 110, Measure: time.Minute}
	if _, err := l.run(t.Context(), s.Edge, "nonsense", "s"); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("a bad token: %v", err)
	}
	if _, err := l.run(t.Context(), s.Edge, s.Token, "forbidden"); err == nil || !strings.Contains(err.Error(), "forbidden") {
		t.Errorf("a session that the token does not name: %v", err)
	}
	if _, err := l.run(ctx, s.Edge, s.Token, SessionPrefix+"s"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	l.TokenBytes = 10
	if _, err := l.run(t.Context(), s.Edge, s.Token, SessionPrefix+"s"); err == nil || !strings.Contains(err.Error(), "10 bytes") {
		t.Errorf("a small token: %v", err)
	}
}
