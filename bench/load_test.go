package bench

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
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
			if l.Rate > 0 {
				if rate := out.Rate(); rate < float64(l.Sessions*l.Rate)/2 || rate > 1.5*float64(l.Sessions*l.Rate) {
					t.Errorf("%.0f tokens/s, want about %d", rate, l.Sessions*l.Rate)
				}
			}
			if _, err := l.run(t.Context(), s.Edge, s.Token, SessionPrefix+"x"); err == nil || !strings.Contains(err.Error(), "must be new") {
				t.Errorf("on sessions that are there: %v", err)
			}
		})
	}
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
			l.tell <- encode(l.t, events(told...))
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
			if out.Sent < 12 || out.Faults != tt.want {
				t.Errorf("%+v of %d, want %+v", out.Faults, out.Sent, tt.want)
			}
		})
	}
}

func TestLoadSaysWhatIsInTheWay(t *testing.T) {
	s := edgeOn(t, broker.NewMemoryLog())
	l := Load{Sessions: 2, Window: 4, TokenBytes: 110, Measure: time.Minute}
	if _, err := l.run(t.Context(), s.Edge, "nonsense", "s"); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("a bad token: %v", err)
	}
	if _, err := l.run(t.Context(), s.Edge, s.Token, "forbidden"); err == nil || !strings.Contains(err.Error(), "forbidden") {
		t.Errorf("a session that the token does not name: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := l.run(ctx, s.Edge, s.Token, SessionPrefix+"s"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled: %v", err)
	}
	l.TokenBytes = 10
	if _, err := l.run(t.Context(), s.Edge, s.Token, SessionPrefix+"s"); err == nil || !strings.Contains(err.Error(), "10 bytes") {
		t.Errorf("a small token: %v", err)
	}
}
