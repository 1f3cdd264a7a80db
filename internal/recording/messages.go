package recording

import (
	"encoding/json"
	"strings"

	"tidemark/schema"
)

// messagesLine is an event of the Messages API.
type messagesLine struct {
	timing
	Type    string `json:"type"`
	Message struct {
		ID    string          `json:"id"`
		Model string          `json:"model"`
		Usage json.RawMessage `json:"usage"`
	} `json:"message"`
	Index int             `json:"index"`
	Block json.RawMessage `json:"content_block"`
	Delta struct {
		Type        string          `json:"type"`
		Text        string          `json:"text"`
		Thinking    string          `json:"thinking"`
		PartialJSON string          `json:"partial_json"`
		Citation    json.RawMessage `json:"citation"`
		StopReason  string          `json:"stop_reason"`
	} `json:"delta"`
	Usage json.RawMessage `json:"usage"`
	Error json.RawMessage `json:"error"`
}

// contentBlock is what a block begins with.
type contentBlock struct {
	Type      string            `json:"type"`
	Text      string            `json:"text"`
	Thinking  string            `json:"thinking"`
	Citations []json.RawMessage `json:"citations"`
	ID        string            `json:"id"`
	Name      string            `json:"name"`
	Input     json.RawMessage   `json:"input"`
	ToolUseID string            `json:"tool_use_id"`
	Content   json.RawMessage   `json:"content"`
	IsError   bool              `json:"is_error"`
}

// messagesReader reads the Messages API. Text blocks follow each other without anything between them: a citation begins a new block in the middle of a sentence.
type messagesReader struct {
	*script
	messageID string
	blocks    map[int]*toolBlock
	stop      string
	usage     json.RawMessage
}

// toolBlock is an open block that calls a tool.
type toolBlock struct {
	*call
	// input is complete where the block begins with it, and {} where it is streamed.
	input json.RawMessage
}

func (r *messagesReader) line(b []byte) error {
	var l messagesLine
	if err := r.parse(b, &l, &l.timing); err != nil {
		return err
	}
	switch l.Type {
	case "message_start":
		r.end()
		r.messageID = r.beginTurn(l.Message.ID, l.Message.Model)
		r.usage = l.Message.Usage
		return nil
	case "error":
		sentence, code := reported(l.Error)
		messageID := r.messageID
		r.forget()
		r.fail(messageID, sentence, code)
		return nil
	case "content_block_start", "content_block_delta", "content_block_stop", "message_delta":
		if r.messageID == "" {
			r.messageID = r.beginTurn("", "")
		}
	}
	switch l.Type {
	case "content_block_start":
		return r.startBlock(&l)
	case "content_block_delta":
		r.token(r.messageID, schema.Channel_CHANNEL_TEXT, l.Delta.Text)
		r.token(r.messageID, schema.Channel_CHANNEL_REASONING, l.Delta.Thinking)
		r.cite(r.messageID, l.Delta.Citation)
		if block := r.blocks[l.Index]; block != nil {
			r.arguments(block.call, l.Delta.PartialJSON)
		} else if l.Delta.PartialJSON != "" {
			return r.refuse("continues the input of block %d, which is no open call of a tool", l.Index)
		}
	case "content_block_stop":
		if block := r.blocks[l.Index]; block != nil {
			r.endCall(block.call, string(block.input))
			delete(r.blocks, l.Index)
		}
	case "message_delta":
		if l.Delta.StopReason != "" {
			r.stop = l.Delta.StopReason
		}
		if present(l.Usage) {
			r.usage = l.Usage
		}
	case "message_stop":
		r.end()
	case "":
		return r.refuse("is no event of the Messages API: it has no type")
	default:
		if strings.HasPrefix(l.Type, "response.") {
			return r.refuse("is an event of another format (%q) in a recording of the format messages", l.Type)
		}
	}
	return nil
}

func (r *messagesReader) startBlock(l *messagesLine) error {
	var block contentBlock
	if err := json.Unmarshal(l.Block, &block); err != nil {
		return r.refuse("begins a content block that cannot be read: %s", err)
	}
	switch {
	case strings.HasSuffix(block.Type, "tool_use"):
		if len(r.blocks) >= maxOpen {
			return r.refuse("opens more than %d blocks at once", maxOpen)
		}
		if old := r.blocks[l.Index]; old != nil {
			r.endCall(old.call, string(old.input))
		}
		if r.blocks == nil {
			r.blocks = make(map[int]*toolBlock)
		}
		r.blocks[l.Index] = &toolBlock{call: r.startCall(r.messageID, block.ID, block.Name, l.Index), input: block.Input}
	case strings.HasSuffix(block.Type, "tool_result"):
		if block.ToolUseID == "" {
			return r.refuse("is a tool's result without a tool_use_id")
		}
		r.result(r.prefix+block.ToolUseID, block.Content, block.failure())
	default:
		r.token(r.messageID, schema.Channel_CHANNEL_TEXT, block.Text)
		r.token(r.messageID, schema.Channel_CHANNEL_REASONING, block.Thinking)
		for _, c := range block.Citations {
			r.cite(r.messageID, c)
		}
	}
	return nil
}

// failure says why a tool failed: server tools put an object of a type that ends in _error where their content would be.
func (b *contentBlock) failure() string {
	var content struct {
		Type    string `json:"type"`
		Code    string `json:"error_code"`
		Message string `json:"error_message"`
	}
	// An array is a result, and no object at all is left as it is.
	if json.Unmarshal(b.Content, &content) == nil && strings.HasSuffix(content.Type, "_error") {
		switch {
		case content.Message != "":
			return content.Message
		case content.Code != "":
			return content.Code
		}
		return content.Type
	}
	if b.IsError {
		return "The tool reported an error; the result says more."
	}
	return ""
}

// end closes the open message. It is complete where a stop reason was given.
func (r *messagesReader) end() {
	if r.messageID == "" {
		return
	}
	if r.stop == "" {
		r.cut(r.messageID)
	} else {
		for _, index := range sortedKeys(r.blocks) {
			r.endCall(r.blocks[index].call, string(r.blocks[index].input))
		}
		r.complete(r.messageID, r.stop, r.usage)
	}
	r.forget()
}

func (r *messagesReader) forget() {
	r.messageID, r.stop, r.usage, r.blocks = "", "", nil, nil
}
