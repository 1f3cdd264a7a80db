package edgews

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"

	"tidemark/internal/auth"
)

var rewrite = flag.Bool("rewrite", false, "write the transcripts in testdata/session anew")

// TestTranscripts plays each script of testdata/session and compares what every client was sent, frame by frame, with what stands there. The lines at the margin are the script:
//
//	NAME (ROLE) opens [QUERY]   opens a session socket; the role is named once
//	NAME sends MESSAGE
//	NAME cut                    loses the connection
//	wait DURATION
//
// Below each stand the frames that it brought to each client, once nothing moves any more: envelopes with their seq, control frames without. The answers to what a client sent stand first: they may come before,
// between or behind the envelopes. Ids and times are left out; epochs are E1, E2 …
func TestTranscripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/session/*.txt")
	if err != nil || len(scripts) < 10 {
		t.Fatal(scripts, err)
	}
	for _, path := range scripts {
		t.Run(filepath.Base(path), func(t *testing.T) {
			script, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var got string
			bubble(t, nil, func(w *world) { got = play(w, string(script)) })
			if *rewrite {
				if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != string(script) {
				g, s := strings.Split(got, "\n"), strings.Split(string(script), "\n")
				for i := range min(len(g), len(s)) {
					if g[i] != s[i] {
						t.Fatalf("line %d is\n%s\nwant\n%s\n\nall of it:\n%s", i+1, g[i], s[i], got)
					}
				}
				t.Fatalf("it has %d lines, want %d:\n%s", len(g), len(s), got)
			}
		})
	}
}

// actor is a client of a script.
type actor struct {
	name, token string
	c           *client
	gone        chan struct{} // closed when the reader of c has ended

	mu   sync.Mutex // guards all below
	told [2][]string
	cut  bool
}

// play plays a script and returns it with what was seen.
func play(w *world, script string) string {
	var out strings.Builder
	actors, order, epochs := map[string]*actor{}, []*actor(nil), &epochNames{}
	for line := range strings.Lines(script) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, " ") {
			continue
		}
		fmt.Fprintln(&out, line)
		name, rest, _ := strings.Cut(line, " ")
		if name == "" || name == "#" {
			continue
		}
		if name == "wait" {
			d, err := time.ParseDuration(rest)
			if err != nil {
				w.Fatal(err)
			}
			time.Sleep(d)
		} else {
			a := actors[name]
			if a == nil {
				role, more, ok := strings.Cut(strings.TrimPrefix(rest, "("), ") ")
				if !ok {
					w.Fatalf("%q: nobody has that name", line)
				}
				rest = more
				a = &actor{name: name, token: as(w, name, auth.ParseRole(role))}
				actors[name], order = a, append(order, a)
			}
			a.do(w, rest, epochs)
		}
		synctest.Wait()
		for _, a := range order {
			a.mu.Lock()
			for _, kind := range a.told {
				for _, told := range kind {
					fmt.Fprintf(&out, "    %s <- %s\n", a.name, told)
				}
			}
			a.told = [2][]string{}
			a.mu.Unlock()
		}
	}
	for _, a := range order {
		a.leave()
	}
	return out.String()
}

// do is one line of the script.
func (a *actor) do(w *world, line string, epochs *epochNames) {
	verb, rest, _ := strings.Cut(line, " ")
	switch verb {
	case "opens":
		a.leave()
		a.cut = false
		a.c = w.ui(a.token, "sessionName=s&"+epochs.real(rest))
		a.gone = make(chan struct{})
		go a.listen(w, a.c, epochs)
	case "sends":
		// Where the edge has closed the connection, what it said stands in the transcript.
		_ = a.c.c.Write(w.Context(), websocket.MessageText, []byte(rest))
	case "cut":
		a.leave()
	default:
		w.Fatalf("%q is no verb", verb)
	}
}

// leave loses the connection, if there is one.
func (a *actor) leave() {
	if a.c == nil {
		return
	}
	a.mu.Lock()
	a.cut = true
	a.mu.Unlock()
	_ = a.c.c.CloseNow()
	<-a.gone
	a.c = nil
}

// listen notes what the client is sent.
func (a *actor) listen(w *world, c *client, epochs *epochNames) {
	defer close(a.gone)
	for {
		_, b, err := c.c.Read(w.Context())
		a.mu.Lock()
		if err != nil {
			var ce websocket.CloseError
			if errors.As(err, &ce) {
				reason, _, _ := strings.Cut(ce.Reason, ":")
				a.told[1] = append(a.told[1], fmt.Sprintf("closed %d %s", ce.Code, reason))
			} else if !a.cut {
				a.told[1] = append(a.told[1], "lost: "+err.Error())
			}
			a.mu.Unlock()
			return
		}
		text, answer := seen(b, epochs)
		if answer {
			a.told[0] = append(a.told[0], text)
		} else {
			a.told[1] = append(a.told[1], text)
		}
		a.mu.Unlock()
	}
}

// seen is a frame as a transcript has it, and whether it answers what the client sent.
func seen(b []byte, epochs *epochNames) (text string, answer bool) {
	var m struct {
		Type, Timestamp, ID string
		Seq                 uint64
		Source              struct{ Subject, Role string }
		Data                json.RawMessage
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return fmt.Sprintf("no JSON: %s", b), false
	}
	if _, err := time.Parse(time.RFC3339Nano, m.Timestamp); err != nil || (m.ID != "") != (m.Seq > 0) {
		return fmt.Sprintf("not of the shape of a frame: %s", b), false
	}
	if m.Seq > 0 {
		return fmt.Sprintf("%d %s by %s %s", m.Seq, m.Type, m.Source.Subject, m.Data), false
	}
	var d struct {
		Epoch, Status, Code, Error, Details, ID, Durability string
		FirstSeq                                            uint64 `json:"first_seq"`
		HeadSeq                                             uint64 `json:"head_seq"`
		AfterSeq                                            uint64 `json:"after_seq"`
		Seq                                                 uint64
		Duplicate, Replaced, Retryable                      bool
		Expected                                            *uint64
	}
	if err := json.Unmarshal(m.Data, &d); err != nil {
		return fmt.Sprintf("data: %v: %s", err, b), false
	}
	switch m.Type {
	case "attached":
		return fmt.Sprintf("attached %s, first %d, head %d, after %d, %s", epochs.name(d.Epoch), d.FirstSeq, d.HeadSeq, d.AfterSeq, d.Status), false
	case "published":
		text = fmt.Sprintf("published as %d", d.Seq)
		if d.Duplicate {
			text += ", duplicate"
		}
		if d.Replaced {
			text += ", replaced"
		}
		return text, true
	case "error":
		text = fmt.Sprintf("error %s: %s", d.Code, d.Error)
		if d.Expected != nil {
			text += fmt.Sprintf(", expected %d", *d.Expected)
		}
		if d.Details == "" {
			text += ", without details"
		}
		return text, d.ID != ""
	default:
		return m.Type + " " + string(m.Data), false
	}
}

// epochNames names histories in the order in which they were seen.
type epochNames struct {
	mu    sync.Mutex
	order []string
}

func (e *epochNames) name(epoch string) string {
	if epoch == "" {
		return "no history"
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, known := range e.order {
		if known == epoch {
			return fmt.Sprint("E", i+1)
		}
	}
	e.order = append(e.order, epoch)
	return fmt.Sprint("E", len(e.order))
}

// real puts the histories into a query.
func (e *epochNames) real(query string) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, epoch := range e.order {
		query = strings.ReplaceAll(query, fmt.Sprint("epoch=E", i+1), "epoch="+epoch)
	}
	return query
}
