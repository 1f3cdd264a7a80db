package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tidemark/internal/auth"
	"tidemark/internal/client"
	"tidemark/schema"
)

// The tests of this file kill edges and the embedded node, as real processes, while writers and readers of every kind are at work, and count afterwards. What is killed is drawn from a seed; when exactly it
// dies is the machine's affair. TIDEMARK_SEED runs one seed again, TIDEMARK_SLOW=1 kills fifty times.

// TestKills is promises I1 to I6 under kill -9: what was acknowledged is there, nothing is there twice, every reader got exactly what is stored, in its order, and clients come back by themselves.
func TestKills(t *testing.T) {
	t.Parallel()
	kills := 6
	if os.Getenv("TIDEMARK_SLOW") != "" {
		kills = 50
	}
	k := newKilling(t)
	k.work()
	killed := 0
	for killed < kills {
		k.awaitProgress(1 + k.random.Uint64N(300))
		// Somewhere between two steps of whatever goes on.
		k.pause(20 * time.Millisecond)
		var hit []*killable
		switch draw := k.random.IntN(100); {
		case killed < len(k.all): // each at least once
			hit = k.all[killed : killed+1]
		case draw < 35:
			hit = []*killable{k.overWS}
		case draw < 60:
			hit = []*killable{k.overGRPC}
		case draw < 85:
			hit = []*killable{k.node}
		case draw < 95:
			hit = []*killable{k.node, k.all[1+k.random.IntN(2)]}
		default:
			hit = k.all
		}
		for _, v := range hit {
			v.kill()
			killed++
		}
		k.pause(300 * time.Millisecond)
		for _, v := range hit {
			v.start()
			// A process that dies while it comes up has read back half of what there is, and made half of what it needs.
			if killed == len(k.all) || k.random.IntN(5) == 0 {
				k.pause(400 * time.Millisecond)
				v.kill()
				killed++
				v.start()
			}
		}
		for _, v := range hit {
			v.p.awaitReady()
		}
	}
	k.awaitProgress(100)
	k.finish()

	// Once more, with nobody at work: those who read now get it from what the files hold, through edges that know nothing.
	for _, v := range k.all {
		v.kill()
	}
	for _, v := range k.all {
		v.start()
		v.p.awaitReady()
	}
	k.compare()
	t.Logf("%d processes killed; %s", killed, k.summary())
}

// TestInterruptWhilePublishing is Ctrl-C of dev at work: the process ends in good order and in good time, and nothing that it acknowledged is lost. A second dev on the directory disturbs neither.
func TestInterruptWhilePublishing(t *testing.T) {
	t.Parallel()
	k := newKilling(t)
	// The two edges of this deployment are one process, and so is its node.
	for _, v := range k.all {
		v.kill()
	}
	all := &killable{k: k, args: []string{"dev", "--data-dir", k.dir, "--http", k.overWS.addr, "--grpc", k.overGRPC.addr, "--nats-listen", k.node.addr, "--agent-rate", "0"}}
	k.all = []*killable{all}
	all.start()
	all.p.awaitReady()
	k.work()
	for range 2 {
		k.awaitProgress(300)
		second := spawn(t, "dev", "--data-dir", k.dir, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--nats-listen", "127.0.0.1:0")
		if code := second.wait(); code != exitFailed || !strings.Contains(second.err.String(), fmt.Sprint("pid ", all.p.cmd.Process.Pid)) {
			t.Fatalf("the second dev on the directory ended with exit code %d and said:\n%s", code, second.err)
		}
		k.awaitProgress(300)
		began := time.Now()
		all.p.signal(os.Interrupt)
		if code := all.p.wait(); code != exitDone {
			t.Fatalf("exit code %d after Ctrl-C:\n%s", code, all.p.err)
		}
		t.Logf("ended %s after Ctrl-C", time.Since(began).Round(time.Millisecond))
		all.start()
		all.p.awaitReady()
	}
	k.awaitProgress(100)
	k.finish()
	k.compare()
	t.Log(k.summary())
}

// killing is a deployment of processes that die, and the people who work on it.
type killing struct {
	// Static once the deployment is there.
	t                      *testing.T
	random                 *rand.Rand
	dir                    string
	node, overWS, overGRPC *killable
	all                    []*killable
	secret                 []byte
	durability             schema.Durability // that acknowledgements must name

	// ctx ends the people when the test does; its cause is what went wrong.
	ctx  context.Context //nolint:containedctx // the test's
	fail context.CancelCauseFunc
	// enough is closed when the writers shall come to an end.
	enough          chan struct{}
	writing, seeing sync.WaitGroup
	books           []*book
	acks            atomic.Uint64
	retries         atomic.Uint64
	seen            atomic.Uint64 // envelopes that readers got
	lost            atomic.Uint64
}

// killable is a process that is started again as it was.
type killable struct {
	k    *killing
	args []string
	addr string
	p    *proc
}

// newKilling is a deployment of a broker with the embedded node and two edges.
func newKilling(t *testing.T) *killing {
	t.Helper()
	k := newPeople(t)
	k.durability = schema.Durability_DURABILITY_FSYNC // the default of the embedded node
	at := quietAddresses(t, 3)
	k.node = &killable{k: k, addr: at[0], args: []string{"broker", "--embedded", "--data-dir", k.dir, "--nats-listen", at[0], "--http", "off"}}
	k.overWS = &killable{k: k, addr: at[1], args: []string{"edge-ws", "--data-dir", k.dir, "--http", at[1], "--agent-rate", "0"}}
	k.overGRPC = &killable{k: k, addr: at[2], args: []string{"edge-grpc", "--data-dir", k.dir, "--grpc", at[2], "--http", "off", "--agent-rate", "0"}}
	k.all = []*killable{k.node, k.overWS, k.overGRPC}
	for _, v := range k.all {
		v.start()
		v.p.awaitReady() // the edges find the node's address and secrets in its directory
	}
	var err error
	if k.secret, err = auth.ReadSecret(secretFile(k.dir)); err != nil {
		t.Fatal(err)
	}
	return k
}

// newPeople are people without a deployment.
func newPeople(t *testing.T) *killing {
	t.Helper()
	seed, err := strconv.ParseUint(os.Getenv("TIDEMARK_SEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	t.Logf("TIDEMARK_SEED=%d", seed)
	k := &killing{t: t, random: rand.New(rand.NewPCG(seed, 0)), dir: t.TempDir(), enough: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	k.ctx, k.fail = context.WithCancelCause(ctx)
	t.Cleanup(func() {
		k.fail(nil)
		cancel()
		k.writing.Wait()
		k.seeing.Wait()
	})
	return k
}

// givenOut are the ports that quietAddresses gave to tests of this process: that of one whose process is down only looks free.
var givenOut = struct {
	sync.Mutex
	ports map[string]bool
}{ports: map[string]bool{}}

// quietAddresses are addresses with free ports below those that systems hand out by themselves: while a process is down nobody gets its port by chance, and nobody who calls it reaches himself.
func quietAddresses(t *testing.T, n int) []string {
	t.Helper()
	givenOut.Lock()
	defer givenOut.Unlock()
	var all []string
	for tries := 0; len(all) < n && tries < 1000; tries++ {
		l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", 15000+rand.IntN(15000)))
		if err != nil {
			continue
		}
		_ = l.Close()
		if at := l.Addr().String(); !givenOut.ports[at] {
			givenOut.ports[at] = true
			all = append(all, at)
		}
	}
	if len(all) < n {
		t.Fatal("no free ports")
	}
	return all
}

func (v *killable) start() { v.p = spawn(v.k.t, v.args...) }

// kill ends it as kill -9 does. It must not have ended before.
func (v *killable) kill() {
	v.k.t.Helper()
	v.p.kill()
	if s, ok := v.p.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || s.Signal() != syscall.SIGKILL {
		v.k.t.Fatalf("tidemark %s had ended by itself: %s\n%s", v.args[0], v.p.cmd.ProcessState, v.p.err)
	}
}

// pause lets a random time pass, up to most.
func (k *killing) pause(most time.Duration) {
	timer := time.NewTimer(time.Duration(k.random.Int64N(int64(most) + 1)))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-k.ctx.Done():
		k.t.Fatal(context.Cause(k.ctx))
	}
}

// awaitProgress waits until so many more publishes are acknowledged.
func (k *killing) awaitProgress(n uint64) {
	k.t.Helper()
	goal := k.acks.Load() + n
	within := time.NewTimer(patience)
	defer within.Stop()
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for k.acks.Load() < goal {
		select {
		case <-look.C:
		case <-within.C:
			k.t.Fatalf("%d of %d publishes were acknowledged within %s, everything running", k.acks.Load()+n-goal, n, patience)
		case <-k.ctx.Done():
			k.t.Fatal(context.Cause(k.ctx))
		}
	}
}

// client is a client of these edges.
func (k *killing) client(role schema.Role, edges ...string) *client.Client {
	c, err := client.New(client.Config{Edges: edges, Token: k.token(role), ConnectFor: -1})
	if err != nil {
		panic(err) // the edges are ours
	}
	return c
}

func (k *killing) token(role schema.Role) string {
	token, err := auth.Mint(k.secret, auth.Principal{Subject: auth.RoleWord(role), Role: role, Sessions: []string{"*"}}, time.Hour)
	if err != nil {
		panic(err)
	}
	return token
}

// work lets people of every kind work in two sessions: in one they write together and stay together, as retries by id need it; in the other everybody is as fast as his window lets him be.
func (k *killing) work() {
	ws, grpc := "http://"+k.overWS.addr, "grpc://"+k.overGRPC.addr
	together, alone := newBook("kills: together", k.durability, 120), newBook("kills/alone", k.durability, 0)
	k.books = []*book{together, alone}
	k.write(together, "producer over WebSocket", k.producer(ws))
	k.write(together, "producer over both", k.producer(grpc, ws))
	k.write(together, "ids by gRPC", k.appender)
	k.write(together, "ids by session socket", k.speaker)
	k.write(alone, "producer over gRPC", k.producer(grpc))
	k.write(alone, "producer over WebSocket", k.producer(ws))
	for _, b := range k.books {
		k.read(b, "WebSocket", k.follower(ws))
		k.read(b, "gRPC", k.follower(grpc))
		k.read(b, "either", k.follower(ws, grpc))
		k.read(b, "session socket", k.listener)
	}
}

// finish lets the writers end, says so in every session, and waits until all readers have read that.
func (k *killing) finish() {
	k.t.Helper()
	close(k.enough)
	k.wait("the writers", &k.writing)
	admin := k.client(schema.Role_ROLE_ADMIN, "grpc://"+k.overGRPC.addr)
	for _, b := range k.books {
		id := newID()
		res, err := admin.Append(k.ctx, &schema.AppendRequest{Session: b.session, Envelopes: []*schema.Envelope{spoken(id, lastWriter, lastText)}})
		if err != nil {
			k.t.Fatal(err)
		}
		b.acked(id, res.GetFirstSeq(), res.GetEpoch(), res.GetDurability())
	}
	k.wait("the readers", &k.seeing)
}

func (k *killing) wait(who string, group *sync.WaitGroup) {
	k.t.Helper()
	over := make(chan struct{})
	go func() {
		defer close(over)
		group.Wait()
	}()
	look := time.NewTicker(time.Second)
	defer look.Stop()
	// They take as long as there is to read; only that nobody gets on is wrong.
	done, since := uint64(0), time.Now()
	for waiting := true; waiting; {
		select {
		case <-over:
			waiting = false
		case <-k.ctx.Done():
			waiting = false
		case <-look.C:
			if now := k.acks.Load() + k.seen.Load(); now != done {
				done, since = now, time.Now()
			}
			if time.Since(since) > patience {
				k.t.Fatalf("%s did not finish, and nobody has got on for %s", who, patience)
			}
		}
	}
	if k.ctx.Err() != nil {
		k.t.Fatal(context.Cause(k.ctx))
	}
}

// compare reads everything again, by new readers of every kind, and compares what is stored with what was seen, written and acknowledged.
func (k *killing) compare() {
	k.t.Helper()
	ws, grpc := "http://"+k.overWS.addr, "grpc://"+k.overGRPC.addr
	for _, b := range k.books {
		k.read(b, "WebSocket, afterwards", k.follower(ws))
		k.read(b, "gRPC, afterwards", k.follower(grpc))
		k.read(b, "session socket, afterwards", k.listener)
	}
	k.wait("the readers", &k.seeing)
	admin := k.client(schema.Role_ROLE_ADMIN, grpc)
	for _, b := range k.books {
		for _, wrong := range b.audit() {
			k.t.Errorf("session %q: %s", b.session, wrong)
		}
		now, err := admin.Session(k.ctx, b.session)
		if err != nil {
			k.t.Fatal(err)
		}
		if now.GetHeadSeq() != uint64(len(b.stored)) || now.GetEpoch() != b.epoch {
			k.t.Errorf("session %q has %d envelopes of epoch %s; %d of %s were read", b.session, now.GetHeadSeq(), now.GetEpoch(), len(b.stored), b.epoch)
		}
	}
	for _, v := range k.all {
		if strings.Contains(v.p.err.String(), "panic") {
			k.t.Errorf("tidemark %s panicked:\n%s", v.args[0], v.p.err)
		}
	}
}

func (k *killing) summary() string {
	var b strings.Builder
	for _, book := range k.books {
		fmt.Fprintf(&b, "%d envelopes in %q, ", len(book.stored), book.session)
	}
	fmt.Fprintf(&b, "each read by 7; %d publishes acknowledged, %d sent again, %d connections lost by followers and producers", k.acks.Load(), k.retries.Load(), k.lost.Load())
	return b.String()
}
