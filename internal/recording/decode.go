package recording

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"tidemark/schema"
)

// Config says how to read. The zero value reads any recording.
type Config struct {
	// Format of the lines. Default [Auto]; plain text whose first line begins with '{' needs [Text].
	Format Format
	// IDPrefix goes before the id of every message, call and run, so that one recording can be published to one session twice, and plain text, whose message has no name of
	// its own, at all. Default none. At most 100 bytes.
	IDPrefix string
	// WithoutRun leaves out start_run and run_status, for a recording that is a part of a run that the publisher speaks for. Plain text never has them.
	WithoutRun bool
}

// maxPrefixBytes leaves half of [schema.MaxIDBytes] to the provider's own ids.
const maxPrefixBytes = 100

// Decoder turns lines into envelopes as they come. One goroutine at a time may use it.
type Decoder struct {
	// Static after construction.
	config Config
	in     *bufio.Reader

	// Owned by the caller of Next.
	format Format
	reader lineReader
	script script
	// held has the blank lines before the first other one: they are text if what follows is.
	held []byte
	// long gathers a line that is longer than the buffer of in.
	long []byte
	next int
	err  error
}

// lineReader is what differs from format to format.
type lineReader interface {
	// line takes in one line. The bytes are valid until it returns. A line that it cannot read is refused.
	line(b []byte) error
	// end says that the stream is over.
	end()
}

// NewDecoder makes a decoder that reads lines from r. It reads nothing yet.
func NewDecoder(r io.Reader, c Config) *Decoder {
	d := &Decoder{config: c, in: bufio.NewReaderSize(r, 64<<10), format: c.Format}
	d.script.prefix = c.IDPrefix
	d.script.withoutRun = c.WithoutRun
	if len(c.IDPrefix) > maxPrefixBytes {
		d.err = schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "The prefix for ids has %d bytes; at most %d are allowed.", len(c.IDPrefix), maxPrefixBytes)
	}
	return d
}

// Format is the format of the lines; [Auto] while no line has told it.
func (d *Decoder) Format() Format { return d.format }

// Line is the number of the last line that was read, from 1; 0 before the first.
func (d *Decoder) Line() int { return d.script.lineNo }

// Next returns the next envelope and the time before it. It returns as soon as the lines read so far make one, and blocks in the reader until they do. At the end of the
// stream, after what closes the message and the run, it returns [io.EOF].
//
// A line that is not what its format says, is longer than [MaxLineBytes], not UTF-8, or makes an envelope that would be refused is refused with a [*schema.Refusal] that names
// the line; nothing of that line is returned, and every later call returns the same error. An error of the reader is returned wrapped.
func (d *Decoder) Next() (Step, error) {
	for d.next == len(d.script.steps) {
		if d.err != nil {
			return Step{}, d.err
		}
		clear(d.script.steps)
		d.script.steps, d.next = d.script.steps[:0], 0
		if d.err = d.readLine(); d.err != nil && !errors.Is(d.err, io.EOF) {
			d.script.steps = d.script.steps[:0]
		}
	}
	step := d.script.steps[d.next]
	d.next++
	return step, nil
}

// readLine reads one line and lets the format take it in. At the end of the stream it returns io.EOF, with the closing steps made.
func (d *Decoder) readLine() error {
	line, err := d.rawLine()
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if len(line) > 0 {
		d.script.lineNo++
		if lineErr := d.takeIn(line); lineErr != nil {
			return lineErr
		}
	}
	if err != nil {
		if endErr := d.finish(); endErr != nil {
			return endErr
		}
	}
	return err
}

// rawLine returns the next line with its end. At the end of the stream it returns io.EOF, with the last line if that has no end.
func (d *Decoder) rawLine() ([]byte, error) {
	d.long = d.long[:0]
	for {
		part, err := d.in.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) || len(d.long) > 0 {
			d.long = append(d.long, part...)
			part = d.long
		}
		if len(part) > MaxLineBytes+len("\r\n") {
			return nil, schema.Refuse(schema.Code_CODE_TOO_LARGE, "Line %d of the recording has more than %d bytes; break it into shorter ones.", d.script.lineNo+1, MaxLineBytes)
		}
		switch {
		case err == nil || errors.Is(err, io.EOF):
			return part, err
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, fmt.Errorf("recording: reading line %d: %w", d.script.lineNo+1, err)
		}
	}
}

func (d *Decoder) takeIn(line []byte) error {
	if !utf8.Valid(line) {
		return d.script.refuse("is not valid UTF-8; nothing is replaced in silence, so convert the recording first")
	}
	if d.reader == nil {
		blank := len(bytes.TrimSpace(line)) == 0
		if d.format == Auto && blank && len(d.held)+len(line) <= MaxLineBytes/2 {
			d.held = append(d.held, line...)
			return nil
		}
		if err := d.open(line); err != nil {
			return err
		}
	}
	if d.format != Text {
		if line = jsonOf(line); line == nil {
			return nil
		}
		if bytes.Equal(line, doneMark) {
			d.reader.end()
			return d.script.err
		}
		if loneSurrogate(line) {
			return d.script.refuse("has half of a surrogate pair (\\ud800 to \\udfff), which no UTF-8 text can hold; join the two halves first")
		}
	}
	if err := d.reader.line(line); err != nil {
		return err
	}
	return d.script.err
}

// open settles the format, by the first line if it is not given.
func (d *Decoder) open(first []byte) error {
	if d.format == Auto {
		f, err := detect(first)
		if err != nil {
			return d.script.refuse("%s", err)
		}
		d.format = f
	}
	d.script.format = d.format
	switch d.format {
	case ChatCompletions:
		d.reader = &chatReader{script: &d.script}
	case Responses:
		d.reader = &responsesReader{script: &d.script}
	case Messages:
		d.reader = &messagesReader{script: &d.script}
	default:
		d.format, d.script.format, d.script.withoutRun = Text, Text, true
		d.reader = &textReader{script: &d.script}
		if len(d.held) > 0 {
			held := d.held
			d.held = nil
			return d.reader.line(held)
		}
	}
	d.held = nil
	return nil
}

func (d *Decoder) finish() error {
	if d.reader == nil && len(d.held) > 0 {
		if err := d.open(d.held); err != nil {
			return err
		}
	}
	if d.reader != nil {
		d.reader.end()
	}
	d.script.endRun()
	return d.script.err
}

// doneMark ends a stream of server-sent events in the dialect of chat completions.
var doneMark = []byte("[DONE]") //nolint:gochecknoglobals // a constant

// jsonOf returns the JSON text of a line, or nil where there is none: blank lines, and what surrounds the data of server-sent events, so that what curl prints can be read.
func jsonOf(line []byte) []byte {
	line = bytes.TrimSpace(bytes.TrimPrefix(line, []byte("\xef\xbb\xbf")))
	if len(line) == 0 {
		return nil
	}
	if data, ok := bytes.CutPrefix(line, []byte("data:")); ok {
		return bytes.TrimSpace(data)
	}
	for _, field := range []string{":", "event:", "id:", "retry:"} {
		if bytes.HasPrefix(line, []byte(field)) {
			return nil
		}
	}
	return line
}

// detect says which format begins with this line.
func detect(line []byte) (Format, error) {
	if event, ok := strings.CutPrefix(string(line), "event: "); ok {
		switch event = strings.TrimSpace(event); {
		case event == "message_start":
			return Messages, nil
		case strings.HasPrefix(event, "response."):
			return Responses, nil
		}
	}
	text := jsonOf(line)
	if len(text) == 0 || text[0] != '{' {
		return Text, nil
	}
	var head struct {
		Type    string          `json:"type"`
		Object  string          `json:"object"`
		Role    string          `json:"role"`
		Choices json.RawMessage `json:"choices"`
		Error   json.RawMessage `json:"error"`
		Number  *int            `json:"sequence_number"`
	}
	if err := json.Unmarshal(text, &head); err != nil {
		return Auto, fmt.Errorf("begins like JSON but is not a JSON object of a stream (%w); if it is plain text, say so by the format text", err)
	}
	switch {
	case strings.HasPrefix(head.Type, "response."), head.Type == "error" && head.Number != nil:
		return Responses, nil
	case strings.HasPrefix(head.Type, "message_"), strings.HasPrefix(head.Type, "content_block_"), head.Type == "ping", head.Type == "error":
		return Messages, nil
	case head.Type == "" && (len(head.Choices) > 0 || head.Object == "chat.completion.chunk" || head.Role == "tool" || present(head.Error)):
		return ChatCompletions, nil
	}
	return Auto, errors.New("is a JSON object of no stream known here (chat completions, OpenAI responses, Anthropic messages); if it is plain text, say so by the format text")
}

// present says whether raw is there and not null.
func present(raw json.RawMessage) bool { return len(raw) > 0 && string(raw) != "null" }

// loneSurrogate finds an escaped half of a surrogate pair without its other half, which encoding/json would replace by U+FFFD in silence.
func loneSurrogate(line []byte) bool {
	for {
		i := bytes.IndexByte(line, '\\')
		if i < 0 || i+1 >= len(line) {
			return false
		}
		r := unit(line[i:])
		line = line[i+2:]
		if utf16.IsSurrogate(r) {
			if utf16.DecodeRune(r, unit(line[4:])) == utf8.RuneError {
				return true
			}
			line = line[4+6:]
		}
	}
}

// unit reads the UTF-16 unit of the escape at the beginning of b, or -1.
func unit(b []byte) rune {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return -1
	}
	n, err := strconv.ParseUint(string(b[2:6]), 16, 16)
	if err != nil {
		return -1
	}
	return rune(n)
}

// timing is embedded in every format's line: Tidemark's own recordings say when a line came.
type timing struct {
	AfterMS *int64 `json:"after_ms"`
}

const maxAfter = time.Minute

// parse reads a line's JSON into v, which embeds t.
func (s *script) parse(line []byte, v any, t *timing) error {
	if err := json.Unmarshal(line, v); err != nil {
		if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && wrong.Field == "" {
			return s.refuse("is a JSON %s where the format %s has objects", wrong.Value, s.format)
		} else if ok {
			return s.refuse("does not fit the format %s: %q cannot be a %s", s.format, wrong.Field, wrong.Value)
		}
		return s.refuse("is not a JSON object: %s", err)
	}
	if t.AfterMS == nil {
		return nil
	}
	if *t.AfterMS < 0 || *t.AfterMS > maxAfter.Milliseconds() {
		return s.refuse("has an after_ms of %d; it may be 0 to %d", *t.AfterMS, maxAfter.Milliseconds())
	}
	s.recorded += time.Duration(*t.AfterMS) * time.Millisecond
	s.timed = true
	return nil
}

// refuse makes the error for the line that is being read.
func (s *script) refuse(format string, args ...any) error {
	return schema.Refuse(schema.Code_CODE_INVALID_MESSAGE, "Line %d of the recording %s.", s.lineNo, fmt.Sprintf(format, args...))
}
