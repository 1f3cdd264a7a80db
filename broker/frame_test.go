package broker

import (
	"bytes"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"tidemark/schema"
)

var storedAt = time.Date(2026, 3, 1, 12, 0, 0, 5, time.UTC)

// testFrame is a frame of n tokens from seq first on.
func testFrame(t testing.TB, epoch string, first uint64, n int) (*frame, []byte) {
	t.Helper()
	stamp := schema.NewStamp(&schema.Source{Subject: "a", Role: schema.Role_ROLE_AGENT})
	f := &frame{Edge: "edge-1", ID: "01ARZ3NDEKTSV4RRFFQ69G5FAV", Prev: 7, Kind: schema.SessionKind_SESSION_KIND_WORKFLOW}
	f.Epoch, f.First, f.Count, f.Time = epoch, first, n, storedAt
	b := f.appendHeader(nil)
	from := len(b)
	for i := range n {
		e := &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m", Text: string(rune('a' + i%26))}}}
		a, err := stamp.AcceptEnvelope(e, storedAt)
		if err != nil {
			t.Fatal(err)
		}
		b = a.AppendRecord(b, first+uint64(i))
	}
	f.Region = b[from:]
	return f, b
}

func TestFrameFieldNumbers(t *testing.T) {
	fields := (&schema.Frame{}).ProtoReflect().Descriptor().Fields()
	for name, num := range map[protoreflect.Name]protoreflect.FieldNumber{
		"epoch": frameEpoch, "first_seq": frameFirst, "time": frameTime, "edge": frameEdge, "id": frameID, "prev": framePrev,
		"count": frameCount, "deleted": frameDeleted, "kind": frameKind, "envelopes": frameEnvelopes,
	} {
		if f := fields.ByNumber(num); f == nil || f.Name() != name {
			t.Errorf("field %d is %v, not %s", num, f, name)
		}
	}
}

// What is written by hand is what protobuf reads, and the other way round.
func TestFrameIsSchemaFrame(t *testing.T) {
	f, data := testFrame(t, "E1", 41, 3)
	var m schema.Frame
	if err := proto.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	if m.GetEpoch() != "E1" || m.GetFirstSeq() != 41 || m.GetCount() != 3 || m.GetPrev() != 7 || m.GetKind() != f.Kind || !m.GetTime().AsTime().Equal(storedAt) || len(m.GetEnvelopes()) != 3 {
		t.Errorf("decoded %v", &m)
	}
	if m.GetEnvelopes()[2].GetSeq() != 43 {
		t.Errorf("the third envelope has seq %d", m.GetEnvelopes()[2].GetSeq())
	}
	got, err := parseFrame(data)
	if err != nil {
		t.Fatal(err)
	}
	if got.Epoch != f.Epoch || got.First != f.First || got.Count != f.Count || got.Prev != f.Prev || got.Kind != f.Kind || got.Edge != f.Edge || got.ID != f.ID || !got.Time.Equal(f.Time) || !bytes.Equal(got.Region, f.Region) {
		t.Errorf("parsed %+v, want %+v", got, f)
	}
}

func TestViewsCutWhereRecordsEnd(t *testing.T) {
	f, _ := testFrame(t, "E1", 10, 5)
	for from := uint64(9); from <= 15; from++ {
		v := f.After(from)
		want := from + 1
		for seq, raw := range v.Each() {
			e, err := schema.Scan(raw)
			if err != nil || seq != want || e.Seq != want {
				t.Fatalf("after %d: seq %d holds %d, %v; want %d", from, seq, e.Seq, err, want)
			}
			want++
		}
		if want = max(want, 10); want != 15 && v.Len() > 0 || v.Len() != int(max(0, 14-int64(max(from, 9)))) {
			t.Errorf("after %d: %d envelopes, up to %d", from, v.Len(), want-1)
		}
		for limit := 0; limit <= len(f.Region)+1; limit += 7 {
			cut := v.Limit(limit)
			if v.Len() > 0 && (cut.Len() == 0 || cut.Len() > 1 && len(cut.Records()) > limit) {
				t.Errorf("after %d, limit %d: %d envelopes in %d bytes", from, limit, cut.Len(), len(cut.Records()))
			}
		}
	}
}

func FuzzParseFrame(f *testing.F) {
	_, data := testFrame(f, "E1", 1, 3)
	f.Add(data)
	tombstone := &frame{Deleted: true}
	tombstone.Epoch, tombstone.First = "E1", 4
	f.Add(tombstone.appendHeader(nil))
	f.Add([]byte{0x7a, 0x00})
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parseFrame(data)
		if err != nil {
			return
		}
		n := 0
		for range got.All().Each() {
			n++
		}
		if n != got.Count {
			t.Fatalf("%d envelopes, the frame says %d", n, got.Count)
		}
	})
}
