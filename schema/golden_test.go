package schema

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// The bytes under testdata/golden must be read for ever. Each file is one message with every field set, one file for each member of a oneof:
// Envelope.token.binpb, Frame.binpb; beside it the same message in its JSON form, so that a field that changed its name or number is seen too.
//
// -rewrite writes the files that are missing and leaves the others alone. A message that got a field after a release needs a directory of its own: raise goldenVersion. Before
// the first release, delete the file.
var rewrite = flag.Bool("rewrite", false, "write the golden files that are missing")

const (
	goldenDir     = "testdata/golden"
	goldenVersion = "v1"
)

// goldenMessages makes every message of our files, by the name of its golden file without the suffix.
func goldenMessages() map[string]proto.Message {
	all := make(map[string]proto.Message)
	for _, file := range []protoreflect.FileDescriptor{
		File_tidemark_v1_envelope_proto, File_tidemark_v1_frame_proto, File_tidemark_v1_wire_proto, File_tidemark_v1_service_proto,
	} {
		for i := range file.Messages().Len() {
			md := file.Messages().Get(i)
			var members []protoreflect.FieldDescriptor
			for j := range md.Oneofs().Len() {
				if oneof := md.Oneofs().Get(j); !oneof.IsSynthetic() {
					for k := range oneof.Fields().Len() {
						members = append(members, oneof.Fields().Get(k))
					}
				}
			}
			if members == nil {
				all[string(md.Name())] = fullMessage(md, nil)
			}
			for _, member := range members {
				all[string(md.Name())+"."+string(member.Name())] = fullMessage(md, member)
			}
		}
	}
	return all
}

// fullMessage has every field set, and of a oneof the given member, or the first.
func fullMessage(md protoreflect.MessageDescriptor, member protoreflect.FieldDescriptor) proto.Message {
	mt, err := protoregistry.GlobalTypes.FindMessageByName(md.FullName())
	if err != nil {
		panic(err)
	}
	m := mt.New()
	for i := range md.Fields().Len() {
		f := md.Fields().Get(i)
		if oneof := f.ContainingOneof(); oneof != nil && !oneof.IsSynthetic() {
			if member == nil && f != oneof.Fields().Get(0) || member != nil && f != member {
				continue
			}
		}
		switch {
		case f.IsList():
			list := m.Mutable(f).List()
			list.Append(fullValue(md, f, 1))
			list.Append(fullValue(md, f, 2))
		default:
			m.Set(f, fullValue(md, f, 1))
		}
	}
	return m.Interface()
}

func fullValue(md protoreflect.MessageDescriptor, f protoreflect.FieldDescriptor, nth uint64) protoreflect.Value {
	n := uint64(f.Number())*100 + nth
	switch f.Kind() {
	case protoreflect.StringKind:
		switch {
		case md.Name() == "Envelope" && f.Name() == "id":
			return protoreflect.ValueOfString("01JBVABCDEFGHJKMNPQRSTVWXY")
		case strings.HasSuffix(string(f.Name()), "_json"):
			return protoreflect.ValueOfString(`{"z":12345678901234567890, "a":["` + string(f.Name()) + `",1.0]}`)
		}
		return protoreflect.ValueOfString(string(f.Name()) + " ünd \"" + string(rune('0'+nth)) + "\"")
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{0, 0xff, byte(n)})
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(1<<60 + n)
	case protoreflect.Int64Kind, protoreflect.Sint64Kind:
		if md.FullName() == "google.protobuf.Timestamp" {
			return protoreflect.ValueOfInt64(1762250415)
		}
		return protoreflect.ValueOfInt64(-int64(n))
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(n))
	case protoreflect.Int32Kind, protoreflect.Sint32Kind:
		return protoreflect.ValueOfInt32(int32(n))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(0.25)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(f.Enum().Values().Get(f.Enum().Values().Len() - 1).Number())
	case protoreflect.MessageKind:
		return protoreflect.ValueOfMessage(fullMessage(f.Message(), nil).ProtoReflect())
	}
	panic("no value for a field of kind " + f.Kind().String())
}

// formOf is the JSON form beside a golden file: an envelope's own, protobuf's for what goes over a connection in it.
func formOf(t *testing.T, m proto.Message) []byte {
	t.Helper()
	if e, ok := m.(*Envelope); ok {
		return append(AppendJSON(nil, e), '\n')
	}
	form, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	// protojson varies its white space on purpose.
	var compact bytes.Buffer
	if err := json.Compact(&compact, form); err != nil {
		t.Fatal(err)
	}
	return append(compact.Bytes(), '\n')
}

func writeMissing(t *testing.T) {
	t.Helper()
	dir := filepath.Join(goldenDir, goldenVersion)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, m := range goldenMessages() {
		raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		for path, content := range map[string][]byte{
			filepath.Join(dir, name+".binpb"): raw,
			filepath.Join(dir, name+".json"):  formOf(t, m),
		} {
			if _, err := os.Stat(path); err == nil {
				continue
			}
			if err := os.WriteFile(path, content, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func goldenPaths(t testing.TB) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(goldenDir, "*", "*.binpb"))
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// goldenForms are the JSON forms of the golden envelopes.
func goldenForms(t testing.TB) [][]byte {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(goldenDir, "*", "Envelope.*.json"))
	if err != nil {
		t.Fatal(err)
	}
	var forms [][]byte
	for _, path := range paths {
		forms = append(forms, readFile(t, path))
	}
	return forms
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Old bytes are read, mean what they meant, and are written as they were.
func TestGolden(t *testing.T) {
	if *rewrite {
		writeMissing(t)
	}
	set := make(map[protoreflect.FullName]bool)
	seen := make(map[string]bool)
	for _, path := range goldenPaths(t) {
		name := strings.TrimSuffix(filepath.Base(path), ".binpb")
		seen[name] = true
		t.Run(name, func(t *testing.T) {
			message, _, _ := strings.Cut(name, ".")
			mt, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName("tidemark.v1." + message))
			if err != nil {
				t.Fatalf("%s: the message is gone: %v", path, err)
			}
			raw := readFile(t, path)
			m := mt.New().Interface()
			if err := proto.Unmarshal(raw, m); err != nil {
				t.Fatal(err)
			}
			noteFields(t, m.ProtoReflect(), set)
			again, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(raw, again) {
				t.Errorf("encoded again:\n%x\nit was\n%x", again, raw)
			}
			checkGoldenForm(t, m, readFile(t, strings.TrimSuffix(path, ".binpb")+".json"))
		})
	}
	for name, m := range goldenMessages() {
		if !seen[name] {
			t.Errorf("no golden file for %s: go test ./schema -run TestGolden -rewrite", name)
		}
		fields := m.ProtoReflect().Descriptor().Fields()
		for i := range fields.Len() {
			if f := fields.Get(i).FullName(); !set[f] {
				t.Errorf("no golden file has the field %s; see the comment of -rewrite", f)
			}
		}
	}
}

// noteFields notes which fields are set, at any depth. None may be unknown: it would be a field that was removed or changed its type.
func noteFields(t *testing.T, m protoreflect.Message, set map[protoreflect.FullName]bool) {
	t.Helper()
	if u := m.GetUnknown(); len(u) > 0 {
		t.Errorf("%s has fields that are no longer known: %x", m.Descriptor().FullName(), u)
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		set[f.FullName()] = true
		switch {
		case f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				noteFields(t, v.List().Get(i).Message(), set)
			}
		default:
			noteFields(t, v.Message(), set)
		}
		return true
	})
}

func checkGoldenForm(t *testing.T, m proto.Message, form []byte) {
	t.Helper()
	if e, ok := m.(*Envelope); ok {
		back, err := ParseJSON(form)
		if err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(e, back) {
			t.Errorf("the JSON form means something else:\n%v\n%v", back, e)
		}
		if got := append(AppendJSON(nil, e), '\n'); !bytes.Equal(got, form) {
			t.Errorf("the JSON form is\n%s\nit was\n%s", got, form)
		}
		return
	}
	back := m.ProtoReflect().New().Interface()
	if err := protojson.Unmarshal(form, back); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(m, back) {
		t.Errorf("the JSON form means something else:\n%v\n%v", back, m)
	}
}
