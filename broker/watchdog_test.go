package broker

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"pgregory.net/rapid"

	"tidemark/schema"
)

// kennel is a log in a bubble with a watchdog beside it that no broker feeds.
type kennel struct {
	*testing.T
	l   *JetStreamLog
	r   *reader
	dog *watchdog
	p   *post
}

// alwaysHeld is a stream that nobody takes over.
type alwaysHeld struct{}

func (alwaysHeld) stale() bool { return false }

func inKennel(t *testing.T, test func(k *kennel)) {
	t.Helper()
	presenceOf(t, func(t *testing.T, l *JetStreamLog, run func()) {
		run()
		r := newReader(l.reads, 1)
		logger := slog.New(slog.NewTextHandler(t.Output(), nil))
		k := &kennel{T: t, l: l, r: r, dog: newWatchdog(r, l.js, &notary{nc: l.reads, r: r, name: "a broker"}, time.Minute, newWatchdogMetrics(nil), logger)}
		k.p = k.dog.post(logStreamName(0), alwaysHeld{})
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { k.dog.run(ctx) })
		wg.Go(func() { k.dog.followLeases(ctx) })
		defer wg.Wait()
		defer stop()
		time.Sleep(leaseGrace)
		test(k)
	})
}

// say stores what a role says in a session.
func (k *kennel) say(id schema.SessionID, role schema.Role, commands ...string) Receipt {
	k.Helper()
	stamp := schema.NewStamp(&schema.Source{Subject: "somebody", Role: role})
	var s Submission
	for _, c := range commands {
		a, err := stamp.AcceptEnvelope(envelopeOf(k, c), time.Now())
		if err != nil {
			k.Fatal(err)
		}
		s.Envelopes = append(s.Envelopes, a)
	}
	r, err := Append(k.Context(), k.l, id, s)
	if err != nil {
		k.Fatal(err)
	}
	return r
}

// state is where the session stands.
func (k *kennel) state(id schema.SessionID) *state {
	k.Helper()
	st, err := k.dog.state(k.Context(), id)
	if err != nil {
		k.Fatal(err)
	}
	return st
}

func (k *kennel) wards() int {
	k.dog.mu.Lock()
	defer k.dog.mu.Unlock()
	return len(k.dog.wards)
}

// TestI10_VerdictIsSaidOnce: many watchdogs reach the same verdict at once, and say it: one is stored. A verdict on a run that has ended since is not, though another of the same name is under way; nor is one of somebody who was asleep while the agent was back.
func TestI10_VerdictIsSaidOnce(t *testing.T) {
	inKennel(t, func(k *kennel) {
		t := k.T // of the bubble
		for round := range 10 {
			id := schema.SessionID{Tenant: "default", Name: fmt.Sprint("s", round)}
			head := k.say(id, schema.Role_ROLE_AGENT, "start r", "token").Last
			old := verdict{id: id, head: head, run: "r", after: time.Minute}
			var wg sync.WaitGroup
			errs := make([]error, 8)
			for i := range errs {
				wg.Go(func() {
					s, _, err := k.dog.word(k.Context(), old)
					if err == nil {
						_, err = k.dog.notary.append(k.Context(), id, s)
					}
					errs[i] = err
				})
			}
			wg.Wait()
			said := 0
			for _, err := range errs {
				switch {
				case err == nil:
					said++
				case schema.CodeOf(err) != schema.Code_CODE_CONFLICT:
					t.Errorf("a verdict that came second was answered %v", err)
				}
			}
			if st := k.state(id); said != 1 || st.head != head+2 || st.status != schema.Status_STATUS_OPEN {
				t.Errorf("the verdict was stored %d times; the session is %s at seq %d", said, st.status, st.head)
			}
			// The next run has the same name, and an agent.
			k.say(id, schema.Role_ROLE_AGENT, "start r", "token")
			s, _, err := k.dog.word(k.Context(), old)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := k.dog.notary.append(k.Context(), id, s); schema.CodeOf(err) != schema.Code_CODE_CONFLICT {
				t.Errorf("a verdict on the run before was answered %v", err)
			}
			// One that says nothing of the head is about a run that is under way all the same.
			k.say(id, schema.Role_ROLE_AGENT, "status completed r")
			s.Expected = nil
			if _, err := k.dog.notary.append(k.Context(), id, s); schema.CodeOf(err) != schema.Code_CODE_INVALID_TRANSITION {
				t.Errorf("a verdict on a run that is over was answered %v", err)
			}
		}
	})
}

// What is said again because its acknowledgement was lost is known by its ids; what is said of a session that nobody ever wrote to, or that was deleted, begins none.
func TestNotaryKnowsItsRetries(t *testing.T) {
	inKennel(t, func(k *kennel) {
		t := k.T // of the bubble
		id := schema.SessionID{Tenant: "default", Name: "s"}
		word := func() *Submission {
			s, err := submissionOf(nil, envelopeOf(k, "system"))
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		if _, err := k.dog.notary.append(t.Context(), id, word()); schema.CodeOf(err) != schema.Code_CODE_SESSION_NOT_FOUND {
			t.Errorf("where there is no session it was answered %v", err)
		}
		k.say(id, schema.Role_ROLE_AGENT, "token")
		s := word()
		for i := range 3 {
			r, err := k.dog.notary.append(t.Context(), id, s)
			if err != nil || r.First != 2 || r.Duplicate != (i > 0) {
				t.Errorf("try %d was answered %+v, %v", i, r, err)
			}
			k.say(id, schema.Role_ROLE_AGENT, "token")
		}
		if err := k.l.Delete(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if _, err := k.dog.notary.append(t.Context(), id, word()); schema.CodeOf(err) != schema.Code_CODE_SESSION_NOT_FOUND {
			t.Errorf("where the session was deleted it was answered %v", err)
		}
	})
}

// A writer without a pause wins every race for its session; what Tidemark has to say is handed to its edge then. In real time, which goes on while there is always something to do.
func TestNotaryGetsThroughBesideAFlood(t *testing.T) {
	s := newShelf(t, 1, 1)
	l, err := Open(Config{Server: s.server(), Edge: "an edge"})
	if err != nil {
		t.Fatal(err)
	}
	running, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := l.Run(running); err != nil {
			t.Error(err)
		}
	})
	b := mustBroker(t, s.server(), s.layout, "a broker")
	wg.Go(func() {
		if err := b.Run(running); err != nil {
			t.Error(err)
		}
	})
	id := schema.SessionID{Tenant: "default", Name: "s"}
	token := func() {
		if _, err := Append(t.Context(), l, id, Submission{Envelopes: accepted(t, 1)}); err != nil {
			t.Error(err)
		}
	}
	token()
	flood, calm := context.WithCancel(t.Context())
	for range 8 {
		wg.Go(func() {
			for flood.Err() == nil {
				token()
			}
		})
	}
	n := &notary{nc: s.nc, r: s.r, name: "a broker"}
	var last uint64
	for i := range 20 {
		word, err := submissionOf(nil, envelopeOf(t, "system"))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), verdictWithin)
		r, err := n.append(ctx, id, word)
		cancel()
		if err != nil || r.First <= last || r.Duplicate {
			t.Errorf("word %d was answered %+v, %v; the one before is at seq %d", i, r, err, last)
		}
		last = r.First
	}
	calm()
	stop()
	wg.Wait()
	if err := l.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestI10_WatchdogIsMistaken: what it takes for a run under way ended long ago, was deleted, or went on without its knowing: it says nothing, and knows better then.
func TestI10_WatchdogIsMistaken(t *testing.T) {
	inKennel(t, func(k *kennel) {
		t := k.T // of the bubble
		id := func(name string) schema.SessionID { return schema.SessionID{Tenant: "default", Name: name} }
		stale := map[string]*state{}
		for _, name := range []string{"ended", "deleted", "went on", "answered", "asks anew"} {
			k.say(id(name), schema.Role_ROLE_AGENT, "start r", "token")
			if name == "answered" || name == "asks anew" {
				k.say(id(name), schema.Role_ROLE_AGENT, "prompt yes no")
			}
			stale[name] = k.state(id(name))
			if stale[name].prompt > 0 {
				stale[name].deadline = time.Now()
			}
		}
		k.say(id("ended"), schema.Role_ROLE_AGENT, "status completed r")
		k.say(id("went on"), schema.Role_ROLE_AGENT, "token")
		k.say(id("answered"), schema.Role_ROLE_USER, `answer "no"`)
		k.say(id("asks anew"), schema.Role_ROLE_AGENT, "ask")
		if err := k.l.Delete(t.Context(), id("deleted")); err != nil {
			t.Fatal(err)
		}
		before := map[string]uint64{}
		for name, st := range stale {
			before[name] = k.state(id(name)).head
			k.p.saw(id(name), st, true, time.Now())
		}
		unchanged := func(when string, names ...string) {
			t.Helper()
			for _, name := range names {
				if st := k.state(id(name)); st.head != before[name] {
					t.Errorf("%s: %s it went from seq %d to %d", name, when, before[name], st.head)
				}
			}
		}
		failed := func(name string) {
			t.Helper()
			if st := k.state(id(name)); st.status != schema.Status_STATUS_OPEN || st.head != before[name]+2 {
				t.Errorf("%s: it is %s at seq %d", name, st.status, st.head)
			}
		}
		time.Sleep(50 * time.Second)
		unchanged("before anything is due", "ended", "deleted", "went on", "answered", "asks anew")
		time.Sleep(40 * time.Second)
		unchanged("of a mistake", "ended", "deleted", "went on", "asks anew")
		// Its deadline was due at once, and the absence counts from when it knew better.
		failed("answered")
		if n := k.wards(); n != 2 {
			t.Errorf("%d sessions are watched; went on and asks anew have a run under way", n)
		}
		time.Sleep(time.Minute)
		failed("went on")
		unchanged("while it waits", "asks anew")
	})
}

// TestI10_WatchdogWasFrozen: it did not run while the agent came back and went again; what it remembers of before is void.
func TestI10_WatchdogWasFrozen(t *testing.T) {
	d := newWatchdog(nil, nil, nil, time.Minute, newWatchdogMetrics(nil), slog.New(slog.DiscardHandler))
	p := d.post("LOG_00", alwaysHeld{})
	id, began := schema.SessionID{Tenant: "default", Name: "s"}, time.Now()
	d.since = began
	l := newLife(schema.SessionKind_SESSION_KIND_CHAT)
	l.do(t, "as agent start r")
	look := func(after time.Duration) (due int, wait time.Duration) {
		v, wait := d.look(began.Add(after))
		return len(v), wait
	}
	look(0)
	p.saw(id, l.st, true, began)
	for s := time.Duration(1); s < 55; s++ {
		if n, wait := look(s * time.Second); n > 0 || wait > lookEvery {
			t.Fatalf("after %d s %d are due, and it looks again in %s", s, n, wait)
		}
	}
	// A minute has passed, and so have ten seconds without a look.
	if n, _ := look(65 * time.Second); n > 0 {
		t.Error("it gave a verdict on what it remembered")
	}
	for s := time.Duration(66); s < 65+60+10; s++ {
		if n, _ := look(s * time.Second); n > 0 {
			t.Fatalf("it gave a verdict %d s after it woke", s-65)
		}
	}
	if n, _ := look((65 + 60 + 10) * time.Second); n != 1 {
		t.Error("it gave no verdict a minute after it woke")
	}
	// What is being said is not said twice.
	if n, _ := look((65 + 60 + 11) * time.Second); n != 0 {
		t.Error("it gave its verdict again while it was saying it")
	}
	p.leave()
	if len(d.wards) != 0 || len(d.queue) != 0 {
		t.Errorf("it left, and watches %d", len(d.wards))
	}
	p.saw(id, l.st, true, began)
	if len(d.wards) != 0 {
		t.Error("it watches though it left")
	}
}

// Whatever comes in whatever order, a session is due exactly when the model says.
func TestI10_WhenARunIsDue(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		d := newWatchdog(nil, nil, nil, time.Minute, newWatchdogMetrics(nil), slog.New(slog.DiscardHandler))
		p := d.post("LOG_00", alwaysHeld{})
		now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		d.since = now
		d.leases.edges["e.1"] = true
		type model struct {
			life     *life
			attended bool
			heard    time.Time // or when it went
			leased   bool
		}
		ids := []schema.SessionID{{Tenant: "default", Name: "a"}, {Tenant: "default", Name: "b"}, {Tenant: "default", Name: "c"}}
		models := map[schema.SessionID]*model{}
		for _, id := range ids {
			models[id] = &model{life: newLife(schema.SessionKind_SESSION_KIND_CHAT)}
		}
		lease := func(id schema.SessionID, is bool) {
			m := &stored{header: nats.Header{kvOperation: {"PURGE"}}}
			if is {
				m = &stored{data: []byte(`{"seats":{"e.1":1}}`)}
			}
			changed, err := d.leases.take(party{session: id, run: true}.key(), m)
			if err != nil || len(changed) != 1 {
				rt.Fatal(changed, err)
			}
			if w := d.wards[id]; w != nil {
				d.lookAtLease(w, now)
			}
		}
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			id := rapid.SampledFrom(ids).Draw(rt, "session")
			m := models[id]
			switch rapid.IntRange(0, 4).Draw(rt, "what") {
			case 0:
				lease(id, !m.leased)
				if m.leased = !m.leased; !m.leased {
					m.heard = now
				}
				m.attended = m.attended || m.leased && m.life.st.under()
			case 1, 2:
				words := rapid.SampledFrom([]string{"as user start r", "as agent token", "as agent ask", "as user answer 1", "as user message", "as agent status completed", "as user start s 2000", "as worker start s"}).Draw(rt, "words")
				before := m.life.st.lifecycle
				if m.life.do(t, words); m.life.st.head == 0 {
					continue // an answer to nothing
				}
				after := &m.life.st.lifecycle
				heard := words[3] != 'u'
				p.saw(id, m.life.st, heard, now)
				if !before.under() || before.run != after.run {
					m.attended, m.heard = false, now
				}
				if heard || before.prompt != 0 && after.prompt == 0 {
					m.heard = now
				}
				m.attended = after.under() && (m.attended || after.about.attended || m.leased)
			default:
				now = now.Add(time.Duration(rapid.IntRange(1, 4000).Draw(rt, "ms")) * time.Millisecond)
			}
			d.looked = now // it was never frozen
			due, _ := d.look(now)
			got := map[schema.SessionID]bool{}
			for _, v := range due {
				got[v.id] = true
				// It comes to nothing, and is found due again at once.
				d.busy--
				v.w.speaking = false
				d.schedule(v.w)
			}
			for _, id := range ids {
				m := models[id]
				l := &m.life.st.lifecycle
				after := time.Minute
				if l.about.orphanAfter > 0 {
					after = l.about.orphanAfter
				}
				want := l.under() && l.prompt == 0 && m.attended && !m.leased && !now.Before(m.heard.Add(after)) && !now.Before(d.since.Add(after))
				if got[id] != want {
					rt.Fatalf("%s, %s: due is %t, want %t (attended %t, leased %t, heard %s ago)", id, m.life, got[id], want, m.attended, m.leased, now.Sub(m.heard))
				}
			}
		}
	})
}

// Keys of runs and names are the same thing, whatever the names are.
func TestRunKeys(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		name := rapid.StringN(1, 20, 200)
		p := party{session: schema.SessionID{Tenant: "default", Name: name.Draw(rt, "session")}, run: true}
		if rapid.Bool().Draw(rt, "named") {
			p.name = name.Draw(rt, "run")
		}
		if _, err := schema.ParseSessionID(p.session.Tenant, p.session.Name); err != nil {
			rt.Skip(err)
		}
		if got, err := parseRunKey(p.key()); err != nil || got != p {
			rt.Fatalf("%+v became %q and %+v, %v", p, p.key(), got, err)
		}
	})
	for _, bad := range []string{"", "run.", "run.a.b", "run.a.b.c.d", "user.a.b.c", "run.a.=.c", "run..b.c", "run.a.b.=4"} {
		if p, err := parseRunKey(bad); err == nil {
			t.Errorf("%q is the run %+v", bad, p)
		}
	}
}

// TestI10_LeasesOfRuns: a run is known to have an agent while any connection on any edge keeps it, and within seconds of the last that went, or of the death of its edge. What is in the bucket ends with it.
func TestI10_LeasesOfRuns(t *testing.T) {
	inKennel(t, func(k *kennel) {
		t := k.T // of the bubble
		id := schema.SessionID{Tenant: "default", Name: "s"}
		has := func(run string) bool {
			synctest.Wait()
			time.Sleep(50 * time.Millisecond)
			k.dog.mu.Lock()
			defer k.dog.mu.Unlock()
			return k.dog.leases.has(id, run)
		}
		wants := func(run string, want bool, when string) {
			t.Helper()
			if got := has(run); got != want {
				t.Errorf("%s, that run %q has an agent is %t", when, run, got)
			}
		}
		wants("r", false, "at first")
		first, second, other := k.l.KeepRun(id, "r"), k.l.KeepRun(id, "r"), k.l.KeepRun(id, "")
		wants("r", true, "kept")
		wants("", true, "kept")
		wants("s", true, "while somebody keeps the session's run, whatever its name is")
		first()
		first()
		other()
		wants("r", true, "kept by one of two")
		wants("s", false, "when only another is kept")
		time.Sleep(seatsTTL + time.Minute)
		wants("r", true, "long after")
		second()
		wants("r", false, "let go")
		if bucket, err := k.l.js.Stream(t.Context(), presenceStream); err != nil {
			t.Error(err)
		} else if time.Sleep(2 * time.Second); bucket.CachedInfo().State.Msgs > 5 {
			t.Errorf("the bucket has %d messages", bucket.CachedInfo().State.Msgs)
		}
		// The bucket is lost, and comes back.
		release := k.l.KeepRun(id, "r")
		wants("r", true, "kept again")
		if err := k.l.js.DeleteStream(t.Context(), presenceStream); err != nil {
			t.Fatal(err)
		}
		time.Sleep(15 * time.Second)
		wants("r", false, "without a bucket")
		if k.dog.mu.Lock(); !k.dog.since.IsZero() {
			t.Error("without a bucket the watchdog takes what it knows for all there is")
		}
		k.dog.mu.Unlock()
		if err := provisionPresence(t.Context(), k.l.js, 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		wants("r", true, "once the bucket is back")
		if k.dog.mu.Lock(); !k.dog.since.After(time.Now()) {
			t.Error("no time is given to edges whose leases were lost")
		}
		k.dog.mu.Unlock()
		release()
		wants("r", false, "let go at the end")
	})
}
