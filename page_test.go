package main

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestPageOfDevAndEdge: dev shows the page and prints links to it, unless it is told not to; an edge shows it where it is told to.
func TestPageOfDevAndEdge(t *testing.T) {
	shows := func(p *proc) bool {
		res, err := http.Get("http://" + p.at.HTTP + "/")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode == http.StatusOK && strings.Contains(string(body), "<title>Tidemark</title>")
	}
	dir := t.TempDir()
	p := dev(t, dir, "--drain-for", "0s")
	// The token stands behind the #: no server sees it, and so no log.
	waitFor(t, "two links to the page", func() bool { return strings.Count(p.err.String(), "http://"+p.at.HTTP+"/#session=hello&token=ey") == 2 })
	if !shows(p) {
		t.Error("dev shows no page")
	}
	for _, want := range []bool{false, true} {
		args := []string{"edge-ws", "--data-dir", dir, "--http", "127.0.0.1:0", "--drain-for", "0s"}
		if want {
			args = append(args, "--page")
		}
		edge := serveUntilReady(t, args...)
		if shows(edge) != want {
			t.Errorf("%v: shows the page: %v", args, !want)
		}
		edge.stop()
	}
	p.stop()
	p = dev(t, dir, "--drain-for", "0s", "--no-page")
	if shows(p) || strings.Contains(p.err.String(), "/#session=") {
		t.Error("dev shows the page although it was told not to")
	}
	p.stop()
}
