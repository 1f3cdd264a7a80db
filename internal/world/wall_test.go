package world

import (
	"bytes"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/schema"
)

// The two sessions that the attempts are made at are of the tenant that a token is of which names none. The first has a history, the second has nothing but a follower who waits: every attempt is made at
// both, and what it is answered must be the same.
const (
	existing = "harbour-7f3a"
	absent   = "harbour-9c5e"
	// treasure stands in everything that the tenant has and an answer must not show.
	treasure = "TREASURE"
	// stored is the existing session's head.
	stored = 5
	// rival is the tenant of who tries.
	rival = "rival"
)

// attempt is one way to try.
type attempt struct {
	name string
	// refused is the word of the code that it must be refused with. Empty: it is answered, as if the victim's tenant did not exist.
	refused string
	try     func(x *intruder, target string)
}

// wall is two tenants, and what the victim's looks like from inside.
type wall struct {
	w         *World
	t         *testing.T
	followers []*Reader
	history   []*schema.Envelope
	session   *schema.Session
	records   string
	attempts  int
}

// inside writes the victim's sessions and follows them.
func (w *World) inside() *wall {
	w.t.Helper()
	v := &wall{w: w, t: w.t}
	agent := w.Join(w.Edge(0), ProtoSocket, existing)
	for i := range stored {
		e := Token(fmt.Sprint(treasure, i, " "))
		e.Producer = &schema.Producer{Id: "pen", Epoch: 1, Seq: uint64(i + 1)}
		agent.Put(existing, e)
	}
	w.must(w.Call(w.Edge(0), "CreateSession", &schema.CreateSessionRequest{Session: treasure + "-vault", MetadataJson: `{"is":"` + treasure + `"}`}, new(schema.CreateSessionResponse)))
	for _, session := range []string{existing, absent} {
		for i, way := range Ways() {
			v.followers = append(v.followers, w.Read(session, ReaderOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge(i % 2)}}))
		}
	}
	for _, r := range v.followers {
		if r.session == existing {
			r.Wait(stored)
		} else {
			r.WaitAttached(1)
		}
	}
	w.Settle()
	v.history, v.records = w.Edge(0).Stored(existing), v.registry()
	var err error
	v.session, err = w.Edge(0).Log.Session(w.t.Context(), Session(existing))
	w.must(err)
	return v
}

// registry is what the victim's registry says.
func (v *wall) registry() string {
	page, err := v.w.Edge(1).Log.Sessions(v.t.Context(), auth.DefaultTenant, broker.Query{Limit: 100})
	v.w.must(err)
	var b strings.Builder
	for _, s := range page.Sessions {
		b.WriteString(protojson.Format(s))
	}
	return b.String()
}

// breached says what has changed inside; empty where nothing has. all: look at what is stored and listed, too.
func (v *wall) breached(all bool) string {
	for i, edge := range []*Edge{v.w.Edge(0), v.w.Edge(1)} {
		if s, err := edge.Log.Session(v.t.Context(), Session(existing)); err != nil || !proto.Equal(s, v.session) {
			return fmt.Sprintf("edge %d has the session as %v, %v", i, s, err)
		}
		if s, err := edge.Log.Session(v.t.Context(), Session(absent)); schema.CodeOf(err) != schema.Code_CODE_SESSION_NOT_FOUND {
			return fmt.Sprintf("edge %d has a session that was never begun: %v, %v", i, s, err)
		}
	}
	for _, r := range v.followers {
		want := uint64(0)
		if r.session == existing {
			want = stored
		}
		if r.Seq() != want || r.Attached() != 1 {
			return fmt.Sprintf("the follower of %s by %v is at %d, and was attached %d times", r.session, r.o.Ways, r.Seq(), r.Attached())
		}
	}
	if !all {
		return ""
	}
	now := v.w.Edge(1).Stored(existing)
	if len(now) != len(v.history) {
		return fmt.Sprintf("%d envelopes are stored", len(now))
	}
	for i, e := range now {
		if !proto.Equal(e, v.history[i]) {
			return fmt.Sprintf("seq %d is %v", i+1, e)
		}
	}
	if records := v.registry(); records != v.records {
		return "the registry says " + records
	}
	return ""
}

// leaked says what an answer shows of the victim's; empty where that is nothing.
func (v *wall) leaked(said string) string {
	open := plain(said)
	for what, secret := range map[string]string{"its content": treasure, "its history": v.session.GetEpoch(), "its id": v.history[0].GetId(), "an id": v.history[stored-1].GetId()} {
		if strings.Contains(open, secret) {
			return what
		}
	}
	return ""
}

// make makes the attempt at both sessions, and returns what was answered and what is wrong with it; the latter is empty where the wall stands.
func (v *wall) make(a attempt) (said, wrong string) {
	v.attempts++
	var answers [2]string
	for i, target := range []string{existing, absent} {
		x := v.w.newIntruder(v.w.Edge(v.attempts % 2))
		a.try(x, target)
		said := x.Said()
		answers[i] = alike(x.sorted(), target[len("harbour-"):])
		lower := strings.ToLower(plain(said))
		switch leak := v.leaked(x.news(said)); {
		case leak != "":
			return said, "the answer shows " + leak
		case said == "":
			return said, "there is no answer"
		case a.refused != "" && !strings.Contains(lower, a.refused):
			return said, "it should be refused with " + a.refused
		case a.refused != "" && (strings.Contains(lower, `"published"`) || strings.Contains(lower, `"firstseq"`)):
			return said, "something was published"
		}
	}
	if answers[0] != answers[1] {
		return answers[0] + "\nand where there is no session\n" + answers[1], "the answers tell a session that exists from one that does not"
	}
	return answers[0], v.breached(v.attempts%50 == 0)
}

// all makes the attempts, and looks at everything at the end.
func (v *wall) all(attempts []attempt) {
	v.t.Helper()
	names := make(map[string]bool)
	for _, a := range attempts {
		if names[a.name] {
			v.t.Errorf("two attempts are called %q", a.name)
		}
		names[a.name] = true
		if said, wrong := v.make(a); wrong != "" {
			v.t.Errorf("%s: %s:\n%s", a.name, wrong, said)
		}
	}
	v.w.Settle()
	if wrong := v.breached(true); wrong != "" {
		v.t.Errorf("after all attempts: %s", wrong)
	}
	v.t.Logf("%d attempts", v.attempts)
}

// tokenOf mints a token of any tenant.
func (w *World) tokenOf(tenant, subject string, role schema.Role, sessions ...string) string {
	w.t.Helper()
	t, err := auth.Mint(secret, auth.Principal{Subject: subject, Tenant: tenant, Role: role, Sessions: sessions}, 365*24*time.Hour)
	w.must(err)
	return t
}

func bearer(token string) http.Header {
	if token == "" {
		return http.Header{}
	}
	return http.Header{"Authorization": {"Bearer " + token}}
}

func jsonFrame(f *schema.ClientFrame) string { return protojson.Format(f) }

func attachFrame(a *schema.Attach) *schema.ClientFrame {
	return &schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: a}}
}

func publishFrame(p *schema.Publish) *schema.ClientFrame {
	p.PublishId = 1
	return &schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: p}}
}

// atHead is a publish that fits the existing session and nothing else.
func atHead(session string) *schema.Publish {
	return &schema.Publish{Session: session, ExpectedSeq: new(uint64(stored)), Envelopes: []*schema.Envelope{Token("forged")}}
}

// entry is a way in, tried with a token and a session's name. code is what it is refused with where the name is one of the intruder's own tenant, in which there is no such session.
type entry struct {
	name string
	code string
	// text: the name must be UTF-8, because the entry cannot say another.
	text bool
	try  func(x *intruder, token, name string)
}

// entries are those that lead to a session by its name.
func entries() []entry {
	const unknown = "session_not_found"
	rpc := "/tidemark.v1.SessionService/"
	after := func(name string) *schema.Attach {
		return &schema.Attach{Channel: 1, Session: name, Start: &schema.Attach_AfterSeq{AfterSeq: stored - 1}}
	}
	post := func(x *intruder, token, method, contentType string, body []byte) {
		h := bearer(token)
		h.Set("Content-Type", contentType)
		h.Set("Connect-Protocol-Version", "1")
		x.HTTP(".grpc", "POST", rpc+method, h, body)
	}
	quoted := func(m proto.Message) []byte { return []byte(protojson.Format(m)) }
	return []entry{
		{"GetSession", unknown, true, func(x *intruder, token, name string) {
			x.Call(token, "GetSession", &schema.GetSessionRequest{Session: name}, new(schema.GetSessionResponse))
		}},
		{"DeleteSession", unknown, true, func(x *intruder, token, name string) {
			x.Call(token, "DeleteSession", &schema.DeleteSessionRequest{Session: name}, new(schema.DeleteSessionResponse))
		}},
		{"Append", "conflict", true, func(x *intruder, token, name string) {
			p := atHead(name)
			x.Call(token, "Append", &schema.AppendRequest{Session: name, ExpectedSeq: p.ExpectedSeq, Envelopes: p.GetEnvelopes()}, new(schema.AppendResponse))
		}},
		{"AppendStream", "conflict", true, func(x *intruder, token, name string) {
			p := atHead(name)
			p.PublishId = 1
			x.Stream(token, "AppendStream", false, p)
		}},
		{"Follow", unknown, true, func(x *intruder, token, name string) {
			x.Stream(token, "Follow", true, &schema.Attach{Session: name, MustExist: true})
		}},
		{"Connect: attach", "seq_beyond_head", true, func(x *intruder, token, name string) {
			x.Stream(token, "Connect", false, attachFrame(after(name)))
		}},
		{"binary socket: attach", unknown, true, func(x *intruder, token, name string) {
			x.Socket("/v1/connect", bearer(token), []string{"tidemark.v1.proto"}, attachFrame(&schema.Attach{Channel: 1, Session: name, MustExist: true, Start: &schema.Attach_Last{Last: 2}}))
		}},
		{"binary socket: publish", "conflict", true, func(x *intruder, token, name string) {
			x.Socket("/v1/connect", bearer(token), []string{"tidemark.v1.proto"}, publishFrame(atHead(name)))
		}},
		{"JSON socket: attach", unknown, true, func(x *intruder, token, name string) {
			x.Socket("/v1/connect", bearer(token), []string{"tidemark.v1.json"},
				jsonFrame(attachFrame(&schema.Attach{Channel: 1, Session: name, MustExist: true, Start: &schema.Attach_Since{Since: timestamppb.New(time.Unix(0, 0))}})))
		}},
		{"JSON socket: publish", "conflict", true, func(x *intruder, token, name string) {
			x.Socket("/v1/connect", bearer(token), []string{"tidemark.v1.json"}, jsonFrame(publishFrame(atHead(name))))
		}},
		{"session socket", "seq_beyond_head", false, func(x *intruder, token, name string) {
			x.Socket("/ws?lastSeq="+fmt.Sprint(stored-1)+"&sessionName="+url.QueryEscape(name), bearer(token), nil)
		}},
		{"GetSession by Connect in JSON", unknown, true, func(x *intruder, token, name string) {
			post(x, token, "GetSession", "application/json", quoted(&schema.GetSessionRequest{Session: name}))
		}},
		{"Append by Connect in JSON", "conflict", true, func(x *intruder, token, name string) {
			p := atHead(name)
			post(x, token, "Append", "application/json", quoted(&schema.AppendRequest{Session: name, ExpectedSeq: p.ExpectedSeq, Envelopes: p.GetEnvelopes()}))
		}},
		{"DeleteSession by gRPC-Web", unknown, true, func(x *intruder, token, name string) {
			b, err := proto.Marshal(&schema.DeleteSessionRequest{Session: name})
			x.w.must(err)
			post(x, token, "DeleteSession", "application/grpc-web+proto", enveloped(b))
		}},
		{"Follow by gRPC-Web", unknown, true, func(x *intruder, token, name string) {
			b, err := proto.Marshal(&schema.Attach{Session: name, MustExist: true})
			x.w.must(err)
			post(x, token, "Follow", "application/grpc-web+proto", enveloped(b))
		}},
		{"Follow by Connect in JSON", unknown, true, func(x *intruder, token, name string) {
			post(x, token, "Follow", "application/connect+json", enveloped(quoted(&schema.Attach{Session: name, MustExist: true})))
		}},
	}
}

// enveloped is a message as gRPC-Web and Connect's streams frame it.
func enveloped(b []byte) []byte {
	n := len(b)
	return append([]byte{0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, b...)
}

// disguise is a name that might be taken for the victim's.
type disguise struct {
	name    string
	of      func(target string) string
	invalid bool // it is no name
}

func disguises() []disguise {
	plain := func(format string) func(string) string {
		return func(target string) string { return strings.ReplaceAll(format, "{}", target) }
	}
	long := func(n int) func(string) string {
		return func(target string) string { return strings.Repeat("x", n-len(target)) + target }
	}
	return []disguise{
		{"the name as it is", plain("{}"), false},
		{"tenant and name", plain("default/{}"), false},
		{"tenant, dot and name", plain("default.{}"), false},
		{"up and down", plain("../default/{}"), false},
		{"up and down twice", plain("../../default/./{}"), false},
		{"backslashes", plain(`..\default\{}`), false},
		{"percent", plain("%2e%2e%2Fdefault%2F{}"), false},
		{"percent twice", plain("%252e%252e%252Fdefault%252F{}"), false},
		{"our escapes", plain("default=2E{}"), false},
		{"the log's subject", plain("log.000.default.{}"), false},
		{"any log's subject", plain("log.*.default.{}"), false},
		{"the pages' subject", plain("page.*.default.{}.0"), false},
		{"the registry's key", plain("$KV.SESSIONS.default.{}"), false},
		{"the presence's key", plain("$KV.PRESENCE.user.default.{}.agent.0"), false},
		{"the API of JetStream", plain("$JS.API.DIRECT.GET.KV_SESSIONS.$KV.SESSIONS.default.{}"), false},
		{"a wildcard for it all", plain(">"), false},
		{"a wildcard for the tenant", plain("*.{}"), false},
		{"a wildcard for the name", plain("default.*"), false},
		{"a wildcard for the tail", plain("default.>"), false},
		{"a wildcard in the name", plain("{}*"), false},
		{"dots", plain(".{}."), false},
		{"two dots", plain(".."), false},
		{"NUL before", plain("\x00{}"), false},
		{"NUL behind", plain("{}\x00"), false},
		{"the tenant behind NUL", plain("{}\x00default"), false},
		{"a line break", plain("{}\r\nX-Tenant: default"), false},
		{"a query", plain("{}?tenant=default"), false},
		{"another parameter", plain("{}&tenant=default&sessionName={}"), false},
		{"JSON", plain(`{}","tenant":"default`), false},
		{"a space", plain(" {} "), false},
		{"no width", plain("\u200b{}"), false},
		{"right to left", plain("\u202e{}"), false},
		{"a letter that looks the same", func(s string) string { return strings.Replace(s, "a", "а", 1) }, false},
		{"wide letters", func(s string) string { return strings.Replace(s, "h", "ｈ", 1) }, false},
		{"capitals", strings.ToUpper, false},
		{"composed letters", func(s string) string { return strings.Replace(s, "o", "o\u0308", 1) }, false},
		{"as long as may be", long(schema.MaxNameBytes), false},
		{"too long", long(schema.MaxNameBytes + 1), true},
		{"very long", long(8000), true},
		{"nothing", func(string) string { return "" }, true},
		{"broken UTF-8", plain("\xff{}"), true},
		{"UTF-8 that is too long", plain("\xc0\xae{}"), true},
	}
}

// TestI9_NamesOfAnotherTenantsSessions: whatever a client of one tenant calls a session, and however it comes in, it finds the same as if the other tenant did not exist.
func TestI9_NamesOfAnotherTenantsSessions(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		token := w.tokenOf(rival, "agent", schema.Role_ROLE_ADMIN, "*")
		var all []attempt
		for _, d := range disguises() {
			for _, e := range entries() {
				code := e.code
				if d.invalid {
					code = "invalid_message"
					if e.text && !utf8.ValidString(d.of("x")) {
						continue
					}
				}
				all = append(all, attempt{d.name + " by " + e.name, code, func(x *intruder, target string) { e.try(x, token, d.of(target)) }})
			}
		}
		w.inside().all(all)
	})
}

// TestI9_PatternsThatDoNotReach: in the victim's own tenant, a token whose sessions do not name the session reaches it by no entry; the answer is the same whether there is one.
func TestI9_PatternsThatDoNotReach(t *testing.T) {
	Run(t, Config{}, func(w *World) {
		var all []attempt
		for _, p := range []struct {
			name string
			of   func(target string) []string
		}{
			{"no session", func(string) []string { return nil }},
			{"others", func(string) []string { return []string{"mine*", "yours"} }},
			{"its beginning without a star", func(s string) []string { return []string{s[:4]} }},
			{"more than it", func(s string) []string { return []string{s + "0", s + "0*", s + "/*", s + ".*"} }},
			{"a star before", func(s string) []string { return []string{"*" + s[1:], "*" + s} }},
			{"a star in the middle", func(s string) []string { return []string{s[:3] + "*" + s[4:]} }},
			{"a star in the middle and behind", func(s string) []string { return []string{"h*r*"} }},
			{"a star that is two", func(s string) []string { return []string{s[:4] + "**"} }},
			{"question marks", func(s string) []string { return []string{s[:len(s)-1] + "?", strings.Repeat("?", len(s))} }},
			{"an expression", func(s string) []string { return []string{".*" + s, "^.*$", "[a-z]*"} }},
			{"wildcards of NATS", func(s string) []string { return []string{">", "default.>", "*.", "harbour.>"} }},
			{"a path", func(s string) []string { return []string{"./" + s, "/" + s, "default/*", "../*"} }},
			{"capitals", func(s string) []string { return []string{strings.ToUpper(s), strings.ToUpper(s[:1]) + "*"} }},
			{"a space", func(s string) []string { return []string{" " + s, s + " ", " *"} }},
			{"NUL", func(s string) []string { return []string{s + "\x00", "\x00*"} }},
			{"commas", func(s string) []string { return []string{"a," + s, "*,a"} }},
		} {
			for _, e := range entries() {
				all = append(all, attempt{p.name + " by " + e.name, "forbidden", func(x *intruder, target string) {
					e.try(x, w.tokenOf("", "intruder", schema.Role_ROLE_ADMIN, p.of(target)...), target)
				}})
			}
			all = append(all, attempt{p.name + ": create", "forbidden", func(x *intruder, target string) {
				x.Call(w.tokenOf("", "intruder", schema.Role_ROLE_ADMIN, p.of(target)...), "CreateSession", &schema.CreateSessionRequest{Session: target}, new(schema.CreateSessionResponse))
			}}, attempt{p.name + ": list", "", func(x *intruder, target string) {
				for _, size := range []uint32{0, 1, 2} {
					x.Call(w.tokenOf("", "intruder", schema.Role_ROLE_ADMIN, p.of(target)...), "ListSessions", &schema.ListSessionsRequest{Prefix: target, PageSize: size}, new(schema.ListSessionsResponse))
				}
			}})
		}
		w.inside().all(all)
	})
}

// TestI9_TheWallIsSeenToBreak: the same attempts by somebody who may are found out, each of them: the tests above can fail.
func TestI9_TheWallIsSeenToBreak(t *testing.T) {
	for _, e := range entries() {
		t.Run(e.name, func(t *testing.T) {
			Run(t, Config{}, func(w *World) {
				v := w.inside()
				token := w.Token(schema.Role_ROLE_ADMIN, "*")
				said, wrong := v.make(attempt{e.name, e.code, func(x *intruder, target string) { e.try(x, token, target) }})
				if wrong == "" {
					t.Errorf("nobody noticed:\n%s", said)
				}
				if !bytes.Contains([]byte(e.name), []byte("ppend")) && !strings.Contains(e.name, "publish") && !strings.Contains(e.name, "Delete") {
					return
				}
				w.Settle()
				if v.breached(true) == "" {
					t.Error("nothing has changed inside")
				}
			})
		})
	}
}
