package edgews

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"tidemark/internal/auth"
	"tidemark/schema"
)

// row is one payload type on the session socket: who may send it, what is taken, and what is not.
type row struct {
	kind schema.Kind
	// by are the roles that may send it, as words; nobody where empty.
	by string
	// good are data that are taken, and come out equal. What stands behind " => " is what comes out where that is something else.
	good []string
	// bad has data that are not taken, and a piece of the sentence that says why.
	bad [][2]string
}

const (
	agents = "agent worker admin"
	all    = "user agent worker admin"
)

// rows is the table of the session socket: every payload type, both directions.
var rows = []row{
	{schema.KindSystem, agents, []string{`{"message":"maintenance at noon"}`}, [][2]string{
		{`{}`, "Missing required field 'message'"}, {`{"message":1}`, "Field 'message' must be a string"}, {`{"message":"x","to":"all"}`, "Unknown field 'to' in 'data'"},
	}},
	{schema.KindWorkflowProgress, agents, []string{
		`{"step":"fetch","message":"3 of 9"}`, `{"step":"fetch","message":"3 of 9","progress":0}`, `{"step":"a","message":"b","progress":1}`,
		`{"step":"a","message":"b","progress":0.25,"metadata":{"any":[1,{"thing":null}]}}`,
	}, [][2]string{
		{`{"message":"m"}`, "Missing required field 'step'"},
		{`{"step":"s"}`, "Missing required field 'message'"},
		{`{"step":"","message":"m"}`, "'step'"},
		{`{"step":"s","message":"m","progress":1.01}`, "'progress' must be a number from 0 to 1"},
		{`{"step":"s","message":"m","progress":-0.1}`, "'progress'"},
		{`{"step":"s","message":"m","progress":"0.5"}`, "'progress' must be a number from 0 to 1"},
		{`{"step":"s","message":"m","metadata":[]}`, "'metadata' must be a JSON object"},
		{`{"step":["s"],"message":"m"}`, "'step' must be a string"},
		{`{"step":"s","message":"m","percent":5}`, "Unknown field 'percent'"},
	}},
	{schema.KindWaitingForInput, agents, []string{
		`{"prompt":"Shall I?"}`, `{"prompt":"Which?","options":["a","b"]}`, `{"prompt":"Which?","options":[],"context":{}} => {"prompt":"Which?","context":{}}`,
		`{"prompt":"p","context":{"diff":"+1","n":12345678901234567890}}`,
		`{"prompt":"p","options":["yes","no"],"deadline":"2126-01-01T00:00:00Z","default":"no"}`, `{"prompt":"p","deadline":"2126-01-01T00:00:00.5Z","default":{"approved":false}}`,
	}, [][2]string{
		{`{"options":["a"]}`, "Missing required field 'prompt'"},
		{`{"prompt":7}`, "'prompt' must be a string"},
		{`{"prompt":"p","options":"a"}`, "'options' must be a list of strings"},
		{`{"prompt":"p","options":["a",1]}`, "'options' must be a list of strings"},
		{`{"prompt":"p","options":[""]}`, "'options'"},
		{`{"prompt":"p","context":"c"}`, "'context' must be a JSON object"},
		{`{"prompt":"p","options":[` + strings.Repeat(`"x",`, schema.MaxPromptOptions) + `"x"]}`, "at most 100"},
		{`{"prompt":"p","options":["` + strings.Repeat("x", schema.MaxPromptOptionBytes+1) + `"]}`, "1 to 1000"},
		{`{"prompt":"p","choices":[]}`, "Unknown field 'choices'"},
		{`{"prompt":"p","deadline":"2126-01-01T00:00:00Z"}`, "'deadline' and 'default' stand together"},
		{`{"prompt":"p","default":"no"}`, "'deadline' and 'default' stand together"},
		{`{"prompt":"p","deadline":"tomorrow","default":"no"}`, "'deadline' is not a time"},
		{`{"prompt":"p","options":["yes"],"deadline":"2126-01-01T00:00:00Z","default":"no"}`, "'default' is none of the answers"},
		{`{"prompt":"p","deadline":"2126-01-01T00:00:00Z","default":"` + strings.Repeat("x", schema.MaxPromptDefaultBytes) + `"}`, "at most 4096"},
	}},
	{schema.KindAgentMessage, agents, []string{`{"message":"done"}`, `{"message":"done","metadata":{"model":"m"}}`}, [][2]string{
		{`{"message":{}}`, "'message' must be a string"}, {`{"message":"m","metadata":1}`, "'metadata' must be a JSON object"}, {`{"message":"m","text":"m"}`, "Unknown field 'text'"},
	}},
	{schema.KindError, agents, []string{`{"error":"E","recoverable":true}`, `{"error":"E","details":"D","recoverable":true,"code":"mine"}`, `{"error":"E","recoverable":false}`}, [][2]string{
		{`{"recoverable":true}`, "Missing required field 'error'"},
		{`{"error":"E"}`, "Missing required field 'recoverable'"},
		{`{"error":"E","recoverable":"no"}`, "'recoverable' must be true or false"},
		{`{"error":"E","recoverable":null}`, "Missing required field 'recoverable'"},
		{`{"error":5,"recoverable":true}`, "'error' must be a string"},
		{`{"error":"E","details":{},"recoverable":true}`, "'details' must be a string"},
		{`{"error":"E","recoverable":true,"fatal":1}`, "Unknown field 'fatal'"},
	}},
	{schema.KindUserInput, "user admin", []string{
		`{"response":"a"}`, `{"response":{"any":["JSON",1e10]}}`, `{"response":null}`, `{"response":false}`, `{"response":0}`, `{"response":""}`, `{"response":[],"metadata":{"took_ms":5}}`,
	}, [][2]string{
		{`{}`, "Missing required field 'response'"},
		{`{"metadata":{}}`, "Missing required field 'response'"},
		{`{"response":1,"metadata":"m"}`, "'metadata' must be a JSON object"},
		{`{"response":1,"answer":1}`, "Unknown field 'answer'"},
		{`{"response":` + strings.Repeat("[", 200) + strings.Repeat("]", 200) + `}`, "nested deeper"},
	}},
	{schema.KindUserMessage, "user " + agents, []string{`{"message":"hello"}`, `{"message":"hello","context":{"file":"a.go","lines":[1,2]}}`}, [][2]string{
		{`{}`, "Missing required field 'message'"},
		{`{"message":null}`, "Missing required field 'message'"},
		{`{"message":true}`, "'message' must be a string"},
		{`{"message":"m","context":[]}`, "'context' must be a JSON object"},
		{`{"message":"m","text":"m"}`, "Unknown field 'text'"},
	}},

	{schema.KindToken, agents, []string{`{"message_id":"m","text":""}`, `{"message_id":"m","channel":"reasoning","text":"Hm\n\u2028\ud83d\ude00"}`, `{"message_id":"m"} => {"message_id":"m","text":""}`}, [][2]string{
		{`{"text":"x"}`, "Missing required field 'message_id'"},
		{`{"message_id":"m","text":1}`, "'text' must be a string"},
		{`{"message_id":"m","channel":"loud"}`, "'channel' must be one of: text, reasoning"},
		{`{"message_id":"` + strings.Repeat("m", 201) + `"}`, "201 bytes"},
		{`{"message_id":"m","text":"\ud83d"}`, "'text'"},
	}},
	{schema.KindMessageCompleted, agents, []string{`{"message_id":"m"}`, `{"message_id":"m","finish_reason":"stop","usage":{"out":3},"text":"Hi"}`}, [][2]string{
		{`{}`, "Missing required field 'message_id'"}, {`{"message_id":"m","usage":3}`, "'usage' must be a JSON object"},
	}},
	{schema.KindToolCall, agents, []string{`{"call_id":"c","name":"ls","arguments":{"dir":"/"},"done":true}`, `{"call_id":"c","name":"ls","arguments_delta":"{\"di"}`, `{"call_id":"c","arguments":null}`}, [][2]string{
		{`{"name":"ls"}`, "Missing required field 'call_id'"}, {`{"call_id":"c","arguments":1,"arguments_delta":"1"}`, "not both"}, {`{"call_id":"c","done":1}`, "'done' must be true or false"},
	}},
	{schema.KindToolResult, all, []string{`{"call_id":"c","result":[1]}`, `{"call_id":"c","error":"no such file"}`}, [][2]string{
		{`{"result":1}`, "Missing required field 'call_id'"}, {`{"call_id":"c","error":1}`, "'error' must be a string"},
	}},
	{schema.KindStartRun, all, []string{`{"run_id":"r"}`, `{"run_id":"r","input":"anything","metadata":{}}`, `{"run_id":"r","orphan_after_ms":1000}`, `{"run_id":"r","orphan_after_ms":86400000}`}, [][2]string{
		{`{}`, "Missing required field 'run_id'"},
		{`{"run_id":9}`, "'run_id' must be a string"},
		{`{"run_id":"r","metadata":[]}`, "'metadata' must be a JSON object"},
		{`{"run_id":"r","orphan_after_ms":999}`, "1000 to 86400000 milliseconds"},
		{`{"run_id":"r","orphan_after_ms":"1s"}`, "'orphan_after_ms'"},
	}},
	{schema.KindRunStatus, agents, []string{`{"run_id":"r","status":"running"}`, `{"status":"waiting_for_input","reason":"approval"}`, `{"status":"completed"}`, `{"status":"failed"}`, `{"status":"cancelled"}`}, [][2]string{
		{`{"run_id":"r"}`, "Missing required field 'status'"}, {`{"status":"done"}`, "'status' must be one of: open, running, waiting_for_input, completed, failed, cancelled"}, {`{"status":3.5}`, "'status'"},
	}},
	{schema.KindCancel, all, []string{`{"run_id":"r"}`, `{"request_id":"q","reason":"no longer needed"}`, `{"session":true}`}, [][2]string{
		{`{}`, "Missing required field: one of"}, {`{"run_id":"r","session":true}`, "one thing"}, {`{"session":false}`, "'session'"}, {`{"session":"yes"}`, "'session' must be true or false"},
	}},
	{schema.KindChatError, agents, []string{`{"error":"E"}`, `{"message_id":"m","error":"E","code":"overloaded"}`}, [][2]string{{`{"message_id":"m"}`, "Missing required field 'error'"}, {`{"error":[]}`, "'error' must be a string"}}},
	{schema.KindCustom, all, []string{
		`{"type":"cursor","content_type":"application/json","json":{"x":1.50,"y":12345678901234567890,"x2":[ ]}}`, `{"type":"shot","content_type":"image/png","data":"iVBORw=="}`,
		`{"type":"t","json":null} => {"type":"t","content_type":"application/json","json":null}`, `{"type":"t"}`,
	}, [][2]string{
		{`{"json":1}`, "Missing required field 'type'"},
		{`{"type":"token","json":1}`, "choose another"},
		{`{"type":"t","data":"not base64"}`, "'data' must be bytes in base64"},
		{`{"type":"t","data":"","json":1}`, "not both"},
		{`{"type":"t","more":1}`, "Unknown field 'more'"},
	}},
	// Tidemark itself says it.
	{schema.KindWorkFailed, "", []string{`{"group":"tools","attempts":5,"reason":"no such tool"}`}, [][2]string{
		{`{"reason":"r"}`, "Missing required field 'group'"}, {`{"group":"g"}`, "Missing required field 'reason'"}, {`{"group":"g","reason":"r","attempts":-1}`, "'attempts'"},
	}},
	// It comes through CreateSession alone.
	{schema.KindSessionCreated, "", nil, [][2]string{{`{"kind":"game"}`, "'kind' must be one of: chat, workflow"}}},
}

// as is a token of a person with this name.
func as(t testing.TB, subject string, role schema.Role) string {
	t.Helper()
	text, err := auth.Mint([]byte(secret), auth.Principal{Subject: subject, Role: role, Sessions: []string{"*"}}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// ui opens a session socket with a token.
func (w *world) ui(token, query string) *client {
	w.Helper()
	return w.mustDial("/ws?token="+token+"&"+query, nil)
}

func (c *client) sendText(text string) {
	c.Helper()
	c.write(websocket.MessageText, []byte(text))
}

// nextSkipping is the next message that is of none of these types.
func (c *client) nextSkipping(types ...string) map[string]any {
	c.Helper()
	for {
		m := c.nextJSON()
		if typ, _ := m["type"].(string); m["seq"] != nil || !slices.Contains(types, typ) {
			return m
		}
	}
}

func message(kind schema.Kind, data string) string {
	return fmt.Sprintf(`{"type":%q,"data":%s}`, kind, data)
}

// TestSessionSocketRows goes over every row: what may be sent is stored and reaches everybody as it was sent; what may not is answered with a sentence, then the connection is closed, and nobody else
// notices.
func TestSessionSocketRows(t *testing.T) {
	roles := []schema.Role{schema.Role_ROLE_USER, schema.Role_ROLE_AGENT, schema.Role_ROLE_WORKER, schema.Role_ROLE_ANALYST, schema.Role_ROLE_ADMIN}
	for _, kind := range schema.Kinds() {
		if !slices.ContainsFunc(rows, func(r row) bool { return r.kind == kind }) {
			t.Errorf("type %s has no row", kind)
		}
	}
	for _, r := range rows {
		t.Run(r.kind.String(), func(t *testing.T) {
			bubble(t, nil, func(w *world) {
				tokens := map[schema.Role]string{}
				for _, role := range roles {
					tokens[role] = as(t, auth.RoleWord(role)+"-1", role)
				}
				n := 0
				// begin opens a session of its own with somebody who watches it. An answer needs a question.
				begin := func() (session string, watcher *client) {
					n++
					session = fmt.Sprintf("sessionName=s%d", n)
					watcher = w.ui(tokens[schema.Role_ROLE_ANALYST], session)
					watcher.wantType("attached")
					if r.kind == schema.KindUserInput {
						asker := w.session(session)
						asker.sendText(`{"type":"workflow_waiting_for_input","data":{"prompt":"?"}}`)
						watcher.wantType("attached")
						watcher.wantType("workflow_waiting_for_input")
						_ = asker.c.CloseNow()
					}
					return session, watcher
				}
				for _, role := range roles {
					word := auth.RoleWord(role)
					may := slices.Contains(strings.Fields(r.by), word)
					good := r.good
					if !may && len(good) > 1 {
						good = good[:1]
					}
					if len(r.good) == 0 {
						good = []string{`{}`}
					}
					for _, data := range good {
						in, out, other := strings.Cut(data, " => ")
						if !other {
							out = in
						}
						session, watcher := begin()
						c := w.ui(tokens[role], session+"&lastSeq=latest")
						c.wantType("attached")
						c.sendText(message(r.kind, in))
						if !may {
							c.wantRefused("forbidden", "The role "+word+" may not publish", "A '"+r.kind.String()+"' cannot be published")
							watcher.wantSilence()
							continue
						}
						watcher.wantEnvelope(r.kind, role, out)
						if p := c.nextSkipping("attached"); p["type"] != "published" && p["seq"] == nil {
							t.Errorf("%s by %s: %s is answered with %v", r.kind, word, in, p)
						}
						_, _ = c.c.CloseNow(), watcher.c.CloseNow()
					}
				}
				for _, role := range []schema.Role{schema.Role_ROLE_USER, schema.Role_ROLE_AGENT} {
					if r.by != "" && !slices.Contains(strings.Fields(r.by), auth.RoleWord(role)) {
						continue
					}
					for _, bad := range r.bad {
						session, watcher := begin()
						c := w.ui(tokens[role], session+"&lastSeq=latest")
						c.wantType("attached")
						c.sendText(message(r.kind, bad[0]))
						c.wantRefused("invalid_message", bad[1])
						watcher.wantSilence()
						_ = watcher.c.CloseNow()
					}
				}
			})
		})
	}
}

// TestSessionSocketShape: what surrounds the data.
func TestSessionSocketShape(t *testing.T) {
	const ok = `"data":{"message":"m"}`
	for _, c := range []struct{ msg, code, says string }{
		{`{"type":"user_message"}`, "invalid_message", "Missing required field 'data'"},
		{`{"type":"user_message","data":"m"}`, "invalid_message", "'data' must be an object"},
		{`{"type":"user_message","data":null}`, "invalid_message", "Missing required field 'data'"},
		{`{` + ok + `}`, "invalid_message", "Missing required field 'type'"},
		{`{"type":7,` + ok + `}`, "invalid_message", "'type' must be a string"},
		{`{"type":"published",` + ok + `}`, "unknown_type", "published"},
		{`{"type":"attached",` + ok + `}`, "unknown_type", "attached"},
		{`{"type":"unknown",` + ok + `}`, "invalid_message", "Unknown field 'message'"},
		{`{"type":"unknown","data":{}}`, "unknown_type", ""},
		{`{"type":"User_Message",` + ok + `}`, "unknown_type", "User_Message"},
		{`{"type":"user_message","session":"other",` + ok + `}`, "invalid_message", "Unknown field 'session'"},
		{`{"type":"user_message","type":"system",` + ok + `}`, "invalid_message", "'type' stands twice"},
		{`{"type":"user_message",` + ok + `,"timestamp":"yesterday"}`, "invalid_message", "'timestamp' is not a time"},
		{`{"type":"user_message",` + ok + `,"id":"1"}`, "invalid_message", "'s id is not a ULID"},
		{`{"type":"user_message",` + ok + `,"request_id":7}`, "invalid_message", "'request_id' must be a string"},
		{`{"type":"user_message",` + ok + `,"reply_to":"first"}`, "invalid_message", "'reply_to'"},
		{`{"type":"user_message",` + ok + `,"producer":{"id":"p"}}`, "invalid_message", "'producer.seq'"},
		{`{"type":"user_message",` + ok + `} {}`, "invalid_message", "something follows"},
		{``, "invalid_message", "not a JSON object"},
	} {
		bubble(t, nil, func(w *world) {
			s := w.session("sessionName=s")
			s.wantType("attached")
			s.sendText(c.msg)
			s.wantRefused(c.code, c.says)
		})
	}
	bubble(t, nil, func(w *world) {
		s := w.session("sessionName=s")
		s.wantType("attached")
		// What the server sets is dropped, what the sender may set is kept.
		s.sendText(`{"type":"user_message","timestamp":"2025-11-04T10:00:15.25+01:00","seq":99,"id":"01JBV00000000000000000000A","request_id":"q","reply_to":3,"source":{"subject":"root","role":"admin"},` + ok + `}`)
		var m map[string]any
		for m["seq"] == nil {
			m = s.nextSkipping("attached", "published")
		}
		delete(m, "data")
		if want := (map[string]any{
			"type": "user_message", "timestamp": "2025-11-04T09:00:15.25Z", "seq": 1.0, "id": "01JBV00000000000000000000A", "request_id": "q", "reply_to": 3.0,
			"source": map[string]any{"subject": "somebody", "role": "agent"},
		}); !reflect.DeepEqual(m, want) {
			t.Errorf("got %v, want %v", m, want)
		}
	})
}

// TestSessionSocketKeepsWhatIsOpen: free-form values come out byte for byte, as no parser would write them again.
func TestSessionSocketKeepsWhatIsOpen(t *testing.T) {
	const free = `{"b":1.50,"a":12345678901234567890,"z":{"":[1e400,"\u00e9\/"]},"b2":[ 1 ,2]}`
	bubble(t, nil, func(w *world) {
		s := w.session("sessionName=s")
		s.wantType("attached")
		for _, c := range []struct{ kind, data string }{
			{"workflow_progress", `{"step":"s","message":"m","metadata":` + free + `}`},
			{"workflow_waiting_for_input", `{"prompt":"p","context":` + free + `}`},
			{"agent_message", `{"message":"m","metadata":` + free + `}`},
			{"user_message", `{"message":"m","context":` + free + `}`},
			{"tool_call", `{"call_id":"c","arguments":` + free + `}`},
			{"tool_result", `{"call_id":"c","result":` + free + `}`},
			{"custom", `{"type":"t","content_type":"application/json","json":` + free + `}`},
		} {
			s.sendText(`{"type":"` + c.kind + `","data":` + c.data + `}`)
			for {
				b, err := s.read()
				if err != nil {
					t.Fatal(err)
				}
				if !strings.Contains(string(b), `"seq":`) || strings.Contains(string(b), `"type":"published"`) {
					continue
				}
				if !strings.Contains(string(b), c.data) {
					t.Errorf("got %s, want %s in it", b, c.data)
				}
				break
			}
			// Progress is stored once a second.
			time.Sleep(2 * time.Second)
		}
	})
}

// wantRefused reads an error frame and the close that follows it. The details have one of the sentences in them.
func (c *client) wantRefused(code string, says ...string) {
	c.Helper()
	m := c.nextSkipping()
	data, _ := m["data"].(map[string]any)
	details, _ := data["details"].(string)
	if m["type"] != "error" || m["seq"] != nil || m["timestamp"] == nil || data["code"] != code || !slices.ContainsFunc(says, func(s string) bool { return strings.Contains(details, s) }) {
		c.Fatalf("got %v, want an error %s that says one of %q", m, code, says)
	}
	if code == "invalid_message" && data["error"] != "Invalid message format" {
		c.Errorf("the error is %q", data["error"])
	}
	c.wantClosed(websocket.StatusPolicyViolation, code+": ")
}

// wantSilence checks that nothing comes for a second. It is the last that is read of this client.
func (c *client) wantSilence() {
	c.Helper()
	ctx, cancel := context.WithTimeout(c.Context(), time.Second)
	defer cancel()
	// The library closes a connection whose read is given up; it has served its purpose.
	if _, b, err := c.c.Read(ctx); err == nil {
		c.Errorf("a bystander got %s", b)
	}
}

// wantEnvelope takes the next envelope of a session, behind the attached that its beginning makes.
func (c *client) wantEnvelope(kind schema.Kind, role schema.Role, data string) {
	c.Helper()
	m := c.nextSkipping("attached")
	word := auth.RoleWord(role)
	source := map[string]any{"subject": word + "-1", "role": word}
	if m["type"] != kind.String() || m["seq"] == nil || m["id"] == nil || m["timestamp"] == nil || !reflect.DeepEqual(m["source"], source) {
		c.Fatalf("got %v, want a %s by %s", m, kind, word)
	}
	got, err := json.Marshal(m["data"])
	if err != nil {
		c.Fatal(err)
	}
	if !sameJSON(string(got), data) {
		c.Errorf("the data of %s is %s, want %s", kind, got, data)
	}
}

// sameJSON compares values as a client's parser sees them.
func sameJSON(a, b string) bool {
	var x, y any
	return json.Unmarshal([]byte(a), &x) == nil && json.Unmarshal([]byte(b), &y) == nil && reflect.DeepEqual(x, y)
}
