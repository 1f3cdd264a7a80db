"""gRPC from Python, with code generated from the definitions: appends over a wire that is cut at random, follows over that wire, and compares with who follows undisturbed."""

import os
import random
import sys
import threading
import time

import grpc

sys.path.insert(0, os.environ["GENERATED"])
from tidemark.v1 import envelope_pb2, service_pb2, service_pb2_grpc, wire_pb2  # noqa: E402

SESSION = "gRPC from Python %d" % time.time_ns()
AUTHORIZED = [("authorization", "Bearer " + os.environ["TOKEN"])]
# At least.
APPENDS = 150
# So often the connection of who follows must be cut, and that of who appends once: it is appended until they were, for as many seconds as this.
CUTS = 2
PATIENCE = 90
# A channel waits longer and longer before it connects again; here that is not the point. The least is also how long connecting may take.
QUICKLY = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 5000), ("grpc.max_reconnect_backoff_ms", 100)]
# What a cut wire looks like.
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


def stub(address):
    return service_pb2_grpc.SessionServiceStub(grpc.insecure_channel(address, options=QUICKLY))


def was_cut(counts):
    return counts["again"] and counts["streams"] > CUTS


def publish(written, counts):
    """Appends with a producer's sequence: the same request, sent again after a lost answer, is stored once."""
    service = stub(os.environ["CUT_GRPC"])
    seq = appends = 0
    began = time.monotonic()
    while appends < APPENDS or not was_cut(counts) and time.monotonic() - began < PATIENCE:
        appends += 1
        request = service_pb2.AppendRequest(session=SESSION)
        for _ in range(random.randint(1, 5)):
            seq += 1
            e = request.envelopes.add(producer=envelope_pb2.Producer(id="python", epoch=1, seq=seq))
            e.token.message_id, e.token.text = "m1", random.choice(["ebb ", "flood ", "潮 ", "🌊 "]) + str(seq)
            written.append(e.token.text)
        while True:
            try:
                answer = service.Append(request, metadata=AUTHORIZED, timeout=PATIENCE)
                break
            except grpc.RpcError as lost:
                assert lost.code() in LOST, lost
                counts["again"] += 1
                time.sleep(0.02)
        assert (answer.first_seq, answer.last_seq) == (seq - len(request.envelopes) + 1, seq), answer
        assert answer.durability == wire_pb2.DURABILITY_FSYNC, answer
        counts["duplicates"] += answer.duplicate
        time.sleep(0.01)
    end = service_pb2.AppendRequest(session=SESSION)
    e = end.envelopes.add()
    e.message_completed.message_id = "m1"
    stub(os.environ["EDGE_GRPC"]).Append(end, metadata=AUTHORIZED, timeout=PATIENCE)


def follow(address, got, counts):
    """Follows to the end of the message, over as many streams as it takes."""
    service = stub(address)
    epoch = ""
    while True:
        try:
            for frame in service.Follow(wire_pb2.Attach(session=SESSION, after_seq=len(got), epoch=epoch), metadata=AUTHORIZED):
                kind = frame.WhichOneof("frame")
                if kind == "attached":
                    assert frame.attached.after_seq == len(got), frame
                    counts["streams"] += 1
                    epoch = frame.attached.epoch or epoch
                elif kind == "events":
                    epoch = frame.events.epoch or epoch
                    for e in frame.events.envelopes:
                        assert e.seq == len(got) + 1, "seq %d comes behind %d" % (e.seq, len(got))
                        got.append(e)
                        if e.HasField("message_completed"):
                            return
                else:
                    assert kind in ("caught_up", "going_away"), frame
        except grpc.RpcError as lost:
            assert lost.code() in LOST, lost
            assert address != os.environ["EDGE_GRPC"], "the wire that nobody cuts was cut: %s" % lost
        time.sleep(0.02)


def refused(call, code):
    try:
        call()
    except grpc.RpcError as e:
        assert e.code() == code, e
    else:
        raise AssertionError("%s was expected" % code)


def main():
    counts, written, calm, got = {"again": 0, "duplicates": 0, "streams": 0}, [], [], []
    wrong = []

    def run(f, *args):
        try:
            f(*args)
        except BaseException as e:
            wrong.append(e)

    jobs = [(publish, written, counts), (follow, os.environ["EDGE_GRPC"], calm, dict(counts)), (follow, os.environ["CUT_GRPC"], got, counts)]
    threads = [threading.Thread(target=run, args=job, daemon=True) for job in jobs]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads) and not wrong:
        time.sleep(0.05)
    if wrong:
        raise wrong[0]
    assert got == calm, "who was cut got something else"
    assert [e.token.text for e in got[:-1]] == written, "something else was written"
    assert was_cut(counts), "hardly anything was cut: %r" % counts
    service = stub(os.environ["EDGE_GRPC"])
    session = service.GetSession(service_pb2.GetSessionRequest(session=SESSION), metadata=AUTHORIZED).session
    assert session.head_seq == len(got), session
    refused(lambda: service.GetSession(service_pb2.GetSessionRequest(session=SESSION)), grpc.StatusCode.UNAUTHENTICATED)
    refused(lambda: list(service.Follow(wire_pb2.Attach(session=SESSION, after_seq=len(got) + 1), metadata=AUTHORIZED)), grpc.StatusCode.OUT_OF_RANGE)
    print(
        "%d envelopes, %d appends sent again (%d had been stored), read over %d streams, are those of an undisturbed client"
        % (len(got), counts["again"], counts["duplicates"], counts["streams"])
    )


main()
