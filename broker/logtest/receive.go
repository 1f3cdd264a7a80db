package logtest

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing/synctest"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

func testFollowByKinds(w *world) {
	var want []uint64
	var head uint64
	for range 4 {
		w.publish(Token("m", "a"), UserMessage("one"), Token("m", "b"), Token("m", "c"), UserMessage("two"), UserMessage("three"))
		want = append(want, head+2, head+5, head+6)
		head += 6
		w.publish(Tokens("m", 4)...)
		head += 4
	}
	for _, limit := range []int{64 << 10, 150} {
		for _, after := range []uint64{0, 1, 2, 5, 17} {
			r := w.follow(broker.FollowOptions{Start: broker.Start{After: after}, Kinds: []schema.Kind{schema.KindUserMessage, schema.KindCancel}})
			r.limit = limit
			r.until(head)
			rest := want
			for len(rest) > 0 && rest[0] <= after {
				rest = rest[1:]
			}
			if len(r.got) != len(rest) {
				w.Fatalf("behind %d got %d envelopes, want those at %v", after, len(r.got), rest)
			}
			for i, g := range r.got {
				if g.seq != rest[i] || g.env.GetUserMessage() == nil {
					w.Fatalf("behind %d got %v at %d, want the user's message at %d", after, g.env, g.seq, rest[i])
				}
			}
			if r.caughtUp != 1 {
				w.Errorf("told %d times that it caught up", r.caughtUp)
			}
			r.f.Close()
		}
	}
	// Live, the cursor moves over what is filtered out, so that a resume does not begin before it.
	r := w.follow(broker.FollowOptions{Start: broker.Start{Head: true}, Kinds: []schema.Kind{schema.KindUserMessage}})
	w.publish(Tokens("m", 3)...)
	r.until(head + 3)
	w.publish(UserMessage("four"))
	if r.until(head + 4); len(r.got) != 1 {
		w.Errorf("got %d envelopes live, want 1", len(r.got))
	}
}

// testFollowByKindsNone filters everything out, in many more bytes than one take has: the cursor must come to the head all the same, and without waiting for anything to happen.
func testFollowByKindsNone(w *world) {
	w.fill(300, 100)
	r := w.follow(broker.FollowOptions{Kinds: []schema.Kind{schema.KindCancel}})
	r.limit = 1000
	began := time.Now()
	r.until(300)
	if took := time.Since(began); took > time.Second {
		w.Errorf("reading over 300 envelopes that are filtered out waited for %s", took)
	}
	if len(r.got) > 0 || r.caughtUp != 1 {
		w.Errorf("got %d envelopes, told %d times that it caught up", len(r.got), r.caughtUp)
	}
	// Take alone, as a gateway uses it: an empty batch is the head.
	g := w.follow(broker.FollowOptions{Kinds: []schema.Kind{schema.KindCancel}, Wake: func() {}})
	g.limit = 1000
	for !g.drained() {
	}
	if g.through != 300 {
		w.Errorf("a batch was empty at seq %d, and the head is 300", g.through)
	}
}

// drained takes, and fetches where it must; true when it got an empty batch.
func (r *reader) drained() bool {
	r.w.Helper()
	b, err := r.f.Take(r.limit)
	if errors.Is(err, broker.ErrBehind) {
		ctx, cancel := context.WithTimeout(r.w.Context(), patience)
		defer cancel()
		if b, err = r.f.Fetch(ctx, r.limit); err == nil && b.Empty() {
			r.take(b)
			return false
		}
	}
	if err != nil {
		r.w.Fatalf("take at %d: %v", r.through, err)
	}
	r.take(b)
	return b.Empty()
}

func testFollowMerged(w *world) {
	reasoning := func(text string) schema.Accepted {
		return Accept(&schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m", Channel: schema.Channel_CHANNEL_REASONING, Text: text}}})
	}
	all := join(Tokens("m", 30), []schema.Accepted{UserMessage("between")}, Tokens("m", 5), []schema.Accepted{reasoning("hm "), reasoning("well ")}, Tokens("m", 3), Tokens("n", 40), Tokens("m", 1))
	n := uint64(len(all))
	w.publish(all[:10]...)
	w.publish(all[10:50]...)
	for _, a := range all[50:] {
		w.publish(a)
	}
	plain := w.follow(broker.FollowOptions{}).until(n)
	merged := w.follow(broker.FollowOptions{MergeTokens: true}).until(n)
	for _, m := range []string{"m", "n"} {
		if got, want := merged.text(m), plain.text(m); got != want {
			w.Errorf("message %s says %q merged, and %q as it is stored", m, got, want)
		}
	}
	if len(merged.got) > 12 {
		w.Errorf("%d envelopes came as %d", n, len(merged.got))
	}
	next := uint64(1)
	for _, g := range merged.got {
		first := g.seq
		if g.env.FirstSeq != nil {
			first = g.env.GetFirstSeq()
		}
		if first != next || first > g.seq {
			w.Fatalf("an envelope stands for seq %d to %d, behind %d", first, g.seq, next-1)
		}
		if first == g.seq && !bytes.Equal(g.raw, plain.got[g.seq-1].raw) {
			w.Errorf("the envelope at %d, which stands for itself alone, is not as it is stored", g.seq)
		}
		if last := plain.got[g.seq-1].env; g.env.GetId() != last.GetId() || g.env.GetToken().GetChannel() != last.GetToken().GetChannel() {
			w.Errorf("the envelope for %d to %d is not the last one's: %v", first, g.seq, g.env)
		}
		next = g.seq + 1
	}
	if next != n+1 {
		w.Errorf("the merged envelopes end at %d, want %d", next-1, n)
	}
	// Live, nothing is merged: every envelope comes as it is stored.
	live := Tokens("m", 6)
	w.publish(live...)
	merged.got = nil
	merged.until(n+6).holds(n+1, live)
}

// testFollowMany has several followers read while several write, each from another place and in pieces of another size.
func testFollowMany(w *world) {
	before := w.fill(40, 3)
	var wg sync.WaitGroup
	const more = 200
	total := uint64(len(before) + more)
	var readers []*reader
	for i := range 6 {
		r := w.follow(broker.FollowOptions{Start: broker.Start{After: uint64(i * 8)}})
		r.limit = 200 << (2 * i)
		readers = append(readers, r)
		wg.Go(func() {
			for r.through < total {
				ctx, cancel := context.WithTimeout(w.Context(), patience)
				b, err := r.f.Next(ctx, r.limit)
				cancel()
				if err != nil {
					w.Errorf("follower %d at %d: %v", i, r.through, err)
					return
				}
				for _, v := range b.Views {
					if v.From != r.through+1 {
						w.Errorf("follower %d got seq %d behind %d", i, v.From, r.through)
						return
					}
					for seq, raw := range v.Each() {
						r.got = append(r.got, got{seq: seq, raw: bytes.Clone(raw)})
					}
					r.through = v.To
				}
			}
		})
	}
	for i := range 4 {
		wg.Go(func() {
			for j := range more / 4 / 5 {
				if (i+j)%3 == 0 {
					time.Sleep(time.Millisecond)
				}
				if _, err := w.try(broker.Submission{Envelopes: Tokens("m", 5)}); err != nil {
					w.Errorf("publish: %v", err)
				}
			}
		})
	}
	wg.Wait()
	if w.Failed() {
		return
	}
	all := w.follow(broker.FollowOptions{}).until(total).got
	for i, r := range readers {
		for j, g := range r.got {
			if want := all[i*8+j]; g.seq != want.seq || !bytes.Equal(g.raw, want.raw) {
				w.Fatalf("follower %d got seq %d, not as it is stored at %d", i, g.seq, want.seq)
			}
		}
	}
}

// testFollowWakes uses Take and Wake as a gateway does: whenever there is something to take after Take had nothing, Wake was called since.
func testFollowWakes(w *world) {
	woken := make(chan struct{}, 1)
	r := w.follow(broker.FollowOptions{Wake: func() {
		select {
		case woken <- struct{}{}:
		default:
		}
	}})
	for !r.drained() {
	}
	wait := func(what string) {
		w.Helper()
		select {
		case <-woken:
		case <-time.After(patience):
			w.Fatalf("%s did not wake the follower", what)
		}
	}
	var n uint64
	for i := range 30 {
		part := Tokens("m", 1+i%3)
		n += uint64(len(part))
		w.publish(part...)
		for r.through < n {
			if r.drained() && r.through < n {
				wait("a publish")
			}
		}
	}
	synctest.Wait()
	select {
	case <-woken:
	default:
	}
	w.delete()
	wait("a deletion")
	for {
		_, err := r.f.Take(r.limit)
		if schema.CodeOf(err) == schema.Code_CODE_SESSION_DELETED {
			break
		}
		if err != nil && !errors.Is(err, broker.ErrBehind) {
			w.Fatal(err)
		}
		wait("a deletion")
	}
	// Closed, it is not woken any more; closing twice is fine.
	r.f.Close()
	r.f.Close()
	synctest.Wait()
	select {
	case <-woken:
	default:
	}
	w.publish(Token("m", "x"))
	time.Sleep(time.Second)
	select {
	case <-woken:
		w.Error("a closed follower was woken")
	default:
	}
}

func testFollowNextEndsWithContext(w *world) {
	w.publish(Token("m", "x"))
	r := w.follow(broker.FollowOptions{}).until(1)
	ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	if b, err := r.f.Next(ctx, r.limit); !errors.Is(err, context.DeadlineExceeded) {
		w.Fatalf("at the head: %+v, %v", b, err)
	}
	if took := time.Since(began); took != time.Minute {
		w.Errorf("Next returned after %s, its context ended after a minute", took)
	}
	// Nothing was lost by it.
	all := Tokens("m", 2)
	w.publish(all...)
	r.got = nil
	r.until(3).holds(2, all)
}

func testFollowCaughtUpOnce(w *world) {
	w.fill(50, 10)
	r := w.follow(broker.FollowOptions{Start: broker.Start{After: 20}})
	r.limit = 200
	at := r.f.Attachment().Head
	for r.through < at {
		if r.caughtUp > 0 {
			w.Fatalf("caught up at %d, and the head was %d", r.through, at)
		}
		if _, err := r.next(); err != nil {
			w.Fatal(err)
		}
	}
	if r.caughtUp != 1 {
		w.Errorf("told %d times that it caught up at the head", r.caughtUp)
	}
	w.fill(20, 5)
	r.until(70)
	if r.caughtUp != 1 {
		w.Errorf("told %d times that it caught up, later", r.caughtUp)
	}
	// At the head there is nothing to catch up with, and that is said too.
	h := w.follow(broker.FollowOptions{Start: broker.Start{Head: true}})
	if b, err := h.next(); err != nil || !b.CaughtUp || len(b.Views) > 0 {
		w.Errorf("the first batch at the head is %+v, %v", b, err)
	}
}

func testFollowLimit(w *world) {
	all := w.fill(200, 25)
	size := len(stored(all[0], 1)) + 16
	for _, limit := range []int{1, size, 10 * size} {
		r := w.follow(broker.FollowOptions{})
		r.limit = limit
		for r.through < 200 {
			b, err := r.next()
			if err != nil {
				w.Fatal(err)
			}
			took := 0
			for _, v := range b.Views {
				took += len(v.Records())
			}
			// About: the envelope that goes over it may still be there.
			if took > limit+size {
				w.Fatalf("a batch of %d bytes with a limit of %d, envelopes of %d", took, limit, size)
			}
		}
		r.holds(1, all)
		r.f.Close()
	}
}

// testFollowEncoded asks for the shared forms, from several followers at once.
func testFollowEncoded(w *world) {
	all := w.fill(90, 30)
	var wg sync.WaitGroup
	for i := range 4 {
		r := w.follow(broker.FollowOptions{Start: broker.Start{After: uint64(i * 7)}})
		wg.Go(func() {
			for r.through < 90 {
				ctx, cancel := context.WithTimeout(w.Context(), patience)
				b, err := r.f.Next(ctx, 700)
				cancel()
				if err != nil {
					w.Errorf("follower %d: %v", i, err)
					return
				}
				for _, v := range b.Views {
					for _, form := range []broker.Form{broker.FormJSON, broker.FormProtoJSON} {
						texts := v.Encoded(form, func(raw []byte) []byte { return append([]byte{byte(form)}, raw...) })
						if len(texts) != v.Len() {
							w.Errorf("%d envelopes in %d texts", v.Len(), len(texts))
							return
						}
						for j, text := range texts {
							seq := v.From + uint64(j)
							if text[0] != byte(form) || !bytes.Equal(text[1:], stored(all[seq-1], seq)) {
								w.Errorf("the text at %d is not of the envelope there", seq)
								return
							}
						}
					}
				}
				r.through = b.Through
			}
		})
	}
	wg.Wait()
}
