package bench

import (
	"bytes"
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

func TestTemplateIsOneTokenInAFrame(t *testing.T) {
	for _, size := range []int{minTokenBytes, 110, 128, 129, 200, 1000, 70_000} {
		tm, err := newTemplate("bench-äöü", size)
		if err != nil {
			t.Fatal(err)
		}
		var out []byte
		numbers := []uint64{1, 127, 128, 16_383, 16_384, 1 << 40}
		for _, n := range numbers {
			out = tm.append(out, n, n*1000)
		}
		s := &socket{in: append(out, 0), to: len(out)} // read back as a server would, whose frames have no mask
		for _, n := range numbers {
			s.in[s.from+1] &^= 0x80
			fin, op, payload, err := s.frame()
			if err != nil || !fin || op != opBinary || !bytes.Equal(payload[:4], []byte{0, 0, 0, 0}) {
				t.Fatalf("size %d, number %d: %v %v %v", size, n, fin, op, err)
			}
			// What the reader took for the payload begins with the mask and ends four bytes early.
			body := s.in[s.from-len(payload)+4 : s.from+4]
			s.from += 4
			f := new(schema.ClientFrame)
			if err := proto.Unmarshal(body, f); err != nil {
				t.Fatal(err)
			}
			p := f.GetPublish()
			if p.GetPublishId() != n || p.GetSession() != "bench-äöü" || len(p.GetEnvelopes()) != 1 {
				t.Fatalf("size %d, number %d: %v", size, n, p)
			}
			e := p.GetEnvelopes()[0]
			// A length of more bytes may leave a few.
			if got := proto.Size(e); got > size || got < size-4 {
				t.Errorf("the envelope has %d bytes, want %d", got, size)
			}
			if err := e.Validate(); err != nil {
				t.Errorf("size %d: %v", size, err)
			}
			number, sent, ok := stamp([]byte(e.GetToken().GetText()))
			if number != n || sent != n*1000 || !ok {
				t.Errorf("stamp %d %d %v, want %d %d", number, sent, ok, n, n*1000)
			}
		}
	}
	if _, err := newTemplate("s", minTokenBytes-1); err == nil {
		t.Error("a token that has no room for its stamp is accepted")
	}
}

// stored is an envelope as it comes out of the log.
func stored(seq uint64, text string) *schema.Envelope {
	return &schema.Envelope{
		Id: "01ARZ3NDEKTSV4RRFFQ69G5FAV", Seq: seq, Time: timestamppb.Now(), Source: &schema.Source{Subject: "bench", Role: schema.Role_ROLE_AGENT},
		Producer: &schema.Producer{Id: "p", Epoch: 1, Seq: seq}, RequestId: "r", Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "m", Channel: schema.Channel_CHANNEL_TEXT, Text: text}},
	}
}

func encode(t testing.TB, f *schema.ServerFrame) []byte {
	t.Helper()
	b, err := proto.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func events(envelopes ...*schema.Envelope) *schema.ServerFrame {
	return &schema.ServerFrame{Frame: &schema.ServerFrame_Events{Events: &schema.Events{Channel: 7, ThroughSeq: 300, Epoch: "01ARZ3NDEKTSV4RRFFQ69G5FAV", Envelopes: envelopes}}}
}

func TestEachEnvelope(t *testing.T) {
	long := string(bytes.Repeat([]byte("x"), 300))
	msg := encode(t, events(stored(1, "a"), stored(300, long), &schema.Envelope{Seq: 301, Payload: &schema.Envelope_System{System: &schema.System{Message: "m"}}}))
	var got []string
	ok, err := eachEnvelope(msg, func(seq uint64, text []byte) { got = append(got, fmt.Sprint(seq, string(text))) })
	if want := []string{"1a", "300" + long, "301"}; err != nil || !ok || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v %v %v, want %v", got, ok, err, want)
	}
	other := encode(t, &schema.ServerFrame{Frame: &schema.ServerFrame_CaughtUp{CaughtUp: &schema.CaughtUp{Channel: 1}}})
	if ok, err := eachEnvelope(other, nil); ok || err != nil {
		t.Errorf("another frame: %v %v", ok, err)
	}
	for n := range msg {
		if n > 0 {
			if _, err := eachEnvelope(msg[:n], func(uint64, []byte) {}); err == nil {
				t.Fatalf("a message that was cut after %d bytes is taken for a whole one", n)
			}
		}
	}
}

func TestEachAck(t *testing.T) {
	msg := encode(t, &schema.ServerFrame{Frame: &schema.ServerFrame_Published{Published: &schema.Published{Durability: schema.Durability_DURABILITY_OS, Acks: []*schema.Ack{
		{PublishId: 1, FirstSeq: 2, LastSeq: 3, Epoch: "e"}, {PublishId: 1 << 33, FirstSeq: 300, LastSeq: 300, Duplicate: true}, {},
	}}}})
	var got string
	ok, err := eachAck(msg, func(id, seq uint64, duplicate bool) { got += fmt.Sprint(id, seq, duplicate, ";") })
	if want := "1 2 false;8589934592 300 true;0 0 false;"; err != nil || !ok || got != want {
		t.Errorf("got %q %v %v, want %q", got, ok, err, want)
	}
	if ok, err := eachAck(encode(t, events(stored(1, "a"))), nil); ok || err != nil {
		t.Errorf("another frame: %v %v", ok, err)
	}
}

// FuzzFrames: whatever comes, the readers say no or say what protobuf says.
func FuzzFrames(f *testing.F) {
	f.Add(encode(f, events(stored(1, "a"), stored(2, "b"))))
	f.Add(encode(f, &schema.ServerFrame{Frame: &schema.ServerFrame_Published{Published: &schema.Published{Acks: []*schema.Ack{{PublishId: 1, FirstSeq: 2}}}}}))
	f.Fuzz(func(t *testing.T, msg []byte) {
		_, _ = eachAck(msg, func(uint64, uint64, bool) {})
		var seqs []uint64
		var texts []string
		ok, err := eachEnvelope(msg, func(seq uint64, text []byte) { seqs, texts = append(seqs, seq), append(texts, string(text)) })
		frame := new(schema.ServerFrame)
		if !ok || err != nil || proto.Unmarshal(msg, frame) != nil {
			return
		}
		// Fields that stand twice are for protobuf to merge; no edge writes them so.
		if again, err := proto.Marshal(frame); err != nil || len(again) != len(msg) {
			return
		}
		envelopes := frame.GetEvents().GetEnvelopes()
		if len(envelopes) != len(seqs) {
			t.Fatalf("%d envelopes, protobuf has %d", len(seqs), len(envelopes))
		}
		for i, e := range envelopes {
			if e.GetSeq() != seqs[i] || e.GetToken().GetText() != texts[i] {
				t.Fatalf("envelope %d: %d %q, protobuf has %d %q", i, seqs[i], texts[i], e.GetSeq(), e.GetToken().GetText())
			}
		}
	})
}
