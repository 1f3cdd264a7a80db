"""A session read from NATS itself, by a client that knows nothing of Tidemark but what docs/raw-nats.md says: python raw_nats.py SESSION [TENANT]

NATS_URL is the server, with user and password, as `tidemark dev` prints it; CONTRACT, the protobuf definitions as a FileDescriptorSet (default: schema/contract.binpb). Prints the session's text from its beginning, and on as it is stored; with
ONCE=1 only what there is.
"""

import asyncio
import os
import sys

import nats
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from nats.js.api import ConsumerConfig, DeliverPolicy

# How long NATS may take to answer, in seconds.
PATIENCE = 90
CONTRACT = os.environ.get("CONTRACT") or os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "schema", "contract.binpb")


def frame_class():
    """The message tidemark.v1.Frame, from the definitions as they are read at run time. Of Google's own the runtime has its own."""
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet()
    with open(CONTRACT, "rb") as f:
        files.ParseFromString(f.read())
    for file in files.file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tidemark.v1.Frame"))


def escape(name):
    """A name as a token of a subject: ASCII letters, digits, - and _ stand for themselves, every other byte of its UTF-8 is = and two digits."""
    return "".join(chr(b) if chr(b).isascii() and (chr(b).isalnum() or chr(b) in "-_") else "=%02X" % b for b in name.encode())


def slice_of(tenant, session):
    """The part of 0 to 255 that a session is in: FNV-1a of 64 bits over both names with a zero between them, mixed once."""
    h = 0xCBF29CE484222325
    for b in tenant.encode() + b"\0" + session.encode():
        h = (h ^ b) * 0x100000001B3 % 2**64
    h ^= h >> 33
    h = h * 0xFF51AFD7ED558CCD % 2**64
    h ^= h >> 33
    return h % 256


def text_of(envelope):
    kind = envelope.WhichOneof("payload")
    if kind == "token":
        return envelope.token.text
    if kind in ("user_message", "agent_message"):
        return getattr(envelope, kind).message + "\n"
    return ""


async def main(session, tenant="default"):
    Frame = frame_class()
    nc = await nats.connect(os.environ["NATS_URL"], connect_timeout=PATIENCE)
    js = nc.jetstream(timeout=PATIENCE)
    streams = int((await js.stream_info("LOG_00")).config.metadata["tidemark.streams"])
    vs = slice_of(tenant, session)
    stream, subject = "LOG_%02d" % (vs * streams // 256), "log.%03d.%s.%s" % (vs, escape(tenant), escape(session))
    # Ordered: a gap on the way is noticed, and the consumer made anew behind the last message.
    frames = await js.subscribe(subject, stream=stream, ordered_consumer=True, config=ConsumerConfig(deliver_policy=DeliverPolicy.ALL))
    epoch, seq = "", 0
    try:
        stored = await frames.consumer_info()
        if os.environ.get("ONCE") and not stored.num_pending + stored.delivered.consumer_seq:
            return
        async for message in frames.messages:
            frame = Frame.FromString(message.data)
            if frame.deleted:
                # The history ends; the next frame begins another.
                epoch, seq = "", 0
            else:
                if frame.epoch != epoch:
                    # The first of a history, or of what retention has left of it.
                    epoch, seq = frame.epoch, frame.first_seq - 1
                assert frame.first_seq == seq + 1 and frame.count == len(frame.envelopes), "a gap behind seq %d" % seq
                for i, envelope in enumerate(frame.envelopes):
                    assert envelope.seq == frame.first_seq + i, envelope
                    print(text_of(envelope), end="", flush=True)
                seq += frame.count
            if os.environ.get("ONCE") and not message.metadata.num_pending:
                return
    finally:
        await nc.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
