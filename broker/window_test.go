package broker

import (
	"testing"

	"tidemark/schema"
)

// accepted are n tokens as publishes bring them.
func accepted(t testing.TB, n int) []schema.Accepted {
	t.Helper()
	stamp := schema.NewStamp(&schema.Source{Subject: "a"})
	out := make([]schema.Accepted, n)
	for i := range out {
		e := &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m", Text: "x"}}}
		a, err := stamp.AcceptEnvelope(e, storedAt)
		if err != nil {
			t.Fatal(err)
		}
		out[i] = a
	}
	return out
}

// storedState is the state of a session that holds the envelopes.
func storedState(t testing.TB, envelopes []schema.Accepted) *state {
	t.Helper()
	st := newState()
	d := newDraft(schema.SessionID{Tenant: "t", Name: "a"}, st)
	if _, err := d.add(&Submission{Envelopes: envelopes}, 0); err != nil {
		t.Fatal(err)
	}
	f := &frame{StreamSeq: 1}
	f.Epoch, f.First, f.Count, f.Time = "E", 1, len(envelopes), storedAt
	d.commit(f)
	return st
}

// A lost race, or a refusal, leaves the ids of the session's last 1,024 envelopes as they were: what is retried after it is still recognised.
func TestI3_DraftThatIsGivenUpCostsNothingOfTheWindow(t *testing.T) {
	old := accepted(t, recentIDs)
	for name, giveUp := range map[string]func(d *draft){
		"lost race": func(d *draft) {
			for range 4 {
				if _, err := d.add(&Submission{Envelopes: accepted(t, 900)}, 0); err != nil {
					t.Fatal(err)
				}
			}
			d.rollback()
		},
		"refusal": func(d *draft) {
			twice := accepted(t, 900)
			twice[899] = twice[0]
			if _, err := d.add(&Submission{Envelopes: twice}, 0); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
				t.Fatalf("an id that stands twice: %v", err)
			}
			d.rollback()
		},
	} {
		st := storedState(t, old)
		giveUp(newDraft(schema.SessionID{Tenant: "t", Name: "a"}, st))
		forgotten := 0
		for i := range old {
			r, err := newDraft(schema.SessionID{Tenant: "t", Name: "a"}, st).add(&Submission{Envelopes: old[i : i+1]}, 0)
			if err != nil || r == nil || !r.Duplicate || r.First != uint64(i)+1 {
				forgotten++
			}
		}
		if forgotten > 0 {
			t.Errorf("after a %s, %d of the last %d envelopes' ids were forgotten", name, forgotten, len(old))
		}
		if !st.recent.covers(st, Cursor{Epoch: st.epoch}) {
			t.Errorf("after a %s, the window does not cover the session's beginning", name)
		}
	}
}

// A retry that holds what is stored and what is only on its way is answered once all of it is stored.
func TestI1_RetryIsNotAnsweredBeforeAllOfItIsStored(t *testing.T) {
	e := accepted(t, 2)
	st := storedState(t, e[:1])
	d := newDraft(schema.SessionID{Tenant: "t", Name: "a"}, st)
	if _, err := d.add(&Submission{Envelopes: e[1:]}, 0); err != nil {
		t.Fatal(err)
	}
	if r, err := d.add(&Submission{Envelopes: e}, 0); r != nil || err != nil {
		t.Errorf("answered %+v, %v while seq 2 is not stored", r, err)
	}
	if len(d.taken) != 2 || d.taken[1].r != (Receipt{Epoch: "E", First: 1, Last: 2, Duplicate: true}) {
		t.Errorf("the frame answers %+v", d.taken)
	}
}

// Where retention took a session's beginning, its state begins behind it. The window then holds what it says it holds, and no more than its bound.
func TestI8_WindowBehindRetentionIsBounded(t *testing.T) {
	st := newState()
	for first := uint64(301); first < 301+3000; first += 100 {
		f, _ := testFrame(t, "E", first, 100)
		f.StreamSeq = first
		if err := st.foldRest(f); err != nil {
			t.Fatal(err)
		}
		if held := len(st.recent.ids); held > recentIDs || st.head-st.recent.from+1 != uint64(min(held, recentIDs)) {
			t.Fatalf("at head %d the window says that it begins at %d and holds %d ids", st.head, st.recent.from, held)
		}
	}
	if st.recent.covers(st, Cursor{Epoch: "E", Seq: 100}) {
		t.Error("the window claims to know what retention took")
	}
}
