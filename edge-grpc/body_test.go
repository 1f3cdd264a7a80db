package edgegrpc

import (
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"tidemark/schema"
)

// TestBodiesAreNotWaitedFor: a call whose message never comes holds no connection, whoever sends it and wherever to; a follower stays for as long as it likes.
func TestBodiesAreNotWaitedFor(t *testing.T) {
	inWorld(t, func(w *world) {
		for _, path := range []string{procedure("Append"), procedure("Follow"), procedure("AppendStream"), procedure("Connect"), "/grpc.health.v1.Health/Watch", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/nowhere"} {
			c, err := w.l.dial(w.ctx)
			w.must(err)
			began := time.Now()
			_, err = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: edge\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n", path)
			w.must(err)
			w.must(c.SetReadDeadline(time.Now().Add(time.Hour)))
			_, err = io.Copy(io.Discard, c)
			if took := time.Since(began); err != nil || took > 2*bodyTimeout {
				w.Errorf("%s: held for %s, %v", path, took, err)
			}
			_ = c.Close()
		}
		// Over HTTP/1, where the deadline is the connection's.
		header := http.Header{"Authorization": {"Bearer " + w.token(schema.Role_ROLE_AGENT, "*")}, "Content-Type": {"application/connect+json"}}
		body := []byte(`{"session":"s"}`)
		res := w.browser("POST", procedure("Follow"), header, append([]byte{0, 0, 0, 0, byte(len(body))}, body...))
		said := make(chan string, 100)
		go func() {
			defer close(said)
			for b := make([]byte, 4096); ; {
				n, err := res.Body.Read(b)
				if n > 0 {
					said <- string(b[:n])
				}
				if err != nil {
					return
				}
			}
		}()
		<-said
		time.Sleep(10 * bodyTimeout)
		for len(said) > 0 {
			<-said
		}
		w.publish("s", "still here")
		if _, more := <-said; !more {
			w.Error("the follower was cut off")
		}
	})
}
