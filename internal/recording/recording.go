package recording

import (
	"errors"
	"io"
	"iter"
	"time"

	"tidemark/schema"
)

// Format is how the lines of a recording are to be read.
type Format int

const (
	// Auto finds the format in the first line that is not blank: a line that begins with '{' must be one of the JSON formats, any other begins plain text.
	Auto Format = iota
	// Text is plain text: every line, with its end, is a token of one message.
	Text
	// ChatCompletions is the chunk of OpenAI's chat completions, as Groq, DeepSeek, xAI and many others speak it, with reasoning or reasoning_content beside content. A line
	// that is a message of role tool ({"role":"tool","tool_call_id":…,"content":…}) is a tool's result. Tidemark's own recordings are of this format and carry their times.
	ChatCompletions
	// Responses is the event of OpenAI's Responses API.
	Responses
	// Messages is the event of Anthropic's Messages API.
	Messages
)

// String is the word for f in flags, in start_run's metadata and in sentences.
func (f Format) String() string {
	switch f {
	case Auto:
		return "auto"
	case Text:
		return "text"
	case ChatCompletions:
		return "chat_completions"
	case Responses:
		return "responses"
	case Messages:
		return "messages"
	}
	return "unknown"
}

// ParseFormat is the reverse of [Format.String].
func ParseFormat(word string) (Format, error) {
	for f := Auto; f <= Messages; f++ {
		if f.String() == word {
			return f, nil
		}
	}
	return Auto, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE,
		"%.40q is no format of a recording; the formats are auto, text, chat_completions, responses and messages.", word)
}

// TypeCitation is the type of the custom envelopes that carry a message's citations and annotations: a JSON object with message_id and, byte for byte as the provider sent
// it, citation.
const TypeCitation = "citation"

const (
	// MaxLineBytes bounds a line, without its end: an envelope made from it must fit into [schema.MaxEnvelopeBytes].
	MaxLineBytes = schema.MaxEnvelopeBytes
	// MaxRecordingBytes and MaxRecordingSteps bound what [Read] keeps in memory. A [Decoder] reads streams of any length.
	MaxRecordingBytes = 64 << 20
	MaxRecordingSteps = 1 << 18
)

// Step is one envelope of a recording and when it comes.
type Step struct {
	// After is how long after the step before it comes: recorded where the line has after_ms (a whole number of milliseconds, at most a minute), else a believable pace, see
	// [TokensPerSecond]. Who reads a live stream ignores it: its lines come at their own pace.
	After time.Duration
	// Envelope passes Validate. It has a payload and nothing else: ids, times and producers are the publisher's. It is the caller's.
	Envelope *schema.Envelope
}

// Recording is a stream that was read to its end.
type Recording struct {
	Format Format
	Steps  []Step
}

// Read reads a recording to its end. A recording without a single envelope, one beyond [MaxRecordingBytes] or [MaxRecordingSteps], and whatever a [Decoder] refuses is
// refused with a [*schema.Refusal]; an error of r is returned wrapped.
func Read(r io.Reader, c Config) (*Recording, error) {
	limited := &io.LimitedReader{R: r, N: MaxRecordingBytes + 1}
	d := NewDecoder(limited, c)
	rec := new(Recording)
	for {
		step, err := d.Next()
		switch {
		case limited.N <= 0 || len(rec.Steps) > MaxRecordingSteps:
			return nil, schema.Refuse(schema.Code_CODE_TOO_LARGE, "The recording has more than %d bytes or %d envelopes; publish it as a live stream instead of reading it whole.",
				MaxRecordingBytes, MaxRecordingSteps)
		case errors.Is(err, io.EOF) && len(rec.Steps) == 0:
			return nil, schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The recording is empty: there is no line in it that makes an envelope.")
		case errors.Is(err, io.EOF):
			rec.Format = d.Format()
			return rec, nil
		case err != nil:
			return nil, err
		}
		rec.Steps = append(rec.Steps, step)
	}
}

// Envelopes yields the envelopes in their order. They are the recording's: clone one before filling in its id or producer if the recording is played twice.
func (r *Recording) Envelopes() iter.Seq[*schema.Envelope] {
	return func(yield func(*schema.Envelope) bool) {
		for _, s := range r.Steps {
			if !yield(s.Envelope) {
				return
			}
		}
	}
}

// Duration is how long the recording plays at its natural pace.
func (r *Recording) Duration() time.Duration {
	var sum time.Duration
	for _, s := range r.Steps {
		sum += s.After
	}
	return sum
}
