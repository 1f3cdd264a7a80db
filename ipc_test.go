package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// ipcDev starts `tidemark dev --ipc` and reads its file.
func ipcDev(t *testing.T, dir string, more ...string) (*proc, ipcFile) {
	t.Helper()
	p := serveUntilReady(t, append([]string{"dev", "--ipc", "--data-dir", dir, "--drain-for", "0s"}, more...)...)
	path := filepath.Join(dir, "ipc.json")
	if i := slices.Index(more, "--ipc-file"); i >= 0 {
		path = more[i+1]
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var f ipcFile
	if err := json.Unmarshal(b, &f); err != nil {
		t.Fatal(err)
	}
	return p, f
}

// ipcPeer is a program of the application: one socket.
type ipcPeer struct {
	*testing.T
	name string
	c    *websocket.Conn
	// hold has room for one who writes.
	hold sync.Mutex
	next uint64
}

func dialIPC(t *testing.T, port int, opts *websocket.DialOptions) (*websocket.Conn, *http.Response, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, res, err := websocket.Dial(ctx, fmt.Sprintf("ws://127.0.0.1:%d/v1/connect", port), opts)
	if err == nil {
		t.Cleanup(func() { _ = c.CloseNow() })
		c.SetReadLimit(2 << 20)
	}
	return c, res, err
}

var ipcProtocol = &websocket.DialOptions{Subprotocols: []string{"tidemark.v1.proto"}}

// enter opens a socket and says hello.
func (f ipcFile) enter(t *testing.T, name string) *ipcPeer {
	t.Helper()
	c, _, err := dialIPC(t, f.Port, ipcProtocol)
	if err != nil {
		t.Fatal(err)
	}
	p := &ipcPeer{T: t, name: name, c: c}
	p.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{Token: f.Token}}})
	w := p.read().GetWelcome()
	if w.GetPrincipal().GetSubject() != "ipc" || w.GetPrincipal().GetRole() != schema.Role_ROLE_ADMIN || w.GetTenant() != "default" {
		t.Fatalf("%s is welcomed as %v", name, w)
	}
	return p
}

// leave goes without a word, so that nobody waits for it.
func (p *ipcPeer) leave() { _ = p.c.CloseNow() }

func (p *ipcPeer) send(f *schema.ClientFrame) {
	p.hold.Lock()
	defer p.hold.Unlock()
	b, err := proto.Marshal(f)
	if err != nil {
		p.Error(err)
		return
	}
	ctx, cancel := context.WithTimeout(p.Context(), patience)
	defer cancel()
	if err := p.c.Write(ctx, websocket.MessageBinary, b); err != nil {
		p.Errorf("%s: %v", p.name, err)
	}
}

// publish appends one envelope of a request.
func (p *ipcPeer) publish(session string, e *schema.Envelope) {
	p.hold.Lock()
	p.next++
	id := p.next
	p.hold.Unlock()
	p.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Publish{Publish: &schema.Publish{PublishId: id, Session: session, Envelopes: []*schema.Envelope{e}}}})
}

func (p *ipcPeer) attach(channel uint32, session string) {
	p.send(&schema.ClientFrame{Frame: &schema.ClientFrame_Attach{Attach: &schema.Attach{Channel: channel, Session: session}}})
}

func (p *ipcPeer) read() *schema.ServerFrame {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.Context(), patience)
	defer cancel()
	_, b, err := p.c.Read(ctx)
	if err != nil {
		p.Fatalf("%s: %v", p.name, err)
	}
	f := new(schema.ServerFrame)
	if err := proto.Unmarshal(b, f); err != nil {
		p.Fatal(err)
	}
	if r := f.GetRejected(); r != nil {
		p.Fatalf("%s: %v", p.name, r)
	}
	if e := f.GetError(); e != nil {
		p.Fatalf("%s: %v", p.name, e)
	}
	return f
}

// follow reads envelopes until see returns true.
func (p *ipcPeer) follow(see func(channel uint32, e *schema.Envelope) bool) {
	p.Helper()
	for {
		events := p.read().GetEvents()
		for _, e := range events.GetEnvelopes() {
			if see(events.GetChannel(), e) {
				return
			}
		}
	}
}

// wantClosed reads until the server closes, with that code and word.
func wantClosed(t *testing.T, c *websocket.Conn, status websocket.StatusCode, word string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		_, _, err := c.Read(ctx)
		if err == nil {
			continue // the frame that says why
		}
		var closed websocket.CloseError
		if !errors.As(err, &closed) || closed.Code != status || !strings.HasPrefix(closed.Reason, word) {
			t.Fatalf("it ended with %v, want %d %s", err, status, word)
		}
		return
	}
}

// TestOneSocketCarriesAllRequests: a UI and a backend find each other over their sockets. The UI asks two things at once, gets both answers interleaved, and stops one of them in the middle.
func TestOneSocketCarriesAllRequests(t *testing.T) {
	dir := t.TempDir()
	p, f := ipcDev(t, dir)
	const session = "app"
	ui, backend := f.enter(t, "ui"), f.enter(t, "backend")

	// The backend answers each request word by word, in turn, until it is done or stopped. The first waits for its cancel, so that this comes in mid-stream however fast the machine is.
	const words = 50
	backend.attach(1, session)
	finished := make(chan map[string]string, 1)
	go func() {
		under := map[string]chan struct{}{}
		var answering sync.WaitGroup
		how := map[string]string{}
		var mu sync.Mutex
		answer := func(request string, cancelled chan struct{}) {
			say := func(e *schema.Envelope) {
				e.RequestId = request
				backend.publish(session, e)
			}
			for i := range words {
				if request == "r1" && i == words/2 {
					<-cancelled
				}
				select {
				case <-cancelled:
					// Nothing more is taken of what was cancelled.
					mu.Lock()
					how[request] = "cancelled"
					mu.Unlock()
					return
				default:
				}
				say(&schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: request, Text: fmt.Sprint(request, ".", i, " ")}}})
			}
			say(&schema.Envelope{Payload: &schema.Envelope_MessageCompleted{MessageCompleted: &schema.MessageCompleted{MessageId: request, FinishReason: "stop"}}})
			mu.Lock()
			how[request] = "stop"
			mu.Unlock()
		}
		backend.follow(func(_ uint32, e *schema.Envelope) bool {
			switch {
			case e.GetUserMessage() != nil:
				cancelled := make(chan struct{})
				under[e.GetRequestId()] = cancelled
				answering.Go(func() { answer(e.GetRequestId(), cancelled) })
			case e.GetCancel() != nil:
				close(under[e.GetCancel().GetRequestId()])
			}
			return e.GetSystem() != nil
		})
		answering.Wait()
		finished <- how
	}()

	ui.attach(7, session)
	for _, request := range []string{"r1", "r2"} {
		ui.publish(session, &schema.Envelope{RequestId: request, Payload: &schema.Envelope_UserMessage{UserMessage: &schema.UserMessage{Message: "tell me about " + request}}})
	}
	got, ended, cancelled, seq := map[string]string{}, map[string]string{}, false, uint64(0)
	ui.follow(func(channel uint32, e *schema.Envelope) bool {
		if channel != 7 || e.GetSeq() != seq+1 {
			t.Fatalf("channel %d, seq %d behind %d", channel, e.GetSeq(), seq)
		}
		seq = e.GetSeq()
		if m := e.GetToken(); m != nil {
			got[e.GetRequestId()] += m.GetText()
		}
		if m := e.GetMessageCompleted(); m != nil {
			ended[e.GetRequestId()] = m.GetFinishReason()
		}
		if m := e.GetCancel(); m != nil {
			ended[m.GetRequestId()] = "cancelled"
		}
		if got["r1"] != "" && got["r2"] != "" && !cancelled {
			// Both are under way: one is enough.
			cancelled = true
			ui.publish(session, &schema.Envelope{Payload: &schema.Envelope_Cancel{Cancel: &schema.Cancel{Target: &schema.Cancel_RequestId{RequestId: "r1"}}}})
		}
		if len(ended) == 2 && e.GetSystem() == nil {
			ui.publish(session, &schema.Envelope{Payload: &schema.Envelope_System{System: &schema.System{Message: "done"}}})
		}
		return e.GetSystem() != nil
	})
	if ended["r1"] != "cancelled" || ended["r2"] != "stop" {
		t.Errorf("they ended with %v", ended)
	}
	if how := <-finished; how["r1"] != "cancelled" || how["r2"] != "stop" {
		t.Errorf("the backend ended them with %v", how)
	}
	whole := func(request string, n int) (text string) {
		for i := range n {
			text += fmt.Sprint(request, ".", i, " ")
		}
		return text
	}
	if got["r2"] != whole("r2", words) {
		t.Errorf("r2 got %q", got["r2"])
	}
	if n := strings.Count(got["r1"], " "); n == 0 || n > words/2 || got["r1"] != whole("r1", n) {
		t.Errorf("r1 got %q", got["r1"])
	}
	ui.leave()
	backend.leave()
	p.stop()
}

// TestIPCFile: who may read it, what it says, and whose it is.
func TestIPCFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(t.TempDir(), "app.json")
	// A dead process has left its file, and a port that somebody else may have by now.
	somebody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	stale, err := json.Marshal(ipcFile{Port: somebody.Addr().(*net.TCPAddr).Port, Token: "old", PID: os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	_ = somebody.Close()
	if err := os.WriteFile(path, stale, 0o644); err != nil {
		t.Fatal(err)
	}

	p, f := ipcDev(t, dir, "--ipc-file", path)
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("the file has mode %v, %v", info.Mode(), err)
	}
	if _, port, _ := net.SplitHostPort(p.at.HTTP); f.PID != p.cmd.Process.Pid || fmt.Sprint(f.Port) != port || p.at.GRPC != off || p.at.NATS != off {
		t.Errorf("the file says %d and %d; the process is %d, and says %+v", f.PID, f.Port, p.cmd.Process.Pid, p.at)
	}
	if b, err := hex.DecodeString(f.Token); err != nil || len(b) != 32 {
		t.Errorf("the token is %d bytes in hex, %v", len(b), err)
	}
	if strings.Contains(p.err.String(), f.Token) {
		t.Error("the token was printed")
	}

	// A second start says so, over the directory and over the file, and leaves the first one's file alone.
	for _, args := range [][]string{{"--data-dir", dir}, {"--data-dir", t.TempDir(), "--ipc-file", path}} {
		second := spawn(t, append([]string{"dev", "--ipc"}, args...)...)
		if code := second.wait(); code != exitFailed || !strings.Contains(second.err.String(), fmt.Sprint("pid ", f.PID)) || strings.Count(second.err.String(), "\n") != 1 {
			t.Errorf("%v: exit code %d, it said %q", args, code, second.err)
		}
	}
	f.enter(t, "a client").leave()

	// The application's terminal is closed.
	if signal.Ignored(syscall.SIGHUP) {
		p.stop() // whoever runs the tests wants them to outlive the terminal, and the process inherits that
	} else {
		p.signal(syscall.SIGHUP)
		if code := p.wait(); code != exitDone {
			t.Errorf("exit code %d after SIGHUP:\n%s", code, p.err)
		}
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the file is left: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*")); len(left) != 0 {
		t.Errorf("files are left: %v", left)
	}

	// Killed, it leaves the file behind; the next one replaces it, with a token of its own.
	p, f = ipcDev(t, dir, "--ipc-file", path)
	p.kill()
	p, next := ipcDev(t, dir, "--ipc-file", path)
	if next.Token == f.Token || next.PID == f.PID {
		t.Error("the file of a killed process was not replaced")
	}
	// Another's file is not taken away.
	others := []byte(`{"port":1,"token":"another","pid":1}`)
	if err := os.WriteFile(path, others, 0o600); err != nil {
		t.Fatal(err)
	}
	p.stop()
	if b, err := os.ReadFile(path); err != nil || string(b) != string(others) {
		t.Errorf("the file of another is %q, %v", b, err)
	}
}

func TestIPCAdmitsWhoHasItsTokenAlone(t *testing.T) {
	dir := t.TempDir()
	p, f := ipcDev(t, dir, "--origins", "app://bundle")

	began := time.Now()
	silent, _, err := dialIPC(t, f.Port, ipcProtocol)
	if err != nil {
		t.Fatal(err)
	}
	jwt := strings.TrimSpace(tidemark(t, map[string]string{"TIDEMARK_DATA_DIR": dir}, "token", "--role", "admin").must(t).out)
	for name, token := range map[string]string{"none": "", "a wrong one": strings.Repeat("0", 64), "a part": f.Token[:63], "more": f.Token + "0", "in capitals": strings.ToUpper(f.Token) + "A", "a JWT": jwt} {
		c, _, err := dialIPC(t, f.Port, ipcProtocol)
		if err != nil {
			t.Fatal(err)
		}
		hello, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Hello{Hello: &schema.Hello{Token: token}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Write(t.Context(), websocket.MessageBinary, hello); err != nil {
			t.Fatal(name, err)
		}
		wantClosed(t, c, websocket.StatusPolicyViolation, "unauthenticated")
	}
	// Anything else first is as bad.
	early, _, err := dialIPC(t, f.Port, ipcProtocol)
	if err != nil {
		t.Fatal(err)
	}
	ping, err := proto.Marshal(&schema.ClientFrame{Frame: &schema.ClientFrame_Ping{Ping: &schema.Ping{}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := early.Write(t.Context(), websocket.MessageBinary, ping); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, early, websocket.StatusPolicyViolation, "unauthenticated")

	for name, tt := range map[string]struct {
		opts   websocket.DialOptions
		status int
	}{
		"text":                  {websocket.DialOptions{Subprotocols: []string{"tidemark.v1.json"}}, http.StatusBadRequest},
		"a foreign origin":      {websocket.DialOptions{Subprotocols: ipcProtocol.Subprotocols, HTTPHeader: http.Header{"Origin": {"https://evil.example"}}}, http.StatusForbidden},
		"our own origin":        {websocket.DialOptions{Subprotocols: ipcProtocol.Subprotocols, HTTPHeader: http.Header{"Origin": {"http://" + p.at.HTTP}}}, http.StatusForbidden},
		"a rebound host":        {websocket.DialOptions{Subprotocols: ipcProtocol.Subprotocols, Host: "evil.example"}, http.StatusForbidden},
		"the token as a header": {websocket.DialOptions{Subprotocols: ipcProtocol.Subprotocols, HTTPHeader: http.Header{"Authorization": {"Bearer " + f.Token}}}, http.StatusUnauthorized},
	} {
		if _, res, err := dialIPC(t, f.Port, &tt.opts); err == nil || res == nil || res.StatusCode != tt.status {
			t.Errorf("%s: %v, %v", name, res, err)
		}
	}
	listed := &websocket.DialOptions{Subprotocols: ipcProtocol.Subprotocols, HTTPHeader: http.Header{"Origin": {"app://bundle"}}}
	if c, _, err := dialIPC(t, f.Port, listed); err != nil {
		t.Errorf("the application's own page: %v", err)
	} else {
		_ = c.CloseNow()
	}
	for path, status := range map[string]int{"/healthz": http.StatusOK, "/": http.StatusNotFound, "/ws?sessionName=s": http.StatusNotFound, "/metrics": http.StatusNotFound, "/page/app.js": http.StatusNotFound} {
		res, err := http.Get("http://" + p.at.HTTP + path)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != status {
			t.Errorf("%s: %s", path, res.Status)
		}
	}

	// Who says nothing has two seconds.
	wantClosed(t, silent, websocket.StatusPolicyViolation, "unauthenticated")
	if lasted := time.Since(began); lasted < 2*time.Second || lasted > patience {
		t.Errorf("a silent client was closed after %s", lasted)
	}
	p.stop()
}

func TestIPCFlags(t *testing.T) {
	data := []string{"dev", "--data-dir", t.TempDir()}
	for name, args := range map[string][]string{
		"a file without the mode": {"--ipc-file", "x"},
		"gRPC beside it":          {"--ipc", "--grpc", "127.0.0.1:0"},
		"NATS beside it":          {"--ipc", "--nats-listen", "127.0.0.1:0"},
		"the page beside it":      {"--ipc", "--page"},
		"another address":         {"--ipc", "--http", "0.0.0.0:0"},
		"another loopback":        {"--ipc", "--http", "[::1]:0"},
	} {
		if r := tidemark(t, nil, append(slices.Clone(data), args...)...); r.code != exitUsage {
			t.Errorf("%s: exit code %d: %s", name, r.code, r.err)
		}
	}
	if r := tidemark(t, nil, append(slices.Clone(data), "--ipc", "--ipc-file", t.TempDir())...); r.code != exitFailed || !strings.Contains(r.err, "is no file") {
		t.Errorf("a directory as the file: exit code %d: %s", r.code, r.err)
	}
	// An address that is named is used.
	at := freePort(t)
	p, _ := ipcDev(t, t.TempDir(), "--http", at)
	if p.at.HTTP != at {
		t.Errorf("it listens on %s, not %s", p.at.HTTP, at)
	}
	p.stop()
}
