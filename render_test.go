package main

import (
	"bufio"
	"strings"
	"testing"

	"tidemark/schema"
)

func render(terminal bool, envelopes ...*schema.Envelope) string {
	var b strings.Builder
	out := bufio.NewWriter(&b)
	r := &textRenderer{out: out, terminal: terminal}
	for _, e := range envelopes {
		r.show(e)
	}
	r.pause()
	_ = out.Flush()
	return b.String()
}

func tokenOf(message, text string, channel schema.Channel) *schema.Envelope {
	return &schema.Envelope{Payload: &schema.Envelope_Token{Token: &schema.Token{MessageId: message, Text: text, Channel: channel}}}
}

func TestTextIsShownAsItStreams(t *testing.T) {
	text, reasoning := schema.Channel_CHANNEL_TEXT, schema.Channel_CHANNEL_REASONING
	done := &schema.Envelope{Payload: &schema.Envelope_MessageCompleted{MessageCompleted: &schema.MessageCompleted{MessageId: "a"}}}
	call := func(delta string, done bool) *schema.Envelope {
		return &schema.Envelope{Payload: &schema.Envelope_ToolCall{ToolCall: &schema.ToolCall{CallId: "c", Name: "search", ArgumentsDelta: delta, Done: done}}}
	}
	question := &schema.Envelope{Payload: &schema.Envelope_WaitingForInput{WaitingForInput: &schema.WaitingForInput{Prompt: "Go on?", Options: []string{"yes", "no"}}}}
	for name, tt := range map[string]struct {
		envelopes []*schema.Envelope
		want      string
	}{
		"pieces join":          {[]*schema.Envelope{tokenOf("a", "Hel", text), tokenOf("a", "lo", text), tokenOf("a", " you", 0)}, "Hello you\n"},
		"lines stay":           {[]*schema.Envelope{tokenOf("a", "one\n", text), tokenOf("a", "two\n", text), done}, "one\ntwo\n"},
		"messages part":        {[]*schema.Envelope{tokenOf("a", "one", text), tokenOf("b", "two", text)}, "one\ntwo\n"},
		"reasoning has a mark": {[]*schema.Envelope{tokenOf("a", "hm", reasoning), tokenOf("a", "m", reasoning), tokenOf("a", "Yes", text)}, "[reasoning] hmm\nYes\n"},
		"calls stream":         {[]*schema.Envelope{tokenOf("a", "Look:", text), call(`{"q":`, false), call(`1}`, true), tokenOf("a", "Well", text)}, "Look:\n[tool_call search] {\"q\":1}\nWell\n"},
		"others have a line":   {[]*schema.Envelope{tokenOf("a", "So", text), question}, "So\n[question] Go on? (yes / no)\n"},
		"unknown payload":      {[]*schema.Envelope{{Seq: 7}}, "[unknown] seq 7 is of a type that this version does not know\n"},
	} {
		if got := render(false, tt.envelopes...); got != tt.want {
			t.Errorf("%s:\n%q, want\n%q", name, got, tt.want)
		}
	}
}

func TestEveryTypeIsShown(t *testing.T) {
	// The payloads' fields, found in the descriptor, so that a type added to the schema is missed here and not by people.
	fields := new(schema.Envelope).ProtoReflect().Descriptor().Oneofs().ByName("payload").Fields()
	for i := range fields.Len() {
		e := new(schema.Envelope)
		m := e.ProtoReflect()
		m.Set(fields.Get(i), m.NewField(fields.Get(i)))
		if got := render(false, e); strings.Contains(got, "[unknown]") {
			t.Errorf("%s is shown as %q", fields.Get(i).Name(), got)
		}
	}
}

func TestTerminalIsNotCommanded(t *testing.T) {
	e := tokenOf("a", "red \x1b[31mtext\x1b]0;title\x07\r\u009b2J\tend\n", schema.Channel_CHANNEL_TEXT)
	if got, want := render(true, e), "red [31mtext]0;title2J\tend\n"; got != want {
		t.Errorf("a terminal gets %q", got)
	}
	if got := render(false, e); got != e.GetToken().GetText() {
		t.Errorf("a file gets %q", got)
	}
}
