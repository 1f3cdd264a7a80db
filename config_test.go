package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"tidemark/internal/auth"
	"tidemark/schema"
)

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tidemark.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// setting finds a line of `tidemark config`.
func setting(t *testing.T, out, name string) (value, from string) {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + name + `: (.*?) +# (.*)$`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no %s in\n%s", name, out)
	}
	return m[1], m[2]
}

func TestSettingsPrecedence(t *testing.T) {
	file := write(t, "http: 127.0.0.1:3003\ngrpc: 127.0.0.1:3003\ndurability: os\norigins: [https://a.example, 'https://b,c.example']\nembedded: true\n")
	vars := map[string]string{"TIDEMARK_HTTP": "127.0.0.1:2002", "TIDEMARK_GRPC": "127.0.0.1:2002", "TIDEMARK_HOLD_FOR": "7s", "TIDEMARK_TAIL_MB": ""}
	out := tidemark(t, vars, "config", "dev", "--http", "127.0.0.1:1001", "--config", file).must(t).out
	for name, want := range map[string][2]string{
		"http":        {"127.0.0.1:1001", "flag"},
		"grpc":        {"127.0.0.1:2002", "environment TIDEMARK_GRPC"},
		"hold-for":    {"7s", "environment TIDEMARK_HOLD_FOR"},
		"durability":  {"os", "file " + file},
		"origins":     {"[https://a.example, https://b,c.example]", "file " + file},
		"nats-listen": {"127.0.0.1:4222", "default"},
		"tail-mb":     {"128", "default"},
	} {
		if value, from := setting(t, out, name); value != want[0] || from != want[1] {
			t.Errorf("%s is %s from %s, want %s from %s", name, value, from, want[0], want[1])
		}
	}

	// The file may be named in the environment, and flags may stand before the command.
	out = tidemark(t, map[string]string{"TIDEMARK_CONFIG": file}, "--log-level", "debug", "config").must(t).out
	if value, from := setting(t, out, "durability"); value != "os" || from != "file "+file {
		t.Errorf("durability is %s from %s", value, from)
	}
	if value, from := setting(t, out, "log-level"); value != "debug" || from != "flag" {
		t.Errorf("log-level is %s from %s", value, from)
	}
}

func TestConfigOfEveryCommandIsAFileItTakes(t *testing.T) {
	for _, command := range []string{"dev", "broker", "edge-ws", "edge-grpc", "publish", "follow", "tail", "token", "rebuild"} {
		out := tidemark(t, nil, "config", command).must(t).out
		file := write(t, out)
		again := tidemark(t, nil, "config", command, "--config", file)
		if again.code != exitDone {
			t.Errorf("%s: what config printed is not taken back: %s", command, again.err)
		}
	}
}

func TestConfigFileIsChecked(t *testing.T) {
	for name, tt := range map[string]struct{ text, says string }{
		"unknown setting": {"http: 127.0.0.1:1\nhtpp: 127.0.0.1:2\n", `"htpp" in line 2`},
		"another config":  {"config: other.yaml\n", `"config"`},
		"not YAML":        {"http: [\n", "not YAML"},
		"a mapping":       {"http: {a: 1}\n", "neither one value nor a list"},
		"a bad value":     {"durability: usually\n", "fsync"},
		"a bad duration":  {"max-age: long\n", "duration"},
	} {
		r := tidemark(t, nil, "dev", "--config", write(t, tt.text))
		if r.code != exitUsage || !strings.Contains(r.err, tt.says) || r.out != "" {
			t.Errorf("%s: exit code %d, %q", name, r.code, r.err)
		}
	}
	if r := tidemark(t, nil, "version", "--config", filepath.Join(t.TempDir(), "none.yaml")); r.code != exitUsage || !strings.Contains(r.err, "none.yaml") {
		t.Errorf("a file that is not there: exit code %d, %q", r.code, r.err)
	}
}

func TestConfigMasksSecrets(t *testing.T) {
	vars := map[string]string{
		"TIDEMARK_SECRET": "hunter2-hunter2-hunter2-hunter2-hunter2", "TIDEMARK_NATS": "nats://ada:hunter2@nats.example:4222,tls://bob:hunter2@nats.example:4223", "TIDEMARK_TOKEN": "hunter2",
	}
	for _, command := range []string{"edge-ws", "edge-grpc", "broker", "publish", "token"} {
		out := tidemark(t, vars, "config", command).must(t).out
		if strings.Contains(out, "hunter2") {
			t.Errorf("config %s shows a secret:\n%s", command, out)
		}
	}
	out := tidemark(t, vars, "config", "edge-ws").must(t).out
	if value, _ := setting(t, out, "nats"); value != "nats://ada:xxxxx@nats.example:4222,tls://bob:xxxxx@nats.example:4223" {
		t.Errorf("nats: %s", value)
	}
	if value, from := setting(t, out, "secret"); value != "(secret)" || from != "environment TIDEMARK_SECRET" {
		t.Errorf("secret: %s from %s", value, from)
	}
}

func TestExitCodes(t *testing.T) {
	dir := t.TempDir()
	data := []string{"--data-dir", dir}
	for name, tt := range map[string]struct {
		args []string
		code int
		says string // on standard error
	}{
		"nothing":               {nil, exitUsage, "--help"},
		"unknown command":       {[]string{"fly"}, exitUsage, "fly"},
		"unknown flag":          {[]string{"dev", "--fly"}, exitUsage, "--fly"},
		"missing argument":      {[]string{"publish"}, exitUsage, "session"},
		"help":                  {[]string{"--help"}, exitDone, ""},
		"help of a command":     {[]string{"follow", "--help"}, exitDone, ""},
		"help of config":        {[]string{"config", "--help"}, exitDone, ""},
		"config of nothing":     {[]string{"config", "fly"}, exitUsage, "fly"},
		"version":               {[]string{"version"}, exitDone, ""},
		"no secret":             {append([]string{"token"}, data...), exitFailed, "no secret"},
		"secret file not there": {[]string{"token", "--secret-file", filepath.Join(dir, "none")}, exitFailed, "none"},
		"no token":              {append([]string{"follow", "s"}, data...), exitFailed, "no token"},
		"role":                  {[]string{"token", "--role", "root"}, exitUsage, "root"},
		"short secret":          {[]string{"token", "--secret", "short"}, exitUsage, "32"},
		"ttl":                   {[]string{"token", "--secret", strings.Repeat("x", 32), "--ttl=-1h"}, exitUsage, "longer"},
		"edge's URL":            {[]string{"follow", "s", "--token", "x", "--edge", "127.0.0.1:8081"}, exitUsage, "127.0.0.1:8081"},
		"two starts":            {[]string{"follow", "s", "--head", "--last", "3"}, exitUsage, "--last"},
		"type":                  {[]string{"follow", "s", "--types", "tokens"}, exitUsage, "tokens"},
		"tail from two places":  {[]string{"tail", "g", "--from-now", "--since", "2025-11-04T10:00:15Z"}, exitUsage, "--since"},
		"tail of a type":        {[]string{"tail", "g", "--types", "tokens"}, exitUsage, "tokens"},
		"tail of no group":      {[]string{"tail", strings.Repeat("g", 201)}, exitUsage, "201"},
		"session's name":        {[]string{"follow", strings.Repeat("s", 201)}, exitUsage, "201"},
		"status":                {[]string{"sessions", "ls", "--status", "asleep"}, exitUsage, "asleep"},
		"input not there":       {[]string{"publish", "s", filepath.Join(dir, "none"), "--token", "x"}, exitFailed, "none"},
		"address":               {append([]string{"dev", "--http", "8080"}, data...), exitUsage, "HOST:PORT"},
		"port":                  {append([]string{"dev", "--http", "127.0.0.1:http"}, data...), exitUsage, "65535"},
		"not loopback":          {append([]string{"dev", "--grpc", ":8081"}, data...), exitUsage, "loopback"},
		"not loopback either":   {append([]string{"dev", "--nats-listen", "0.0.0.0:4222"}, data...), exitUsage, "loopback"},
		"embedded and nats":     {append([]string{"broker", "--embedded", "--nats", "nats://127.0.0.1:1"}, data...), exitUsage, "--embedded"},
		"two replicas":          {append([]string{"broker", "--replicas", "2"}, data...), exitUsage, "--replicas"},
		"embedded cluster":      {append([]string{"broker", "--embedded", "--replicas", "3"}, data...), exitUsage, "replica"},
	} {
		r := tidemark(t, nil, tt.args...)
		if r.code != tt.code || !strings.Contains(r.err, tt.says) || tt.code == exitDone && r.out == "" || tt.code != exitDone && (r.out != "" || strings.Count(r.err, "\n") != 1) {
			t.Errorf("%s: exit code %d, standard output %q, standard error %q", name, r.code, r.out, r.err)
		}
	}
}

func TestTokenRoundTrip(t *testing.T) {
	dir := t.TempDir()
	secret, err := auth.LoadOrCreateSecret(secretFile(dir))
	if err != nil {
		t.Fatal(err)
	}
	v, err := auth.NewVerifier(auth.Config{Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	mint := func(args ...string) *auth.Principal {
		t.Helper()
		r := tidemark(t, map[string]string{"TIDEMARK_DATA_DIR": dir}, append([]string{"token"}, args...)...).must(t)
		if r.err != "" || strings.Count(r.out, "\n") != 1 {
			t.Errorf("token printed %q and %q", r.out, r.err)
		}
		p, err := v.Verify(t.Context(), strings.TrimSuffix(r.out, "\n"))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := mint()
	if p.Subject != "user" || p.Tenant != "default" || p.Role != schema.Role_ROLE_USER || !p.MayUse("anything") || time.Until(p.Expires) < 23*time.Hour {
		t.Errorf("%+v", p)
	}
	p = mint("--role", "agent", "--session", "x*", "--session", "a,b", "--ttl", "1h", "--tenant", "acme", "--sub", "ada")
	if p.Subject != "ada" || p.Tenant != "acme" || p.Role != schema.Role_ROLE_AGENT || !p.MayUse("xyz") || !p.MayUse("a,b") || p.MayUse("a") || time.Until(p.Expires) > 61*time.Minute {
		t.Errorf("%+v", p)
	}
}
