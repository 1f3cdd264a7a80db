// Package recording reads what a language model's provider streamed, one JSON object a line, and says it in Tidemark's words: the typed envelopes of a session. Plain text
// is read too, a token a line.
//
// It promises that nothing a follower would read is lost or changed: the texts joined per message and channel are what the provider streamed, arguments joined are JSON,
// usage and results are kept byte for byte. [Gather] joins them back, so that tests and the demo prove it text for text.
//
// How the formats map:
//
//   - A message is one turn of the model: one chat completion, one response, one Messages API message. Its id is the provider's. Text and reasoning are its two channels.
//   - A run surrounds the stream: start_run before the first envelope, run_status behind the last. A stream that stops for a person's approval ends with its run waiting; one
//     that is cut, or whose last message failed, ends with the run failed.
//   - What a tool is asked becomes tool_call with streamed arguments, what it answers tool_result. Arguments that a provider streams as bare text (code, shell commands) are
//     quoted into a JSON object on the way.
//   - Citations, which are no text, travel as [TypeCitation].
//   - Lines that say nothing new (pings, progress marks, snapshots of what was streamed before, opaque signatures) make no envelope.
//
// Not its part: publishing, waiting for the pace (a [Step] says it, the caller keeps it), ids, seqs and producers of envelopes.
//
// A [Decoder] blocks only in its reader. To cancel it, close what it reads from.
package recording
