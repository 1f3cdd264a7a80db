package auth_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tidemark/internal/auth"
	"tidemark/schema"
)

// running makes a verifier and runs it until the test ends.
func running(t *testing.T, c auth.Config, changes ...func(*auth.Verifier)) *auth.Verifier {
	t.Helper()
	v, err := auth.NewVerifier(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range changes {
		change(v)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- v.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return v
}

// says is what a verifier says of a token: "" where it is accepted, otherwise the code's word.
func says(v *auth.Verifier, token string) string {
	if _, err := v.Verify(context.Background(), token); err != nil {
		return schema.CodeOf(err).Word()
	}
	return ""
}

const (
	in     = ""
	out    = "unauthenticated"
	cannot = "unavailable"
)

func wants(t *testing.T, v *auth.Verifier, when, want string, tokens ...string) {
	t.Helper()
	for n, token := range tokens {
		if got := says(v, token); got != want {
			t.Errorf("%s: token %d is %q; want %q", when, n+1, got, want)
		}
	}
}

func TestKeysOfAFileRotate(t *testing.T) {
	k := keyring()
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "jwks.json")
		write(t, path, set(k.rsa.public(), k.ec.public()))
		v := running(t, auth.Config{JWKS: auth.Source(path)})
		life := map[string]any{"exp": time.Now().Add(1000 * time.Hour).Unix()}
		one, two, three := k.rsa.token(t, life), k.ec.token(t, life), k.ed.token(t, life)
		wants(t, v, "at first", in, one, two)
		wants(t, v, "at first", out, three)

		// A new key is used at once.
		time.Sleep(auth.JWKSGap)
		write(t, path, set(k.rsa.public(), k.ec.public(), k.ed.public()))
		wants(t, v, "with a third key", in, one, two, three)

		// One that was withdrawn is refused when the file was looked at.
		write(t, path, set(k.ed.public()))
		time.Sleep(11 * time.Second)
		wants(t, v, "with the third alone", in, three)
		wants(t, v, "with the third alone", out, one, two)

		// Half a file takes nothing away, and neither does none.
		if err := os.WriteFile(path, set(k.ed.public())[:50], 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(11 * time.Second)
		wants(t, v, "with half a file", in, three)
		wants(t, v, "with half a file", cannot, one) // it may stand in the other half
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(auth.JWKSMaxAge - time.Minute)
		wants(t, v, "without a file for a day", in, three)
		if err := v.Ready(); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Minute)
		wants(t, v, "without a file for longer", cannot, one, three)
		if err := v.Ready(); schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE {
			t.Errorf("ready with keys of yesterday: %v", err)
		}
		write(t, path, set(k.rsa.public()))
		time.Sleep(11 * time.Second)
		wants(t, v, "with a file again", in, one)
		if err := v.Ready(); err != nil {
			t.Error(err)
		}

		// All are withdrawn.
		write(t, path, set())
		time.Sleep(11 * time.Second)
		wants(t, v, "with no key", out, one, two, three)
		if v.Ready() == nil {
			t.Error("ready without a key")
		}

		// Another key under the same times and size, as a coarse clock gives them: the file is read now and then in any case.
		write(t, path, set(k.ec.public()))
		time.Sleep(11 * time.Second)
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		other := set(k.ec2.public())
		if int64(len(other)) != info.Size() {
			t.Fatalf("the sets have %d and %d bytes", len(other), info.Size())
		}
		if err := errors.Join(os.WriteFile(path, other, 0o600), os.Chtimes(path, info.ModTime(), info.ModTime())); err != nil {
			t.Fatal(err)
		}
		time.Sleep(auth.JWKSEvery + time.Minute)
		wants(t, v, "with a file that looks the same", out, two)
		wants(t, v, "with a file that looks the same", in, k.ec2.token(t, life))
	})
}

// TestKeysOfAURLRotate is over real sockets. Nothing waits: a token with an unknown key has the set read.
func TestKeysOfAURLRotate(t *testing.T) {
	k := keyring()
	var idp issuer
	server := httptest.NewServer(&idp)
	defer server.Close()
	idp.publishes(k.rsa.public(), k.ec.public())
	v := running(t, auth.Config{JWKS: auth.Source(server.URL + "/jwks.json")}, func(v *auth.Verifier) { v.ReadsEvery(time.Hour, time.Nanosecond) })

	// The first token may come before the first read, and before Run.
	waitReady(t, v)
	one, two, three := k.rsa.token(t, nil), k.ec.token(t, nil), k.ed.token(t, nil)
	wants(t, v, "at first", in, one, two)
	wants(t, v, "at first", out, three)
	idp.publishes(k.ec.public(), k.ed.public())
	wants(t, v, "before anybody asked", in, one)
	wants(t, v, "rotated", in, three, two)
	wants(t, v, "rotated", out, one)
	idp.isAway()
	wants(t, v, "during an outage", in, two, three)
	wants(t, v, "during an outage", cannot, one)
	idp.publishes(k.rsa.public())
	wants(t, v, "rotated back", in, one)
	wants(t, v, "rotated back", out, two, three)
}

// waitReady waits for the first read.
func waitReady(t *testing.T, v *auth.Verifier) {
	t.Helper()
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for late := time.After(time.Minute); v.Ready() != nil; {
		select {
		case <-look.C:
		case <-late:
			t.Fatal(v.Ready())
		}
	}
}

func TestPeriodicRefresh(t *testing.T) {
	k := keyring()
	synctest.Test(t, func(t *testing.T) {
		var idp issuer
		idp.publishes(k.ec.public())
		v := running(t, auth.Config{JWKS: "http://idp.example/jwks", Transport: idp.inBubble(t)})
		synctest.Wait()
		old := k.ec.token(t, nil)
		wants(t, v, "at first", in, old)
		idp.publishes(k.ed.public())
		time.Sleep(auth.JWKSEvery - time.Second)
		wants(t, v, "before it was read again", in, old)
		time.Sleep(2 * time.Second)
		wants(t, v, "after it was read again", out, old)
	})
}

// TestFloodOfUnknownKeys: tokens whose keys nobody knows cost their senders nothing, and the source next to nothing.
func TestFloodOfUnknownKeys(t *testing.T) {
	k := keyring()
	synctest.Test(t, func(t *testing.T) {
		var idp issuer
		b := set(k.ec.public())
		const slow = 2 * time.Second
		idp.answers(func(w http.ResponseWriter, _ *http.Request) {
			time.Sleep(slow)
			_, _ = w.Write(b)
		})
		v := running(t, auth.Config{JWKS: "http://idp.example/jwks", Transport: idp.inBubble(t)})
		time.Sleep(slow + auth.JWKSGap)
		synctest.Wait()
		if n := idp.asked.Load(); n != 1 {
			t.Fatalf("asked %d times at the start", n)
		}

		// Many at once share one read, and none waits for longer than it takes.
		good, began := k.ec.token(t, nil), time.Now()
		var wg sync.WaitGroup
		for n := range 300 {
			wg.Go(func() {
				if got := says(v, k.ed.tokenWith(t, jwk{"kid": fmt.Sprint("k", n)}, nil)); got != out {
					t.Errorf("a token of nobody's key is %q", got)
				}
				if took := time.Since(began); took > slow {
					t.Errorf("it took %s", took)
				}
			})
			// Tokens whose key is known wait for nothing.
			wg.Go(func() {
				if got := says(v, good); got != in || time.Since(began) != 0 {
					t.Errorf("a good token is %q after %s", got, time.Since(began))
				}
			})
		}
		wg.Wait()
		if n := idp.asked.Load(); n != 2 {
			t.Errorf("asked %d times for 300 tokens at once", n-1)
		}

		// For a minute, one each 100 ms: at most one read in each gap, of which the read itself is no part.
		before := idp.asked.Load()
		for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(100 * time.Millisecond) {
			wg.Go(func() { _ = says(v, k.ed.tokenWith(t, jwk{"kid": time.Now().String()}, nil)) })
		}
		wg.Wait()
		if n := idp.asked.Load() - before; n < 5 || n > 10 {
			t.Errorf("asked %d times in a minute", n)
		}
	})
}

// TestOutage: a URL that is away from the start is asked again and again, more and more seldom; what was read before it went away counts for a day.
func TestOutage(t *testing.T) {
	k := keyring()
	synctest.Test(t, func(t *testing.T) {
		var idp issuer
		idp.isAway()
		metrics := prometheus.NewRegistry()
		v := running(t, auth.Config{Secret: secret, JWKS: "http://idp.example/jwks", Transport: idp.inBubble(t), Metrics: metrics})
		life := map[string]any{"exp": time.Now().Add(1000 * time.Hour).Unix()}
		token := k.ed.token(t, life)
		wants(t, v, "away from the start", cannot, token)
		if err := v.Ready(); schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE {
			t.Errorf("ready without keys: %v", err)
		}
		mine, err := auth.Mint(secret, auth.Principal{Subject: "ada", Role: schema.Role_ROLE_USER}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		wants(t, v, "a token that needs no key", in, mine)
		time.Sleep(time.Hour)
		if n := idp.asked.Load(); n < 12 || n > 30 {
			t.Errorf("asked %d times in an hour of outage", n)
		}
		idp.publishes(k.ed.public())
		wants(t, v, "back again", in, token)
		if err := v.Ready(); err != nil {
			t.Error(err)
		}

		idp.isAway()
		time.Sleep(auth.JWKSMaxAge - time.Minute)
		wants(t, v, "away for a day", in, token)
		time.Sleep(2 * time.Minute)
		wants(t, v, "away for longer", cannot, token)
		if v.Ready() == nil {
			t.Error("ready with keys that are too old")
		}
		idp.publishes(k.ed.public())
		time.Sleep(auth.JWKSEvery)
		wants(t, v, "back once more", in, token)

		families, err := metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				var name strings.Builder
				name.WriteString(f.GetName())
				for _, l := range m.GetLabel() {
					name.WriteString(" " + l.GetValue())
				}
				got[name.String()] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
		if got["tidemark_auth_jwks_keys"] != 1 || got["tidemark_auth_jwks_reads_total failed"] < 250 || got["tidemark_auth_jwks_reads_total ok"] < 2 ||
			time.Since(time.Unix(int64(got["tidemark_auth_jwks_last_read_timestamp_seconds"]), 0)) > 2*auth.JWKSEvery {
			t.Errorf("metrics %v", got)
		}
	})
}

// TestSourceThatNeverAnswers: nobody waits for longer than one read may take, and those who wait are let go when the verifier ends.
func TestSourceThatNeverAnswers(t *testing.T) {
	k := keyring()
	synctest.Test(t, func(t *testing.T) {
		var idp issuer
		idp.answers(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		v, err := auth.NewVerifier(auth.Config{JWKS: "http://idp.example/jwks", Transport: idp.inBubble(t)})
		if err != nil {
			t.Fatal(err)
		}
		token := k.ec.token(t, nil)
		wants(t, v, "before Run", cannot, token)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- v.Run(ctx) }()
		synctest.Wait()
		if err := v.Run(ctx); err == nil {
			t.Error("it ran twice")
		}
		began := time.Now()
		wants(t, v, "while it is read", cannot, token)
		if took := time.Since(began); took != auth.JWKSTimeout {
			t.Errorf("it took %s", took)
		}
		wants(t, v, "just after", cannot, token)
		if took := time.Since(began); took != auth.JWKSTimeout {
			t.Errorf("the next took %s", took-auth.JWKSTimeout)
		}
		time.Sleep(time.Minute)
		began = time.Now()
		waited := make(chan string)
		go func() { waited <- says(v, token) }()
		synctest.Wait()
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if got := <-waited; got != cannot || time.Since(began) != 0 {
			t.Errorf("at the end %q after %s", got, time.Since(began))
		}
		wants(t, v, "after the end", cannot, token)
	})
}

// TestAskingAtTheEnd: whoever asks in the moment in which Run ends is let go. Which of the two comes first is left to chance, so it is tried often; a bubble notices who is left waiting.
func TestAskingAtTheEnd(t *testing.T) {
	k := keyring()
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "jwks.json")
			write(t, path, set(k.ec.public()))
			v, err := auth.NewVerifier(auth.Config{JWKS: auth.Source(path)})
			if err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- v.Run(ctx) }()
			synctest.Wait()
			stop()
			wants(t, v, "at the end", out, k.ed.token(t, nil))
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAskingWhileItIsRead: whoever asks in the moment in which the set is read anyhow has it read no second time.
func TestAskingWhileItIsRead(t *testing.T) {
	k := keyring()
	synctest.Test(t, func(t *testing.T) {
		var idp issuer
		idp.publishes(k.ec.public())
		v := running(t, auth.Config{JWKS: "http://idp.example/jwks", Transport: idp.inBubble(t)})
		synctest.Wait()
		const rounds = 200
		forged := k.ed.token(t, map[string]any{"exp": time.Now().Add(1000 * time.Hour).Unix()})
		for range rounds {
			time.Sleep(auth.JWKSEvery)
			wants(t, v, "at the same moment", out, forged)
			synctest.Wait()
		}
		if n := idp.asked.Load(); n != 1+rounds {
			t.Errorf("asked %d times in %d rounds", n-1, rounds)
		}
	})
}

// TestAskingEndsWithTheAsker: whoever gives up, or is cut, does not wait for a source that takes its time; the others have the read all the same.
func TestAskingEndsWithTheAsker(t *testing.T) {
	k := keyring()
	synctest.Test(t, func(t *testing.T) {
		var idp issuer
		idp.publishes(k.ec.public())
		transport := idp.inBubble(t)
		held := make(chan struct{})
		v := running(t, auth.Config{JWKS: "http://idp.example/jwks", Transport: slowly(func(r *http.Request) (*http.Response, error) {
			<-held
			return transport.RoundTrip(r)
		})})
		synctest.Wait()
		token := k.ec.token(t, nil)
		ctx, leave := context.WithCancel(t.Context())
		gone, stays := make(chan error, 1), make(chan error, 1)
		go func() {
			_, err := v.Verify(ctx, token)
			gone <- err
		}()
		go func() {
			_, err := v.Verify(t.Context(), token)
			stays <- err
		}()
		synctest.Wait()
		leave()
		if err := <-gone; schema.CodeOf(err) != schema.Code_CODE_UNAVAILABLE {
			t.Errorf("who left got %v", err)
		}
		close(held)
		if err := <-stays; err != nil {
			t.Errorf("who stayed got %v", err)
		}
	})
}

// slowly is a function as a transport.
type slowly func(*http.Request) (*http.Response, error)

func (f slowly) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// lockedBuffer is a log that may be read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lockedBuffer) waitFor(t *testing.T, text string) {
	t.Helper()
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for late := time.After(time.Minute); !strings.Contains(l.String(), text); {
		select {
		case <-look.C:
		case <-late:
			t.Fatalf("the log does not say %q: %s", text, l.String())
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	k := keyring()
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		write(t, path, b)
		return path
	}
	for name, row := range map[string]struct {
		c    auth.Config
		says string // empty where it is accepted
	}{
		"nothing":                        {auth.Config{}, "nobody could come in"},
		"a short secret":                 {auth.Config{Secret: secret[:31]}, "31 bytes"},
		"a short secret beside a set":    {auth.Config{Secret: secret[:31], JWKS: auth.Source(file("a", set(k.ed.public())))}, "31 bytes"},
		"an issuer of nothing":           {auth.Config{Secret: secret, Issuer: "x"}, "JWKS"},
		"an audience of nothing":         {auth.Config{Secret: secret, Audience: "x"}, "JWKS"},
		"a file that is not there":       {auth.Config{JWKS: auth.Source(filepath.Join(dir, "none"))}, "none"},
		"a directory":                    {auth.Config{JWKS: auth.Source(dir)}, "not a file"},
		"a device":                       {auth.Config{JWKS: os.DevNull}, "not a file"},
		"an empty file":                  {auth.Config{JWKS: auth.Source(file("b", nil))}, "not a JWKS"},
		"a set without a key":            {auth.Config{JWKS: auth.Source(file("c", set()))}, "no key that can be used"},
		"a set with symmetric keys only": {auth.Config{JWKS: auth.Source(file("d", set(jwk{"kty": "oct", "k": "AAAA"})))}, "symmetric"},
		"a file too large":               {auth.Config{JWKS: auth.Source(file("e", bytes.Repeat([]byte(" "), auth.JWKSMaxBytes+1)))}, "larger than 1 MiB"},
		"another scheme":                 {auth.Config{JWKS: "ftp://idp.example/jwks"}, "https://"},
		"a URL without a host":           {auth.Config{JWKS: "https:///jwks"}, "https://"},
		"a URL that nobody has asked":    {auth.Config{JWKS: "https://idp.example/jwks"}, ""},
		"a set":                          {auth.Config{JWKS: auth.Source(file("f", set(k.ed.public()))), Issuer: "x", Audience: "y"}, ""},
	} {
		v, err := auth.NewVerifier(row.c)
		if (row.says == "") != (err == nil && v != nil) || err != nil && !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Without a JWKS there is nothing to wait for, and Run ends with its context all the same.
	v, err := auth.NewVerifier(auth.Config{Secret: secret})
	if err != nil || v.Ready() != nil {
		t.Fatal(err, v.Ready())
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := v.Run(ctx); err != nil {
		t.Error(err)
	}
}
