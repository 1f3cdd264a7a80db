package broker

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// foreignEnvelopes is how many envelopes of other sessions lie around the one that is read: 100,000, or what the environment says.
func foreignEnvelopes(b *testing.B) int {
	if s := os.Getenv("TIDEMARK_BENCH_FOREIGN"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			b.Fatal(err)
		}
		return n
	}
	return 100_000
}

// BenchmarkColdReplay reads a session of 2,000 envelopes, one in a frame, that lies evenly among many others in one stream: as a follower does, from pages; and, beside it, from the log by subject.
// "cold" is the first read after the server was restarted, "warm" every further one.
func BenchmarkColdReplay(b *testing.B) {
	const envelopes = 2000
	foreign := foreignEnvelopes(b)
	s := newShelf(b, 1, 1)
	w := s.scatter(b, envelopes, foreign)
	r := s.run(nil, "bench")
	for began := time.Now(); s.checkpoint("LOG_00") < s.lastSeq("LOG_00"); {
		if time.Since(began) > 10*time.Minute {
			b.Fatal("the projector did not come to the end")
		}
		time.Sleep(100 * time.Millisecond)
	}
	r.end(b)
	ways := []struct {
		name string
		read func() int
	}{
		{"pages", func() int { return w.readPages(b) }},
		{"by-subject", func() int { return w.readBySubject(b) }},
	}
	for _, way := range ways {
		check := func() {
			if n := way.read(); n != envelopes {
				b.Fatalf("read %d of %d envelopes", n, envelopes)
			}
		}
		b.Run(fmt.Sprintf("%s/cold/foreign=%d", way.name, foreign), func(b *testing.B) {
			best := time.Hour
			for b.Loop() {
				b.StopTimer()
				s.stop()
				s.start("")
				if err := s.nc.Flush(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				began := time.Now()
				check()
				best = min(best, time.Since(began))
			}
			// On a machine that does other things as well, the best says more than the mean.
			b.ReportMetric(float64(best.Microseconds())/1000, "best-ms")
		})
		b.Run(fmt.Sprintf("%s/warm/foreign=%d", way.name, foreign), func(b *testing.B) {
			check()
			for b.Loop() {
				check()
			}
		})
	}
}

// scatter stores a session, one envelope in a frame, evenly among frames of 10,000 others.
func (s *shelf) scatter(b *testing.B, envelopes, foreign int) *scribe {
	w := s.scribe("default", "wanted")
	token := &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "message-1", Text: " word"}}}
	others := make([]*frame, 10_000)
	for written := range foreign {
		if written*envelopes/foreign > int(w.st.head) {
			w.append(token)
		}
		i := written % len(others)
		f := others[i]
		if f == nil {
			f = &frame{Edge: "edge", ID: "F"}
			f.Epoch = fmt.Sprint("E", i)
			others[i] = f
		}
		a, err := w.stamp.AcceptEnvelope(token, time.Now())
		if err != nil {
			b.Fatal(err)
		}
		f.First, f.Count, f.Time = f.First+1, 1, time.Now()
		f.Region = a.AppendRecord(f.Region[:0], f.First)
		msg := &nats.Msg{Subject: laneOf(schema.SessionID{Tenant: "default", Name: fmt.Sprint("other-", i)}).logSubject(), Data: append(f.appendHeader(nil), f.Region...)}
		if _, err := s.js.PublishMsgAsync(msg, jetstream.WithStallWait(time.Minute)); err != nil {
			b.Fatal(err)
		}
	}
	<-s.js.PublishAsyncComplete()
	for int(w.st.head) < envelopes {
		w.append(token)
	}
	return w
}

func (w *scribe) readPages(b *testing.B) int {
	var c Cursor
	for {
		views, _, err := w.r.cold(b.Context(), w.ln, c, nil, 1<<20)
		if err != nil {
			b.Fatal(err)
		}
		if len(views) == 0 {
			return int(c.Seq)
		}
		for _, v := range views {
			c.Seq = v.To
		}
	}
}

// readBySubject is what a replay without pages would do: direct gets of the subject, in batches.
func (w *scribe) readBySubject(b *testing.B) int {
	inbox := w.nc.NewInbox()
	sub, err := w.nc.SubscribeSync(inbox)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	read := 0
	for from := uint64(1); ; {
		body := fmt.Sprintf(`{"seq":%d,"batch":256,"next_by_subj":%q}`, from, w.ln.logSubject())
		if err := w.nc.PublishRequest("$JS.API.DIRECT.GET.LOG_00", inbox, []byte(body)); err != nil {
			b.Fatal(err)
		}
		for {
			m, err := sub.NextMsg(time.Minute)
			if err != nil {
				b.Fatal(err)
			}
			if status := m.Header.Get("Status"); status == "204" {
				break
			} else if status != "" {
				return read
			}
			st, err := storedOf(m)
			if err != nil {
				b.Fatal(err)
			}
			f, err := parseFrame(st.data)
			if err != nil {
				b.Fatal(err)
			}
			from, read = st.seq+1, read+f.Count
		}
	}
}
