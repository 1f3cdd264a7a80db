package gateway

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"tidemark/broker"
	"tidemark/schema"
)

// What workers say and hear on the session socket: the frames of a multiplexed connection in the socket's shape, their fields named as in wire.proto, numbers as numbers and times in RFC 3339 form.

// controls are the frames that the socket takes in that way, by their names.
var controls = [...]string{"work_subscribe", "work_unsubscribe", "ack", "nack", "in_progress", "term", "heartbeat"} //nolint:gochecknoglobals // a table that nothing writes

// parseControl takes a worker's frame apart, where the message, which is valid JSON with a type that is no envelope's, is one.
func parseControl(msg []byte) (f *schema.ClientFrame, is bool, err error) {
	var m map[string]json.RawMessage
	var kind string
	if json.Unmarshal(msg, &m) != nil || json.Unmarshal(m["type"], &kind) != nil {
		return nil, false, nil
	}
	f = new(schema.ClientFrame)
	var field protoreflect.FieldDescriptor
	for _, name := range controls {
		if name == kind {
			field = f.ProtoReflect().Descriptor().Fields().ByName(protoreflect.Name(name))
		}
	}
	if field == nil {
		return nil, false, nil
	}
	wrong := func(format string, args ...any) (*schema.ClientFrame, bool, error) {
		return nil, true, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, format, args...)
	}
	for key := range m {
		switch key {
		case "type", "timestamp", "data":
		default:
			return wrong("A frame %s has type, timestamp and data, and nothing else.", kind)
		}
	}
	var data map[string]json.RawMessage
	switch raw := m["data"]; {
	case raw == nil:
		return wrong("Missing required field 'data'")
	case json.Unmarshal(raw, &data) != nil || data == nil:
		return wrong("Field 'data' must be an object.")
	}
	for key := range data {
		if field.Message().Fields().ByName(protoreflect.Name(key)) == nil {
			return wrong("Unknown field '%s' in 'data' of %s.", strings.ToValidUTF8(key, "?"), kind)
		}
	}
	body := f.ProtoReflect().Mutable(field).Message().Interface()
	if err := protojson.Unmarshal(m["data"], body); err != nil {
		return nil, true, &schema.Refusal{Code: schema.Code_CODE_INVALID_MESSAGE, Message: dataTrouble(kind, data, field.Message(), err), Err: err}
	}
	return f, true, nil
}

// dataTrouble says which field of a frame's data is wrong, and what it must be; what protojson says where it is not one field that is.
func dataTrouble(kind string, data map[string]json.RawMessage, d protoreflect.MessageDescriptor, err error) string {
	for _, key := range slices.Sorted(maps.Keys(data)) {
		one, failed := json.Marshal(map[string]json.RawMessage{key: data[key]})
		if failed == nil && protojson.Unmarshal(one, dynamicpb.NewMessage(d)) != nil {
			return "Field '" + key + "' in 'data' of " + kind + " must be " + jsonShape(d.Fields().ByName(protoreflect.Name(key))) + "."
		}
	}
	return "The data of " + kind + " is not as it should be: " + jsonTrouble(err)
}

// jsonShape says what a field holds in JSON.
func jsonShape(f protoreflect.FieldDescriptor) string {
	one, many := "a string", "strings"
	switch f.Kind() {
	case protoreflect.BoolKind:
		one, many = "true or false", "true or false"
	case protoreflect.Uint32Kind:
		one, many = "a whole number from 0 to 4294967295", "whole numbers from 0 to 4294967295"
	case protoreflect.Uint64Kind:
		one, many = "a whole number, 0 or more", "whole numbers, 0 or more"
	default:
	}
	if f.IsList() {
		return "an array of " + many
	}
	return one
}

// The data of control frames for workers.
type (
	sessionWork struct {
		Channel uint32 `json:"channel"`
		WorkID  uint64 `json:"work_id"`
		Attempt int    `json:"attempt"`
		// Deadline is by the edge's clock.
		Deadline  string `json:"deadline"`
		Cancelled bool   `json:"cancelled,omitempty"`
	}
	sessionGroup struct {
		Group       string   `json:"group"`
		Kinds       []string `json:"kinds"`
		Sessions    []string `json:"sessions"`
		AckWaitMS   uint64   `json:"ack_wait_ms"`
		MaxDeliver  uint32   `json:"max_deliver"`
		BackoffMS   []uint64 `json:"backoff_ms"`
		Ordered     bool     `json:"ordered"`
		Waiting     uint64   `json:"waiting"`
		InHand      uint64   `json:"in_hand"`
		Redelivered uint64   `json:"redelivered"`
		Created     string   `json:"created,omitempty"`
	}
	sessionSubscribed struct {
		Channel uint32       `json:"channel"`
		Group   sessionGroup `json:"group"`
	}
	sessionChannel struct {
		Channel uint32 `json:"channel"`
	}
	sessionCancelled struct {
		Channel uint32 `json:"channel"`
		WorkID  uint64 `json:"work_id"`
		Seq     uint64 `json:"seq"`
		Reason  string `json:"reason"`
	}
	sessionRefused struct {
		WorkID  uint64 `json:"work_id"`
		Code    string `json:"code"`
		Details string `json:"details"`
	}
	sessionHeard struct {
		RunID string `json:"run_id"`
	}
)

// work says each item in a frame of its own.
func (sessionCodec) work(w *writer, s *subscription, items []*broker.Item) {
	for _, it := range items {
		appendData(w, "work", sessionWork{
			Channel: s.channel, WorkID: it.ID, Attempt: it.Attempt, Deadline: it.Deadline.UTC().Format(time.RFC3339Nano), Cancelled: it.Cancelled,
		})
		// As the socket says envelopes everywhere, byte for byte: behind the rest of the data.
		out := w.out.buf[:len(w.out.buf)-len("}}")]
		out = append(out, `,"envelope":`...)
		out = append(out, jsonEnvelope(it.Envelope)...)
		w.out.buf = append(out, "}}"...)
		w.out.ends[len(w.out.ends)-1] = len(w.out.buf)
	}
}

// appendWork appends what is said to workers beside their items.
func appendWork(w *writer, f *schema.ServerFrame) {
	switch m := f.GetFrame().(type) {
	case *schema.ServerFrame_WorkSubscribed:
		g := m.WorkSubscribed.GetGroup()
		data := sessionSubscribed{Channel: m.WorkSubscribed.GetChannel(), Group: sessionGroup{
			Group: g.GetGroup(), Kinds: append([]string{}, g.GetKinds()...), Sessions: append([]string{}, g.GetSessions()...), AckWaitMS: g.GetAckWaitMs(), MaxDeliver: g.GetMaxDeliver(), BackoffMS: append([]uint64{}, g.GetBackoffMs()...), Ordered: g.GetOrdered(),
			Waiting: g.GetWaiting(), InHand: g.GetInHand(), Redelivered: g.GetRedelivered(),
		}}
		if at := g.GetCreated(); at != nil {
			data.Group.Created = at.AsTime().UTC().Format(time.RFC3339Nano)
		}
		appendData(w, "work_subscribed", data)
	case *schema.ServerFrame_WorkUnsubscribed:
		appendData(w, "work_unsubscribed", sessionChannel{m.WorkUnsubscribed.GetChannel()})
	case *schema.ServerFrame_WorkCancelled:
		c := m.WorkCancelled
		appendData(w, "work_cancelled", sessionCancelled{Channel: c.GetChannel(), WorkID: c.GetWorkId(), Seq: c.GetSeq(), Reason: c.GetReason()})
	case *schema.ServerFrame_WorkRefused:
		r := m.WorkRefused
		appendData(w, "work_refused", sessionRefused{WorkID: r.GetWorkId(), Code: r.GetCode().Word(), Details: r.GetMessage()})
	case *schema.ServerFrame_Heard:
		appendData(w, "heard", sessionHeard{RunID: m.Heard.GetRunId()})
	}
}
