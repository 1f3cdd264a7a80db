package recording

import "tidemark/schema"

// textReader reads plain text: every line is a token, its end included, so that the tokens joined are the text.
type textReader struct {
	*script
	messageID string
}

func (t *textReader) line(b []byte) error {
	if t.messageID == "" {
		t.messageID = t.beginTurn("", "")
	}
	t.token(t.messageID, schema.Channel_CHANNEL_TEXT, string(b))
	return nil
}

func (t *textReader) end() {
	if t.messageID != "" {
		t.complete(t.messageID, "stop", nil)
		t.messageID = ""
	}
}
