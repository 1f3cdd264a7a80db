package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"tidemark/internal/auth"
	"tidemark/schema"
)

// The loopback mode, `tidemark dev --ipc`, is for desktop applications: a UI and a backend that find each other through one file and talk through one socket each. edge-ws/local.go has its rules.

// ipcHelloWithin is how long a program of this machine may take to say who it is.
const ipcHelloWithin = 2 * time.Second

// ipcSubject is who programs are that bring the start-up token.
const ipcSubject = "ipc"

// ipcFlags choose the loopback mode.
type ipcFlags struct {
	IPC     bool   `name:"ipc" help:"Serve the programs of one desktop application instead: /v1/connect alone, on a free port, for those who bring the token of --ipc-file in their first frame."`
	IPCFile string `name:"ipc-file" placeholder:"FILE" help:"Where --ipc says port, token and pid, for this user alone; gone when it ends. Default: ipc.json in --data-dir."`
}

// AfterApply is called by kong. In loopback mode other defaults hold, and what does not listen cannot be asked to.
func (c *devCommand) AfterApply(k *kong.Context) error {
	if !c.IPC {
		if c.IPCFile != "" {
			return usage("--ipc-file is the file of --ipc, which was not given")
		}
		return nil
	}
	named := map[string]bool{}
	for _, step := range k.Path {
		if step.Flag == nil {
			continue
		}
		named[step.Flag.Name] = true
		if name := step.Flag.Name; !step.Resolved && (name == "grpc" && c.GRPC != off || name == "nats-listen" && c.NatsListen != off || name == "page" && c.Page) {
			return usage("with --ipc there is one socket and nothing else, so --%s cannot be given", name)
		}
	}
	if !named["http"] {
		c.HTTP = "127.0.0.1:0"
	}
	// Programs read a port, and look for it on 127.0.0.1.
	if host, _, err := net.SplitHostPort(c.HTTP); err == nil && host != "127.0.0.1" {
		return usage("--ipc listens on 127.0.0.1 alone, and --http %s is not there", c.HTTP)
	}
	c.GRPC, c.NatsListen, c.Page = off, off, false
	return nil
}

// ipc is one start in loopback mode.
type ipc struct {
	path  string
	token string
	// digest is the token's: what a client brings is compared with it, so that neither content nor length show in the time that takes.
	digest [sha256.Size]byte
}

// ipcFile is what the file holds.
type ipcFile struct {
	Port  int    `json:"port"`
	Token string `json:"token"`
	PID   int    `json:"pid"`
}

// newIPC makes a token. It refuses where the file at path belongs to a process that serves; what a dead one has left is in nobody's way.
func newIPC(ctx context.Context, path string) (*ipc, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("the file of --ipc-file cannot be used: %w", err)
	}
	if info, err := os.Lstat(path); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s, which --ipc-file names, is no file", path)
	}
	if old, ok := readIPCFile(path); ok && old.serves(ctx) {
		return nil, fmt.Errorf("the file %s is that of another tidemark process, pid %d, which serves on port %d; stop it, or choose another --ipc-file", path, old.PID, old.Port)
	}
	var random [32]byte
	rand.Read(random[:]) // never fails: crypto/rand ends the process instead
	i := &ipc{path: path, token: hex.EncodeToString(random[:])}
	i.digest = sha256.Sum256([]byte(i.token))
	return i, nil
}

// readIPCFile reads the file; false where there is none, or something else.
func readIPCFile(path string) (f ipcFile, ok bool) {
	b, err := os.ReadFile(path)
	return f, err == nil && json.Unmarshal(b, &f) == nil && f.Port > 0 && f.Token != ""
}

// serves asks the port: a pid says nothing, for another process may have it since.
func (f ipcFile) serves(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:"+strconv.Itoa(f.Port)+"/healthz", http.NoBody)
	if err != nil {
		return false
	}
	// Not the default client: no proxy stands between this machine and itself.
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := c.Do(r)
	if err != nil {
		return false
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 64))
	return err == nil && res.StatusCode == http.StatusOK && strings.Contains(string(body), `"alive"`)
}

// verify is the gateway's, for hello.
func (i *ipc) verify(_ context.Context, token string) (*auth.Principal, error) {
	brought := sha256.Sum256([]byte(token))
	if subtle.ConstantTimeCompare(brought[:], i.digest[:]) != 1 {
		return nil, schema.Refuse(schema.Code_CODE_UNAUTHENTICATED, "The token is not the one of this start; read it from the file that the server has written.")
	}
	// It lives as long as the process: it does not expire.
	return &auth.Principal{Subject: ipcSubject, Tenant: auth.DefaultTenant, Role: schema.Role_ROLE_ADMIN, Sessions: []string{"*"}}, nil
}

// publish writes the file for this user alone, whole or not at all, in the place of whatever a dead process has left there.
func (i *ipc) publish(l net.Listener) error {
	port := l.Addr().(*net.TCPAddr).Port //nolint:errcheck // p.listen listens on TCP
	b, err := json.Marshal(ipcFile{Port: port, Token: i.token, PID: os.Getpid()})
	if err != nil {
		return err
	}
	beside, err := os.CreateTemp(filepath.Dir(i.path), filepath.Base(i.path)+".*") // of mode 0600
	if err != nil {
		return err
	}
	_, err = beside.Write(append(b, '\n'))
	if err = errors.Join(err, beside.Close()); err == nil {
		err = os.Rename(beside.Name(), i.path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(beside.Name()))
	}
	return nil
}

// withdraw removes the file, unless it is another's by now.
func (i *ipc) withdraw() error {
	if f, ok := readIPCFile(i.path); !ok || f.Token != i.token {
		return nil
	}
	return os.Remove(i.path)
}

// announceIPC tells programs where to find the socket, and removes that again before anything else ends.
func (p *process) announceIPC(i *ipc, l net.Listener) error {
	if err := i.publish(l); err != nil {
		return fmt.Errorf("the file of --ipc cannot be written: %w", err)
	}
	p.onStop("ipc file", time.Second, func(context.Context) error { return i.withdraw() })
	_, err := fmt.Fprintf(p.env.stderr, "\nTidemark %s serves the programs of this machine that bring the token of\n\n  %s\n\nin hello, the first frame on ws://%s/v1/connect (subprotocol tidemark.v1.proto).\n\n",
		version(), i.path, l.Addr())
	return err
}
