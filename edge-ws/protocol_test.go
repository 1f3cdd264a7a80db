package edgews

import (
	"encoding/json"
	"maps"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"tidemark/internal/doctable"
	"tidemark/schema"
)

// sessionSection reads the tables in PROTOCOL.md's section on the session socket, by the first cell of their heads.
func sessionSection(t *testing.T) map[string][][]string {
	t.Helper()
	tables, err := doctable.Tables("../PROTOCOL.md", "The session socket")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string][][]string{}
	for _, table := range tables {
		rows[table.Head[0]] = append(rows[table.Head[0]], table.Rows...)
	}
	return rows
}

// words are the words in backquotes.
func words(cell string) []string {
	var all []string
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
		all = append(all, m[1])
	}
	return all
}

func codeOf(word string) (schema.Code, bool) {
	c, ok := schema.Code_value["CODE_"+strings.ToUpper(word)]
	return schema.Code(c), ok
}

// TestProtocolCloses compares the table of close codes with the rules.
func TestProtocolCloses(t *testing.T) {
	says := map[schema.Reconnect]string{schema.Reconnect_RECONNECT_NO: "no", schema.Reconnect_RECONNECT_SAME_CURSOR: "same cursor", schema.Reconnect_RECONNECT_BEGINNING: "beginning"}
	seen := map[string]bool{}
	for _, r := range sessionSection(t)["close"] {
		status, err := strconv.Atoi(r[0])
		if err != nil {
			t.Fatal(err)
		}
		seen[r[0]] = true
		for _, word := range words(r[1]) {
			if status == 1000 {
				if _, ok := schema.Status_value["STATUS_"+strings.ToUpper(word)]; !ok || !strings.HasPrefix(r[3], "no") {
					t.Errorf("%v", r)
				}
				continue
			}
			code, ok := codeOf(word)
			rule := code.Rule()
			if !ok || !strings.HasPrefix(r[3], says[rule.Reconnect]) {
				t.Errorf("%s: PROTOCOL.md says reconnect %q, the code %q", word, r[3], says[rule.Reconnect])
			}
			// Those that say what the RFC has an own number for.
			if exact := status == 1002 || status == 1003 || status == 1007; rule.Close != status && (!exact || code != schema.Code_CODE_INVALID_MESSAGE) {
				t.Errorf("%s: PROTOCOL.md says it closes with %d, the code %d", word, status, rule.Close)
			}
			seen[word] = true
		}
	}
	for _, needed := range []string{"1000", "1001", "1002", "1003", "1007", "1008", "1009", "1011", "1012", "4401", "rate_exceeded", "forbidden", "session_deleted", "too_many_connections"} {
		if !seen[needed] {
			t.Errorf("PROTOCOL.md does not say what %s means", needed)
		}
	}
}

// TestProtocolStatuses compares the table of HTTP statuses with what a refusal is answered with.
func TestProtocolStatuses(t *testing.T) {
	statuses := sessionSection(t)["HTTP status"]
	if len(statuses) != 6 {
		t.Errorf("PROTOCOL.md has %d statuses", len(statuses))
	}
	edge := &Edge{refused: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "refused"}, []string{"code"})}
	for _, r := range statuses {
		for _, word := range words(r[1]) {
			code, ok := codeOf(word)
			if !ok {
				t.Errorf("%s is no code", word)
			}
			w := httptest.NewRecorder()
			if code == schema.Code_CODE_UNSUPPORTED_PROTOCOL {
				edge.upgrades(w, httptest.NewRequest("GET", "/ws", nil))
			} else {
				refuse(w, schema.Refuse(code, "A sentence."))
			}
			var p problem
			if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || strconv.Itoa(w.Code) != r[0] || p.Error != r[2] || p.Code != word {
				t.Errorf("%s: PROTOCOL.md says %s %q, the edge %d %+v", word, r[0], r[2], w.Code, p)
			}
		}
	}
}

// together are fields that stand with another or not at all.
var together = map[string]string{"deadline": "default", "default": "deadline"}

// TestProtocolData compares the table of what envelopes hold with what is taken: no field is missing in it, those in bold are required, the others are not.
func TestProtocolData(t *testing.T) {
	check := func(kind string, data map[string]json.RawMessage) error {
		b, err := json.Marshal(map[string]any{"type": kind, "data": data})
		if err != nil {
			t.Fatal(err)
		}
		e, err := schema.ParseJSON(b)
		if err != nil {
			return err
		}
		return e.Validate()
	}
	table := map[string][]string{}
	for _, r := range sessionSection(t)["type"] {
		table[words(r[0])[0]] = r
	}
	for _, r := range rows {
		if r.by == "" {
			continue
		}
		doc := table[r.kind.String()]
		if doc == nil {
			t.Errorf("%s has no row in PROTOCOL.md", r.kind)
			continue
		}
		delete(table, r.kind.String())
		fields := words(doc[2])
		for _, good := range r.good {
			in, _, _ := strings.Cut(good, " => ")
			var data map[string]json.RawMessage
			if err := json.Unmarshal([]byte(in), &data); err != nil {
				t.Fatal(err)
			}
			for _, field := range fields {
				without := maps.Clone(data)
				delete(without, field)
				delete(without, together[field])
				required := strings.Contains(doc[2], "**`"+field+"`**")
				if err := check(r.kind.String(), without); (err != nil) != required && r.kind != schema.KindCancel {
					t.Errorf("%s: without %s it is refused with %v; PROTOCOL.md says %q", r.kind, field, err, doc[2])
				}
			}
			for field := range data {
				if !slices.Contains(fields, field) {
					t.Errorf("%s: PROTOCOL.md does not name the field %s", r.kind, field)
				}
			}
		}
		for _, field := range fields {
			unknown := check(r.kind.String(), map[string]json.RawMessage{field: json.RawMessage("[[]]")})
			if unknown != nil && strings.Contains(unknown.Error(), "Unknown field") {
				t.Errorf("%s: PROTOCOL.md names the field %s, and it is refused with %v", r.kind, field, unknown)
			}
		}
	}
	for kind := range table {
		t.Errorf("PROTOCOL.md has a row for %s, which is no type", kind)
	}
}
