package schema

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// Every payload of the descriptor is a kind, and nothing else is; payloads and other fields keep to their ranges of numbers.
func TestKinds(t *testing.T) {
	t.Parallel()
	fields := new(Envelope).ProtoReflect().Descriptor().Fields()
	var kinds []Kind
	for i := range fields.Len() {
		f := fields.Get(i)
		kind := Kind(f.Number())
		payload := f.ContainingOneof() != nil && f.ContainingOneof().Name() == "payload"
		if payload != IsPayload(int32(f.Number())) {
			t.Errorf("field %s has the number %d; payloads have 8–13 and 16–99, and no other field has", f.Name(), f.Number())
		}
		if payload != kind.Known() {
			t.Errorf("field %s: Known() = %v", f.Name(), kind.Known())
		}
		if !payload {
			continue
		}
		kinds = append(kinds, kind)
		want := string(f.Name())
		if kind == KindWaitingForInput {
			want = "workflow_waiting_for_input"
		}
		e := &Envelope{Payload: newPayload(kind)}
		if e.Kind() != kind || e.Type() != want || !e.ProtoReflect().Has(f) {
			t.Errorf("field %s: kind %d, type %s", f.Name(), e.Kind(), e.Type())
		}
		for _, name := range []string{string(f.Name()), kind.String()} {
			if k, err := ParseType(name); err != nil || k != kind {
				t.Errorf("ParseType(%q) = %d, %v", name, k, err)
			}
		}
	}
	slices.Sort(kinds)
	if !slices.Equal(kinds, Kinds()) {
		t.Errorf("Kinds() = %v, the descriptor has %v", Kinds(), kinds)
	}
}

func TestUnknownKinds(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "unknown", "nope", "Token", "payload", "seq", strings.Repeat("x", 100)} {
		if k, err := ParseType(name); CodeOf(err) != Code_CODE_UNKNOWN_TYPE {
			t.Errorf("ParseType(%q) = %v, %v", name, k, err)
		}
	}
	for _, k := range []Kind{-1, 0, 7, 14, 15, 28, 1 << 30} {
		if k.Known() || k.String() != "unknown" {
			t.Errorf("kind %d is %s", k, k)
		}
	}
	var none *Envelope
	if none.Kind() != 0 || none.Type() != "unknown" {
		t.Error("a nil envelope has a kind")
	}
}

// The words of the JSON form are the names of the descriptor, in lower case and without their prefix.
func TestWords(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		enum   protoreflect.EnumDescriptor
		prefix string
		words  []string
	}{
		{Channel(0).Descriptor(), "CHANNEL_", channelWords[:]},
		{SessionKind(0).Descriptor(), "SESSION_KIND_", sessionKindWords[:]},
		{Status(0).Descriptor(), "STATUS_", statusWords[:]},
		{Role(0).Descriptor(), "ROLE_", roleWords[:]},
	} {
		if got := row.enum.Values().Len(); got != len(row.words) {
			t.Errorf("%s has %d values and %d words", row.enum.Name(), got, len(row.words))
		}
		for i := range row.enum.Values().Len() {
			v := row.enum.Values().Get(i)
			want := strings.ToLower(strings.TrimPrefix(string(v.Name()), row.prefix))
			if v.Number() == 0 {
				want = ""
			}
			if got := row.words[v.Number()]; got != want {
				t.Errorf("%s: the word is %q", v.Name(), got)
			}
		}
	}
}
