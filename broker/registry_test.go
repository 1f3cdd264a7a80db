package broker

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// put writes a record into the registry, as the projector does.
func (s *shelf) put(tenant, name string, status schema.Status) {
	s.Helper()
	id := schema.SessionID{Tenant: tenant, Name: name}
	data, err := proto.Marshal(&schema.SessionRecord{Tenant: tenant, Session: name, Epoch: "E", Status: status, HeadSeq: 1, Through: 1})
	if err != nil {
		s.Fatal(err)
	}
	if _, err := s.js.Publish(s.Context(), registrySubject(laneOf(id)), data); err != nil {
		s.Fatal(err)
	}
}

// list goes through all pages and returns the names in their order, and how many pages there were.
func (s *shelf) list(tenant string, q Query) (names []string, pages int) {
	s.Helper()
	for {
		page, err := s.r.listSessions(s.Context(), tenant, q)
		if err != nil {
			s.Fatal(err)
		}
		if len(page.Sessions) > q.Limit {
			s.Fatalf("%d sessions on a page of %d", len(page.Sessions), q.Limit)
		}
		pages++
		for _, one := range page.Sessions {
			names = append(names, one.GetSession())
		}
		if page.Next == "" {
			return names, pages
		}
		q.Token = page.Next
	}
}

func TestListingIsInTheOrderOfTransitions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 61)
		for i := range 700 {
			s.put("default", fmt.Sprintf("s%03d", i), schema.Status_STATUS_OPEN)
			s.put("other", fmt.Sprintf("s%03d", i), schema.Status_STATUS_RUNNING)
		}
		s.put("default", "s005", schema.Status_STATUS_RUNNING)
		names, pages := s.list("default", Query{Limit: 50})
		// A full page never says that it is the last: what comes behind it may be another tenant's.
		if len(names) != 700 || pages != 15 || names[0] != "s000" || names[5] != "s006" || names[699] != "s005" {
			t.Errorf("%d names on %d pages, %q, %q … %q", len(names), pages, names[0], names[5], names[699])
		}
		if names, _ := s.list("default", Query{Limit: 1000, Status: schema.Status_STATUS_RUNNING}); strings.Join(names, " ") != "s005" {
			t.Errorf("running are %q", names)
		}
		if names, _ := s.list("default", Query{Limit: 3, Prefix: "s69"}); len(names) != 10 {
			t.Errorf("beginning with s69 are %q", names)
		}
	})
}

// One call looks at a bounded number of records, and what is behind that comes with the next, however few of the records are the tenant's.
func TestI8_ListingIsBounded(t *testing.T) {
	s := newShelf(t, 1, 67)
	s.put("default", "first", schema.Status_STATUS_OPEN)
	for i := range maxScanned + 2*scanBatch {
		data, err := proto.Marshal(&schema.SessionRecord{Tenant: "other", Session: fmt.Sprint(i), Epoch: "E", Through: 1})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.js.PublishAsync(registrySubject(laneOf(schema.SessionID{Tenant: "other", Name: fmt.Sprint(i)})), data, jetstream.WithStallWait(time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	<-s.js.PublishAsyncComplete()
	s.put("default", "last", schema.Status_STATUS_OPEN)
	page, err := s.r.listSessions(t.Context(), "default", Query{Limit: 10})
	if err != nil || len(page.Sessions) != 1 || page.Next == "" {
		t.Fatalf("the first page is %+v, %v; want one session, and more to come", page, err)
	}
	names, pages := s.list("default", Query{Limit: 10})
	if strings.Join(names, " ") != "first last" || pages != 2 {
		t.Errorf("%q on %d pages", names, pages)
	}
	// A full scan of it, to see what a page costs.
	began := time.Now()
	if names, _ := s.list("nobody", Query{Limit: 10}); len(names) != 0 {
		t.Errorf("a tenant without sessions has %q", names)
	}
	t.Logf("%d records in %v", maxScanned+2*scanBatch+2, time.Since(began))
}

// A token tells nothing, and is good for its tenant alone.
func TestI9_ListingTokensAreSealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 71)
		for i := range 4 {
			s.put("default", fmt.Sprint(i), schema.Status_STATUS_OPEN)
			s.put("other", fmt.Sprint(i), schema.Status_STATUS_OPEN)
		}
		page, err := s.r.listSessions(t.Context(), "default", Query{Limit: 1})
		if err != nil || page.Next == "" {
			t.Fatalf("%+v, %v", page, err)
		}
		again, err := s.r.listSessions(t.Context(), "default", Query{Limit: 1})
		if err != nil || again.Next == page.Next {
			t.Errorf("the same place has the same token, so that tokens can be compared: %v", err)
		}
		// Another edge, which reads the same secret.
		other := newReader(s.nc, 1)
		if page, err := other.listSessions(t.Context(), "default", Query{Limit: 1, Token: page.Next}); err != nil || page.Sessions[0].GetSession() != "1" {
			t.Errorf("another edge answers with %+v, %v", page, err)
		}
		for what, token := range map[string]string{"another tenant's": page.Next, "a cut": page.Next[:len(page.Next)-2], "no": "AAAA"} {
			tenant := "default"
			if what == "another tenant's" {
				tenant = "other"
			}
			if _, err := s.r.listSessions(t.Context(), tenant, Query{Limit: 1, Token: token}); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
				t.Errorf("%s token is answered with %v", what, err)
			}
		}
		for _, limit := range []int{0, -1, maxListed + 1} {
			if _, err := s.r.listSessions(t.Context(), "default", Query{Limit: limit}); schema.CodeOf(err) != schema.Code_CODE_INVALID_MESSAGE {
				t.Errorf("a limit of %d is answered with %v", limit, err)
			}
		}
	})
}

// The registry says of a session what its envelopes say, within moments of a transition and within seconds of the last envelope, and is not written for each token.
func TestRegistryIsWrittenOnTransitions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 1, 73)
		r := s.run(nil, "one")
		time.Sleep(time.Second)
		w := s.scribe("default", "a")
		token := &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m", Text: "x"}}}
		stands := func(want schema.Status, head uint64) {
			t.Helper()
			record, _, err := s.r.record(t.Context(), w.ln)
			if err != nil || record.GetStatus() != want || record.GetHeadSeq() != head || record.GetEpoch() != w.st.epoch {
				t.Errorf("the record is %v, %v; want %v at %d", record, err, want, head)
			}
		}
		w.append(token)
		time.Sleep(2 * tickEvery)
		stands(schema.Status_STATUS_OPEN, 1)
		before := s.lastSeq(registryStream)
		for range 40 {
			w.append(token)
			time.Sleep(100 * time.Millisecond)
		}
		if written := s.lastSeq(registryStream) - before; written > 0 {
			t.Errorf("the record was written %d times for 40 tokens", written)
		}
		w.append(&schema.Envelope{Payload: &schema.Envelope_StartRun{StartRun: &schema.StartRun{RunId: "r"}}})
		time.Sleep(2 * tickEvery)
		stands(schema.Status_STATUS_RUNNING, 42)
		w.append(token)
		time.Sleep(flushIdle + 2*tickEvery)
		stands(schema.Status_STATUS_RUNNING, 43)
		w.delete()
		time.Sleep(2 * tickEvery)
		if record, _, err := s.r.record(t.Context(), w.ln); record != nil || err != nil {
			t.Errorf("deleted, the record is %v, %v", record, err)
		}
		r.end(t)
	})
}

// Sessions that retention took leave the registry; those that are old and still there, and those of other streams, stay.
func TestRegistryIsSwept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf(t, 2, 79)
		r := s.run(nil, "one")
		var all []*scribe
		for i := range 12 {
			w := s.scribe("default", fmt.Sprint("s", i))
			w.some(3)
			all = append(all, w)
		}
		time.Sleep(5 * time.Second)
		r.end(t)
		old := time.Now()
		time.Sleep(time.Hour)
		mine, gone := 0, 0
		for i, w := range all {
			if s.r.logOf(w.ln) == "LOG_00" {
				mine++
			}
			if i%3 == 0 {
				continue
			}
			if s.r.logOf(w.ln) == "LOG_00" {
				gone++
			}
			log, err := s.js.Stream(t.Context(), s.r.logOf(w.ln))
			if err == nil {
				err = log.Purge(t.Context(), jetstream.WithPurgeSubject(w.ln.logSubject()))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		p := &projector{stream: "LOG_00", nc: s.nc, js: s.js, r: s.r, logger: testLogger(t)}
		if n, err := p.sweepBefore(t.Context(), old.Add(-time.Hour)); n != 0 || err != nil {
			t.Errorf("%d young sessions were removed, %v", n, err)
		}
		if n, err := p.sweepBefore(t.Context(), old); n != gone || err != nil || gone == 0 || gone == mine {
			t.Errorf("%d sessions were removed, %v; want %d", n, err, gone)
		}
		if names, _ := s.list("default", Query{Limit: 100}); len(names) != len(all)-gone {
			t.Errorf("%d sessions are left, want %d", len(names), len(all)-gone)
		}
	})
}
