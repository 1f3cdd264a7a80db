package schema

import (
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"tidemark/internal/doctable"
)

// protocolTables reads the tables of a section of PROTOCOL.md as the rows of all of them, without their heads and backquotes.
func protocolTables(t *testing.T, section string) (rows [][]string) {
	t.Helper()
	tables, err := doctable.Tables("../PROTOCOL.md", section)
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		for _, r := range table.Rows {
			for i := range r {
				r[i] = doctable.Plain(r[i])
			}
			rows = append(rows, r)
		}
	}
	return rows
}

func TestProtocolCodes(t *testing.T) {
	reconnect := map[Reconnect]string{
		Reconnect_RECONNECT_NO: "no", Reconnect_RECONNECT_SAME_CURSOR: "same cursor", Reconnect_RECONNECT_BEGINNING: "beginning",
	}
	rows := map[string][]string{}
	for _, r := range protocolTables(t, "Codes") {
		rows[r[0]] = r
	}
	for c, rule := range rules {
		r := rows[c.Word()]
		if r == nil {
			t.Errorf("code %s has no row in PROTOCOL.md", c.Word())
			continue
		}
		delete(rows, c.Word())
		if r[2] != strconv.Itoa(int(rule.GRPC)) || r[3] != strconv.Itoa(rule.Close) || r[4] != reconnect[rule.Reconnect] {
			t.Errorf("code %s: PROTOCOL.md says %v, the code %+v", c.Word(), r[2:], rule)
		}
		if rule.Retryable != strings.Contains(r[1], "retryable") {
			t.Errorf("code %s: retryable is %v, PROTOCOL.md says %q", c.Word(), rule.Retryable, r[1])
		}
	}
	for word := range rows {
		t.Errorf("PROTOCOL.md has a row for %s, which is no code", word)
	}
}

func TestProtocolLimits(t *testing.T) {
	limits := []int{
		MaxNameBytes, MaxEnvelopeBytes, MaxFrameBytes, MaxPublishEnvelopes, MaxIDBytes, MaxProducerIDBytes, MaxAttachTypes, MaxAttachedSessions, MaxPromptOptions, MaxPromptOptionBytes, MaxSessionMetadataBytes,
		MaxPromptDefaultBytes, MaxOrphanAfterMs, MaxGroupBytes, MaxWorkSessions, MaxWorkCredit, MaxAckWaitMs, MaxDeliveries, MaxBackoffs, MaxBackoffMs, MaxReasonBytes,
	}
	rows := protocolTables(t, "Limits")
	if len(rows) != len(limits) {
		t.Fatalf("PROTOCOL.md has %d limits, the code %d", len(rows), len(limits))
	}
	for i, r := range rows {
		if r[1] != strconv.Itoa(limits[i]) {
			t.Errorf("%s: PROTOCOL.md says %s, the code %d", r[0], r[1], limits[i])
		}
	}
}

func TestProtocolFrames(t *testing.T) {
	rows := map[string]bool{}
	for _, r := range protocolTables(t, "A multiplexed connection") {
		rows[r[0]] = true
	}
	for _, m := range []proto.Message{&ClientFrame{}, &ServerFrame{}} {
		fields := m.ProtoReflect().Descriptor().Oneofs().ByName("frame").Fields()
		for i := range fields.Len() {
			name := string(fields.Get(i).Name())
			if !rows[name] {
				t.Errorf("frame %s has no row in PROTOCOL.md", name)
			}
			delete(rows, name)
		}
	}
	for name := range rows {
		t.Errorf("PROTOCOL.md has a row for %s, which is no frame", name)
	}
}

func TestProtocolTypes(t *testing.T) {
	rows := map[string]string{}
	for _, r := range protocolTables(t, "Payload types") {
		rows[r[1]] = r[0]
	}
	fields := (&Envelope{}).ProtoReflect().Descriptor().Oneofs().ByName("payload").Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if word := Kind(f.Number()).String(); rows[string(f.Name())] != word {
			t.Errorf("payload %s is %q in JSON, PROTOCOL.md says %q", f.Name(), word, rows[string(f.Name())])
		}
	}
	if len(rows) != fields.Len() {
		t.Errorf("PROTOCOL.md has %d payload types, the schema %d", len(rows), fields.Len())
	}
}
