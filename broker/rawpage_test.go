package broker

import (
	"testing"

	"tidemark/internal/doctable"
	"tidemark/schema"
)

// TestRawPageSaysWhereSessionsAre compares the examples of docs/raw-nats.md with where sessions are.
func TestRawPageSaysWhereSessionsAre(t *testing.T) {
	tables, err := doctable.Tables("../docs/raw-nats.md", "Streams and subjects")
	if err != nil || len(tables) != 1 || len(tables[0].Rows) < 3 {
		t.Fatalf("the page has the tables %v, %v", tables, err)
	}
	for _, r := range tables[0].Rows {
		l := laneOf(schema.SessionID{Tenant: doctable.Plain(r[0]), Name: doctable.Plain(r[1])})
		if subject, stream := doctable.Plain(r[2]), doctable.Plain(r[3]); subject != l.logSubject() || stream != logStreamName(streamOf(l.slice, 4)) {
			t.Errorf("%s: the page says %s in %s, it is %s in %s", r[1], subject, stream, l.logSubject(), logStreamName(streamOf(l.slice, 4)))
		}
	}
}
