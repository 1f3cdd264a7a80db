package gateway

import (
	"encoding/json"
	"strconv"
	"strings"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

// sessionCodec speaks the session socket: one envelope in JSON a message. Its control frames have the shape of envelopes, without seq and id:
//
//	{"type":"attached","timestamp":"…","data":{"epoch":"…","first_seq":1,"head_seq":9,"after_seq":4,"status":"running"}}
//	{"type":"published","timestamp":"…","data":{"id":"…","seq":10,"durability":"fsync","epoch":"…"}}
//	{"type":"truncated","timestamp":"…","data":{"wanted_seq":1,"first_seq":5}}
//	{"type":"going_away","timestamp":"…","data":{"reason":"…","grace_ms":1000,"last_seq":9}}
//	{"type":"refreshed","timestamp":"…","data":{"expires":"…"}}
//	{"type":"error","timestamp":"…","data":{"error":"…","details":"…","code":"…"}}
//
// And so have those that a client sends: {"type":"refresh","data":{"token":"…"}}, and what workers say; see parseControl.
type sessionCodec struct{}

func (sessionCodec) receive(c *conn, msg []byte) error {
	e, err := schema.ParseJSON(msg)
	if schema.CodeOf(err) == schema.Code_CODE_UNKNOWN_TYPE {
		if f, is, wrong := parseControl(msg); wrong != nil {
			return wrong
		} else if is {
			return c.receive(f, len(msg))
		}
		if token, is, wrong := parseRefresh(msg); wrong != nil {
			return wrong
		} else if is {
			return c.refresh(token)
		}
	}
	if err != nil {
		return err
	}
	p := c.admit(0, len(msg))
	if p == nil {
		return nil
	}
	if err := c.sessionEnvelope(p, e); err != nil {
		// What may not be sent ends this connection, once all that came before it is answered. This one is not in flight.
		c.drop(p)
		return err
	}
	p.Envelopes = p.one[:]
	// A session that begins here is one run, and ends with it (DESIGN section 7).
	p.Kind = schema.SessionKind_SESSION_KIND_WORKFLOW
	c.submit(p)
	return nil
}

// sessionEnvelope takes the envelope into the publish, where it is one that the peer may send now.
func (c *conn) sessionEnvelope(p *pending, e *schema.Envelope) error {
	if err := c.spend(1, p.came); err != nil {
		return err
	}
	a, err := c.stamp.AcceptEnvelope(e, p.came)
	if err != nil {
		return err
	}
	if err := c.mayPublish(a.Kind); err != nil {
		return err
	}
	p.one[0] = a
	p.noteRun(&a)
	return c.aim(p, nil, 0)
}

// parseRefresh takes the token out of a refresh, where the message, which is valid JSON with a type that is no envelope's, is one. Its errors name keys, never values.
func parseRefresh(msg []byte) (token string, is bool, err error) {
	var m, data map[string]json.RawMessage
	var kind string
	if json.Unmarshal(msg, &m) != nil || json.Unmarshal(m["type"], &kind) != nil || kind != "refresh" {
		return "", false, nil
	}
	wrong := func(sentence string) (string, bool, error) {
		return "", true, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "%s", sentence)
	}
	for key := range m {
		switch key {
		case "type", "timestamp", "data":
		default:
			return wrong("A refresh has type, timestamp and data, and nothing else.")
		}
	}
	switch raw := m["data"]; {
	case raw == nil:
		return wrong("Missing required field 'data'")
	case json.Unmarshal(raw, &data) != nil:
		return wrong("Field 'data' must be an object.")
	}
	switch raw := data["token"]; {
	case raw == nil:
		return wrong("Missing required field 'token'")
	case len(data) > 1:
		return wrong("The data of a refresh has a token, and nothing else.")
	case json.Unmarshal(raw, &token) != nil:
		return wrong("Field 'token' must be a string.")
	}
	return token, true, nil
}

func (sessionCodec) events(w *writer, _ *attachment, b *broker.Batch) {
	for _, v := range b.Views {
		for _, text := range v.Encoded(broker.FormJSON, jsonEnvelope) {
			w.out.buf = append(w.out.buf, text...)
			w.out.end()
		}
		w.envelopes += v.Len()
	}
}

// jsonEnvelope makes the session socket's form of stored bytes.
func jsonEnvelope(raw []byte) []byte { return schema.AppendJSON(nil, decoded(raw)) }

func (sessionCodec) published(w *writer, run []*pending) {
	now := time.Now()
	durability := schema.DurabilityWord(w.c.g.cfg.Log.Status().Durability)
	for _, p := range run {
		out := appendControl(w.out.buf, "published", now)
		out = append(out, `"id":"`...)
		out = append(out, p.Envelopes[0].ID.String()...)
		out = append(out, `","seq":`...)
		out = strconv.AppendUint(out, p.receipt.First, 10)
		out = append(out, `,"durability":"`...)
		out = append(out, durability...)
		out = append(out, '"')
		if p.receipt.Duplicate {
			out = append(out, `,"duplicate":true`...)
		}
		if p.receipt.Replaced {
			out = append(out, `,"replaced":true`...)
		}
		if epoch := p.epochToTell(); epoch != "" {
			out = append(out, `,"epoch":"`...)
			out = append(out, epoch...)
			out = append(out, '"')
		}
		w.out.buf = append(out, "}}"...)
		w.out.end()
	}
}

func (sessionCodec) rejected(w *writer, p *pending) {
	r := p.refusal
	data := sessionError{Error: title(r.Code), Details: r.Message, Code: r.Code.Word(), Retryable: r.Code.Rule().Retryable}
	if len(p.Envelopes) > 0 {
		data.ID = p.Envelopes[0].ID.String()
	}
	switch r.Code {
	case schema.Code_CODE_PRODUCER_GAP, schema.Code_CODE_PRODUCER_FENCED:
		data.Expected = new(r.Expected)
	default:
	}
	appendData(w, "error", data)
}

// The data of control frames.
type (
	sessionAttached struct {
		Epoch    string `json:"epoch"`
		FirstSeq uint64 `json:"first_seq"`
		HeadSeq  uint64 `json:"head_seq"`
		AfterSeq uint64 `json:"after_seq"`
		Status   string `json:"status"`
	}
	sessionTruncated struct {
		WantedSeq uint64 `json:"wanted_seq"`
		FirstSeq  uint64 `json:"first_seq"`
	}
	sessionGoingAway struct {
		Reason  string `json:"reason"`
		GraceMS uint32 `json:"grace_ms"`
		// LastSeq is the cursor to resume from.
		LastSeq uint64 `json:"last_seq"`
	}
	sessionRefreshed struct {
		// Expires is left out where the token does not expire.
		Expires string `json:"expires,omitempty"`
	}
	sessionError struct {
		Error   string `json:"error"`
		Details string `json:"details"`
		Code    string `json:"code"`
		// ID is the envelope's that was not stored.
		ID string `json:"id,omitempty"`
		// Channel is the subscription's that ends.
		Channel uint32 `json:"channel,omitempty"`
		// Retryable: the same, sent again on this connection or the next, may be taken.
		Retryable bool    `json:"retryable,omitempty"`
		Expected  *uint64 `json:"expected,omitempty"`
		HeadSeq   *uint64 `json:"head_seq,omitempty"`
	}
)

func (sessionCodec) frame(w *writer, f *schema.ServerFrame) {
	switch m := f.GetFrame().(type) {
	case *schema.ServerFrame_Attached:
		a := m.Attached
		appendData(w, "attached", sessionAttached{
			Epoch: a.GetEpoch(), FirstSeq: a.GetFirstSeq(), HeadSeq: a.GetHeadSeq(), AfterSeq: a.GetAfterSeq(), Status: schema.StatusWord(standing(a.GetStatus())),
		})
		if held := w.held; held != nil {
			w.held = nil
			w.c.codec.frame(w, held)
		}
	case *schema.ServerFrame_Truncated:
		appendData(w, "truncated", sessionTruncated{WantedSeq: m.Truncated.GetWantedSeq(), FirstSeq: m.Truncated.GetFirstSeq()})
	case *schema.ServerFrame_GoingAway:
		if w.single == nil {
			// Attached comes first.
			w.held = f
			return
		}
		data := sessionGoingAway{Reason: m.GoingAway.GetReason(), GraceMS: m.GoingAway.GetGraceMs()}
		data.LastSeq = w.single.through
		appendData(w, "going_away", data)
	case *schema.ServerFrame_Refreshed:
		var data sessionRefreshed
		if at := m.Refreshed.GetExpires(); at != nil {
			data.Expires = at.AsTime().UTC().Format(time.RFC3339)
		}
		appendData(w, "refreshed", data)
	case *schema.ServerFrame_Error:
		e := m.Error
		appendData(w, "error", sessionError{
			Error: title(e.GetCode()), Details: e.GetMessage(), Code: e.GetCode().Word(), Retryable: e.GetCode().Rule().Retryable, HeadSeq: e.HeadSeq, Channel: e.GetChannel(),
		})
	case *schema.ServerFrame_WorkSubscribed, *schema.ServerFrame_WorkUnsubscribed, *schema.ServerFrame_WorkCancelled, *schema.ServerFrame_WorkRefused, *schema.ServerFrame_Heard:
		appendWork(w, f)
	default:
		// The session socket has no welcome, pong, detached and caught_up.
	}
}

// appendData appends a control frame.
func appendData(w *writer, kind string, data any) {
	text, err := json.Marshal(data)
	if err != nil {
		// Strings and numbers only.
		w.c.fail(err)
		return
	}
	out := appendControl(w.out.buf, kind, time.Now())
	out = append(out[:len(out)-1], text...)
	w.out.buf = append(out, '}')
	w.out.end()
}

// appendControl begins a control frame, up to and with the brace that opens its data.
func appendControl(b []byte, kind string, now time.Time) []byte {
	b = append(b, `{"type":"`...)
	b = append(b, kind...)
	b = append(b, `","timestamp":"`...)
	b = now.UTC().AppendFormat(b, time.RFC3339Nano)
	return append(b, `","data":{`...)
}

// title is an error in two or three words, for people.
func title(c schema.Code) string {
	switch c {
	case schema.Code_CODE_INVALID_MESSAGE, schema.Code_CODE_UNKNOWN_TYPE:
		return "Invalid message format"
	case schema.Code_CODE_TOO_LARGE:
		return "Message too large"
	default:
		words := strings.ReplaceAll(c.Word(), "_", " ")
		return strings.ToUpper(words[:1]) + words[1:]
	}
}

// standing is where a session stands; one without an envelope is open.
func standing(s schema.Status) schema.Status {
	if s == schema.Status_STATUS_UNSPECIFIED {
		return schema.Status_STATUS_OPEN
	}
	return s
}
