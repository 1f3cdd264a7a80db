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
	// MaxPromptDefaultBytes bounds the answer that a question gets at its deadline; a session's state keeps that of the open one.
	MaxPromptDefaultBytes = 4 << 10
	// MinOrphanAfterMs and MaxOrphanAfterMs bound how long a run may be without its agent, in milliseconds: longer than a reconnect takes, and a day.
	MinOrphanAfterMs = 1000
	MaxOrphanAfterMs = 86_400_000
	// MaxGroupBytes bounds the name of a group, of workers or of readers.
	MaxGroupBytes = 200
	// MaxWorkSessions bounds the sessions and prefixes that a group's filter names.
	MaxWorkSessions = 32
	// MaxWorkCredit bounds the items that one worker may have in hand.
	MaxWorkCredit = 1000
	// MinAckWaitMs and MaxAckWaitMs bound how long a worker may be silent about an item, in milliseconds.
	MinAckWaitMs = 100
	MaxAckWaitMs = 43_200_000
	// MaxDeliveries bounds how often a group may ask for an item to be handed out.
	MaxDeliveries = 1000
	// MaxBackoffs bounds the rests that a group names, and MaxBackoffMs each of them, in milliseconds.
	MaxBackoffs  = 32
	MaxBackoffMs = 86_400_000
	// MaxReasonBytes bounds what a worker says of an item.
	MaxReasonBytes = 1000
	// MaxSessionMetadataBytes bounds what an application keeps with a session; it is in every page and in the registry.
	MaxSessionMetadataBytes = 64 << 10
	// PageEnvelopes is how many envelopes a page holds: slot k has the seqs 256k+1 … 256k+256.
	PageEnvelopes = 256
)
