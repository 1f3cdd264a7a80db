package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/coder/websocket"
	"github.com/oklog/ulid/v2"

	"tidemark/internal/client"
	"tidemark/schema"
)

// again is how long people of this file wait before they try again what failed.
const again = 20 * time.Millisecond

func newID() string { return ulid.Make().String() }

// spoken is an envelope of a writer.
func spoken(id, writer, text string) *schema.Envelope {
	return &schema.Envelope{Id: id, Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: writer, Text: text}}}
}

// write lets a writer write until it is enough, and then until all of it is acknowledged.
func (k *killing) write(b *book, name string, how func(b *book, name string) error) {
	b.writers[name] = new(progress)
	k.writing.Go(func() {
		if err := how(b, name); err != nil {
			k.fail(fmt.Errorf("%s in %q: %w", name, b.session, err))
		}
	})
}

// read lets a reader read to the end.
func (k *killing) read(b *book, name string, how func(b *book, name string) error) {
	k.seeing.Go(func() {
		if err := how(b, name); err != nil {
			k.fail(fmt.Errorf("the reader of %q over %s: %w", b.session, name, err))
		}
	})
}

// writable is the context of those who may still begin something.
func (k *killing) writable() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(k.ctx)
	stop := make(chan struct{})
	var waiting sync.WaitGroup
	waiting.Go(func() {
		select {
		case <-k.enough:
			cancel()
		case <-stop:
		}
	})
	return ctx, func() {
		close(stop)
		waiting.Wait()
		cancel()
	}
}

// producer publishes with a producer's sequence, which the client keeps (I3): some hundred publishes of one to three envelopes under way.
func (k *killing) producer(edges ...string) func(*book, string) error {
	return func(b *book, name string) error {
		c := k.client(schema.Role_ROLE_AGENT, edges...)
		ctx, stop := k.writable()
		defer stop()
		var mu sync.Mutex
		var under [][]string // ids of the publishes under way
		p := c.Publisher(k.ctx, client.PublishOptions{
			Session: b.session, Producer: name, Window: 64 << 10,
			Acked: func(a client.Ack) {
				mu.Lock()
				ids := under[0]
				under = under[1:]
				mu.Unlock()
				for i, id := range ids {
					b.acked(id, a.First+uint64(i), a.Epoch, a.Durability)
				}
				k.acks.Add(1)
				if a.Duplicate {
					k.retries.Add(1)
				}
				b.done(name, len(ids))
			},
			Lost: func(error) { k.lost.Add(1) },
		})
		// Two thousand a second and no more: the machine is everybody's, and the tests read all of it nine times.
		pace := time.NewTicker(500 * time.Microsecond)
		defer pace.Stop()
		for n := 1; ; n = n%3 + 1 {
			first, ok := b.take(ctx, name, n)
			if !ok {
				break
			}
			var envelopes []*schema.Envelope
			var ids []string
			for i := range n {
				ids = append(ids, newID())
				envelopes = append(envelopes, spoken(ids[i], name, strconv.Itoa(first+i)))
			}
			mu.Lock()
			under = append(under, ids)
			mu.Unlock()
			// Taken is taken: it is published, also when that is enough now.
			if err := p.Publish(k.ctx, envelopes...); err != nil {
				return err
			}
			select {
			case <-pace.C:
			case <-ctx.Done():
			}
			if ctx.Err() != nil {
				break
			}
		}
		return p.Close(k.ctx)
	}
}

// appender appends by gRPC, one call after the other, and sends a call again until it is answered: the ids of its envelopes are all that keeps them from being stored twice.
func (k *killing) appender(b *book, name string) error {
	c := k.client(schema.Role_ROLE_AGENT, "grpc://"+k.overGRPC.addr)
	ctx, stop := k.writable()
	defer stop()
	for n := 1; ; n = n%5 + 1 {
		first, ok := b.take(ctx, name, n)
		if !ok {
			return nil
		}
		req := &schema.AppendRequest{Session: b.session}
		for i := range n {
			req.Envelopes = append(req.Envelopes, spoken(newID(), name, strconv.Itoa(first+i)))
		}
		for {
			res, err := c.Append(k.ctx, req)
			if err == nil {
				for i, e := range req.GetEnvelopes() {
					b.acked(e.GetId(), res.GetFirstSeq()+uint64(i), res.GetEpoch(), res.GetDurability())
				}
				break
			}
			if k.ctx.Err() != nil {
				return context.Cause(k.ctx)
			}
			if r := schema.AsRefusal(err); r.Code != schema.Code_CODE_INTERNAL && !r.Code.Rule().Retryable {
				return err
			}
			k.retries.Add(1)
			if !wait(k.ctx, again) {
				return context.Cause(k.ctx)
			}
		}
		k.acks.Add(1)
		b.done(name, n)
	}
}

// said is what the session socket sends.
type said struct {
	Type string
	Seq  uint64
	ID   string
	Data struct {
		MessageID  string `json:"message_id"`
		Text       string
		Epoch      string
		AfterSeq   uint64 `json:"after_seq"`
		WantedSeq  uint64 `json:"wanted_seq"`
		ID         string
		Seq        uint64
		Durability string
		Code       string
		Details    string
		Retryable  bool
	}
}

// socket opens the session socket.
func (k *killing) socket(role schema.Role, session string, query url.Values) (*websocket.Conn, error) {
	query.Set("sessionName", session)
	query.Set("token", k.token(role))
	ctx, cancel := context.WithTimeout(k.ctx, 10*time.Second)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, "ws://"+k.overWS.addr+"/ws?"+query.Encode(), nil)
	if err == nil {
		ws.SetReadLimit(4 << 20)
	}
	return ws, err
}

func (k *killing) hear(ws *websocket.Conn) (said, error) {
	var s said
	_, text, err := ws.Read(k.ctx)
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	return s, err
}

// maxUnderWay is how much of a speaker is under way at a time.
const maxUnderWay = 8

// word is what a speaker has under way.
type word struct{ id, text string }

// speaker publishes over the session socket. When that breaks it says again, in the same order and with the same ids, what was not acknowledged.
func (k *killing) speaker(b *book, name string) error {
	var under []word
	for {
		ws, err := k.socket(schema.Role_ROLE_AGENT, b.session, url.Values{"lastSeq": {"latest"}})
		if err == nil {
			var over bool
			if under, over, err = k.speak(ws, b, name, under); over {
				return err
			}
		}
		if !wait(k.ctx, again) {
			return context.Cause(k.ctx)
		}
	}
}

// speak speaks as long as the socket holds, or until it is enough, or wrong: then it is over. It returns what is under way.
func (k *killing) speak(ws *websocket.Conn, b *book, name string, under []word) (_ []word, over bool, _ error) {
	k.retries.Add(uint64(len(under)))
	heard := make(chan said)
	left, leave := context.WithCancel(k.ctx)
	var hearing sync.WaitGroup
	hearing.Go(func() {
		defer close(heard)
		for {
			s, err := k.hear(ws)
			if err != nil {
				return
			}
			select {
			case heard <- s:
			case <-left.Done():
			}
		}
	})
	defer hearing.Wait()
	defer ws.CloseNow() //nolint:errcheck // it may be gone
	defer leave()
	enough := k.enough
	for sent := 0; ; {
		var moved <-chan struct{}
		for sent < len(under) || enough != nil && len(under) < maxUnderWay {
			if sent == len(under) {
				var n int
				var ok bool
				if n, ok, moved = b.tryTake(name, 1); !ok {
					break
				}
				under = append(under, word{newID(), strconv.Itoa(n)})
			}
			w := under[sent]
			message, err := json.Marshal(map[string]any{"type": "token", "id": w.id, "data": map[string]string{"message_id": name, "text": w.text}})
			if err != nil {
				return under, true, err
			}
			if ws.Write(k.ctx, websocket.MessageText, message) != nil {
				return under, false, nil
			}
			sent++
		}
		if len(under) == 0 && enough == nil {
			return nil, true, nil
		}
		select {
		case <-moved:
		case <-enough:
			enough = nil
		case s, ok := <-heard:
			switch {
			case !ok, s.Type == "error" && s.Data.Retryable:
				return under, false, nil // from the first on, on a new connection
			case s.Type == "error":
				return under, true, fmt.Errorf("%s: %s", s.Data.Code, s.Data.Details)
			case s.Type == "published":
				// On one connection they come in order.
				if len(under) == 0 || s.Data.ID != under[0].id {
					return under, true, fmt.Errorf("it is told that %s was stored, and %v is under way", s.Data.ID, under)
				}
				b.acked(s.Data.ID, s.Data.Seq, s.Data.Epoch, schema.ParseDurability(s.Data.Durability))
				under = under[1:]
				sent--
				k.acks.Add(1)
				b.done(name, 1)
			}
		}
	}
}

// follower reads with the client, which comes back by itself.
func (k *killing) follower(edges ...string) func(*book, string) error {
	return func(b *book, name string) error {
		f := k.client(schema.Role_ROLE_USER, edges...).Follow(client.FollowOptions{Session: b.session})
		defer f.Close()
		for last := uint64(0); ; {
			e, err := f.Next(k.ctx)
			switch {
			case err != nil:
				return err
			case e.Truncated != nil:
				return fmt.Errorf("it is told that envelopes from seq %d on are gone", e.Truncated.GetWantedSeq())
			case e.Lost != nil:
				k.lost.Add(1)
			case e.Envelope != nil:
				if e.Envelope.GetSeq() != last+1 {
					return fmt.Errorf("it got seq %d after %d", e.Envelope.GetSeq(), last)
				}
				last++
				m := e.Envelope.GetToken()
				k.seen.Add(1)
				b.saw(name, last, f.Place().Epoch, entry{e.Envelope.GetId(), m.GetMessageId(), m.GetText()})
				if m.GetMessageId() == lastWriter {
					return nil
				}
			}
		}
	}
}

// listener reads the session socket, and comes back with nothing but the last seq and the epoch.
func (k *killing) listener(b *book, name string) error {
	var last uint64
	var epoch string
	for {
		query := url.Values{}
		if last > 0 {
			query = url.Values{"lastSeq": {fmt.Sprint(last)}, "epoch": {epoch}}
		}
		ws, err := k.socket(schema.Role_ROLE_USER, b.session, query)
		for err == nil {
			var s said
			s, err = k.hear(ws)
			switch {
			case err != nil:
			case s.Type == "attached":
				if s.Data.AfterSeq != last {
					return fmt.Errorf("it is attached after %d, and had %d", s.Data.AfterSeq, last)
				}
				if s.Data.Epoch != "" {
					epoch = s.Data.Epoch
				}
			case s.Type == "error" && s.Data.Code == schema.Code_CODE_TOO_MANY_CONNECTIONS.Word():
				// Edges that were killed keep their places for some seconds.
			case s.Type == "error" && !s.Data.Retryable, s.Type == "truncated":
				return fmt.Errorf("it is told of %s %s: %s", s.Type, s.Data.Code, s.Data.Details)
			case s.Seq > 0:
				if s.Seq != last+1 {
					return fmt.Errorf("it got seq %d after %d", s.Seq, last)
				}
				last++
				k.seen.Add(1)
				b.saw(name, last, epoch, entry{s.ID, s.Data.MessageID, s.Data.Text})
				if s.Data.MessageID == lastWriter {
					return ws.CloseNow()
				}
			}
		}
		if ws != nil {
			_ = ws.CloseNow()
		}
		if !wait(k.ctx, again) {
			return context.Cause(k.ctx)
		}
	}
}
