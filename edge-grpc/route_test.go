package edgegrpc

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2/hpack"
)

// frame makes an HTTP/2 frame.
func frame(typ, flags byte, stream uint32, payload []byte) []byte {
	b := []byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), typ, flags}
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(b, payload...)
}

// fields encodes header fields.
func fields(pairs ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for i := 0; i < len(pairs); i += 2 {
		_ = e.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return b.Bytes()
}

var (
	ackFrame      = frame(frameSettings, flagAck, 0, nil)
	settingsFrame = frame(frameSettings, 0, 0, []byte{0, 4, 0, 1, 0, 0})
	windowFrame   = frame(8, 0, 0, []byte{0, 0, 1, 0})
)

// headersOf is a request's first frame.
func headersOf(contentType string) []byte {
	return frame(frameHeaders, flagEndHeaders, 1, fields(":method", "POST", ":path", "/a/B", "content-type", contentType, "te", "trailers"))
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestRoute(t *testing.T) {
	preface := []byte(http2Preface)
	grpcFields := fields(":method", "POST", ":path", "/a/B", "te", "trailers", "content-type", "application/grpc")
	padded := append(append([]byte{4}, grpcFields...), 0, 0, 0, 0)
	prioritised := append([]byte{0, 0, 0, 0, 16}, grpcFields...)
	tests := []struct {
		name   string
		sent   []byte
		native bool
		// acked: sent has the acknowledgement of the router's settings, which must be taken out.
		acked bool
	}{
		{"http/1", []byte("POST /a HTTP/1.1\r\nHost: x\r\n\r\n"), false, false},
		{"http/1, shorter than the preface", []byte("GET / HTTP/1.0\r\n\r\n"), false, false},
		{"http/1 that begins as the preface", []byte("PRIVATE / HTTP/1.1\r\n\r\n"), false, false},
		{"a browser's preflight", []byte("OPTIONS /a HTTP/1.1\r\n\r\n"), false, false},
		{"grpc", join(preface, settingsFrame, headersOf("application/grpc"), ackFrame), true, true},
		{"grpc+proto", join(preface, settingsFrame, windowFrame, ackFrame, headersOf("application/grpc+proto")), true, true},
		{"grpc with a parameter", join(preface, settingsFrame, headersOf("Application/GRPC; charset=utf-8"), ackFrame), true, true},
		{"grpc+json", join(preface, settingsFrame, headersOf("application/grpc+json"), ackFrame), false, true},
		{"grpc-web", join(preface, settingsFrame, headersOf("application/grpc-web+proto"), ackFrame), false, true},
		{"connect", join(preface, settingsFrame, headersOf("application/proto"), ackFrame), false, true},
		{"no content type", join(preface, settingsFrame, frame(frameHeaders, flagEndHeaders, 1, fields(":method", "GET")), ackFrame), false, true},
		{"padded", join(preface, settingsFrame, frame(frameHeaders, flagEndHeaders|flagPadded, 1, padded), ackFrame), true, true},
		{"with priority", join(preface, settingsFrame, frame(frameHeaders, flagEndHeaders|flagPriority, 1, prioritised), ackFrame), true, true},
		{"in two frames", join(preface, settingsFrame, frame(frameHeaders, 0, 1, grpcFields[:9]), frame(frameContinuation, flagEndHeaders, 1, grpcFields[9:]), ackFrame), true, true},
		{"acknowledged once more", join(preface, settingsFrame, ackFrame, headersOf("application/grpc"), ackFrame), true, true},
		{"padding beyond the frame", join(preface, settingsFrame, frame(frameHeaders, flagEndHeaders|flagPadded, 1, []byte{200}), ackFrame), false, true},
		{"no field block", join(preface, settingsFrame, frame(frameHeaders, flagEndHeaders, 1, bytes.Repeat([]byte{0xff}, 30)), ackFrame), true, true},
		{"more than is looked at", join(preface, settingsFrame, frame(0x42, 0, 0, make([]byte, routeBytes)), headersOf("application/grpc-web"), ackFrame), true, true},
		{"nothing behind the preface", preface, true, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			// At once, and byte by byte.
			for _, size := range []int{1 << 20, 1} {
				synctest.Test(t, func(t *testing.T) {
					checkRoute(t, tt.sent, size, tt.native, tt.acked)
				})
			}
		})
	}
}

// checkRoute routes a connection whose client sends these bytes, so many at a time, and wants all of them to come out, but for one acknowledgement.
func checkRoute(t *testing.T, sent []byte, size int, native, acked bool) {
	client, server := newPipe()
	go func() {
		for rest := sent; len(rest) > 0; {
			n := min(size, len(rest))
			if _, err := client.Write(rest[:n]); err != nil {
				return
			}
			rest = rest[n:]
		}
		// It stays open, and says no more until it was routed.
		time.Sleep(2 * routeTimeout)
		_ = client.Close()
	}()
	isHTTP2 := bytes.HasPrefix(sent, []byte(http2Preface))
	greeting := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(io.LimitReader(client, settingsFrameBytes))
		greeting <- b
	}()
	c, got, err := route(server, 77)
	if err != nil {
		t.Fatal(err)
	}
	if got != native {
		t.Errorf("native %v, want %v", got, native)
	}
	b, err := io.ReadAll(c)
	if err != nil {
		t.Error(err)
	}
	want := sent
	if acked {
		i := bytes.Index(sent, ackFrame)
		want = join(sent[:i], sent[i+len(ackFrame):])
	}
	if !bytes.Equal(b, want) {
		t.Errorf("read %d bytes, want %d:\n%q\n%q", len(b), len(want), short(b), short(want))
	}
	_ = server.Close()
	g := <-greeting
	if isHTTP2 && !bytes.Equal(g, frame(frameSettings, 0, 0, []byte{0, settingMaxStreams, 0, 0, 0, 77})) || !isHTTP2 && len(g) > 0 {
		t.Errorf("the router said %q", g)
	}
}

func short(b []byte) []byte { return b[:min(len(b), 200)] }

// A connection that says nothing is closed in time; one that goes is forgotten.
func TestRouteGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := newPipe()
		began := time.Now()
		_, _, err := route(server, 1)
		if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() || time.Since(began) != routeTimeout {
			t.Errorf("a silent client: %v after %s", err, time.Since(began))
		}
		_ = client.Close()
		for _, sent := range []string{"", "P", "PRI * HTTP/2.0", http2Preface, http2Preface + "\x00\x00\x10\x01"} {
			client, server = newPipe()
			if _, err := client.Write([]byte(sent)); err != nil {
				t.Fatal(err)
			}
			_ = client.Close()
			if _, _, err := route(server, 1); err == nil {
				t.Errorf("a client that left after %q was routed", sent)
			}
		}
	})
}

// FuzzRoute: whatever a client sends comes out as it went in, but for one acknowledgement where it was greeted.
func FuzzRoute(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add(join([]byte(http2Preface), settingsFrame, headersOf("application/grpc"), ackFrame, []byte("rest")))
	f.Add(join([]byte(http2Preface), settingsFrame, frame(frameHeaders, flagPadded|flagPriority, 1, []byte{1, 2, 3}), frame(frameContinuation, 0, 1, nil), ackFrame))
	f.Fuzz(func(t *testing.T, sent []byte) {
		client, server := newPipe()
		if len(sent) > pipeBuffer {
			return
		}
		if _, err := client.Write(sent); err != nil {
			t.Fatal(err)
		}
		client.(*pipeEnd).out.close(false) // it will send no more
		c, _, err := route(server, 1)
		if err != nil {
			return
		}
		got, err := io.ReadAll(c)
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(err)
		}
		if bytes.Equal(got, sent) {
			return
		}
		// The first acknowledgement at a frame's beginning is missing, and nothing else. A half header at the end says nothing to anyone.
		for at := len(http2Preface); at+frameHeaderBytes <= len(sent); {
			size, typ, flags := frameHeader(sent[at:])
			end := min(at+frameHeaderBytes+size, len(sent))
			if typ == frameSettings && flags&flagAck != 0 {
				if want := join(sent[:at], sent[end:]); !bytes.Equal(got, want) && !bytes.HasPrefix(want, got) {
					t.Fatalf("got %q of %q", got, sent)
				}
				return
			}
			at = end
		}
		if !bytes.HasPrefix(sent, got) || len(sent)-len(got) >= frameHeaderBytes {
			t.Fatalf("got %q of %q", got, sent)
		}
	})
}
