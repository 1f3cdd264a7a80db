package main

import (
	"context"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"tidemark/broker"
	"tidemark/internal/auth"
	"tidemark/internal/natsd"
	"tidemark/schema"
)

// devTokenTTL is how long the tokens live that dev prints.
const devTokenTTL = 30 * 24 * time.Hour

// devCommand is `tidemark dev`.
type devCommand struct {
	DataDir string `default:"${data_dir}" help:"Directory for everything that is stored, made where it is not there."`
	HTTP    string `name:"http" default:"127.0.0.1:8080" help:"Address for WebSocket and HTTP; port 0 for a free one."`
	GRPC    string `name:"grpc" default:"127.0.0.1:8081" help:"Address for gRPC, gRPC-Web and Connect; port 0 for a free one."`
	nodeFlags
	MaxAge time.Duration `default:"720h" help:"How long envelopes are kept."`
	runFlags
	Page bool `default:"true" negatable:"" help:"Serve the page to look at sessions with at /."`
	ipcFlags
	jwksFlags
	edgeFlags
}

// Run serves until the process is told to stop.
func (c *devCommand) Run(ctx context.Context, env *environment) error {
	if err := checkLoopback("http", c.HTTP); err != nil {
		return err
	}
	for _, listener := range [][2]string{{"grpc", c.GRPC}, {"nats-listen", c.NatsListen}} {
		if listener[1] == off {
			continue
		}
		if err := checkLoopback(listener[0], listener[1]); err != nil {
			return err
		}
	}
	if err := c.check(); err != nil {
		return err
	}
	if err := c.checkRuns(); err != nil {
		return usageError{err}
	}
	if c.IPC && c.JWKS != "" {
		return usage("--ipc serves whoever has the token of its file, and --jwks those whom others vouch for; choose one")
	}
	return serve(ctx, env, c.start)
}

// start starts one thing on the other. What can be in the way is tried first: the directory, then the ports.
func (c *devCommand) start(p *process) error {
	lock, err := natsd.LockDir(c.DataDir)
	if err != nil {
		return err
	}
	var local *ipc
	if c.IPC {
		path := c.IPCFile
		if path == "" {
			path = filepath.Join(lock.Dir(), "ipc.json")
		}
		if local, err = newIPC(p.ctx, path); err != nil {
			return releaseAfter(err, lock)
		}
	}
	overHTTP, err := p.listen("http", c.HTTP)
	if err != nil {
		return releaseAfter(err, lock)
	}
	overGRPC, err := p.listen("grpc", c.GRPC)
	if err != nil {
		return releaseAfter(err, lock)
	}
	n, err := p.startNode(lock, &c.nodeFlags)
	if err != nil {
		return err
	}
	metrics := newRegistry()
	durability := schema.ParseDurability(c.Durability)
	b, err := p.startBroker(broker.BrokerConfig{
		Server: n.nats, Layout: broker.Layout{MaxAge: c.MaxAge, Durability: durability}, Name: embeddedName(""), OrphanAfter: c.OrphanAfter,
		Logger: p.env.log, Metrics: metrics,
	})
	if err != nil {
		return err
	}
	// Looking for streams that are not there yet would only be in vain.
	p.settle(b.Ready)
	var core *core
	if local != nil {
		core, err = p.startCoreFor(n.nats, &c.edgeFlags, bearers{verify: local.verify, hello: ipcHelloWithin}, metrics)
	} else {
		core, err = p.startCore(n.nats, &c.edgeFlags, c.beside(n.secret), metrics)
	}
	if err != nil {
		return err
	}
	core.page, core.loopback = c.Page, local != nil
	if err := p.startEdges(core, &c.edgeFlags, overHTTP, overGRPC); err != nil {
		return err
	}
	// The keys of a JWKS are not waited for: without them the tokens that dev prints are good all the same.
	p.settle(core.gateway.LogReady)
	if p.ctx.Err() != nil {
		return nil // it failed, or was stopped, before it was ready
	}
	at := addresses{HTTP: addressOf(overHTTP), GRPC: addressOf(overGRPC), NATS: n.server.Addr()}
	switch {
	case local != nil:
		err = p.announceIPC(local, overHTTP)
	case p.env.logFormat == "json":
		// Machines read along, and what they gather shall hold no tokens; `tidemark token` makes some.
	default:
		err = c.welcome(p.env, n, at)
	}
	if err != nil {
		return err
	}
	return p.announce(n.dir, at)
}

// welcome tells people what there is and what to do with it. It goes to standard error, because the line for scripts stands on standard output alone.
func (c *devCommand) welcome(env *environment, n *node, at addresses) error {
	mint := func(role schema.Role) (string, error) {
		return auth.Mint(n.secret, auth.Principal{Subject: "dev-" + auth.RoleWord(role), Role: role, Sessions: []string{"*"}}, devTokenTTL)
	}
	user, err := mint(schema.Role_ROLE_USER)
	if err != nil {
		return err
	}
	agent, err := mint(schema.Role_ROLE_AGENT)
	if err != nil {
		return err
	}
	// Commands find addresses and secret in the data directory, where that is not the usual one it must be named.
	where := ""
	if c.DataDir != defaultDataDir(env.lookup) {
		where = " --data-dir " + shellQuoted(n.dir)
	}
	nats := "off"
	if n.server.URL() != "" {
		nats = n.server.URL()
	}
	// The token stands behind the #, which browsers keep to themselves: no server sees it.
	page := func(token string) string {
		return "http://" + at.HTTP + "/#session=hello&token=" + url.QueryEscape(token)
	}
	pages := [][2]string{{"Page, as user", page(user)}, {"Page, as agent", page(agent)}}
	if !c.Page {
		pages = nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\nTidemark %s is running. Data in %s, durability %s.\n\n", version(), n.dir, c.Durability)
	for _, row := range append(pages, [][2]string{
		{"Session socket", "ws://" + at.HTTP + "/ws?sessionName=NAME&token=TOKEN"},
		{"Multiplexed", "ws://" + at.HTTP + "/v1/connect (subprotocol tidemark.v1.proto or tidemark.v1.json)"},
		{"gRPC", at.GRPC + " (gRPC, gRPC-Web, Connect; reflection is on)"},
		{"NATS", nats},
		{"Health, metrics", "http://" + at.HTTP + "/readyz, /healthz, /metrics"},
		{"User token", user},
		{"Agent token", agent},
	}...) {
		fmt.Fprintf(&b, "  %-16s %s\n", row[0], row[1])
	}
	socket := "ws://" + at.HTTP + "/ws?sessionName=hello&token="
	b.WriteString("\nTry it, in other terminals:\n\n")
	for _, line := range []string{
		env.program + " follow" + where + " hello",
		"echo 'Hello from the shell' | " + env.program + " publish" + where + " hello",
		env.program + " sessions ls" + where,
		env.program + " work take" + where + " tools",
		env.program + " tail" + where + " analytics",
		"",
		"T=$(" + env.program + " token" + where + ")",
		"websocat \"" + socket + "$T\"",
		"T=$T node -e 'new WebSocket(\"" + socket + "\" + process.env.T).onmessage = e => console.log(e.data)'",
		"curl -s http://" + at.GRPC + "/tidemark.v1.SessionService/GetSession -H \"Authorization: Bearer $T\" -H 'Content-Type: application/json' -d '{\"session\":\"hello\"}'",
	} {
		b.WriteString(strings.TrimRight("  "+line, " ") + "\n")
	}
	b.WriteString("\nCtrl-C stops it, with nothing lost.\n\n")
	_, err = fmt.Fprint(env.stderr, b.String())
	return err
}

// shellQuoted is a word for a shell, as it is where that does.
func shellQuoted(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+=:@", r))
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
