package edgegrpc

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"tidemark/internal/gateway"
	"tidemark/schema"
)

func publishOf(id uint64, session string, texts ...string) *schema.Publish {
	p := &schema.Publish{PublishId: id, Session: session}
	for _, t := range texts {
		p.Envelopes = append(p.Envelopes, tokenOf(t))
	}
	return p
}

func clientFrame(m proto.Message) *schema.ClientFrame {
	switch m := m.(type) {
	case *schema.Publish:
		return &schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: m}}
	case *schema.Hello:
		return &schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: m}}
	case *schema.Attach:
		return &schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: m}}
	case *schema.WorkSubscribe:
		return &schema.ClientFrame{Frame: &schema.ClientFrame_WorkSubscribe{WorkSubscribe: m}}
	case *schema.WorkAck:
		return &schema.ClientFrame{Frame: &schema.ClientFrame_Ack{Ack: m}}
	case *schema.WorkTerm:
		return &schema.ClientFrame{Frame: &schema.ClientFrame_Term{Term: m}}
	case *schema.Ping:
		return &schema.ClientFrame{Frame: &schema.ClientFrame_Ping{Ping: m}}
	}
	panic("no frame of a client")
}

func TestFollowOverEveryProtocol(t *testing.T) { eachDialect(t, testFollow) }

func testFollow(w *world, d dialect) {
	w.publish("s", "a", "b", "c")
	k := w.dial(d, w.token(schema.Role_ROLE_USER, "*"))
	c := k.follow(&schema.Attach{Session: "s"})
	at := c.next().GetAttached()
	if at.GetSession() != "s" || at.GetHeadSeq() != 3 || at.GetFirstSeq() != 1 || at.GetEpoch() == "" || at.GetChannel() != 0 {
		w.Errorf("attached: %v", at)
	}
	seq := c.wantTexts(0, "a", "b", "c")
	if f := c.next(); f.GetCaughtUp().GetThroughSeq() != 3 {
		w.Errorf("wanted caught_up, got %v", f)
	}
	// Live.
	w.publish("s", "d")
	c.wantTexts(seq, "d")
	// Deleted while it is followed.
	w.must(w.log.Delete(w.ctx, schema.SessionID{Tenant: "default", Name: "s"}))
	if f := c.next(); f.GetError().GetCode() != schema.Code_CODE_SESSION_DELETED {
		w.Errorf("wanted the error, got %v", f)
	}
	c.wantStatus(schema.Code_CODE_SESSION_DELETED)

	// What there is not. It waits, or refuses, as was asked for.
	k.follow(&schema.Attach{Session: "none", MustExist: true}).wantStatus(schema.Code_CODE_SESSION_NOT_FOUND)
	c = k.follow(&schema.Attach{Session: "new"})
	if at := c.next().GetAttached(); at == nil || at.GetEpoch() != "" {
		w.Errorf("attached to an empty session: %v", at)
	}
	w.publish("new", "x")
	c.wantTexts(0, "x")
	c.cancel()
	// A cursor that does not fit the history; the status says where the session stands.
	p := k.follow(&schema.Attach{Session: "new", Start: &schema.Attach_AfterSeq{AfterSeq: 9}}).wantStatus(schema.Code_CODE_SEQ_BEYOND_HEAD)
	if f, ok := p.detail.(*schema.ErrorFrame); !ok || f.GetHeadSeq() != 1 {
		w.Errorf("the detail is %v, want head_seq 1", p.detail)
	}
	p = k.follow(&schema.Attach{Session: "new", Epoch: "01JD9ZK7V1Q8R7S6T5V4W3X2Y1"}).wantStatus(schema.Code_CODE_EPOCH_MISMATCH)
	if f, ok := p.detail.(*schema.ErrorFrame); !ok || f.GetReconnect() != schema.Reconnect_RECONNECT_BEGINNING {
		w.Errorf("the detail is %v, want to reconnect from the beginning", p.detail)
	}
	k.follow(&schema.Attach{Session: ""}).wantStatus(schema.Code_CODE_INVALID_MESSAGE)
	k.follow(&schema.Attach{Session: "new", Types: []string{"no such type"}}).wantStatus(schema.Code_CODE_UNKNOWN_TYPE)

	// Filtered: through_seq still says where the cursor is.
	for i := range 3 {
		w.publish("f", fmt.Sprint(i))
	}
	c = k.follow(&schema.Attach{Session: "f", Types: []string{"user_message"}})
	if f := c.next(); f.GetAttached() == nil {
		w.Errorf("wanted attached, got %v", f)
	}
	if f := c.next(); f.GetCaughtUp().GetThroughSeq() != 3 {
		w.Errorf("wanted caught_up through 3, got %v", f)
	}
	c.cancel()
}

// A follower that lost its connection goes on from its last seq, on any protocol, and misses nothing.
func TestI4_ResumeOnAnyProtocol(t *testing.T) {
	inWorld(t, func(w *world) {
		token := w.token(schema.Role_ROLE_AGENT, "*")
		const total = 120
		texts := make([]string, total)
		for i := range texts {
			texts[i] = fmt.Sprintf("t%d", i)
		}
		var agent sync.WaitGroup
		defer agent.Wait()
		agent.Go(func() {
			for _, text := range texts {
				time.Sleep(time.Millisecond)
				w.publish("s", text)
			}
		})
		seq := uint64(0)
		for i := 0; seq < total; i++ {
			d := dialects[i%len(dialects)]
			k := w.dial(d, token)
			c := k.follow(&schema.Attach{Session: "s", Start: &schema.Attach_AfterSeq{AfterSeq: seq}})
			for range 3 {
				if seq == total {
					break
				}
				f := c.next()
				for _, e := range f.GetEvents().GetEnvelopes() {
					if e.GetSeq() != seq+1 || e.GetToken().GetText() != texts[seq] {
						w.Fatalf("%s: got %d %q after %d", d.name, e.GetSeq(), e.GetToken().GetText(), seq)
					}
					seq++
				}
			}
			// The cut comes without a goodbye.
			for _, conn := range *k.conns {
				_ = conn.Close()
			}
			c.cancel()
			k.close()
		}
	})
}

func TestAppendStreamOverEveryProtocol(t *testing.T) { eachBidi(t, testAppendStream) }

func testAppendStream(w *world, d dialect) {
	k := w.dial(d, w.token(schema.Role_ROLE_AGENT, "*"))
	c := k.open("AppendStream", true)
	const n = 50
	for i := uint64(1); i <= n; i++ {
		c.say(publishOf(i, "s", fmt.Sprint(i)))
	}
	acked := uint64(0)
	for acked < n {
		f := c.next()
		if f.GetPublished() == nil {
			w.Fatalf("wanted published, got %v", f)
		}
		for _, a := range f.GetPublished().GetAcks() {
			acked++
			if a.GetPublishId() != acked || a.GetFirstSeq() != acked || a.GetLastSeq() != acked {
				w.Fatalf("ack %v, want publish %d at seq %d", a, acked, acked)
			}
		}
	}
	// A publish that is refused; the stream goes on.
	bad := publishOf(51, "s", "x")
	bad.ExpectedSeq = new(uint64(7))
	c.say(bad)
	if r := c.next().GetRejected(); r.GetPublishId() != 51 || r.GetCode() != schema.Code_CODE_CONFLICT || r.GetHeadSeq() != n {
		w.Errorf("rejected: %v", r)
	}
	c.say(publishOf(52, "", "x"))
	if r := c.next().GetRejected(); r.GetPublishId() != 52 || r.GetCode() != schema.Code_CODE_INVALID_MESSAGE {
		w.Errorf("rejected: %v", r)
	}
	c.say(&schema.Publish{PublishId: 53, Session: "s"})
	if r := c.next().GetRejected(); r.GetPublishId() != 53 || r.GetCode() != schema.Code_CODE_INVALID_MESSAGE {
		w.Errorf("rejected: %v", r)
	}
	// Everything sent before the end is answered before the stream ends.
	c.say(publishOf(54, "s", "last", "of all"))
	c.finish()
	if a := c.next().GetPublished().GetAcks(); len(a) != 1 || a[0].GetPublishId() != 54 || a[0].GetFirstSeq() != n+1 || a[0].GetLastSeq() != n+2 {
		w.Errorf("acks: %v", a)
	}
	c.wantEnd()
}

func TestConnectOverEveryProtocol(t *testing.T) { eachBidi(t, testConnect) }

func testConnect(w *world, d dialect) {
	token := w.token(schema.Role_ROLE_AGENT, "*")
	for _, hello := range []bool{false, true} {
		k := w.dial(d, token)
		if hello {
			k.token = ""
		}
		c := k.open("Connect", true)
		session := fmt.Sprint("s ", hello)
		if hello {
			c.say(clientFrame(&schema.Hello{Token: token, Client: "test"}))
			if f := c.next(); f.GetWelcome().GetTenant() != "default" || f.GetWelcome().GetPrincipal().GetSubject() != "ada" {
				w.Errorf("welcome: %v", f)
			}
		}
		c.say(clientFrame(&schema.Attach{Channel: 7, Session: session}))
		if f := c.next(); f.GetAttached().GetChannel() != 7 {
			w.Errorf("attached: %v", f)
		}
		if f := c.next(); f.GetCaughtUp().GetChannel() != 7 {
			w.Errorf("caught up: %v", f)
		}
		c.say(clientFrame(&schema.Publish{PublishId: 1, Channel: 7, Envelopes: []*schema.Envelope{tokenOf("hi")}}))
		var acked, seen bool
		for !acked || !seen {
			f := c.next()
			for _, a := range f.GetPublished().GetAcks() {
				acked = acked || a.GetPublishId() == 1 && a.GetFirstSeq() == 1
			}
			if e := f.GetEvents(); e != nil {
				seen = true
				if e.GetChannel() != 7 || e.GetThroughSeq() != 1 || e.GetEnvelopes()[0].GetToken().GetText() != "hi" || e.GetEnvelopes()[0].GetSource().GetSubject() != "ada" {
					w.Errorf("events: %v", e)
				}
			}
		}
		c.say(clientFrame(&schema.Ping{Data: []byte("x")}))
		if f := c.next(); string(f.GetPong().GetData()) != "x" {
			w.Errorf("pong: %v", f)
		}
		// What no client may say ends the connection: with a frame and with the status.
		c.say(clientFrame(&schema.Attach{Channel: 0, Session: session}))
		if f := c.next(); f.GetError().GetCode() != schema.Code_CODE_INVALID_MESSAGE || f.GetError().GetChannel() != 0 {
			w.Errorf("error: %v", f)
		}
		c.wantStatus(schema.Code_CODE_INVALID_MESSAGE)
		k.close()
	}
	// Bytes that are no frame, and none at all behind a good frame: what came before must not be taken for it.
	k := w.dial(d, token)
	c := k.open("Connect", true)
	if k.grpc == nil {
		c.say(rawMessage{bytes: []byte("\xff\xff not a frame")})
		c.wantStatus(schema.Code_CODE_INVALID_MESSAGE)
		c = k.open("Connect", true)
		c.say(clientFrame(publishOf(1, "twice?", "once")))
		c.next()
		// The edge may have answered before the client's library has written its nothing.
		_ = c.send(rawMessage{bytes: []byte{}})
		c.wantStatus(schema.Code_CODE_INVALID_MESSAGE)
	}
	// No token and no hello.
	k.token = ""
	c = k.open("Connect", true)
	c.say(clientFrame(&schema.Attach{Channel: 1, Session: "s"}))
	c.wantStatus(schema.Code_CODE_UNAUTHENTICATED)
	began := time.Now()
	c = k.open("Connect", true)
	c.wantStatus(schema.Code_CODE_UNAUTHENTICATED)
	if d := time.Since(began); d != gateway.DefaultHelloTimeout {
		w.Errorf("a connection without hello lasted %s, want %s", d, gateway.DefaultHelloTimeout)
	}
	// A client that has no more to say is answered first.
	k.token = token
	c = k.open("Connect", true)
	c.say(clientFrame(publishOf(9, "s", "x")))
	c.finish()
	if a := c.next().GetPublished().GetAcks(); len(a) != 1 || a[0].GetPublishId() != 9 {
		w.Errorf("acks: %v", a)
	}
	c.wantEnd()
}

// A client learns that its stream is there before the edge has anything to say.
func TestHeaderComesFirst(t *testing.T) {
	inWorld(t, func(w *world) {
		began := time.Now()
		k := w.dial(dialects[0], "")
		s, err := k.grpc.NewStream(w.ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, procedure("Connect"))
		w.must(err)
		if _, err := s.Header(); err != nil {
			w.Error(err)
		}
		web := w.dial(dialects[6], "").rpc("Connect").CallBidiStream(w.ctx)
		w.must(web.Send(nil))
		if h := web.ResponseHeader(); h.Get("Content-Type") != "application/connect+proto" {
			w.Errorf("header %v", h)
		}
		if d := time.Since(began); d != 0 {
			w.Errorf("the headers came after %s", d)
		}
		_ = web.CloseRequest()
		_ = web.CloseResponse()
	})
}

// What a newer client put into an envelope comes out as it went in.
func TestUnknownFieldsSurvive(t *testing.T) {
	eachBidi(t, func(w *world, d dialect) {
		if d.json {
			return // JSON has no unknown fields.
		}
		k := w.dial(d, w.token(schema.Role_ROLE_AGENT, "*"))
		e := tokenOf("x")
		unknown := protowire.AppendString(protowire.AppendTag(nil, 4000, protowire.BytesType), "from the future")
		e.ProtoReflect().SetUnknown(unknown)
		c := k.open("AppendStream", true)
		c.say(&schema.Publish{PublishId: 1, Session: "s", Envelopes: []*schema.Envelope{e}})
		c.next()
		w.must(k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: []*schema.Envelope{e}}, new(schema.AppendResponse)))
		f := k.follow(&schema.Attach{Session: "s"})
		f.next()
		n := 0
		for n < 2 {
			for _, e := range f.next().GetEvents().GetEnvelopes() {
				n++
				if !bytes.Equal(e.ProtoReflect().GetUnknown(), unknown) {
					w.Errorf("envelope %d came with the unknown fields %q", n, e.ProtoReflect().GetUnknown())
				}
			}
		}
		f.cancel()
		c.cancel()
	})
}

func TestTooLarge(t *testing.T) {
	limited(t, gateway.Limits{}, func(w *world, d dialect) {
		counted := func(want float64) {
			w.Helper()
			synctest.Wait()
			if n := w.counter("tidemark_gateway_limits_exceeded_total", "limit", "message_bytes"); n != want {
				w.Errorf("the limit was exceeded %v times, want %v", n, want)
			}
		}
		k := w.dial(d, w.token(schema.Role_ROLE_AGENT, "*"))
		// The largest that is allowed, a little more, and more than the libraries read.
		largest := strings.Repeat("x", schema.MaxEnvelopeBytes-20)
		w.must(k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: []*schema.Envelope{tokenOf(largest)}}, new(schema.AppendResponse)))
		w.wantProblem(k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: []*schema.Envelope{tokenOf(largest + strings.Repeat("x", 100))}}, new(schema.AppendResponse)), schema.Code_CODE_TOO_LARGE)
		w.wantProblem(k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: []*schema.Envelope{tokenOf(largest), tokenOf(strings.Repeat("x", 10<<10))}}, new(schema.AppendResponse)), schema.Code_CODE_TOO_LARGE)
		counted(2)
		huge := slices.Repeat([]*schema.Envelope{tokenOf(largest)}, 5)
		err := k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: huge}, new(schema.AppendResponse))
		if p, ok := errors.AsType[*problem](err); !ok || p.grpc != schema.Code_CODE_TOO_LARGE.Rule().GRPC {
			w.Errorf("5 MiB: %v", err)
		}
		if d.http1 {
			return
		}
		// The libraries refuse such a call before it is ours, but a stream never.
		counted(2)
		// Another stream of the same connection goes on.
		other := k.open("AppendStream", true)
		c := k.open("AppendStream", true)
		c.say(publishOf(1, "s", largest))
		if f := c.next(); f.GetPublished() == nil {
			w.Fatalf("the largest envelope: %v", f)
		}
		c.say(publishOf(2, "s", largest+strings.Repeat("x", 100)))
		if f := c.next(); f.GetRejected().GetCode() != schema.Code_CODE_TOO_LARGE {
			w.Fatalf("too large an envelope: %v", f)
		}
		c.say(publishOf(3, "s", largest, "and", strings.Repeat("x", 10<<10)))
		c.wantStatus(schema.Code_CODE_TOO_LARGE)
		c = k.open("AppendStream", true)
		// It may be refused while it is sent.
		_ = c.send(&schema.Publish{PublishId: 4, Session: "s", Envelopes: huge})
		f, err := c.recv()
		if err == nil && f.GetError() != nil {
			_, err = c.recv()
		}
		if p, ok := errors.AsType[*problem](err); !ok || p.grpc != schema.Code_CODE_TOO_LARGE.Rule().GRPC {
			w.Errorf("5 MiB: %v", err)
		}
		synctest.Wait()
		if n := w.counter("tidemark_grpc_calls_total", "method", "AppendStream", "code", "too_large"); n != 2 {
			w.Errorf("%v streams ended with too_large, want 2", n)
		}
		counted(5)
		// What a stream is to follow, too.
		_, err = k.follow(&schema.Attach{Session: "s", Epoch: strings.Repeat(largest, 5)}).recv()
		if p, ok := errors.AsType[*problem](err); !ok || p.grpc != schema.Code_CODE_TOO_LARGE.Rule().GRPC {
			w.Errorf("5 MiB to follow: %v", err)
		}
		if d.native {
			// The other libraries read it before it is ours.
			counted(6)
		}
		other.say(publishOf(1, "s", "still here"))
		if f := other.next(); f.GetPublished() == nil {
			w.Errorf("the other stream: %v", f)
		}
		other.cancel()
	})
}

// A client that does not read costs only itself, and is let go in the end.
func TestI8_SlowReaderDelaysNobody(t *testing.T) {
	eachDialect(t, func(w *world, d dialect) {
		token := w.token(schema.Role_ROLE_USER, "*")
		slow := w.dial(d, token)
		stuck := slow.follow(&schema.Attach{Session: "s"})
		quick := w.dial(dialects[0], token).follow(&schema.Attach{Session: "s"})
		stuck.next()
		quick.next()
		synctest.Wait()
		slow.freeze()
		began := time.Now()
		text := incompressible(64 << 10)
		seq := uint64(0)
		for range 64 {
			w.publish("s", text)
			seq = quick.wantTexts(seq, text)
		}
		if d := time.Since(began); d != 0 {
			w.Errorf("the quick reader was delayed by %s", d)
		}
		if n := w.counter("tidemark_grpc_calls_total", "method", "Follow"); n != 0 {
			w.Errorf("%v streams ended, want 0 so far", n)
		}
		time.Sleep(gateway.DefaultWriteTimeout + DefaultKeepAlive + keepAliveTimeout)
		synctest.Wait()
		if n := w.counter("tidemark_grpc_calls_total", "method", "Follow"); n != 1 {
			w.Errorf("%v streams ended, want 1: the stuck one", n)
		}
		w.publish("s", "on")
		quick.wantTexts(seq, "on")
		// A frozen client would wait for ever to say that it cancels.
		slow.close()
		stuck.cancel()
		quick.cancel()
	})
}

// incompressible is text that no compression makes smaller.
func incompressible(n int) string {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range b {
		b[i] = byte(' ' + r.IntN(94))
	}
	return string(b)
}

// One stream of a connection that is not read does not hold up the others on it.
func TestI8_SlowStreamBesideOthers(t *testing.T) {
	inWorld(t, func(w *world) {
		k := w.dial(dialects[0], w.token(schema.Role_ROLE_USER, "*"))
		slow := k.follow(&schema.Attach{Session: "s"})
		quick := k.follow(&schema.Attach{Session: "s"})
		quick.next()
		text := incompressible(32 << 10)
		seq := uint64(0)
		for range 100 {
			w.publish("s", text)
			seq = quick.wantTexts(seq, text)
		}
		// Nothing it was owed is lost while it is within the time.
		time.Sleep(gateway.DefaultWriteTimeout / 2)
		slow.next()
		slow.wantTexts(0, slices.Repeat([]string{text}, 100)...)
		// Beyond it, it is told so behind what was already on its way.
		for range 100 {
			w.publish("s", text)
			seq = quick.wantTexts(seq, text)
		}
		time.Sleep(2 * gateway.DefaultWriteTimeout)
		slow.wantStatus(schema.Code_CODE_PEER_DEAD)
		quick.cancel()
	})
}

// A client that falls silent without a word is noticed by the pings.
func TestDeadPeerIsNoticed(t *testing.T) {
	for _, d := range dialects {
		if d.http1 {
			continue // TCP's own keep-alive finds it; HTTP/1 has no ping.
		}
		t.Run(d.name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				k := w.dial(d, w.token(schema.Role_ROLE_USER, "*"))
				c := k.follow(&schema.Attach{Session: "s"})
				c.next()
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				if n := w.counter("tidemark_grpc_connections"); n != 1 {
					t.Fatalf("%v connections after a quiet time, want 1", n)
				}
				k.freeze()
				time.Sleep(2*DefaultKeepAlive + keepAliveTimeout)
				synctest.Wait()
				if n := w.counter("tidemark_grpc_connections"); n != 0 {
					t.Errorf("%v connections, want the dead one closed", n)
				}
				k.close()
				c.cancel()
			})
		})
	}
}

// Who cancels a call leaves nothing behind.
func TestCancellation(t *testing.T) {
	eachDialect(t, func(w *world, d dialect) {
		k := w.dial(d, w.token(schema.Role_ROLE_AGENT, "*"))
		c := k.follow(&schema.Attach{Session: "s"})
		c.next()
		streams := []*conversation{c}
		if !d.http1 {
			c = k.open("Connect", true)
			c.say(clientFrame(&schema.Attach{Channel: 1, Session: "s"}))
			c.next()
			streams = append(streams, c, k.open("AppendStream", true))
		}
		synctest.Wait()
		for _, c := range streams {
			c.cancel()
		}
		synctest.Wait()
		if n := w.counter("tidemark_grpc_calls_total"); n != float64(len(streams)) {
			w.Errorf("%v of %d streams ended", n, len(streams))
		}
		// The connection is as good as before, where the protocol keeps it.
		w.must(k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: []*schema.Envelope{tokenOf("x")}}, new(schema.AppendResponse)))
	})
}

// The log is away for a moment: publishes are refused as retryable, and followers stay.
func TestFollowersOutliveTheLog(t *testing.T) {
	inWorld(t, func(w *world) {
		k := w.dial(dialects[0], w.token(schema.Role_ROLE_AGENT, "*"))
		c := k.follow(&schema.Attach{Session: "s"})
		c.next()
		w.log.away.Store(true)
		time.Sleep(time.Minute)
		w.log.away.Store(false)
		w.publish("s", "x")
		c.wantTexts(0, "x")
		c.cancel()
	})
}
