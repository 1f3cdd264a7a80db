package broker

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"tidemark/schema"
)

// What is on the streams of work (docs/adr/0008):
//
//	WORK  work.<tenant>.<kind>.<session>                     an item: an envelope that makes work, written by the projector alone
//	      redrive.<tenant>.<group>.<session>.<epoch>.<seq>   an item that one group gets again
//	DEAD  dead.<tenant>.<group>.<session>.<epoch>.<seq>      an item that a group gave up
//
// Tenant and session are escaped, kind is the number of the payload's field, group a hash of its name.
const (
	workStream = "WORK"
	deadStream = "DEAD"
	// orderStream has registers. Two are decimal numbers. Of groups that take a session's items in their order, how far each has come in each session, a sequence of WORK: order.<tenant>.<group>.<session>. And how
	// often an item was delivered to an edge that could not put it into anybody's hands: unhanded.<tenant>.<group>.<sequence in WORK>. A third says whether somebody changes a group: group.<tenant>.<group>.
	orderStream = "ORDER"
)

func workSubject(ln lane, kind schema.Kind) string {
	tenant, session, _ := strings.Cut(ln.name, ".")
	return "work." + tenant + "." + strconv.Itoa(int(kind)) + "." + session
}

// groupHash names a group in subjects, consumers and keys: of any name a token of fixed length.
func groupHash(group string) string {
	sum := sha256.Sum256([]byte(group))
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:15]))
}

// letterSubject is where an item stands that the group gave up, under "dead", or gets again, under "redrive".
func letterSubject(root, group string, id schema.SessionID, epoch string, seq uint64) string {
	return root + "." + schema.EscapeToken(id.Tenant) + "." + groupHash(group) + "." + schema.EscapeToken(id.Name) + "." + schema.EscapeToken(epoch) + "." + strconv.FormatUint(seq, 10)
}

// redriveSubjects are those of all items that a group gets again.
func redriveSubjects(k groupKey) string {
	return "redrive." + schema.EscapeToken(k.tenant) + "." + groupHash(k.name) + ".>"
}

// maxGroups bounds the groups of a deployment: each is a consumer of WORK, at some 34 KiB and four goroutines of the server (NATS.md, section 6).
const maxGroups = 4096

// provisionWork makes the streams of work, and brings their settings up to date.
func provisionWork(ctx context.Context, js jetstream.JetStream, l Layout) error {
	base := jetstream.StreamConfig{
		Storage: l.storage(), Replicas: l.Replicas, Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardOld, MaxAge: l.MaxAge, AllowDirect: true,
		Duplicates: 100 * time.Millisecond,
	}
	work, dead, order := base, base, base
	work.Name, work.Subjects, work.MaxConsumers = workStream, []string{"work.>", "redrive.>"}, maxGroups
	dead.Name, dead.Subjects, dead.MaxMsgsPerSubject = deadStream, []string{"dead.>"}, 1
	order.Name, order.Subjects, order.MaxMsgsPerSubject = orderStream, []string{"order.>", "unhanded.>", "group.>"}, 1
	for _, c := range []jetstream.StreamConfig{work, dead, order} {
		if _, err := js.CreateOrUpdateStream(ctx, c); err != nil {
			return fmt.Errorf("broker: stream %s: %w", c.Name, err)
		}
	}
	return nil
}

// workItem is an item of the stream WORK. Its envelope stays encoded, as it stands in the log.
type workItem struct {
	*schema.WorkItem // without the envelope
	kind             schema.Kind
	envelope         []byte
	// seq is the item's place in WORK; 0 before it is stored.
	seq uint64
	// group is the hash of the group that gets the item again, where it was redriven and a listing found it.
	group string
}

func (w *workItem) id() schema.SessionID {
	return schema.SessionID{Tenant: w.GetTenant(), Name: w.GetSession()}
}

// encode makes the item's message.
func (w *workItem) encode() ([]byte, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(w.WorkItem)
	if err != nil {
		return nil, err
	}
	return protowire.AppendBytes(protowire.AppendTag(b, workItemEnvelope, protowire.BytesType), w.envelope), nil
}

// workItemEnvelope is the field of [schema.WorkItem] that holds the envelope. TestWorkItemFieldNumber compares it with the descriptor.
const workItemEnvelope protowire.Number = 15

// parseWorkItem reads an item's message. The envelope points into data.
func parseWorkItem(data []byte) (*workItem, error) {
	w := &workItem{WorkItem: new(schema.WorkItem)}
	head := data
	for b := data; len(b) > 0; {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, badItem(protowire.ParseError(n))
		}
		m := protowire.ConsumeFieldValue(num, typ, b[n:])
		if m < 0 {
			return nil, badItem(protowire.ParseError(m))
		}
		if num == workItemEnvelope && typ == protowire.BytesType {
			// It comes last, as encode writes it.
			w.envelope, _ = protowire.ConsumeBytes(b[n:])
			head = data[:len(data)-len(b)]
		}
		b = b[n+m:]
	}
	if err := proto.Unmarshal(head, w.WorkItem); err != nil {
		return nil, badItem(err)
	}
	s, err := schema.Scan(w.envelope)
	if err != nil {
		return nil, badItem(err)
	}
	w.kind = s.Kind
	return w, nil
}

func badItem(err error) error {
	return &schema.Refusal{Code: schema.Code_CODE_INTERNAL, Message: "A stored work item cannot be read.", Err: err}
}
