package world

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// bystander is somebody else on the same edge, on a connection of each way, whom nothing that others do may touch.
type bystander struct {
	w       *World
	session string
	writers []*Writer
	readers []*Reader
	n       uint64
}

func (w *World) bystander(e *Edge) *bystander {
	b := &bystander{w: w, session: "the bystanders' on " + e.Name}
	for _, way := range Ways() {
		b.writers = append(b.writers, w.Write(b.session, WriterOptions{Ways: []Way{way}, Edges: []*Edge{e}}))
		b.readers = append(b.readers, w.Read(b.session, ReaderOptions{Ways: []Way{way}, Edges: []*Edge{e}}))
	}
	b.untouched()
	return b
}

// untouched publishes and follows on all of the bystander's connections.
func (b *bystander) untouched() {
	b.w.t.Helper()
	for _, x := range b.writers {
		b.n++
		x.Send(Token("."))
		if all := x.Flush(); all[len(all)-1].Ack.First != b.n || x.Lost() != 0 {
			b.w.t.Errorf("a bystander by %v published at %d instead of %d, and lost %d connections", x.o.Ways, all[len(all)-1].Ack.First, b.n, x.Lost())
		}
	}
	for _, r := range b.readers {
		r.Wait(b.n)
		if r.Attached() != 1 {
			b.w.t.Errorf("a bystander by %v was attached %d times", r.o.Ways, r.Attached())
		}
	}
}

// wantRefused wants an attachment to be refused: alone where the connection has others, with the connection otherwise.
func (p *Peer) wantRefused(code schema.Code) *schema.ErrorFrame {
	p.w.t.Helper()
	if p.way.Single() {
		end := p.WantEnd(code)
		if want := code.Rule().Close; p.way == SessionSocket && end.Status != want {
			p.w.t.Errorf("%s: closed with %d instead of %d", p.way, end.Status, want)
		}
		if want := code.Rule().GRPC; p.way == Calls && end.Status != int(want) {
			p.w.t.Errorf("%s: ended with %d instead of %d", p.way, end.Status, want)
		}
		return &schema.ErrorFrame{Code: end.Code, Message: end.Message, Reconnect: end.Code.Rule().Reconnect}
	}
	e := p.WantError(1, code)
	p.Ping()
	return e
}

// wantEnded wants the connection to end with the code, as the way says that.
func (p *Peer) wantEnded(code schema.Code) {
	p.w.t.Helper()
	end := p.WantEnd(code)
	want := code.Rule().Close
	if p.way == GRPC || p.way == Calls {
		want = int(code.Rule().GRPC)
	}
	if end.Status != want || end.Message == "" {
		p.w.t.Errorf("%s: the connection should end with %d and a sentence; it ended with %s", p.way, want, end)
	}
}

// TestBadInput sends what is wrong by every way: it is answered with its code and a sentence, what was stored stays, and nobody else notices.
func TestBadInput(t *testing.T) {
	produced := func(seq uint64) *schema.Envelope {
		e := Token("produced ")
		e.Producer = &schema.Producer{Id: "p", Epoch: 1, Seq: seq}
		return e
	}
	after := func(seq uint64) *schema.Attach {
		return &schema.Attach{Session: "s", Start: &schema.Attach_AfterSeq{AfterSeq: seq}}
	}
	// Each case gets a connection of its own, and session s with 3 envelopes.
	cases := []struct {
		name string
		// not are the ways that cannot say it.
		not []Way
		bad func(w *World, e *Edge, way Way)
	}{
		{"follow of an unknown session that must exist", []Way{SessionSocket}, func(w *World, e *Edge, way Way) {
			w.Follow(e, way, &schema.Attach{Session: "nobody's", MustExist: true}).wantRefused(schema.Code_CODE_SESSION_NOT_FOUND)
		}},
		{"follow of an unknown session", nil, func(w *World, e *Edge, way Way) {
			session := "not yet by " + way.String() + e.Name
			p := w.Follow(e, way, &schema.Attach{Session: session})
			if a := p.WantAttached(); a.GetHeadSeq() != 0 || a.GetEpoch() != "" {
				w.t.Errorf("%s: %v", way, a)
			}
			w.Sleep(20 * time.Second)
			w.Join(w.Edge(1), ProtoSocket, session).Put(session, Token("at last"))
			if got := Texts(p.WantEvents(1)); got != "at last" {
				w.t.Errorf("%s: it waited for %q", way, got)
			}
		}},
		{"a seq beyond the head", nil, func(w *World, e *Edge, way Way) {
			f := w.Follow(e, way, after(9)).wantRefused(schema.Code_CODE_SEQ_BEYOND_HEAD)
			if f.GetReconnect() != schema.Reconnect_RECONNECT_BEGINNING || f.HeadSeq != nil && f.GetHeadSeq() != 3 || !way.Single() && f.HeadSeq == nil {
				w.t.Errorf("%s: %v", way, f)
			}
		}},
		{"a seq of an empty session", nil, func(w *World, e *Edge, way Way) {
			a := after(9)
			a.Session = "nobody's"
			w.Follow(e, way, a).wantRefused(schema.Code_CODE_SEQ_BEYOND_HEAD)
		}},
		{"an epoch of another history", nil, func(w *World, e *Edge, way Way) {
			a := after(2)
			a.Epoch = "01JBVX3V3V3V3V3V3V3V3V3V3V"
			f := w.Follow(e, way, a).wantRefused(schema.Code_CODE_EPOCH_MISMATCH)
			if f.GetReconnect() != schema.Reconnect_RECONNECT_BEGINNING || !way.Single() && f.GetEpoch() == "" {
				w.t.Errorf("%s: %v", way, f)
			}
		}},
		{"a filter by an unknown type", []Way{SessionSocket}, func(w *World, e *Edge, way Way) {
			w.Follow(e, way, &schema.Attach{Session: "s", Types: []string{"nonsense"}}).wantRefused(schema.Code_CODE_UNKNOWN_TYPE)
		}},
		{"a session's name that is too long", nil, func(w *World, e *Edge, way Way) {
			a := &schema.Attach{Channel: 1, Session: strings.Repeat("n", schema.MaxNameBytes+1)}
			if way != SessionSocket {
				w.Follow(e, way, a).wantRefused(schema.Code_CODE_INVALID_MESSAGE)
			} else if p, end := w.TryDial(e, way, Dial{}, a); p != nil || end.Status != http.StatusBadRequest || end.Code != schema.Code_CODE_INVALID_MESSAGE {
				w.t.Errorf("%s: %s", way, end)
			}
		}},
		{"what is no message of the protocol", nil, func(w *World, e *Edge, way Way) {
			p := w.Join(e, way, "s")
			p.Put("s", Token("before "))
			p.SendRaw([]byte("{\"type\": nonsense \xe2\x82\xac"))
			p.wantEnded(schema.Code_CODE_INVALID_MESSAGE)
		}},
		{"an unknown type of envelope", []Way{ProtoSocket, GRPC, Calls}, func(w *World, e *Edge, way Way) {
			p := w.Join(e, way, "s")
			if way == JSONSocket {
				// In protobuf's JSON form it is a key that there is not. The connection goes on.
				p.SendRaw([]byte(`{"publish":{"publishId":"77","session":"s","envelopes":[{"nonsense":{}}]}}`))
				p.WantRejected(77, schema.Code_CODE_UNKNOWN_TYPE)
				return
			}
			p.SendRaw([]byte(`{"type":"nonsense","data":{}}`))
			p.wantEnded(schema.Code_CODE_UNKNOWN_TYPE)
		}},
		{"an envelope without content", nil, func(w *World, e *Edge, way Way) {
			p := w.Join(e, way, "s")
			if way == SessionSocket {
				p.SendRaw([]byte(`{"type":"token","data":{"text":"of no message"}}`))
				p.wantEnded(schema.Code_CODE_INVALID_MESSAGE)
				return
			}
			p.WantRejected(p.Publish("s", &schema.Envelope{}), schema.Code_CODE_UNKNOWN_TYPE)
			p.WantRejected(p.Publish("s", &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{Text: "of no message"}}}), schema.Code_CODE_INVALID_MESSAGE)
			p.WantRejected(p.Publish("s"), schema.Code_CODE_INVALID_MESSAGE)
			p.WantRejected(p.Publish("s", Tokens("x", schema.MaxPublishEnvelopes+1)...), schema.Code_CODE_INVALID_MESSAGE)
			p.Put("s", Token("after "))
		}},
		{"one bad envelope among good ones", []Way{SessionSocket}, func(w *World, e *Edge, way Way) {
			p := w.Join(e, way, "s")
			p.WantRejected(p.Publish("s", Token("good "), &schema.Envelope{Id: "no ULID", Payload: Token("").Payload}, Token("good ")), schema.Code_CODE_INVALID_MESSAGE)
			p.Put("s", Token("after "))
		}},
		{"an envelope that is too large", nil, func(w *World, e *Edge, way Way) {
			p := w.Join(e, way, "s")
			if way == SessionSocket {
				p.Publish("s", Token(strings.Repeat("x", schema.MaxEnvelopeBytes+1)))
				p.wantEnded(schema.Code_CODE_TOO_LARGE)
				return
			}
			p.WantRejected(p.Publish("s", Token(strings.Repeat("x", schema.MaxEnvelopeBytes+1))), schema.Code_CODE_TOO_LARGE)
			p.Put("s", Token("after "))
		}},
		{"a frame that is too large", nil, func(w *World, e *Edge, way Way) {
			p := w.Join(e, way, "s")
			p.Publish("s", Token(strings.Repeat("x", schema.MaxFrameBytes+1)))
			p.wantEnded(schema.Code_CODE_TOO_LARGE)
		}},
		{"text that is not UTF-8", []Way{ProtoSocket, GRPC, Calls}, func(w *World, e *Edge, way Way) {
			p := w.Join(e, way, "s")
			p.SendRaw([]byte("{\"type\":\"system\",\"data\":{\"message\":\"\xff\"}}"))
			if end := p.WantEnd(schema.Code_CODE_INVALID_MESSAGE); end.Status != int(websocket.StatusInvalidFramePayloadData) {
				w.t.Errorf("%s: closed with %d", way, end.Status)
			}
		}},
		{"a gap in a producer's sequence", nil, func(w *World, e *Edge, way Way) {
			session := "produced by " + way.String() + e.Name
			p := w.Join(e, way, session)
			p.Put(session, produced(1))
			if r := p.WantRejected(p.Publish(session, produced(3)), schema.Code_CODE_PRODUCER_GAP); r.GetExpected() != 2 || r.GetRetryable() {
				w.t.Errorf("%s: %v", way, r)
			}
			if a := p.Put(session, produced(2)); a.First != 2 {
				w.t.Errorf("%s: %+v", way, a)
			}
		}},
		{"an expected seq that is not the head's", []Way{SessionSocket}, func(w *World, e *Edge, way Way) {
			p := w.Join(e, way, "s")
			head := p.Put("s", Token("head ")).Last
			id := p.PublishAs(&schema.Publish{Session: "s", ExpectedSeq: new(head - 1), Envelopes: []*schema.Envelope{Token("no")}})
			if r := p.WantRejected(id, schema.Code_CODE_CONFLICT); r.GetHeadSeq() != head || r.GetRetryable() {
				w.t.Errorf("%s: %v", way, r)
			}
		}},
		{"a channel that is no attachment", []Way{SessionSocket, Calls}, func(w *World, e *Edge, way Way) {
			p := w.Join(e, way, "s")
			p.WantRejected(p.PublishAs(&schema.Publish{Channel: 77, Envelopes: []*schema.Envelope{Token("no")}}), schema.Code_CODE_INVALID_MESSAGE)
			p.Put("s", Token("after "))
		}},
		{"no token, and a wrong one", nil, func(w *World, e *Edge, way Way) {
			for _, d := range []Dial{{Token: "nonsense"}, {Anonymous: true}} {
				a := &schema.Attach{Channel: 1, Session: "s"}
				p, end := w.TryDial(e, way, d, a)
				if p != nil {
					// Calls find out with the answer. Connections may still say hello.
					w.closers = append(w.closers, p.Close)
					if !way.Single() {
						p.Attach(a)
					}
					end = p.WantEnd(schema.Code_CODE_UNAUTHENTICATED)
				}
				want := http.StatusUnauthorized
				switch {
				case way == GRPC || way == Calls:
					want = int(codes.Unauthenticated)
				case p != nil:
					want = 1008
				}
				if end.Code != schema.Code_CODE_UNAUTHENTICATED || end.Status != want {
					w.t.Errorf("%s with %+v: %s", way, d, end)
				}
			}
		}},
		{"a session that the token does not name", nil, func(w *World, e *Edge, way Way) {
			token := w.Token(schema.Role_ROLE_AGENT, "mine*")
			a := &schema.Attach{Channel: 1, Session: "s"}
			p, end := w.TryDial(e, way, Dial{Token: token}, a)
			if way == SessionSocket {
				if p != nil || end.Status != http.StatusForbidden || end.Code != schema.Code_CODE_FORBIDDEN {
					w.t.Errorf("%s: %s", way, end)
				}
				return
			}
			w.closers = append(w.closers, p.Close)
			if !way.Single() {
				p.Attach(a)
				p.wantRefused(schema.Code_CODE_FORBIDDEN)
				p.WantRejected(p.Publish("s", Token("no")), schema.Code_CODE_FORBIDDEN)
				p.Put("mine 1", Token("yes"))
				return
			}
			p.wantRefused(schema.Code_CODE_FORBIDDEN)
		}},
	}
	Run(t, Config{}, func(w *World) {
		doing := ""
		defer func() {
			if w.t.Failed() {
				w.t.Log("the case was:", doing)
			}
		}()
		e := w.Edge(0)
		others := w.bystander(e)
		w.Join(w.Edge(1), ProtoSocket, "s").Put("s", Tokens("kept ", 3)...)
		for _, c := range cases {
		ways:
			for _, way := range Ways() {
				for _, not := range c.not {
					if way == not {
						continue ways
					}
				}
				before := w.Edge(1).Stored("s")
				doing = c.name + " by " + way.String()
				c.bad(w, e, way)
				now := w.Edge(1).Stored("s")
				for i, v := range before {
					if !proto.Equal(v, now[i]) {
						t.Fatalf("%s by %s: seq %d was %v and is %v", c.name, way, i+1, v, now[i])
					}
				}
				for _, v := range now[len(before):] {
					if s := Text(v); s != "before " && s != "after " && s != "head " {
						t.Fatalf("%s by %s: %v is stored", c.name, way, v)
					}
				}
				if len(now) > 3 {
					// The next case has its three again.
					w.must(w.Call(e, "DeleteSession", &schema.DeleteSessionRequest{Session: "s"}, new(schema.DeleteSessionResponse)))
					w.Join(w.Edge(1), ProtoSocket, "s").Put("s", Tokens("kept ", 3)...)
				}
			}
			others.untouched()
		}
	})
}

// TestBadInput_WrongSubprotocol is refused before the upgrade, with a sentence.
func TestBadInput_WrongSubprotocol(t *testing.T) {
	Run(t, Config{Edges: 1}, func(w *World) {
		others := w.bystander(w.Edge(0))
		for _, offered := range [][]string{nil, {"tidemark.v2.proto"}, {"graphql-ws", "mqtt"}} {
			s := newSocket(path{net: w.net, addr: w.Edge(0).Name + ".http"}, w.Token(schema.Role_ROLE_AGENT, "*"))
			err := s.dial(w.t.Context(), "ws://edge/v1/connect", offered...)
			end := s.ending(err)
			if err == nil || end.Status != http.StatusBadRequest || end.Code != schema.Code_CODE_UNSUPPORTED_PROTOCOL || end.Message == "" {
				t.Errorf("%v: %s", offered, end)
			}
			s.drop()
		}
		others.untouched()
	})
}

// TestBadInput_Nonsense: bytes that belong to no protocol at all, on both ports.
func TestBadInput_Nonsense(t *testing.T) {
	Run(t, Config{Edges: 1}, func(w *World) {
		others := w.bystander(w.Edge(0))
		for _, port := range []string{".http", ".grpc"} {
			for _, nonsense := range []string{"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1", "GET", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff", strings.Repeat("A", 200<<10)} {
				_, c, err := w.net.dial(w.t.Context(), w.Edge(0).Name+port)
				w.must(err)
				go func(c net.Conn) {
					_, _ = c.Write([]byte(nonsense))
				}(c)
				w.must(c.SetReadDeadline(time.Now().Add(time.Second)))
				_, _ = c.Read(make([]byte, 1000))
				w.must(c.Close())
			}
		}
		others.untouched()
	})
}

// TestBadInput_NATSAway attaches and asks while NATS does not answer: what needs it is refused for now, in bounded time; the connection stays.
func TestBadInput_NATSAway(t *testing.T) {
	Run(t, Config{Edges: 1}, func(w *World) {
		e := w.Edge(0)
		w.Join(e, ProtoSocket, "s").Put("s", Tokens("x", 5)...)
		w.Read("s", ReaderOptions{}).Wait(5)
		w.Edge(0).Freeze()
		for _, way := range Ways() {
			began := time.Now()
			p := w.Follow(e, way, &schema.Attach{Session: "never heard of by " + way.String()})
			p.wantRefused(schema.Code_CODE_UNAVAILABLE)
			// What the edge has in memory it tells at once.
			if q := w.Follow(e, way, &schema.Attach{Session: "s"}); Texts(q.WantEvents(5)) != "x1 x2 x3 x4 x5 " {
				t.Errorf("%s: what is in memory is not told", way)
			}
			if took := time.Since(began); took > 15*time.Second {
				t.Errorf("%s: it took %s", way, took)
			}
		}
		began := time.Now()
		err := w.Call(e, "GetSession", &schema.GetSessionRequest{Session: "s"}, new(schema.GetSessionResponse))
		if r := refused(err); r == nil || r.Code != schema.Code_CODE_UNAVAILABLE || time.Since(began) > 15*time.Second {
			t.Errorf("GetSession: after %s: %v", time.Since(began), err)
		}
		e.Thaw()
		e.WaitReady()
		w.Sleep(time.Second) // the connection for reads may come back a little later
		w.bystander(e).untouched()
	})
}

// TestBadInput_DiskFull fills the disk: publishes are refused with storage_full, which says that they may be sent again; connections stay, what is stored can be read. Once there is room, it goes on.
func TestBadInput_DiskFull(t *testing.T) {
	Run(t, Config{Streams: 1, MaxStore: 6 << 20}, func(w *World) {
		filler := w.Join(w.Edge(0), ProtoSocket, "filler")
		text := strings.Repeat("x", 256<<10)
		full := func() {
			for i := 0; ; i++ {
				id := filler.Publish("filler", Token(text))
				f := filler.want("an answer", func(f *schema.ServerFrame) bool { return f.GetPublished() != nil || f.GetRejected() != nil })
				if r := f.GetRejected(); r != nil {
					if r.GetPublishId() != id || r.GetCode() != schema.Code_CODE_STORAGE_FULL || !r.GetRetryable() || r.GetMessage() == "" {
						t.Fatalf("the disk is full: %v", r)
					}
					return
				}
				if i > 100 {
					t.Fatal("the disk does not become full")
				}
			}
		}
		type client struct {
			way    Way
			peer   *Peer
			reader *Reader
			next   *schema.Envelope
			n      uint64
		}
		var clients []*client
		for i, way := range Ways() {
			c := &client{way: way, peer: w.Join(w.Edge(i%2), way, way.String()), n: 1}
			c.peer.Put(way.String(), Token("one "))
			c.reader = w.Read(way.String(), ReaderOptions{Ways: []Way{way}})
			c.reader.Wait(1)
			clients = append(clients, c)
		}
		// refuse wants everybody refused, and goOn that they send the same again and it is stored.
		refuse := func() {
			for _, c := range clients {
				c.peer.inbox = nil
				c.next = Token(fmt.Sprint(c.n+1, strings.Repeat("y", 300<<10)))
				if r := c.peer.WantRejected(c.peer.Publish(c.way.String(), c.next), schema.Code_CODE_STORAGE_FULL); !r.GetRetryable() {
					t.Errorf("%s: %v", c.way, r)
				}
				if got := w.Follow(w.Edge(0), c.way, &schema.Attach{Session: c.way.String()}).WantEvents(c.n); uint64(len(got)) != c.n {
					t.Errorf("%s: %d of %d envelopes are read from the full disk", c.way, len(got), c.n)
				}
			}
		}
		goOn := func() {
			for _, c := range clients {
				c.n++
				if a := c.peer.Put(c.way.String(), c.next); a.First != c.n || a.Duplicate {
					t.Errorf("%s: %+v", c.way, a)
				}
				c.reader.Wait(c.n)
				if c.reader.Attached() != 1 {
					t.Errorf("%s: its follower was attached %d times", c.way, c.reader.Attached())
				}
			}
		}
		full()
		refuse()

		// An operator makes room.
		js, err := jetstream.New(w.nats())
		w.must(err)
		for stream, subject := range map[string]string{"LOG_00": "log.*.default.filler", "PAGE_00": "page.*.default.filler.>"} {
			s, err := js.Stream(w.t.Context(), stream)
			w.must(err)
			w.must(s.Purge(w.t.Context(), jetstream.WithPurgeSubject(subject)))
		}
		filler.Close()
		goOn()
		filler = w.Join(w.Edge(0), ProtoSocket, "filler")
		full()
		refuse()

		// Or somebody deletes a session.
		w.must(w.Call(w.Edge(1), "DeleteSession", &schema.DeleteSessionRequest{Session: "filler"}, new(schema.DeleteSessionResponse)))
		w.Settle()
		goOn()
		full()
		refuse()

		// Or the limit is raised.
		w.StopNATS()
		w.SetMaxStore(64 << 20)
		w.StartNATS()
		w.Edge(0).WaitReady()
		w.Edge(1).WaitReady()
		goOn()
	})
}
