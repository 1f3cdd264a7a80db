package replay

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"iter"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"

	"tidemark/internal/client"
	"tidemark/internal/recording"
	"tidemark/schema"
)

// Verdict is what Verify found.
type Verdict struct {
	Session string `json:"session"`
	Epoch   string `json:"epoch"`
	// First and Last are the seqs of the first and the last envelope, 0 where there is none; Envelopes is how many came.
	First     uint64 `json:"first"`
	Last      uint64 `json:"last"`
	Envelopes int    `json:"envelopes"`
	// Gone is how many envelopes before First retention took.
	Gone     uint64 `json:"gone,omitempty"`
	Messages int    `json:"messages"`
	// TextBytes is the length of all messages' texts. TextDigest is the SHA-256, in hexadecimal, of each message's text, a zero byte, its reasoning and a zero byte, in the order in which the messages
	// began: the same conversation has the same digest, however it was cut into tokens.
	TextBytes  int    `json:"text_bytes"`
	TextDigest string `json:"text_digest"`
	// Problems are sentences, at most [MaxProblems]; Found is how many there are.
	Problems []string `json:"problems,omitempty"`
	Found    int      `json:"found"`
}

// MaxProblems bounds the problems that a verdict tells of.
const MaxProblems = 20

// Sound reports whether there are no problems.
func (v *Verdict) Sound() bool { return v.Found == 0 }

// Verify checks a session: the seqs are contiguous up to the head, each id is there once, each envelope is one that the schema allows and its JSON form gives back, each producer's envelopes are in its
// own order without a gap, and what a completed message says of its text is so. It holds the ids and the texts in memory. The error is why the session could not be read to its end.
func Verify(session string, events iter.Seq2[client.Event, error]) (*Verdict, error) {
	v := &verifier{Verdict: Verdict{Session: session}, ids: make(map[ulid.ULID]uint64), producers: make(map[producer]uint64), completed: make(map[string]string)}
	var failed error
	said := recording.Gather(func(yield func(*schema.Envelope) bool) {
		for ev, err := range events {
			if err != nil {
				failed = err
				return
			}
			switch {
			case ev.Attached != nil:
				v.attached(ev.Attached)
			case ev.Truncated != nil:
				v.truncated(ev.Truncated)
			case ev.Envelope != nil:
				v.envelope(ev.Envelope)
				if !yield(ev.Envelope) {
					return
				}
			}
		}
	})
	if failed != nil {
		return nil, failed
	}
	v.finish(said)
	return &v.Verdict, nil
}

// producer is whose it is, its id and its epoch.
type producer struct {
	subject string
	role    schema.Role
	id      string
	epoch   uint64
}

type verifier struct {
	Verdict
	head      uint64
	ids       map[ulid.ULID]uint64 // the seq that each id has
	producers map[producer]uint64  // the seq, as the producer counts, of its last envelope
	completed map[string]string    // the texts that completed messages say they have
	json      []byte
}

func (v *verifier) problem(format string, args ...any) {
	v.Found++
	if len(v.Problems) < MaxProblems {
		v.Problems = append(v.Problems, fmt.Sprintf(format, args...))
	}
}

func (v *verifier) attached(a *schema.Attached) {
	v.Epoch, v.head, v.Last = a.GetEpoch(), a.GetHeadSeq(), a.GetAfterSeq()
	if _, err := ulid.ParseStrict(v.Epoch); err != nil {
		v.problem("The session's epoch, %q, is not a ULID.", v.Epoch)
	}
}

func (v *verifier) truncated(t *schema.Truncated) {
	if v.Envelopes > 0 || t.GetFirstSeq() <= v.Last {
		v.problem("After seq %d the edge says that the session begins at seq %d.", v.Last, t.GetFirstSeq())
	}
	v.Gone += t.GetFirstSeq() - v.Last - 1
	v.Last = t.GetFirstSeq() - 1
}

func (v *verifier) envelope(e *schema.Envelope) {
	seq := e.GetSeq()
	if seq != v.Last+1 {
		v.problem("Seq %d came where %d was due.", seq, v.Last+1)
	}
	v.Last = seq
	if v.Envelopes++; v.Envelopes == 1 {
		v.First = seq
	}
	if id, err := ulid.ParseStrict(e.GetId()); err != nil {
		v.problem("The id of seq %d, %q, is not a ULID.", seq, e.GetId())
	} else if before, twice := v.ids[id]; twice {
		v.problem("Seqs %d and %d have the same id, %s.", before, seq, id)
	} else {
		v.ids[id] = seq
	}
	// What a newer version wrote is none of this one's business.
	if err := e.Validate(); err != nil && schema.CodeOf(err) != schema.Code_CODE_UNKNOWN_TYPE {
		v.problem("Seq %d is not as it must be: %v", seq, err)
	}
	if e.GetSource().GetSubject() == "" || e.GetTime() == nil {
		v.problem("Seq %d does not say who sent it, or when.", seq)
	}
	v.json = schema.AppendJSON(v.json[:0], e)
	if again, err := schema.ParseJSON(v.json); err != nil {
		v.problem("The JSON form of seq %d cannot be read back: %v", seq, err)
	} else if !proto.Equal(e, again) {
		v.problem("The JSON form of seq %d reads back as another envelope.", seq)
	}
	if p := e.GetProducer(); p != nil {
		v.produced(seq, e.GetSource(), p)
	}
	if m := e.GetMessageCompleted(); m.GetText() != "" {
		v.completed[m.GetMessageId()] = m.GetText()
	}
}

// produced checks the producer's own order. Where the beginning was taken, or was not asked for, it may begin anywhere.
func (v *verifier) produced(seq uint64, of *schema.Source, p *schema.Producer) {
	k := producer{of.GetSubject(), of.GetRole(), p.GetId(), p.GetEpoch()}
	last, known := v.producers[k]
	switch {
	case known && p.GetSeq() != last+1, !known && v.First == 1 && p.GetSeq() != 1:
		v.problem("Seq %d is number %d of producer %q in its epoch %d, where %d was due.", seq, p.GetSeq(), k.id, k.epoch, last+1)
	}
	v.producers[k] = p.GetSeq()
}

func (v *verifier) finish(said *recording.Transcript) {
	if v.Last < v.head {
		v.problem("The session ended at seq %d; its head was %d.", v.Last, v.head)
	}
	sum := sha256.New()
	for _, m := range said.Messages {
		v.TextBytes += len(m.Text)
		_, _ = io.WriteString(sum, m.Text+"\x00"+m.Reasoning+"\x00")
		if text, ok := v.completed[m.ID]; ok && m.Text != "" && text != m.Text && v.Gone == 0 && v.First == 1 {
			v.problem("Message %q says that its text has %d bytes; its tokens have %d, or others.", m.ID, len(text), len(m.Text))
		}
	}
	v.Messages = len(said.Messages)
	v.TextDigest = hex.EncodeToString(sum.Sum(nil))
}

// WriteText writes the verdict for people.
func (v *Verdict) WriteText(w io.Writer) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "session   %s\nepoch     %s\nseqs      %d … %d, %d envelopes\n", visible(v.Session, false), v.Epoch, v.First, v.Last, v.Envelopes)
	if v.Gone > 0 {
		fmt.Fprintf(&b, "retention took %d envelopes before seq %d\n", v.Gone, v.First)
	}
	fmt.Fprintf(&b, "text      %d messages, %d bytes, sha256 %s\n", v.Messages, v.TextBytes, v.TextDigest)
	for _, p := range v.Problems {
		fmt.Fprintf(&b, "problem   %s\n", visible(p, false))
	}
	switch {
	case v.Sound():
		fmt.Fprintln(&b, "verdict   sound: contiguous, every id once, every producer in order, JSON lossless")
	case v.Found > len(v.Problems):
		fmt.Fprintf(&b, "verdict   not sound: %d problems, the first %d above\n", v.Found, len(v.Problems))
	default:
		fmt.Fprintf(&b, "verdict   not sound: %d problems\n", v.Found)
	}
	_, err := w.Write(b.Bytes())
	return err
}
