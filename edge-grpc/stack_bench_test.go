package edgegrpc

import (
	"bufio"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/schema"
)

// The measurement of docs/adr/0002-grpc-stack.md: what a frame costs grpc-go and connect-go, each serving the same handler in a process of its own, with the codecs of the edge.
//
//	go test ./edge-grpc -run '^$' -bench Stack -benchtime 2s [-stack-conns 20]

var stackConns = flag.Int("stack-conns", 1, "connections of BenchmarkStack, each with one stream")

// stackServer is the environment variable that makes a server of the test binary.
const stackServer = "TIDEMARK_TEST_STACK_SERVER"

func TestMain(m *testing.M) {
	if s := os.Getenv(stackServer); s != "" {
		if err := serveStack(s); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// duplex is what both stacks offer a handler, and a client.
type duplex struct {
	recv func() ([]byte, error) // valid until the next
	send func([]byte) error
}

// talk is the handler. The client's first message says what is wanted: "down n" is events of n tokens without an end; "up" is an answer to every 4,096 frames; "both" is answers as the gateway
// gives them, by a writer that says what it has to say whenever it can; "ping" is every frame sent back.
func (d duplex) talk() error {
	first, err := d.recv()
	if err != nil {
		return err
	}
	mode, n := "", 0
	_, _ = fmt.Sscan(string(first), &mode, &n)
	var got atomic.Uint64
	count := func() []byte { return binary.LittleEndian.AppendUint64(nil, got.Load()) }
	switch mode {
	case "down":
		for events := eventsFrame(n); err == nil; {
			err = d.send(events)
		}
	case "up":
		for {
			if _, err = d.recv(); err != nil {
				break
			}
			if got.Add(1)%4096 == 0 {
				if err = d.send(count()); err != nil {
					break
				}
			}
		}
	case "both":
		wake := make(chan struct{}, 1)
		var writer sync.WaitGroup
		writer.Go(func() {
			for range wake {
				if d.send(count()) != nil {
					break
				}
			}
		})
		for {
			if _, err = d.recv(); err != nil {
				break
			}
			got.Add(1)
			select {
			case wake <- struct{}{}:
			default:
			}
		}
		close(wake)
		writer.Wait()
	case "ping":
		for {
			b, err := d.recv()
			if err != nil || d.send(b) != nil {
				break
			}
		}
	}
	return err
}

// serveStack serves until standard input ends.
func serveStack(stack string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	if stack == "grpc-go" {
		s := grpc.NewServer(grpc.ForceServerCodecV2(newNativeCodec()), grpc.StaticStreamWindowSize(streamWindow), grpc.StaticConnWindowSize(connectionWindow),
			grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
				var in, out message
				return duplex{
					func() ([]byte, error) { err := s.RecvMsg(&in); return in.bytes, err },
					func(b []byte) error { out.bytes = b; return s.SendMsg(&out) },
				}.talk()
			}))
		return s.Serve(l)
	}
	h := connect.NewBidiStreamHandler(procedure("Connect"), func(_ context.Context, s *connect.BidiStream[message, message]) error {
		c := s.Conn()
		var in, out message
		return duplex{
			func() ([]byte, error) { err := c.Receive(&in); return in.bytes, err },
			func(b []byte) error { out.bytes = b; return c.Send(&out) },
		}.talk()
	}, webOptions())
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	s := &http.Server{Handler: h, Protocols: p, HTTP2: &http.HTTP2Config{MaxReceiveBufferPerConnection: connectionWindow, MaxReceiveBufferPerStream: streamWindow}}
	return s.Serve(l)
}

// dialStack opens streams to a server, one on a connection.
func dialStack(b *testing.B, client, addr string) func() duplex {
	if client == "grpc-go" {
		return func() duplex {
			cc, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(newNativeCodec())))
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = cc.Close() })
			s, err := cc.NewStream(b.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, procedure("Connect"))
			if err != nil {
				b.Fatal(err)
			}
			var in, out message
			return duplex{
				func() ([]byte, error) { err := s.RecvMsg(&in); return in.bytes, err },
				func(b []byte) error { out.bytes = b; return s.SendMsg(&out) },
			}
		}
	}
	return func() duplex {
		p := new(http.Protocols)
		p.SetUnencryptedHTTP2(true)
		tr := &http.Transport{Protocols: p}
		b.Cleanup(tr.CloseIdleConnections)
		// Without compression: what is compared is the carrying of frames.
		k := connect.NewClient[message, message](&http.Client{Transport: tr}, "http://"+addr+procedure("Connect"), connect.WithGRPC(), connect.WithCodec(webCodec{name: "proto"}), connect.WithAcceptCompression("gzip", nil, nil))
		s := k.CallBidiStream(b.Context())
		var out message
		return duplex{
			func() ([]byte, error) {
				m, err := s.Receive()
				if err != nil {
					return nil, err
				}
				return m.bytes, nil
			},
			func(b []byte) error { out.bytes = b; return s.Send(&out) },
		}
	}
}

// eventsFrame is a ServerFrame with n tokens as they are stored.
func eventsFrame(n int) []byte {
	events := &schema.Events{Channel: 1, ThroughSeq: uint64(1000 + n)}
	for i := range n {
		events.Envelopes = append(events.Envelopes, &schema.Envelope{
			Id: "01JD9ZK7V1Q8R7S6T5V4W3X2Y1", Seq: uint64(1000 + i), Time: timestamppb.Now(), Source: &schema.Source{Subject: "agent-7", Role: schema.Role_ROLE_AGENT},
			Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "msg_01", Text: " token"}},
		})
	}
	b, _ := proto.Marshal(&schema.ServerFrame{Frame: &schema.ServerFrame_Events{Events: events}})
	return b
}

// publishFrame is a ClientFrame with one token.
func publishFrame() []byte {
	e := &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: "msg_01", Text: " token"}}}
	b, _ := proto.Marshal(clientFrame(&schema.Publish{PublishId: 4711, Channel: 1, Envelopes: []*schema.Envelope{e}}))
	return b
}

func BenchmarkStack(b *testing.B) {
	for _, mode := range []string{"down 1", "down 16", "down 256", "up 1", "both 1", "ping 1"} {
		for _, client := range []string{"grpc-go", "connect-go"} {
			for _, server := range []string{"grpc-go", "connect-go"} {
				b.Run(fmt.Sprintf("%s/client=%s/server=%s", strings.ReplaceAll(mode, " ", "-"), client, server), func(b *testing.B) { benchmarkStack(b, mode, client, server) })
			}
		}
	}
}

func benchmarkStack(b *testing.B, mode, client, server string) {
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), stackServer+"="+server)
	child.Stderr = os.Stderr
	stdin, err := child.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := child.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := child.Start(); err != nil {
		b.Fatal(err)
	}
	addr, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	open := dialStack(b, client, strings.TrimSpace(addr))
	streams := make([]duplex, *stackConns)
	for i := range streams {
		streams[i] = open()
		if err := streams[i].send([]byte(mode)); err != nil {
			b.Fatal(err)
		}
	}
	var latency []time.Duration
	each := (b.N + len(streams) - 1) / len(streams)
	b.ResetTimer()
	began := time.Now()
	var clients sync.WaitGroup
	for i, s := range streams {
		clients.Go(func() {
			var err error
			switch mode {
			case "up 1":
				err = s.push(uint64(each+4095)/4096*4096, 8192)
			case "both 1":
				err = s.push(uint64(each), 256)
			case "ping 1":
				took, e := s.pings(each)
				if err = e; i == 0 {
					latency = took
				}
			default:
				for range each {
					if _, err = s.recv(); err != nil {
						break
					}
				}
			}
			if err != nil {
				b.Error(err)
			}
		})
	}
	clients.Wait()
	took := time.Since(began)
	b.StopTimer()
	_ = stdin.Close()
	_ = child.Wait()
	frames := float64(each * len(streams))
	kind, tokens := "", 1.0
	_, _ = fmt.Sscan(mode, &kind, &tokens)
	b.ReportMetric(frames*tokens/took.Seconds(), "tokens/s")
	b.ReportMetric(float64(child.ProcessState.UserTime()+child.ProcessState.SystemTime())/frames/1e3, "server-µs/frame")
	if len(latency) > 0 {
		slices.Sort(latency)
		b.ReportMetric(float64(latency[len(latency)/2])/1e3, "p50-µs")
		b.ReportMetric(float64(latency[len(latency)*99/100])/1e3, "p99-µs")
	}
}

// push sends n frames, of which at most window are unanswered, and waits until all are answered.
func (d duplex) push(n, window uint64) error {
	var answered atomic.Uint64
	room := make(chan struct{}, 1)
	failed := make(chan error, 1)
	var reader sync.WaitGroup
	reader.Go(func() {
		for answered.Load() < n {
			b, err := d.recv()
			if err != nil {
				failed <- err
				return
			}
			answered.Store(binary.LittleEndian.Uint64(b))
			select {
			case room <- struct{}{}:
			default:
			}
		}
	})
	frame := publishFrame()
	for sent := range n {
		for sent-answered.Load() >= window {
			select {
			case <-room:
			case err := <-failed:
				return err
			}
		}
		if err := d.send(frame); err != nil {
			return err
		}
	}
	reader.Wait()
	return nil
}

// pings sends n frames, each when the one before has come back.
func (d duplex) pings(n int) ([]time.Duration, error) {
	frame := publishFrame()
	took := make([]time.Duration, n)
	for i := range took {
		began := time.Now()
		if err := d.send(frame); err != nil {
			return nil, err
		}
		if _, err := d.recv(); err != nil {
			return nil, err
		}
		took[i] = time.Since(began)
	}
	return took, nil
}
