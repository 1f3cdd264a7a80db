package main

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
)

type law struct{ of, may, why string }

// own is the import law for packages of ours: what each folder may import beside itself ("*": everything). Tests may import what they like.
var own = []law{
	{"schema", "", "the words stand below everything, so that anybody may speak them"},
	{"broker", "schema", "the promises know the words, and neither transports nor processes"},
	{"internal/natsd", "schema", "it boots a server of a durability class and knows nothing of what is stored in it"},
	{"internal/auth", "schema", "who may do what is decided from the words alone"},
	{"internal/gateway", "broker schema internal/auth", "one state machine serves every transport, so it knows none"},
	{"edge-ws", "internal/gateway internal/auth broker schema", "edges stand side by side on the gateway; neither knows the other"},
	{"edge-grpc", "internal/gateway internal/auth broker schema", "edges stand side by side on the gateway; neither knows the other"},
	{"replay", "schema internal/client internal/recording", "it reads the log for people, through an edge as any client would, and serves nobody"},
	{"bench", "schema", "it loads over sockets only, as a client from outside would"},
	{"internal/client", "schema", "it knows of an edge what the protocol says"},
	{"internal/recording", "schema", "it says in our words what providers streamed"},
	{"internal/demo", "broker internal/auth internal/client internal/natsd internal/recording schema", "it starts edges as processes, so that it can kill them"},
	{"internal/doctable", "", "it reads our pages for tests, whatever they compare them with"},
	{"internal/world", "*", "the test world boots everything"},
	{".", "*", "the binary puts everything together"},
}

// foreign is the import law for modules of others: which folders alone may import them.
var foreign = []law{
	{"github.com/nats-io/nats-server/", "internal/natsd", "a second place would be a second configuration of the server"},
	{"github.com/nats-io/nats.go", "broker bench internal/natsd", "promises have one keeper; the bench measures raw JetStream beside us, and a server is asked one question before it counts as started"},
	{"github.com/coder/websocket", "edge-ws internal/client internal/world bench", "WebSocket ends at its edge; the others are clients of it"},
	{"google.golang.org/grpc", "edge-grpc internal/client internal/world bench", "gRPC ends at its edge; the others are clients of it"},
	{"connectrpc.com/", "edge-grpc internal/client internal/world bench schema", "the same; schema holds the generated stubs"},
}

// TestImportLaw reads what every file imports: downward only, edges side by side, NATS in one place.
func TestImportLaw(t *testing.T) {
	// row is the place in own of the longest folder that holds dir, -1 where none does.
	row := func(dir string) int {
		for ; ; dir = path.Dir(dir) {
			i := slices.IndexFunc(own, func(l law) bool { return l.of == dir })
			if i >= 0 || !strings.Contains(dir, "/") {
				return i
			}
		}
	}
	eachFile(t, func(name string, source []byte, file *ast.File) {
		if strings.HasSuffix(name, "_test.go") {
			return
		}
		from := row(path.Dir(name))
		if from < 0 {
			t.Errorf("%s has no row in the import law; say in layers_test.go where it stands", name)
			return
		}
		for _, spec := range file.Imports {
			imported := strings.Trim(spec.Path.Value, `"`)
			if dir, ours := strings.CutPrefix(imported, "tidemark/"); ours {
				to, may := row(dir), strings.Fields(own[from].may)
				if to != from && own[from].may != "*" && (to < 0 || !slices.Contains(may, own[to].of)) {
					t.Errorf("%s imports %s: %s may not, because %s", name, imported, own[from].of, own[from].why)
				}
			}
			for _, l := range foreign {
				if strings.HasPrefix(imported, l.of) && !slices.Contains(strings.Fields(l.may), own[from].of) {
					t.Errorf("%s imports %s: only %s may, because %s", name, imported, l.may, l.why)
				}
			}
		}
	})
}

// TestRooms keeps files small enough to hold in the head, and packages named for what they do.
func TestRooms(t *testing.T) {
	eachFile(t, func(name string, source []byte, file *ast.File) {
		if lines := bytes.Count(source, []byte("\n")); lines > 600 && !ast.IsGenerated(file) {
			t.Errorf("%s has %d lines; more than 600 are two concerns: split it by what they do", name, lines)
		}
		if slices.Contains([]string{"util", "utils", "common", "helper", "helpers", "manager", "types", "base", "misc", "pkg"}, file.Name.Name) {
			t.Errorf("%s: %q does not say what the package does", name, file.Name.Name)
		}
	})
}

// eachFile calls see with every Go file of the module, its imports and comments parsed. Reading the files here, rather than asking the go command, lets the
// test cache notice when one of them changes.
func eachFile(t *testing.T, see func(name string, source []byte, file *ast.File)) {
	t.Helper()
	seen := 0
	err := fs.WalkDir(os.DirFS("."), ".", func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (name == "tools" || strings.HasPrefix(entry.Name(), ".") && name != "." || entry.Name() == "node_modules" || entry.Name() == "testdata"):
			return fs.SkipDir // another module, and what is no code of ours
		case entry.IsDir() || path.Ext(name) != ".go":
			return nil
		}
		source, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, source, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		seen++
		see(name, source, file)
		return nil
	})
	if err != nil || seen == 0 {
		t.Fatalf("read %d files of the module: %v", seen, err)
	}
}
