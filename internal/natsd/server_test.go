package natsd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

func TestMain(m *testing.M) {
	// As another process, hold a directory until standard input ends: see TestLockNamesItsHolder.
	if dir := os.Getenv("NATSD_TEST_HOLD"); dir != "" {
		if _, err := LockDir(dir); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("held")
		_, _ = os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	}
	PrepareBubbles()
	os.Exit(m.Run())
}

func start1(t *testing.T, c Config) *Server {
	t.Helper()
	s, err := Start(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Shutdown(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return s
}

func connect(t *testing.T, url string, opts ...nats.Option) jetstream.JetStream {
	t.Helper()
	nc, err := nats.Connect(url, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func TestKeepsDataOverARestart(t *testing.T) {
	for _, d := range []schema.Durability{schema.Durability_DURABILITY_FSYNC, schema.Durability_DURABILITY_OS} {
		t.Run(schema.DurabilityWord(d), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := Config{DataDir: t.TempDir(), Durability: d, User: "u", Password: "p"}
				s, err := Start(c)
				if err != nil {
					t.Fatal(err)
				}
				js := connect(t, "", nats.InProcessServer(s), nats.UserInfo("u", "p"), nats.NoReconnect())
				if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "A", Subjects: []string{"a"}}); err != nil {
					t.Fatal(err)
				}
				if _, err := js.Publish(t.Context(), "a", make([]byte, DefaultMaxPayload-512)); err != nil {
					t.Fatal("the largest message:", err)
				}
				if s.Addr() != Off || s.URL() != "" {
					t.Errorf("address %q, URL %q of a server that does not listen", s.Addr(), s.URL())
				}
				if err := s.Shutdown(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := s.Shutdown(t.Context()); err != nil {
					t.Fatal("a second time:", err)
				}

				js = connect(t, "", nats.InProcessServer(start1(t, c)), nats.UserInfo("u", "p"), nats.NoReconnect())
				stream, err := js.Stream(t.Context(), "A")
				if err != nil {
					t.Fatal(err)
				}
				if n := stream.CachedInfo().State.Msgs; n != 1 {
					t.Fatalf("%d messages after the restart", n)
				}
			})
		})
	}
}

func TestDurabilitySettings(t *testing.T) {
	lock, err := LockDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lock.Release() })
	for d, always := range map[schema.Durability]bool{
		schema.Durability_DURABILITY_UNSPECIFIED: true, schema.Durability_DURABILITY_FSYNC: true,
		schema.Durability_DURABILITY_OS: false, schema.Durability_DURABILITY_MEMORY: false,
	} {
		opts, err := options(Config{Lock: lock, Durability: d})
		if err != nil || opts.SyncAlways != always {
			t.Errorf("%s: SyncAlways %v, %v", d, opts.SyncAlways, err)
		}
	}
	if _, err := options(Config{Lock: lock, Durability: schema.Durability_DURABILITY_REPLICATED}); err == nil || !strings.Contains(err.Error(), "replicated") {
		t.Errorf("replicated by one server: %v", err)
	}
}

func TestListensWithCredentials(t *testing.T) {
	s := start1(t, Config{DataDir: t.TempDir(), Listen: "127.0.0.1:0", User: "tidemark", Password: "p@ss/word", Durability: schema.Durability_DURABILITY_OS})
	js := connect(t, s.URL(), nats.NoReconnect())
	if _, err := js.AccountInfo(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, who := range []string{"", "tidemark:wrong@", "other:p%40ss%2Fword@", "tidemark@"} {
		if _, err := nats.Connect("nats://" + who + s.Addr()); !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("as %q: %v", who, err)
		}
	}
}

// The way back for the answers of JetStream's API is there before anybody can ask: two who asked first at once would race for it, and one of them be answered into the void, once in some hundred starts.
func TestTheWayBackForAnswersIsMade(t *testing.T) {
	for name, c := range map[string]Config{"in process": {}, "with a password": {User: "u", Password: "p"}, "listening": {Listen: "127.0.0.1:0"}} {
		t.Run(name, func(t *testing.T) {
			c.DataDir = t.TempDir()
			subs, err := start1(t, c).ns.Subsz(&server.SubszOptions{Subscriptions: true, Limit: 10_000})
			if err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(subs.Subs, func(s server.SubDetail) bool { return strings.HasPrefix(s.Subject, "_R_.") }) {
				t.Fatalf("none of %d subscriptions is for the answers of services", subs.Total)
			}
		})
	}
}

func TestPortInUseIsNamed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	_, err = Start(Config{DataDir: dir, Listen: l.Addr().String()})
	if err == nil || !strings.Contains(err.Error(), l.Addr().String()) || !strings.Contains(err.Error(), "in use") {
		t.Fatalf("the error does not name the port: %v", err)
	}
	// The failed start has not kept the directory.
	start1(t, Config{DataDir: dir})
}

func TestAddressIsChecked(t *testing.T) {
	for _, addr := range []string{"4222", "127.0.0.1:nats", "127.0.0.1:70000", "127.0.0.1"} {
		if s, err := Start(Config{DataDir: t.TempDir(), Listen: addr}); err == nil {
			t.Errorf("%s was accepted", addr)
			_ = s.Shutdown(t.Context())
		}
	}
}

func TestSecondStartOnOneDirectory(t *testing.T) {
	dir := t.TempDir()
	s, err := Start(Config{DataDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		_, err = Start(Config{DataDir: dir})
		if err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), fmt.Sprint("pid ", os.Getpid())) {
			t.Fatalf("the error names neither directory nor holder: %v", err)
		}
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	start1(t, Config{DataDir: dir})
}

func TestLockNamesItsHolder(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), "NATSD_TEST_HOLD="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 5)
	if _, err := out.Read(line); err != nil || string(line) != "held\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if _, err := LockDir(dir); err == nil || !strings.Contains(err.Error(), fmt.Sprint("pid ", cmd.Process.Pid)) {
		t.Fatalf("the error does not name pid %d: %v", cmd.Process.Pid, err)
	}
	// A killed holder leaves the directory free, whatever the file says.
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	lock, err := LockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := os.ReadFile(filepath.Join(dir, "lock"))
	if err != nil || string(pid) != fmt.Sprintln(os.Getpid()) {
		t.Fatalf("pid %q, %v", pid, err)
	}
	if err := errors.Join(lock.Release(), lock.Release()); err != nil {
		t.Fatal(err)
	}
}

func TestUnwritableDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(Config{DataDir: filepath.Join(file, "data")}); err == nil || !strings.Contains(err.Error(), file) {
		t.Fatalf("%v", err)
	}
	if _, err := Start(Config{}); err == nil {
		t.Fatal("no directory was accepted")
	}
}

func TestFatalErrorsOfTheServerAreReturned(t *testing.T) {
	dir := t.TempDir()
	// JetStream's directory cannot be made where a file stands.
	if err := os.WriteFile(filepath.Join(dir, "nats"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(Config{DataDir: dir}); err == nil || !strings.Contains(err.Error(), "did not start") {
		t.Fatalf("%v", err)
	}
	if lock, err := LockDir(dir); err != nil {
		t.Fatal("the directory was not released:", err)
	} else {
		_ = lock.Release()
	}
}

func TestShutdownReturnsWhenItsContextEnds(t *testing.T) {
	s, err := Start(Config{DataDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	// It may have been quicker than the context; then there is nothing to see.
	if err := s.Shutdown(ended); err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := s.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if _, err := LockDir(s.lock.Dir()); err != nil {
		t.Fatal(err)
	}
}

func TestLogGoesToSlog(t *testing.T) {
	var out bytes.Buffer
	s := start1(t, Config{DataDir: t.TempDir(), Logger: slog.New(slog.NewTextHandler(&out, nil)), User: "u", Password: "hunter2-secret"})
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out.Len() != 0 {
		t.Errorf("a quiet start and stop logs at info or above:\n%s", out.String())
	}
	out.Reset()
	s = start1(t, Config{DataDir: t.TempDir(), Logger: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})), User: "u", Password: "hunter2-secret"})
	connect(t, "", nats.InProcessServer(s), nats.UserInfo("u", "hunter2-secret"), nats.NoReconnect())
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "nats-server") || strings.Contains(out.String(), "hunter2") {
		t.Errorf("debug log:\n%s", out.String())
	}
}
