package schema

import (
	"bytes"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

var scanTime = time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC)

func testStamp() Stamp { return NewStamp(&Source{Subject: "agent-7", Role: Role_ROLE_AGENT}) }

func mustMarshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func scanToken(text string) *Envelope {
	return &Envelope{Payload: &Envelope_Token{Token: &Token{MessageId: "m1", Channel: Channel_CHANNEL_TEXT, Text: text}}}
}

// stored decodes what an accepted envelope looks like in a frame.
func stored(t *testing.T, a Accepted, seq uint64) *Envelope {
	t.Helper()
	record := a.AppendRecord(nil, seq)
	num, typ, n := protowire.ConsumeTag(record)
	body, m := protowire.ConsumeBytes(record[n:])
	if num != 15 || typ != protowire.BytesType || n+m != len(record) {
		t.Fatalf("not a record of field 15: %x", record)
	}
	if len(record) > a.Size() {
		t.Errorf("the record has %d bytes, Size promised at most %d", len(record), a.Size())
	}
	e := new(Envelope)
	if err := proto.Unmarshal(body, e); err != nil {
		t.Fatal(err)
	}
	return e
}

// A producer is its sender's, whatever the sender says who he is, and whoever reads it finds the same owner.
func TestProducerOwner(t *testing.T) {
	stamps := map[string]Stamp{
		"agent": testStamp(), "user": NewStamp(&Source{Subject: "agent-7", Role: Role_ROLE_USER}), "other": NewStamp(&Source{Subject: "agent-8", Role: Role_ROLE_AGENT}),
	}
	owners := make(map[string]string)
	for name, stamp := range stamps {
		for _, claimed := range []*Source{nil, {Subject: "agent-7", Role: Role_ROLE_AGENT}} {
			e := scanToken("x")
			e.Producer, e.Source = &Producer{Id: "p", Epoch: 1, Seq: 1}, claimed
			a, err := stamp.Accept(mustMarshal(t, e), scanTime)
			if err != nil {
				t.Fatal(err)
			}
			if again, err := Stored(a.Bytes); err != nil || again.Producer != a.Producer {
				t.Errorf("accepted as %+v, read as %+v, %v", a.Producer, again.Producer, err)
			}
			if of, ok := owners[a.Producer.Owner]; ok && of != name {
				t.Errorf("the %s's producer is taken for the %s's", name, of)
			}
			owners[a.Producer.Owner] = name
		}
	}
	if len(owners) != len(stamps) {
		t.Errorf("%d senders' producers have %d owners", len(stamps), len(owners))
	}
	if a, err := testStamp().Accept(mustMarshal(t, scanToken("x")), scanTime); err != nil || a.Producer != (ProducerPlace{}) {
		t.Errorf("an envelope without a producer has %+v, %v", a.Producer, err)
	}
}

func TestFieldNumbers(t *testing.T) {
	fields := (&Envelope{}).ProtoReflect().Descriptor().Fields()
	for name, num := range map[string]protowire.Number{
		"id": fieldID, "seq": fieldSeq, "time": fieldTime, "source": fieldSource, "producer": fieldProducer,
		"request_id": fieldRequest, "reply_to": fieldReplyTo, "first_seq": fieldFirstSeq,
	} {
		if got := fields.ByNumber(num); got == nil || string(got.Name()) != name {
			t.Errorf("field %d is %v, not %s", num, got, name)
		}
	}
	for name, m := range map[string]proto.Message{"Frame": &Frame{}, "Events": &Events{}, "Publish": &Publish{}, "HandOverRequest": &HandOverRequest{}} {
		if f := m.ProtoReflect().Descriptor().Fields().ByName("envelopes"); f == nil || f.Number() != 15 {
			t.Errorf("%s.envelopes must be field 15: its bytes are copied between these messages", name)
		}
	}
}

func TestAcceptStampsWhatTheSenderLeftOut(t *testing.T) {
	a, err := testStamp().Accept(mustMarshal(t, scanToken("hé")), scanTime)
	if err != nil {
		t.Fatal(err)
	}
	got := stored(t, a, 77)
	want := scanToken("hé")
	want.Id, want.Seq, want.Time = a.ID.String(), 77, timestamppb.New(scanTime)
	want.Source = &Source{Subject: "agent-7", Role: Role_ROLE_AGENT}
	if !proto.Equal(got, want) {
		t.Errorf("stored %v, want %v", got, want)
	}
	if a.Kind != KindToken || !bytes.Equal(a.Payload, mustMarshal(t, want.GetToken())) {
		t.Errorf("kind %v, payload %x", a.Kind, a.Payload)
	}
}

func TestAcceptKeepsWhatTheSenderSaid(t *testing.T) {
	e := scanToken("x")
	e.Id = ulid.Make().String()
	e.Time = timestamppb.New(scanTime.Add(-time.Hour))
	e.RequestId, e.ReplyTo = "r1", new(uint64(3))
	e.Producer = &Producer{Id: "p", Epoch: 2, Seq: 9}
	raw := protowire.AppendVarint(protowire.AppendTag(mustMarshal(t, e), 500, protowire.VarintType), 42)
	a, err := testStamp().Accept(raw, scanTime)
	if err != nil {
		t.Fatal(err)
	}
	if a.ID.String() != e.Id || a.Producer != (ProducerPlace{testStamp().owner, "p", 2, 9}) {
		t.Errorf("id %s, producer %+v", a.ID, a.Producer)
	}
	got := stored(t, a, 5)
	if unknown := got.ProtoReflect().GetUnknown(); len(unknown) == 0 {
		t.Error("a field of a later version did not survive")
	}
	got.ProtoReflect().SetUnknown(nil)
	e.Seq, e.Source = 5, &Source{Subject: "agent-7", Role: Role_ROLE_AGENT}
	if !proto.Equal(got, e) {
		t.Errorf("stored %v, want %v", got, e)
	}
}

// What was read may be sent again as it is, and nobody can speak in another's name.
func TestAcceptReplacesWhatOnlyTheServerSets(t *testing.T) {
	e := scanToken("x")
	e.Seq, e.FirstSeq, e.Source = 12, new(uint64(3)), &Source{Subject: "root", Role: Role_ROLE_ADMIN}
	a, err := testStamp().Accept(mustMarshal(t, e), scanTime)
	if err != nil {
		t.Fatal(err)
	}
	got := stored(t, a, 1)
	if got.Seq != 1 || got.FirstSeq != nil || got.Source.Subject != "agent-7" || got.Source.Role != Role_ROLE_AGENT {
		t.Errorf("stored %v", got)
	}
}

// A field that stands twice must not let a forged value through behind the checks.
func TestAcceptSeesThroughRepeatedFields(t *testing.T) {
	raw := mustMarshal(t, scanToken("first"))
	raw = append(raw, mustMarshal(t, &Envelope{Payload: &Envelope_System{System: &System{Message: "second"}}})...)
	a, err := testStamp().Accept(raw, scanTime)
	if err != nil {
		t.Fatal(err)
	}
	if got := stored(t, a, 1); a.Kind != KindSystem || got.GetSystem().GetMessage() != "second" {
		t.Errorf("kind %v, stored %v", a.Kind, got)
	}
	raw = append(mustMarshal(t, scanToken("x")), mustMarshal(t, scanToken("y"))...)
	if a, err = testStamp().Accept(raw, scanTime); err != nil {
		t.Fatal(err)
	}
	if got := stored(t, a, 1); got.GetToken().GetText() != "y" {
		t.Errorf("stored %v", got)
	}
}

func TestAcceptRefuses(t *testing.T) {
	badUTF8 := mustMarshal(t, scanToken("abc"))
	badUTF8[bytes.Index(badUTF8, []byte("abc"))] = 0xff
	lower := scanToken("x")
	lower.Id = "01jcq8zzzzzzzzzzzzzzzzzzzz"
	for name, c := range map[string]struct {
		raw  []byte
		code Code
	}{
		"nothing":        {nil, Code_CODE_UNKNOWN_TYPE},
		"later payload":  {protowire.AppendBytes(protowire.AppendTag(nil, 900, protowire.BytesType), []byte{}), Code_CODE_UNKNOWN_TYPE},
		"garbage":        {[]byte{0xff, 0xff, 0xff}, Code_CODE_INVALID_MESSAGE},
		"not UTF-8":      {badUTF8, Code_CODE_INVALID_MESSAGE},
		"no message id":  {mustMarshal(t, &Envelope{Payload: &Envelope_Token{Token: &Token{Text: "x"}}}), Code_CODE_INVALID_MESSAGE},
		"lower-case id":  {mustMarshal(t, lower), Code_CODE_INVALID_MESSAGE},
		"id not a ULID":  {mustMarshal(t, &Envelope{Id: "hello", Payload: scanToken("x").Payload}), Code_CODE_INVALID_MESSAGE},
		"no prompt":      {mustMarshal(t, &Envelope{Payload: &Envelope_WaitingForInput{WaitingForInput: &WaitingForInput{}}}), Code_CODE_INVALID_MESSAGE},
		"too large":      {mustMarshal(t, scanToken(string(make([]byte, MaxEnvelopeBytes)))), Code_CODE_TOO_LARGE},
		"producer seq 0": {mustMarshal(t, &Envelope{Producer: &Producer{Id: "p"}, Payload: scanToken("x").Payload}), Code_CODE_INVALID_MESSAGE},
	} {
		if _, err := testStamp().Accept(c.raw, scanTime); CodeOf(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code.Word())
		}
	}
}

// Whatever is accepted is a valid envelope, read the same by the scanner and the decoder.
func FuzzAccept(f *testing.F) {
	e := scanToken("hello")
	e.Producer = &Producer{Id: "p", Epoch: 1, Seq: 1}
	f.Add(mustMarshal(f, e))
	f.Add(mustMarshal(f, &Envelope{Seq: 4, Payload: &Envelope_UserInput{UserInput: &UserInput{ResponseJson: `"yes"`}}}))
	f.Add(append(mustMarshal(f, scanToken("a")), mustMarshal(f, scanToken("b"))...))
	f.Add([]byte{0x42, 0x00})
	stamp := testStamp()
	f.Fuzz(func(t *testing.T, raw []byte) {
		a, err := stamp.Accept(raw, scanTime)
		if err != nil {
			return
		}
		got := stored(t, a, 9)
		if err := got.Validate(); err != nil {
			t.Fatalf("accepted, but %v: %v", err, got)
		}
		if got.Seq != 9 || got.Id != a.ID.String() || got.Kind() != a.Kind || got.GetSource().GetSubject() != "agent-7" || got.GetSource().GetRole() != Role_ROLE_AGENT {
			t.Fatalf("scanned %+v, decoded %v", a, got)
		}
		place := ProducerPlace{ID: got.GetProducer().GetId(), Epoch: got.GetProducer().GetEpoch(), Seq: got.GetProducer().GetSeq()}
		if got.GetProducer() != nil {
			place.Owner = testStamp().owner
		}
		if a.Producer != place {
			t.Fatalf("producer scanned %+v, decoded %+v", a.Producer, place)
		}
		again, err := Scan(mustMarshal(t, got))
		if err != nil || again.Kind != a.Kind || again.ID != a.ID || again.Producer != a.Producer || again.ReplyTo != got.GetReplyTo() {
			t.Fatalf("scanned again: %+v, %v", again, err)
		}
	})
}

func BenchmarkAccept(b *testing.B) {
	stamp := testStamp()
	raw := mustMarshal(b, scanToken(" the tide comes in"))
	b.ReportAllocs()
	for b.Loop() {
		a, err := stamp.Accept(raw, scanTime)
		if err != nil {
			b.Fatal(err)
		}
		benchSink = a.Bytes
	}
}

var benchSink []byte

// The role that an edge stamped is read back without decoding the envelope, whatever the sender said of it.
func TestScannedRole(t *testing.T) {
	for number, name := range Role_name {
		role := Role(number)
		claimed := &Envelope{Source: &Source{Subject: "x", Role: Role_ROLE_ADMIN}, Payload: &Envelope_System{System: &System{Message: "m"}}}
		a, err := NewStamp(&Source{Subject: "somebody", Role: role}).AcceptEnvelope(claimed, time.Unix(1, 0))
		if err != nil {
			t.Fatal(err)
		}
		s, err := Scan(a.Bytes)
		if err != nil || s.Role() != role {
			t.Errorf("%s was read back as %s, %v", name, s.Role(), err)
		}
	}
	var none Scanned
	if none.Role() != Role_ROLE_UNSPECIFIED {
		t.Errorf("without a source it is %s", none.Role())
	}
}
