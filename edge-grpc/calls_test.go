package edgegrpc

import (
	"slices"
	"strings"
	"testing"

	"tidemark/schema"
)

func TestCallsOverEveryProtocol(t *testing.T) { eachDialect(t, testCalls) }

func testCalls(w *world, d dialect) {
	k := w.dial(d, w.token(schema.Role_ROLE_AGENT, "chat*"))

	// Creating: once, with what was given.
	created := new(schema.CreateSessionResponse)
	w.must(k.call("CreateSession", &schema.CreateSessionRequest{Session: "chat 1/ü", Kind: schema.SessionKind_SESSION_KIND_WORKFLOW, MetadataJson: `{"n":12345678901234567890}`}, created))
	s := created.GetSession()
	if s.GetSession() != "chat 1/ü" || s.GetKind() != schema.SessionKind_SESSION_KIND_WORKFLOW || s.GetHeadSeq() != 1 || s.GetEpoch() == "" || s.GetMetadataJson() != `{"n":12345678901234567890}` {
		w.Errorf("created %v", s)
	}
	p := w.wantProblem(k.call("CreateSession", &schema.CreateSessionRequest{Session: "chat 1/ü"}, created), schema.Code_CODE_ALREADY_EXISTS)
	if !strings.Contains(p.message, "chat 1/ü") {
		w.Errorf("%q does not name the session", p.message)
	}
	w.wantProblem(k.call("CreateSession", &schema.CreateSessionRequest{Session: ""}, created), schema.Code_CODE_INVALID_MESSAGE)
	w.wantProblem(k.call("CreateSession", &schema.CreateSessionRequest{Session: "chat 2", MetadataJson: "{"}, created), schema.Code_CODE_INVALID_MESSAGE)
	w.wantProblem(k.call("CreateSession", &schema.CreateSessionRequest{Session: strings.Repeat("chat", 51)}, created), schema.Code_CODE_INVALID_MESSAGE)
	w.wantProblem(k.call("CreateSession", &schema.CreateSessionRequest{Session: "other"}, created), schema.Code_CODE_FORBIDDEN)

	// Appending: all or none, behind the head that was named, once for each id.
	appended := new(schema.AppendResponse)
	w.must(k.call("Append", &schema.AppendRequest{Session: "chat 1/ü", ExpectedSeq: new(uint64(1)), Envelopes: []*schema.Envelope{tokenOf("a"), tokenOf("b")}}, appended))
	if appended.GetFirstSeq() != 2 || appended.GetLastSeq() != 3 || appended.GetDuplicate() || appended.GetEpoch() != s.GetEpoch() || appended.GetDurability() != schema.Durability_DURABILITY_MEMORY {
		w.Errorf("appended %v", appended)
	}
	p = w.wantProblem(k.call("Append", &schema.AppendRequest{Session: "chat 1/ü", ExpectedSeq: new(uint64(1)), Envelopes: []*schema.Envelope{tokenOf("x")}}, appended), schema.Code_CODE_CONFLICT)
	if r, ok := p.detail.(*schema.Rejected); !ok || r.GetHeadSeq() != 3 {
		w.Errorf("the conflict's detail is %v, want head_seq 3", p.detail)
	}
	e := tokenOf("c")
	e.Id = "01JD9ZK7V1Q8R7S6T5V4W3X2Y1"
	w.must(k.call("Append", &schema.AppendRequest{Session: "chat 1/ü", Envelopes: []*schema.Envelope{e}}, appended))
	w.must(k.call("Append", &schema.AppendRequest{Session: "chat 1/ü", Envelopes: []*schema.Envelope{e}}, appended))
	if appended.GetFirstSeq() != 4 || !appended.GetDuplicate() {
		w.Errorf("the same id again: %v", appended)
	}
	gap := tokenOf("d")
	gap.Producer = &schema.Producer{Id: "p", Epoch: 1, Seq: 7}
	p = w.wantProblem(k.call("Append", &schema.AppendRequest{Session: "chat 1/ü", Envelopes: []*schema.Envelope{gap}}, appended), schema.Code_CODE_PRODUCER_GAP)
	if r, ok := p.detail.(*schema.Rejected); !ok || r.GetExpected() != 1 {
		w.Errorf("the gap's detail is %v, want expected 1", p.detail)
	}
	w.wantProblem(k.call("Append", &schema.AppendRequest{Session: "chat 1/ü"}, appended), schema.Code_CODE_INVALID_MESSAGE)
	w.wantProblem(k.call("Append", &schema.AppendRequest{Session: "chat 1/ü", Envelopes: []*schema.Envelope{{}}}, appended), schema.Code_CODE_UNKNOWN_TYPE)
	many := slices.Repeat([]*schema.Envelope{tokenOf("x")}, schema.MaxPublishEnvelopes+1)
	w.wantProblem(k.call("Append", &schema.AppendRequest{Session: "chat 1/ü", Envelopes: many}, appended), schema.Code_CODE_INVALID_MESSAGE)

	// Getting.
	got := new(schema.GetSessionResponse)
	w.must(k.call("GetSession", &schema.GetSessionRequest{Session: "chat 1/ü"}, got))
	if got.GetSession().GetHeadSeq() != 4 || got.GetSession().GetEpoch() != s.GetEpoch() {
		w.Errorf("got %v", got)
	}
	p = w.wantProblem(k.call("GetSession", &schema.GetSessionRequest{Session: "chat nobody"}, got), schema.Code_CODE_SESSION_NOT_FOUND)
	if !strings.Contains(p.message, "chat nobody") {
		w.Errorf("%q does not name the session", p.message)
	}
	w.wantProblem(k.call("GetSession", &schema.GetSessionRequest{Session: "other"}, got), schema.Code_CODE_FORBIDDEN)

	// Deleting ends the history.
	w.must(k.call("DeleteSession", &schema.DeleteSessionRequest{Session: "chat 1/ü"}, new(schema.DeleteSessionResponse)))
	w.wantProblem(k.call("GetSession", &schema.GetSessionRequest{Session: "chat 1/ü"}, got), schema.Code_CODE_SESSION_NOT_FOUND)
	w.wantProblem(k.call("DeleteSession", &schema.DeleteSessionRequest{Session: "chat 1/ü"}, new(schema.DeleteSessionResponse)), schema.Code_CODE_SESSION_NOT_FOUND)
	w.must(k.call("CreateSession", &schema.CreateSessionRequest{Session: "chat 1/ü"}, created))
	if created.GetSession().GetEpoch() == s.GetEpoch() || created.GetSession().GetKind() != schema.SessionKind_SESSION_KIND_CHAT {
		w.Errorf("created again as %v", created.GetSession())
	}
	if d.native != (w.counter("tidemark_grpc_connections", "server", "native") == 1) {
		w.Errorf("the connection went to the wrong server")
	}
}

func TestListSessions(t *testing.T) { eachDialect(t, testListSessions) }

func testListSessions(w *world, d dialect) {
	for _, s := range []string{"a1", "a2", "a3", "b1", "secret"} {
		w.publish(s, "x")
	}
	list := func(token string, req *schema.ListSessionsRequest) (names []string, next string) {
		w.Helper()
		k := w.dial(d, token)
		defer k.close()
		res := new(schema.ListSessionsResponse)
		w.must(k.call("ListSessions", req, res))
		for _, s := range res.GetSessions() {
			names = append(names, s.GetSession())
		}
		return names, res.GetNextPageToken()
	}
	want := func(got, want []string) {
		w.Helper()
		slices.Sort(got)
		if !slices.Equal(got, want) {
			w.Errorf("listed %q, want %q", got, want)
		}
	}
	names, _ := list(w.token(schema.Role_ROLE_USER, "*"), &schema.ListSessionsRequest{})
	want(names, []string{"a1", "a2", "a3", "b1", "secret"})
	names, _ = list(w.token(schema.Role_ROLE_USER, "*"), &schema.ListSessionsRequest{Prefix: "a", PageSize: 5000})
	want(names, []string{"a1", "a2", "a3"})
	// A token sees what it gives access to, whatever was asked for.
	names, _ = list(w.token(schema.Role_ROLE_ANALYST, "a*"), &schema.ListSessionsRequest{})
	want(names, []string{"a1", "a2", "a3"})
	names, _ = list(w.token(schema.Role_ROLE_ANALYST, "a*"), &schema.ListSessionsRequest{Prefix: "a2"})
	want(names, []string{"a2"})
	names, _ = list(w.token(schema.Role_ROLE_ANALYST, "a*"), &schema.ListSessionsRequest{Prefix: "secret"})
	want(names, nil)
	names, _ = list(w.token(schema.Role_ROLE_ANALYST, "a1", "secret"), &schema.ListSessionsRequest{})
	want(names, []string{"a1", "secret"})
	names, _ = list(w.token(schema.Role_ROLE_ANALYST), &schema.ListSessionsRequest{})
	want(names, nil)
	// Page by page.
	token := w.token(schema.Role_ROLE_USER, "*")
	var all []string
	next, pages := "", 0
	for {
		names, n := list(token, &schema.ListSessionsRequest{PageSize: 2, PageToken: next})
		all = append(all, names...)
		pages++
		if next = n; next == "" {
			break
		}
	}
	want(all, []string{"a1", "a2", "a3", "b1", "secret"})
	if pages < 3 {
		w.Errorf("5 sessions came in %d pages of 2", pages)
	}
	k := w.dial(d, token)
	defer k.close()
	w.wantProblem(k.call("ListSessions", &schema.ListSessionsRequest{Status: 99}, new(schema.ListSessionsResponse)), schema.Code_CODE_INVALID_MESSAGE)
}

func TestTokensAreNeeded(t *testing.T) { eachDialect(t, testTokens) }

func testTokens(w *world, d dialect) {
	for name, token := range map[string]string{"none": "", "nonsense": "nonsense", "foreign": "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0."} {
		k := w.dial(d, token)
		p := w.wantProblem(k.call("GetSession", &schema.GetSessionRequest{Session: "s"}, new(schema.GetSessionResponse)), schema.Code_CODE_UNAUTHENTICATED)
		if token != "" && strings.Contains(p.message, token) {
			w.Errorf("%s: the answer repeats the token: %q", name, p.message)
		}
		k.follow(&schema.Attach{Session: "s"}).wantStatus(schema.Code_CODE_UNAUTHENTICATED)
		if !d.http1 {
			k.open("AppendStream", true).wantStatus(schema.Code_CODE_UNAUTHENTICATED)
		}
		if !d.http1 && token != "" {
			k.open("Connect", true).wantStatus(schema.Code_CODE_UNAUTHENTICATED)
		}
	}
	// What a role may not do.
	k := w.dial(d, w.token(schema.Role_ROLE_ANALYST, "*"))
	w.wantProblem(k.call("Append", &schema.AppendRequest{Session: "s", Envelopes: []*schema.Envelope{tokenOf("x")}}, new(schema.AppendResponse)), schema.Code_CODE_FORBIDDEN)
	w.wantProblem(k.call("CreateSession", &schema.CreateSessionRequest{Session: "s"}, new(schema.CreateSessionResponse)), schema.Code_CODE_FORBIDDEN)
	w.wantProblem(k.call("DeleteSession", &schema.DeleteSessionRequest{Session: "s"}, new(schema.DeleteSessionResponse)), schema.Code_CODE_FORBIDDEN)
	k = w.dial(d, w.token(schema.Role_ROLE_USER, "mine"))
	k.follow(&schema.Attach{Session: "yours"}).wantStatus(schema.Code_CODE_FORBIDDEN)
}
