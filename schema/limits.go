package schema

// Bounds of what a client may send. Each is enforced where bytes come in and stands in PROTOCOL.md.
const (
	// MaxNameBytes bounds a session's and a tenant's name. Escaped into a NATS subject it can triple, and a subject must stay well below the server's
	// 4 KiB control line.
	MaxNameBytes = 200
	// MaxEnvelopeBytes bounds an envelope, encoded.
	MaxEnvelopeBytes = 1 << 20
	// MaxFrameBytes bounds a client's frame: one envelope of the largest size and what surrounds it.
	MaxFrameBytes = MaxEnvelopeBytes + 4<<10
	// MaxPublishEnvelopes bounds the envelopes of one publish: they land in one frame of the log, all or none.
	MaxPublishEnvelopes = 1000
	// MaxIDBytes bounds the ids that applications choose: messages, calls, runs, requests, custom types.
	MaxIDBytes = 200
	// MaxProducerIDBytes bounds a producer's id; a session's state keeps many of them.
	MaxProducerIDBytes = 64
	// MaxAttachTypes bounds a follower's filter.
	MaxAttachTypes = 32
	// MaxAttachedSessions bounds the sessions that one connection follows.
	MaxAttachedSessions = 1000
	// MaxPromptOptions and MaxPromptOptionBytes bound the answers that a question allows; a session's state keeps those of the open one.
	MaxPromptOptions     = 100
	MaxPromptOptionBytes = 1000
	// MaxSessionMetadataBytes bounds what an application keeps with a session; it is in every page and in the registry.
	MaxSessionMetadataBytes = 64 << 10
	// PageEnvelopes is how many envelopes a page holds: slot k has the seqs 256k+1 … 256k+256.
	PageEnvelopes = 256
)
