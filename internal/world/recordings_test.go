package world

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"

	"tidemark/internal/client"
	"tidemark/internal/recording"
	"tidemark/schema"
)

// streams is where recorded answers of language models are, beside the repository.
const streams = "../../../shared/data/llm-streams"

// pace is the time between two envelopes: quicker than any model, slow enough for each to be on its own way.
const pace = 500 * time.Microsecond

// eachRecording runs a test for each of them.
func eachRecording(t *testing.T, test func(t *testing.T, n int, rec *recording.Recording)) {
	files, err := filepath.Glob(filepath.Join(streams, "*.chunks.txt"))
	if err != nil || len(files) == 0 {
		t.Skipf("there are no recorded streams in %s, which is not part of the repository", streams)
	}
	for n, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".chunks.txt"), func(t *testing.T) {
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			rec, err := recording.Read(f, recording.Config{})
			if err != nil {
				t.Fatal(err)
			}
			test(t, n, rec)
		})
	}
}

// wantPlayed wants envelopes to be those of a recording: each payload as it was, and the texts joined the same.
func wantPlayed(t *testing.T, who string, rec *recording.Recording, got []*schema.Envelope) {
	t.Helper()
	if len(got) != len(rec.Steps) {
		t.Errorf("%s: %d of %d envelopes came", who, len(got), len(rec.Steps))
		return
	}
	for i, e := range got {
		sent := &schema.Envelope{Payload: rec.Steps[i].Envelope.Payload, RequestId: rec.Steps[i].Envelope.RequestId, ReplyTo: rec.Steps[i].Envelope.ReplyTo}
		if came := (&schema.Envelope{Payload: e.Payload, RequestId: e.RequestId, ReplyTo: e.ReplyTo}); !proto.Equal(sent, came) {
			t.Errorf("%s: seq %d was sent as %v and came as %v", who, e.GetSeq(), sent, came)
			return
		}
	}
	if want, have := recording.Gather(rec.Envelopes()), recording.Gather(slices.Values(got)); !reflect.DeepEqual(want, have) {
		t.Errorf("%s: the transcript differs:\n%+v\nwas sent, and\n%+v\ncame", who, want, have)
	}
}

// cuts makes a function for CutAfter: so many cuts, each after up to so many bytes.
func cuts(r *rand.Rand, times, bytes int) func() int {
	var mu sync.Mutex
	r = rand.New(rand.NewPCG(r.Uint64(), 0))
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		if times--; times < 0 {
			return 0
		}
		return bytes/8 + r.IntN(bytes)
	}
}

// TestRecordings plays every recorded stream into a session through one edge, and reads it through the other, by every way, with connections that are cut at random places on both sides. It comes back
// identical, text for text.
func TestRecordings(t *testing.T) {
	eachRecording(t, func(t *testing.T, n int, rec *recording.Recording) {
		Run(t, Config{Streams: 1, Latency: 100 * time.Microsecond}, func(w *World) {
			r := rand.New(rand.NewPCG(uint64(n), 5))
			in := Ways()[n%len(Ways())]
			size := 4000
			for e := range rec.Envelopes() {
				size += 100 + proto.Size(e)
			}
			up, down := rand.New(rand.NewPCG(uint64(n), 6)), rand.New(rand.NewPCG(uint64(n), 7))
			x := w.Write("s", WriterOptions{
				Ways: []Way{in}, Edges: []*Edge{w.Edge(n % 2)}, Producer: "agent", Window: 64, CutAfter: cuts(up, 5, size/3), DeafAfter: cuts(down, 5, size/10),
			})
			var readers []*Reader
			for _, way := range Ways() {
				readers = append(readers, w.Read("s", ReaderOptions{Ways: []Way{way}, Edges: []*Edge{w.Edge((n + 1) % 2)}, CutAfter: cuts(r, 5, size/2)}))
			}
			for e := range rec.Envelopes() {
				e = clone(e)
				e.Id = ulid.Make().String()
				x.Send(e)
				w.Sleep(pace)
			}
			x.Flush()
			w.Settle()
			late := w.Read("s", ReaderOptions{Ways: []Way{in}, CutAfter: cuts(r, 5, size/2)})
			lost := 0
			for _, f := range append(readers, late) {
				wantPlayed(t, fmt.Sprint(f.o.Ways[0]), rec, f.Wait(uint64(len(rec.Steps))))
				lost += f.Attached() - 1
			}
			t.Logf("%d envelopes in by %s; the writer lost %d connections, the readers %d", len(rec.Steps), in, x.Lost(), lost)
			if x.Lost() == 0 || lost == 0 {
				t.Error("no connection was lost; the test shows nothing")
			}
		})
	})
}

// TestRecordings_ByTheGoClient does the same with the client that the commands use: in through one edge, out through both, over gRPC and the WebSocket, cut at random.
func TestRecordings_ByTheGoClient(t *testing.T) {
	eachRecording(t, func(t *testing.T, n int, rec *recording.Recording) {
		if n%3 != 0 && !slow() {
			t.Skip("TIDEMARK_SLOW plays this one, too")
		}
		Run(t, Config{Streams: 1, Latency: 100 * time.Microsecond}, func(w *World) {
			dial := func(ctx context.Context, _, addr string) (net.Conn, error) {
				_, c, err := w.net.dial(ctx, addr)
				return c, err
			}
			to := func(edges ...string) *client.Client {
				c, err := client.New(client.Config{Edges: edges, Token: w.Token(schema.Role_ROLE_AGENT, "*"), Dial: dial})
				w.must(err)
				return c
			}
			in := [][]string{{"grpc://edge0.grpc", "http://edge1.http"}, {"http://edge0.http", "grpc://edge1.grpc"}}[n%2]
			p := to(in...).Publisher(w.t.Context(), client.PublishOptions{Session: "s"})
			type outcome struct {
				got  []*schema.Envelope
				lost int
				err  error
			}
			outs := make(map[string]chan outcome)
			for i, out := range []string{"http://edge0.http", "grpc://edge0.grpc", "http://edge1.http", "grpc://edge1.grpc"} {
				f := to(out).Follow(client.FollowOptions{Session: "s"})
				r := rand.New(rand.NewPCG(uint64(n), uint64(i)))
				outs[out] = make(chan outcome, 1)
				go func(done chan outcome) {
					var o outcome
					for len(o.got) < len(rec.Steps) && o.err == nil {
						var e client.Event
						e, o.err = f.Next(w.t.Context())
						switch {
						case e.Envelope != nil:
							o.got = append(o.got, e.Envelope)
							if r.IntN(max(len(rec.Steps)/4, 2)) == 0 {
								f.Cut()
							}
						case e.Lost != nil:
							o.lost++
						}
					}
					f.Close()
					done <- o
				}(outs[out])
			}
			r := rand.New(rand.NewPCG(uint64(n), 9))
			for e := range rec.Envelopes() {
				w.must(p.Publish(w.t.Context(), clone(e)))
				w.Sleep(pace)
				if r.IntN(max(len(rec.Steps)/5, 2)) == 0 {
					p.Cut()
				}
			}
			w.must(p.Close(w.t.Context()))
			lost := 0
			for out, done := range outs {
				o := <-done
				if o.err != nil {
					t.Errorf("%s: %v", out, o.err)
				}
				wantPlayed(t, out, rec, o.got)
				lost += o.lost
			}
			if t.Logf("the followers lost %d connections", lost); lost == 0 {
				t.Error("no connection was lost; the test shows nothing")
			}
		})
	})
}
