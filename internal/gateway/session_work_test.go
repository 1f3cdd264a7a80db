package gateway

import (
	"encoding/json"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	"tidemark/broker/worktest"
	"tidemark/internal/doctable"
	"tidemark/schema"
)

// socket opens a session socket behind the session's head, and reads the attached that comes first.
func (w *world) socket(role, session string) *peer {
	w.Helper()
	p := w.dial(Peer{Protocol: SessionJSON, Principal: principal(role, "*"), Session: session, Follow: &schema.Attach{Session: session, Start: &schema.Attach_Head{Head: true}}})
	p.wantControl("attached")
	return p
}

// wantControl takes the next control frame, which must be of this type, and returns its data.
func (p *peer) wantControl(kind string) map[string]any {
	p.Helper()
	raw := p.nextRaw()
	var m struct {
		Type, Timestamp string
		Seq             *uint64
		Data            map[string]any
	}
	if err := json.Unmarshal(raw, &m); err != nil || m.Type != kind || m.Timestamp == "" || m.Seq != nil {
		p.Fatalf("want a control frame %s, got %s: %v", kind, raw, err)
	}
	return m.Data
}

// TestSessionSocketWork: a session socket works for its session, with the same frames in its own shape.
func TestSessionSocketWork(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		p := w.socket("worker", "s")
		p.sendRaw([]byte(`{"type":"work_subscribe","timestamp":"2026-01-01T00:00:00Z","data":{"channel":1,"group":"tools","kinds":["tool_call"],"credit":2,"ack_wait_ms":60000,"backoff_ms":[1000,2000],"from_now":true}}`))
		got := p.wantControl("work_subscribed")
		group, _ := got["group"].(map[string]any)
		created, _ := group["created"].(string)
		delete(group, "created")
		if want := map[string]any{
			"channel": 1.0, "group": map[string]any{
				"group": "tools", "kinds": []any{"tool_call"}, "sessions": []any{"s"}, "ack_wait_ms": 60_000.0, "max_deliver": 5.0, "backoff_ms": []any{1000.0, 2000.0}, "ordered": false,
				"waiting": 0.0, "in_hand": 0.0, "redelivered": 0.0,
			},
		}; !reflect.DeepEqual(got, want) || created == "" {
			t.Errorf("got %v, want %v", got, want)
		}

		jobs(q, "other", 7)
		jobs(q, "s", 1, 2, 3)
		raw := p.nextRaw()
		if !strings.Contains(string(raw), `,"envelope":{"type":"tool_call","seq":1,`) || !strings.Contains(string(raw), `"arguments":{"n": 1.50}`) || !strings.Contains(string(raw), `"name":"<ls>"`) {
			t.Errorf("the envelope is not as it stands in the session: %s", raw)
		}
		var m struct {
			Data struct {
				Channel, WorkID, Attempt float64
				Work                     float64 `json:"work_id"`
				Deadline                 time.Time
				Envelope                 json.RawMessage
			}
		}
		if err := json.Unmarshal(raw, &m); err != nil || m.Data.Channel != 1 || m.Data.Work != 1 || m.Data.Attempt != 1 || !m.Data.Deadline.Equal(time.Now().Add(time.Minute)) {
			t.Errorf("the delivery is %s: %v", raw, err)
		}
		if e, err := schema.ParseJSON(m.Data.Envelope); err != nil || e.GetToolCall().GetName() != "<ls>" || e.GetRequestId() != "q1" {
			t.Errorf("the envelope is %v, %v", e, err)
		}
		if d := p.wantControl("work"); d["work_id"] != 2.0 {
			t.Errorf("the second item is %v", d)
		}
		p.sendRaw([]byte(`{"type":"in_progress","data":{"work_ids":[1]}}`))
		p.sendRaw([]byte(`{"type":"ack","data":{"work_ids":[1]}}`))
		if d := p.wantControl("work"); d["work_id"] != 3.0 {
			t.Errorf("the third item is %v", d)
		}
		p.sendRaw([]byte(`{"type":"nack","data":{"work_id":2,"delay_ms":5000,"reason":"busy"}}`))
		p.sendRaw([]byte(`{"type":"term","data":{"work_id":3,"reason":"no"}}`))
		p.sendRaw([]byte(`{"type":"ack","data":{"work_ids":[1]}}`))
		if d := p.wantControl("work_refused"); d["work_id"] != 1.0 || d["code"] != "work_lost" || d["details"] == "" {
			t.Errorf("refused: %v", d)
		}
		w.wantSaid(q, "in_progress 1", "ack 1", "nack 2 5s: busy", "term 3: no")
		time.Sleep(5 * time.Second)
		if d := p.wantControl("work"); d["work_id"] != 4.0 || d["attempt"] != 2.0 {
			t.Errorf("the second item comes again as %v", d)
		}
		q.Cancel(idOf("s"), 9, "enough")
		if d := p.wantControl("work_cancelled"); !reflect.DeepEqual(d, map[string]any{"channel": 1.0, "work_id": 4.0, "seq": 9.0, "reason": "enough"}) {
			t.Errorf("cancelled: %v", d)
		}
		p.sendRaw([]byte(`{"type":"work_unsubscribe","data":{"channel":1}}`))
		if d := p.wantControl("work_unsubscribed"); d["channel"] != 1.0 {
			t.Errorf("unsubscribed: %v", d)
		}
		p.sendRaw([]byte(`{"type":"work_subscribe","data":{"channel":2,"group":""}}`))
		if d := p.wantControl("error"); d["channel"] != 2.0 || d["code"] != "invalid_message" {
			t.Errorf("refused: %v", d)
		}
		p.sendRaw([]byte(`{"type":"work_subscribe","data":{"channel":2,"group":"g","sessions":["s","t"]}}`))
		if d := p.wantControl("error"); d["channel"] != 2.0 || !strings.Contains(d["details"].(string), "that session alone") {
			t.Errorf("refused: %v", d)
		}
		p.sendRaw([]byte(`{"type":"heartbeat","data":{"run_id":"r"}}`))
		if d := p.wantControl("heard"); d["run_id"] != "r" {
			t.Errorf("heard: %v", d)
		}
		w.wantKept(q, "s/r")
		p.sendRaw(schema.AppendJSON(nil, startOf("r2")))
		for range 3 { // attached of the session that begins, published, the envelope
			p.nextRaw()
		}
		w.wantKept(q, "s/r", "s/r2")
		p.leave()
		w.wantKept(q)

		for _, c := range []struct{ msg, says string }{
			{`{"type":"work_subscribe"}`, "Missing required field 'data'"},
			{`{"type":"work_subscribe","data":[]}`, "'data' must be an object"},
			{`{"type":"work_subscribe","data":null}`, "'data' must be an object"},
			{`{"type":"work_subscribe","data":{},"id":"x"}`, "type, timestamp and data, and nothing else"},
			{`{"type":"work_subscribe","data":{"channel":1,"Group":"g"}}`, "Unknown field 'Group' in 'data' of work_subscribe"},
			{`{"type":"work_subscribe","data":{"channel":1,"ackWaitMs":1}}`, "Unknown field 'ackWaitMs'"},
			{`{"type":"ack","data":{"work_ids":["x"]}}`, "Field 'work_ids' in 'data' of ack must be an array of whole numbers, 0 or more."},
			{`{"type":"ack","data":{"work_ids":7}}`, "Field 'work_ids' in 'data' of ack must be an array of whole numbers"},
			{`{"type":"work_subscribe","data":{"channel":1,"ack_wait_ms":"x"}}`, "Field 'ack_wait_ms' in 'data' of work_subscribe must be a whole number, 0 or more."},
			{`{"type":"work_subscribe","data":{"channel":1,"kinds":"tool_call"}}`, "Field 'kinds' in 'data' of work_subscribe must be an array of strings."},
			{`{"type":"work_subscribe","data":{"channel":-1}}`, "Field 'channel' in 'data' of work_subscribe must be a whole number from 0 to 4294967295."},
			{`{"type":"work_subscribe","data":{"ordered":"yes"}}`, "Field 'ordered' in 'data' of work_subscribe must be true or false."},
			{`{"type":"work_subscribe","data":{"channel":1,"channel":2}}`, "The data of work_subscribe is not as it should be: duplicate field \"channel\", at line 1, column 14."},
			{`{"type":"heartbeat","data":{"session":"t"}}`, "that session alone"},
			{`{"type":"work_unsubscribe","data":{}}`, "needs the channel"},
		} {
			p := w.socket("worker", "s")
			p.sendRaw([]byte(c.msg))
			if d := p.wantControl("error"); d["code"] != "invalid_message" || d["channel"] != nil || !strings.Contains(d["details"].(string), c.says) {
				t.Errorf("%s: %v", c.msg, d)
			}
			if err := p.wantClosed(schema.Code_CODE_INVALID_MESSAGE, ""); err == nil {
				t.Errorf("%s: the connection ended well", c.msg)
			}
		}
		// Who may not work may follow on.
		user := w.socket("user", "s")
		user.sendRaw([]byte(`{"type":"work_subscribe","data":{"channel":1,"group":"g"}}`))
		if d := user.wantControl("error"); d["channel"] != 1.0 || d["code"] != "forbidden" {
			t.Errorf("refused: %v", d)
		}
		user.leave()
	})
}

// TestSessionSocketHasItsOwnGroup: a session socket is handed items of its own session and of no other, whoever made the group, and whatever became of it since.
func TestSessionSocketHasItsOwnGroup(t *testing.T) {
	working(t, nil, func(w *world, q *worktest.Queue) {
		const subscribe, advice = `{"type":"work_subscribe","data":{"channel":1,"group":"tools"}}`, "give each session a group of its own, or use /v1/connect"
		refused := func(p *peer, says string) {
			t.Helper()
			d := p.wantControl("error")
			if text, _ := d["details"].(string); d["channel"] != 1.0 || d["code"] != "invalid_message" || !strings.Contains(text, says) || !strings.Contains(text, "/v1/connect") {
				t.Errorf("refused: %v, want %q", d, says)
			}
		}
		a, b := w.socket("worker", "sa"), w.socket("worker", "sb")
		a.sendRaw([]byte(subscribe))
		a.wantControl("work_subscribed")
		b.sendRaw([]byte(subscribe))
		refused(b, `Group "tools" takes work of "sa", and the session socket of session "sb" works for that session alone; `+advice)
		jobs(q, "sb", 1)
		a.wantNothing()

		// Wider from its beginning.
		all := w.agent()
		all.subscribe(&schema.WorkSubscribe{Channel: 1, Group: "all", Sessions: []string{"s*"}})
		all.wantSubscribed()
		b.sendRaw([]byte(strings.Replace(subscribe, "tools", "all", 1)))
		refused(b, `takes work of "s*"`)

		// Wider later.
		all.subscribe(&schema.WorkSubscribe{Channel: 2, Group: "tools", Sessions: []string{"sa", "sb"}})
		all.wantSubscribed()
		w.wantSaid(q)
		jobs(q, "sb", 2)
		refused(a, `takes work of "sb"`)
		a.sendRaw([]byte(subscribe))
		refused(a, `takes work of "sb"`)

		// A name that ends in * is a prefix in a group's filter.
		star := w.socket("worker", "s*")
		star.sendRaw([]byte(strings.Replace(subscribe, "tools", "star", 1)))
		refused(star, "ends in *")
		for _, p := range []*peer{a, b, star} {
			p.leave()
		}
	})
}

// TestProtocolWork compares PROTOCOL.md's tables of the session socket's frames for workers with what is taken and said.
func TestProtocolWork(t *testing.T) {
	tables, err := doctable.Tables("../../PROTOCOL.md", "Work")
	if err != nil || len(tables) != 2 {
		t.Fatalf("PROTOCOL.md has %d tables of work: %v", len(tables), err)
	}
	cell := regexp.MustCompile("`([^`]+)`")
	words := func(s string) []string {
		var all []string
		for _, m := range cell.FindAllStringSubmatch(s, -1) {
			all = append(all, m[1])
		}
		return all
	}
	var named []string
	for _, r := range tables[0].Rows {
		name := doctable.Plain(r[0])
		named = append(named, name)
		var fields []string
		message := (&schema.ClientFrame{}).ProtoReflect().Descriptor().Fields().ByName(protoreflect.Name(name)).Message().Fields()
		for i := range message.Len() {
			fields = append(fields, string(message.Get(i).Name()))
		}
		if got := words(r[1]); !slices.Equal(got, fields) {
			t.Errorf("%s has the fields %q, PROTOCOL.md says %q", name, fields, got)
		}
	}
	if !slices.Equal(named, controls[:]) {
		t.Errorf("the socket takes %q, PROTOCOL.md says %q", controls, named)
	}

	said := map[string]any{
		"work_subscribed": sessionSubscribed{}, "work": sessionWork{Cancelled: true}, "work_cancelled": sessionCancelled{}, "work_unsubscribed": sessionChannel{}, "work_refused": sessionRefused{}, "heard": sessionHeard{},
	}
	for _, r := range tables[1].Rows {
		name := doctable.Plain(r[0])
		text, err := json.Marshal(said[name])
		var data map[string]any
		if err != nil || json.Unmarshal(text, &data) != nil {
			t.Errorf("%s is no frame of the socket", name)
			continue
		}
		delete(said, name)
		if name == "work" {
			data["envelope"] = nil
		}
		for _, field := range words(r[1]) {
			if _, ok := data[field]; !ok && field != "WorkGroup" {
				t.Errorf("%s has no field %s", name, field)
			}
			delete(data, field)
		}
		if len(data) > 0 {
			t.Errorf("PROTOCOL.md does not name the fields %v of %s", data, name)
		}
	}
	if len(said) > 0 {
		t.Errorf("PROTOCOL.md does not name %v", said)
	}
}
