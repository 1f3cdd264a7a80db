package broker

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"

	"tidemark/internal/natsd"
	"tidemark/schema"
)

// shelf is an embedded node with a deployment on it, seen from inside the package: what is stored there is written and read message by message.
type shelf struct {
	testing.TB
	dir    string
	node   *natsd.Server
	layout Layout
	nc     *connection
	js     jetstream.JetStream
	r      *reader
	rng    *rand.Rand
}

// forEver keeps file storage from expiring in a bubble, where it would go by the real clock.
const forEver = 200 * 365 * 24 * time.Hour

func newShelf(t testing.TB, streams int, seed uint64) *shelf {
	s := &shelf{TB: t, dir: t.TempDir(), rng: rand.New(rand.NewPCG(seed, 1))}
	s.layout = Layout{Streams: streams, MaxAge: forEver, Durability: schema.Durability_DURABILITY_OS}
	s.start("")
	t.Cleanup(s.stop)
	if _, err := mustBroker(t, s.server(), s.layout, "layout").prepare(t.Context(), s.nc, s.js); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *shelf) server() Server { return Server{InProcess: s.node, Name: "test"} }

func (s *shelf) start(listen string) {
	s.Helper()
	var err error
	if s.node, err = natsd.Start(natsd.Config{DataDir: s.dir, Durability: s.layout.Durability, Listen: listen}); err != nil {
		s.Fatal(err)
	}
	if s.nc, err = s.server().connect(slog.New(slog.DiscardHandler), "test"); err != nil {
		s.Fatal(err)
	}
	if s.js, err = jetstream.New(s.nc.Conn); err != nil {
		s.Fatal(err)
	}
	s.r = newReader(s.nc, s.layout.Streams)
}

func (s *shelf) stop() {
	s.nc.Close()
	if err := s.node.Shutdown(context.Background()); err != nil {
		s.Error(err)
	}
}

func mustBroker(t testing.TB, server Server, l Layout, name string) *Broker {
	t.Helper()
	b, err := NewBroker(BrokerConfig{Server: server, Layout: l, Name: name, Logger: testLogger(t)})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// testLogger writes to the test's log.
func testLogger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// scribe writes a session's frames and remembers what it wrote.
type scribe struct {
	*shelf
	id     schema.SessionID
	ln     lane
	st     *state // of the session, folded as an appender does
	frames []*frame
	stamp  schema.Stamp
	prod   uint64
}

func (s *shelf) scribe(tenant, name string) *scribe {
	id := schema.SessionID{Tenant: tenant, Name: name}
	return &scribe{shelf: s, id: id, ln: laneOf(id), st: newState(), stamp: schema.NewStamp(&schema.Source{Subject: "writer"})}
}

// append stores one frame.
func (w *scribe) append(envelopes ...*schema.Envelope) *frame {
	w.Helper()
	f := &frame{Edge: "edge", ID: ulid.Make().String(), Prev: w.st.frame}
	f.Epoch, f.First, f.Count, f.Time = w.st.epoch, w.st.head+1, len(envelopes), time.Now()
	if w.st.head == 0 {
		f.Epoch, f.Prev = f.ID, 0
	}
	for i, e := range envelopes {
		a, err := w.stamp.AcceptEnvelope(e, time.Now())
		if err != nil {
			w.Fatal(err)
		}
		f.Region = a.AppendRecord(f.Region, f.First+uint64(i))
	}
	return w.store(f)
}

func (w *scribe) store(f *frame) *frame {
	w.Helper()
	msg := &nats.Msg{Subject: w.ln.logSubject(), Data: append(f.appendHeader(nil), f.Region...), Header: nats.Header{}}
	msg.Header.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(w.st.frame, 10))
	if f.Deleted {
		msg.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	}
	ack, err := w.js.PublishMsg(context.Background(), msg)
	if err != nil {
		w.Fatal(err)
	}
	f.StreamSeq = ack.Sequence
	if err := w.st.foldFrame(f); err != nil {
		w.Fatal(err)
	}
	w.frames = append(w.frames, f)
	if f.Deleted {
		w.frames = nil
	}
	return f
}

func (w *scribe) delete() {
	w.Helper()
	f := &frame{Edge: "edge", ID: ulid.Make().String(), Prev: w.st.frame, Deleted: true}
	f.Epoch, f.First, f.Time = w.st.epoch, w.st.head+1, time.Now()
	w.store(f)
}

// some appends n envelopes of random kinds, in frames of random sizes.
func (w *scribe) some(n int) {
	w.Helper()
	for n > 0 {
		k := min(n, 1+w.rng.IntN(1+w.rng.IntN(40)))
		n -= k
		var envelopes []*schema.Envelope
		for range k {
			envelopes = append(envelopes, w.random())
		}
		w.append(envelopes...)
	}
}

func (w *scribe) random() *schema.Envelope {
	e := new(schema.Envelope)
	switch w.rng.IntN(40) {
	case 0:
		e.Payload = &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: fmt.Sprint("r", w.rng.IntN(9))}}
	case 1:
		e.Payload = &schema.Envelope_WaitingForInput{WaitingForInput: &schema.WaitingForInput{Prompt: "?"}}
	case 2:
		e.Payload = &schema.Envelope_UserInput{UserInput: &schema.UserInput{ResponseJson: "1"}}
	case 3:
		e.Payload = &schema.Envelope_RunStatus{RunStatus: &schema.RunStatus{Status: schema.Status_STATUS_COMPLETED}}
	case 4:
		w.prod++
		e.Producer = &schema.Producer{Id: "p", Epoch: 1, Seq: w.prod}
		fallthrough
	default:
		e.Payload = &schema.Envelope_Token{Token: &schema.Token{MessageId: "m", Text: fmt.Sprint(" word", w.rng.IntN(1000))}}
	}
	return e
}

// large is an envelope that hardly compresses.
func (w *scribe) large(size int) *schema.Envelope {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(w.rng.Uint32())
	}
	return &schema.Envelope{Payload: &schema.Envelope_Custom{Custom: &schema.Custom{Type: "blob", Data: b}}}
}

// region is what the session holds from seq `from` to `to`.
func (w *scribe) region(from, to uint64) []byte {
	var out []byte
	for _, f := range w.frames {
		v := f.After(from - 1)
		v.To = min(v.To, to)
		out = append(out, v.Records()...)
	}
	return out
}

// free projects by hand, without a lease.
type free struct{}

func (free) fresh(context.Context) error                          { return nil }
func (free) confirm(context.Context, lane, string) (bool, error)  { return true, nil }
func (free) mayClear(context.Context, lane, uint64) (bool, error) { return true, nil }
func (s *shelf) projection(budget int) *projection {
	return newProjection(s.nc, s.r, free{}, budget, newProjectionMetrics(nil), testLogger(s.TB))
}

// feed gives a projection the messages of the log stream `stream` from … to, and returns where it came to.
func (s *shelf) feed(p *projection, stream int, from, to uint64) uint64 {
	s.Helper()
	for ; from <= to; from++ {
		m, err := s.r.at(context.Background(), logStreamName(stream), from)
		if err != nil {
			s.Fatal(err)
		}
		if m == nil {
			continue
		}
		if err := p.add(context.Background(), m.subject, m.seq, m.data, time.Now()); err != nil {
			s.Fatal(err)
		}
		if p.full() {
			if err := p.store(context.Background(), nil); err != nil {
				s.Fatal(err)
			}
		}
	}
	return from
}

func (s *shelf) lastSeq(stream string) uint64 {
	s.Helper()
	st, err := s.js.Stream(context.Background(), stream)
	if err != nil {
		s.Fatal(err)
	}
	return st.CachedInfo().State.LastSeq
}

// derived is everything that is derived: the pages and the registry, by subject.
func (s *shelf) derived() map[string][]byte {
	s.Helper()
	all := make(map[string][]byte)
	names := []string{registryStream}
	for i := range s.layout.Streams {
		names = append(names, pageStreamName(i))
	}
	for _, name := range names {
		for from := uint64(1); ; {
			batch, more, err := s.r.scan(context.Background(), name, from)
			if err != nil {
				s.Fatal(err)
			}
			for _, m := range batch {
				all[m.subject] = m.data
				from = m.seq + 1
			}
			if !more {
				break
			}
		}
	}
	return all
}

// forget removes everything that is derived.
func (s *shelf) forget() {
	s.Helper()
	names := []string{registryStream}
	for i := range s.layout.Streams {
		names = append(names, pageStreamName(i))
	}
	for _, name := range names {
		st, err := s.js.Stream(context.Background(), name)
		if err == nil {
			err = st.Purge(context.Background())
		}
		if err != nil {
			s.Fatal(err)
		}
	}
}

// rebuilt compares what is derived with what a rebuild from nothing derives.
func (s *shelf) rebuilt() {
	s.Helper()
	have := s.derived()
	s.forget()
	if _, err := Rebuild(context.Background(), RebuildConfig{Server: s.server(), Logger: testLogger(s.TB)}); err != nil {
		s.Fatal(err)
	}
	want := s.derived()
	for subject, data := range want {
		switch {
		case have[subject] == nil:
			s.Errorf("%s is missing; %s", subject, describe(subject, data))
		case !bytes.Equal(have[subject], data):
			s.Errorf("%s is not what the log says:\n%s\nwant\n%s", subject, describe(subject, have[subject]), describe(subject, data))
		}
	}
	for subject := range have {
		if want[subject] == nil {
			s.Errorf("%s should not be there", subject)
		}
	}
}

func describe(subject string, data []byte) string {
	if !strings.HasPrefix(subject, "page.") {
		return fmt.Sprintf("%q", data)
	}
	tokens := strings.Split(subject, ".")
	slot, _ := strconv.ParseUint(tokens[4], 10, 64)
	part := 0
	if len(tokens) > 5 {
		part, _ = strconv.Atoi(tokens[5])
	}
	p, err := decodePage(data, slot, part, 0)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("epoch %s, %d from %d, through %d, %d parts, frames %v, state %v", p.epoch, p.count, p.first, p.through, p.parts, p.frames, p.state)
}

// readAll reads a session by cold replay alone, behind seq after, and compares it with what was written.
func (w *scribe) readAll(after uint64, before *frame, limit int) {
	w.Helper()
	c := Cursor{Epoch: w.st.epoch, Seq: after}
	to := w.st.head
	if before != nil {
		to = before.First - 1
	}
	var got []byte
	for rounds := 0; ; rounds++ {
		views, gap, err := w.r.cold(context.Background(), w.ln, c, before, limit)
		if err != nil || gap != 0 {
			w.Fatalf("behind %d of %d: gap %d, %v", c.Seq, w.st.head, gap, err)
		}
		if len(views) == 0 {
			break
		}
		size := 0
		for i, v := range views {
			if v.From != c.Seq+1 || v.Len() == 0 || v.Epoch != w.st.epoch {
				w.Fatalf("behind %d came %d to %d of epoch %s", c.Seq, v.From, v.To, v.Epoch)
			}
			got = append(got, v.Records()...)
			size += len(v.Records())
			if size > limit && (i > 0 || v.Len() > 1) && size > limit+len(v.Records()) {
				w.Fatalf("%d bytes at once, where %d were asked for", size, limit)
			}
			c.Seq = v.To
		}
	}
	if c.Seq != max(to, after) || !bytes.Equal(got, w.region(after+1, to)) {
		w.Fatalf("behind %d of %d, before %v, limit %d: came to %d, and what was read is not what was written", after, w.st.head, to+1, limit, c.Seq)
	}
}
