package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tidemark/schema"
)

// clusterMember is the command that makes the test binary a server of a NATS cluster: its name, its directory, its address for clients, its address for the other servers, and theirs.
const clusterMember = "nats-cluster-member"

func runClusterMember(args []string) {
	name, dir, clients, routes, others := args[0], args[1], args[2], args[3], args[4:]
	opts := &server.Options{ServerName: name, JetStream: true, StoreDir: dir, NoSigs: true, MaxPayload: 2 << 20, JetStreamMaxStore: 8 << 30, JetStreamMaxMemory: 1 << 30, NoLog: false}
	opts.Host, opts.Port = splitAddress(clients)
	opts.Cluster.Name = "tidemark-test"
	opts.Cluster.Host, opts.Cluster.Port = splitAddress(routes)
	for _, o := range others {
		opts.Routes = append(opts.Routes, &url.URL{Scheme: "nats", Host: o})
	}
	s, err := server.NewServer(opts)
	if err != nil {
		log.Fatal(err)
	}
	s.ConfigureLogger()
	s.Start()
	if !s.ReadyForConnections(patience) {
		log.Fatal("the server takes no connections")
	}
	fmt.Printf("ready http=off grpc=off nats=%s\n", clients)
	s.WaitForShutdown()
}

func splitAddress(at string) (host string, port int) {
	host, p, err := net.SplitHostPort(at)
	if err == nil {
		port, err = strconv.Atoi(p)
	}
	if err != nil {
		log.Fatal(err)
	}
	return host, port
}

// cluster is a NATS cluster of three servers, with a broker and two edges, every stream on all three.
type cluster struct {
	*killing
	members []*killable
	broker  *killable
	// brokerArgs start another broker.
	brokerArgs []string
	js         jetstream.JetStream
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{killing: newPeople(t)}
	c.durability = schema.Durability_DURABILITY_REPLICATED
	at := quietAddresses(t, 8)
	clients, routes := at[:3], at[3:6]
	var urls []string
	for i := range clients {
		urls = append(urls, "nats://"+clients[i])
		args := []string{clusterMember, fmt.Sprint("n", i), filepath.Join(c.dir, fmt.Sprint("n", i)), clients[i], routes[i]}
		c.members = append(c.members, &killable{k: c.killing, addr: clients[i], args: append(args, slices.Delete(slices.Clone(routes), i, i+1)...)})
	}
	all := strings.Join(urls, ",")
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // it never fails
	c.secret = []byte(hex.EncodeToString(secret))
	file := secretFile(c.dir)
	if err := os.WriteFile(file, append(c.secret, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	c.brokerArgs = []string{"broker", "--nats", all, "--replicas", "3", "--streams", "2", "--http", "off", "--orphan-after", "2s"}
	c.broker = &killable{k: c.killing, args: c.brokerArgs}
	c.overWS = &killable{k: c.killing, addr: at[6], args: []string{"edge-ws", "--nats", all, "--secret-file", file, "--http", at[6], "--agent-rate", "0", "--data-dir", c.dir}}
	c.overGRPC = &killable{k: c.killing, addr: at[7], args: []string{"edge-grpc", "--nats", all, "--secret-file", file, "--grpc", at[7], "--http", "off", "--agent-rate", "0", "--data-dir", c.dir}}
	c.all = append(slices.Clone(c.members), c.broker, c.overWS, c.overGRPC)
	for _, v := range c.all {
		v.start()
	}
	for _, v := range c.all {
		v.p.awaitReady()
	}
	nc, err := nats.Connect(all, nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	if c.js, err = jetstream.New(nc); err != nil {
		t.Fatal(err)
	}
	return c
}

// heal waits until every stream is whole on all three servers.
func (c *cluster) heal() {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.ctx, patience)
	defer cancel()
	look := time.NewTicker(50 * time.Millisecond)
	defer look.Stop()
	for {
		why := c.broken(ctx)
		if why == "" {
			return
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			c.t.Fatalf("the cluster is not whole after %s: %s (%v)", patience, why, context.Cause(c.ctx))
		}
	}
}

// broken says what the cluster lacks; empty for nothing.
func (c *cluster) broken(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	streams := c.js.ListStreams(ctx)
	n := 0
	for s := range streams.Info() {
		n++
		if s.Cluster == nil || s.Cluster.Leader == "" || len(s.Cluster.Replicas) != 2 {
			return "stream " + s.Config.Name + " has no leader"
		}
		for _, r := range s.Cluster.Replicas {
			if !r.Current || r.Offline {
				return fmt.Sprintf("stream %s is behind on %s by %d", s.Config.Name, r.Name, r.Lag)
			}
		}
	}
	if err := streams.Err(); err != nil {
		return err.Error()
	}
	if n < 8 {
		return fmt.Sprintf("there are %d streams", n)
	}
	return ""
}

// TestKillsInACluster is TestKills where each envelope is on three servers, and the servers die: one at a time people hardly notice, and even when two or all of them are dead for a while nothing that was acknowledged is lost.
func TestKillsInACluster(t *testing.T) {
	if os.Getenv("TIDEMARK_SLOW") == "" {
		t.Skip("TIDEMARK_SLOW=1 runs it: elections take their seconds")
	}
	t.Parallel()
	c := newCluster(t)
	c.work()
	c.awaitProgress(300)
	killed := 0
	for round := range 12 {
		c.heal()
		c.awaitProgress(1 + c.random.Uint64N(500))
		c.pause(20 * time.Millisecond)
		var hit []*killable
		switch draw := c.random.IntN(100); {
		case round < 3: // each at least once
			hit = c.members[round : round+1]
		case draw < 40:
			hit = []*killable{c.members[c.random.IntN(3)]}
		case draw < 55:
			i := c.random.IntN(3)
			hit = []*killable{c.members[i], c.members[(i+1)%3]}
		case draw < 65:
			hit = c.members
		case draw < 75:
			hit = []*killable{c.broker}
		default:
			hit = []*killable{c.members[c.random.IntN(3)], c.all[3+c.random.IntN(3)]}
		}
		for _, v := range hit {
			v.kill()
			killed++
		}
		if len(hit) == 1 {
			c.awaitProgress(200)
		} else {
			c.pause(time.Second)
		}
		for _, v := range hit {
			v.start()
		}
		for _, v := range hit {
			v.p.awaitReady()
		}
	}
	c.heal()
	c.awaitProgress(100)
	c.finish()
	for _, v := range c.all {
		v.kill()
	}
	for _, v := range c.all {
		v.start()
	}
	for _, v := range c.all {
		v.p.awaitReady()
	}
	c.compare()
	t.Logf("%d processes killed; %s", killed, c.summary())
}

// TestKillsAtWorkInACluster is TestKillsAtWork on a cluster, whose servers die one at a time as brokers and edges do.
func TestKillsAtWorkInACluster(t *testing.T) {
	if os.Getenv("TIDEMARK_SLOW") == "" {
		t.Skip("TIDEMARK_SLOW=1 runs it: elections take their seconds")
	}
	t.Parallel()
	c := newCluster(t)
	w := newToilAt(c.killing)
	w.startStandby(append(c.brokerArgs, "--broker-name", "standby")...)
	w.toil(3_000, func() {
		for i := range 12 {
			c.heal()
			w.fault(i, 2*time.Second)
		}
	})
}
