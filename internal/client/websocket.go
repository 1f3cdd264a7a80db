package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"tidemark/schema"
)

// subprotocol of the multiplexed connection in binary.
const subprotocol = "tidemark.v1.proto"

// wsConn is a connection over the WebSocket.
type wsConn struct {
	ws     *websocket.Conn
	client *http.Client
	// reads counts the beginnings and ends of receive: it is odd while somebody waits for the edge.
	reads atomic.Uint64
	over  context.CancelFunc
	ended chan struct{} // closed when watch has ended
	buf   []byte        // owned by receive
}

func (c *Client) dialWebSocket(ctx context.Context, e edge) (conn, error) {
	u := *e.url
	u.Scheme, u.Path = "ws", "/v1/connect"
	if e.secure {
		u.Scheme = "wss"
	}
	h := make(http.Header)
	h.Set("Authorization", "Bearer "+c.cfg.Token)
	if c.cfg.Name != "" {
		h.Set("User-Agent", c.cfg.Name)
	}
	hc := &http.Client{Transport: &http.Transport{DialContext: c.cfg.Dial, TLSClientConfig: c.cfg.TLS}}
	ws, res, err := websocket.Dial(ctx, u.String(), &websocket.DialOptions{HTTPClient: hc, HTTPHeader: h, Subprotocols: []string{subprotocol}})
	if err != nil {
		hc.CloseIdleConnections()
		return nil, upgradeError(res, err)
	}
	ws.SetReadLimit(maxServerFrame)
	w := &wsConn{ws: ws, client: hc, ended: make(chan struct{})}
	watching, over := context.WithCancel(context.WithoutCancel(ctx))
	w.over = over
	go w.watch(watching)
	return w, nil
}

// upgradeError is what the edge said instead of upgrading.
func upgradeError(res *http.Response, err error) error {
	if res == nil || res.StatusCode == http.StatusSwitchingProtocols {
		return err
	}
	// The library keeps the first KiB of the body.
	body, _ := io.ReadAll(res.Body)
	var said struct{ Error, Details, Code string }
	_ = json.Unmarshal(body, &said)
	r := &schema.Refusal{Code: parseCode(said.Code), Message: said.Details}
	if r.Message == "" {
		r.Message = fmt.Sprintf("The edge answered the upgrade with %s.", res.Status)
	}
	if r.Code != schema.Code_CODE_UNSPECIFIED {
		return r
	}
	switch {
	case res.StatusCode == http.StatusUnauthorized:
		r.Code = schema.Code_CODE_UNAUTHENTICATED
	case res.StatusCode == http.StatusForbidden:
		r.Code = schema.Code_CODE_FORBIDDEN
	case res.StatusCode == http.StatusTooManyRequests || res.StatusCode >= 500:
		r.Code = schema.Code_CODE_UNAVAILABLE
	default:
		r.Code = schema.Code_CODE_UNSUPPORTED_PROTOCOL
	}
	return r
}

func (w *wsConn) send(ctx context.Context, frame []byte) error {
	return w.ws.Write(ctx, websocket.MessageBinary, frame)
}

func (w *wsConn) receive(ctx context.Context) ([]byte, error) {
	w.reads.Add(1)
	defer w.reads.Add(1)
	_, r, err := w.ws.Reader(ctx)
	if err != nil {
		return nil, closedBy(err)
	}
	w.buf, err = appendAll(w.buf[:0], r)
	if err != nil {
		return nil, closedBy(err)
	}
	return w.buf, nil
}

// watch asks an edge that says nothing whether it is there, and cuts the connection where it does not answer.
func (w *wsConn) watch(ctx context.Context) {
	defer close(w.ended)
	tick := time.NewTicker(silence)
	defer tick.Stop()
	for last := uint64(0); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		reads := w.reads.Load()
		if reads%2 == 0 || reads != last {
			last = reads
			continue
		}
		pong, cancel := context.WithTimeout(ctx, deadAfter)
		err := w.ws.Ping(pong)
		cancel()
		// Pongs are read by receive alone: where it has returned meanwhile there are other signs of life.
		if err != nil && w.reads.Load() == reads && ctx.Err() == nil {
			_ = w.ws.CloseNow()
			return
		}
	}
}

func (w *wsConn) cut() {
	w.over()
	_ = w.ws.CloseNow()
	<-w.ended
	w.client.CloseIdleConnections()
}

func (w *wsConn) close() {
	w.over()
	_ = w.ws.Close(websocket.StatusNormalClosure, "")
	<-w.ended
	w.client.CloseIdleConnections()
}

// closedBy is the refusal in a close frame whose reason begins with a code's word, otherwise err.
func closedBy(err error) error {
	closed, ok := errors.AsType[websocket.CloseError](err)
	if !ok || closed.Code == websocket.StatusNormalClosure {
		// A good end has no code, whatever its reason says.
		return err
	}
	word, sentence, _ := strings.Cut(closed.Reason, ":")
	if code := parseCode(word); code != schema.Code_CODE_UNSPECIFIED {
		return &schema.Refusal{Code: code, Message: strings.TrimSpace(sentence)}
	}
	return err
}

// parseCode is the code of a word, unspecified where it is none.
func parseCode(word string) schema.Code {
	if word != strings.ToLower(word) {
		return schema.Code_CODE_UNSPECIFIED
	}
	return schema.Code(schema.Code_value["CODE_"+strings.ToUpper(word)])
}

// appendAll reads r to its end into b, which grows where it must.
func appendAll(b []byte, r io.Reader) ([]byte, error) {
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if errors.Is(err, io.EOF) {
			return b, nil
		}
		if err != nil {
			return b, err
		}
	}
}
