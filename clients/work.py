"""Work and analytics from Python: workers over gRPC and over a WebSocket, whose wires are cut at random, take tool calls from the log and answer them; two members of an analytics group read all of it, one of whom leaves early."""

import asyncio
import contextlib
import os
import random
import sys
import time
from collections import Counter

import grpc
import websockets
from google.protobuf import json_format

sys.path.insert(0, os.environ["GENERATED"])
from tidemark.v1 import envelope_pb2, service_pb2, service_pb2_grpc, wire_pb2  # noqa: E402

NAME = "work from Python %d" % time.time_ns()
SESSIONS = ["%s/%d" % (NAME, i) for i in range(5)]
# At least.
CALLS = 200
# Those that nobody can do at first.
HOPELESS = {str(n) for n in range(7, CALLS, 50)}
# How long anything may take, in seconds.
PATIENCE = 90
AUTHORIZED = [("authorization", "Bearer " + os.environ["TOKEN"])]
QUICKLY = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 5000), ("grpc.max_reconnect_backoff_ms", 100)]
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


@contextlib.asynccontextmanager
async def over_grpc(service):
    """A worker's connection, as what sends a frame and what receives one."""
    call = service.Work(metadata=AUTHORIZED)
    try:
        yield call.write, call.read
    finally:
        call.cancel()


@contextlib.asynccontextmanager
async def over_websocket(address):
    async with websockets.connect("ws://%s/v1/connect" % address, subprotocols=["tidemark.v1.json"], additional_headers=AUTHORIZED, max_size=None) as ws:

        async def send(frame):
            await ws.send(json_format.MessageToJson(frame))

        async def receive():
            return json_format.Parse(await ws.recv(), wire_pb2.ServerFrame())

        yield send, receive


async def work(connect, counts, name, able):
    """Takes items until it is cancelled, over as many connections as it takes. An item is settled when its result is stored."""
    while True:
        try:
            async with connect() as (send, receive):
                await send(wire_pb2.ClientFrame(work_subscribe=wire_pb2.WorkSubscribe(
                    channel=1, group=NAME, kinds=["tool_call"], sessions=[NAME + "/*"], credit=8, ack_wait_ms=10000, max_deliver=1000,
                )))
                counts[name + " connections"] += 1
                while (frame := await receive()) is not grpc.aio.EOF:
                    kind = frame.WhichOneof("frame")
                    if kind == "work":
                        for item in frame.work.items:
                            await send(answer(item, able))
                    elif kind == "published":
                        await send(wire_pb2.ClientFrame(ack=wire_pb2.WorkAck(work_ids=[a.publish_id for a in frame.published.acks])))
                        counts[name] += len(frame.published.acks)
                    elif kind == "rejected":
                        # It was done before, by whoever lost the connection before saying so.
                        assert frame.rejected.code == wire_pb2.CODE_ALREADY_ANSWERED, frame
                        await send(wire_pb2.ClientFrame(ack=wire_pb2.WorkAck(work_ids=[frame.rejected.publish_id])))
                        counts["done before"] += 1
                    else:
                        assert kind in ("work_subscribed", "going_away"), frame
        except grpc.RpcError as lost:
            assert lost.code() in LOST, lost
        except (OSError, asyncio.InvalidStateError, websockets.ConnectionClosed, websockets.InvalidHandshake, EOFError):
            pass
        await asyncio.sleep(0.02)


def answer(item, able):
    call = item.envelope.tool_call
    if call.call_id in HOPELESS and not able.is_set():
        return wire_pb2.ClientFrame(term=wire_pb2.WorkTerm(work_id=item.work_id, reason="nobody can do %s" % call.call_id))
    if int(call.call_id) % 10 == 3 and item.attempt == 1:
        return wire_pb2.ClientFrame(nack=wire_pb2.WorkNack(work_id=item.work_id, delay_ms=10, reason="not now"))
    result = envelope_pb2.Envelope(request_id=item.envelope.request_id)
    result.tool_result.call_id, result.tool_result.result_json = call.call_id, '{"square":%d}' % (int(call.call_id) ** 2)
    return wire_pb2.ClientFrame(publish=wire_pb2.Publish(publish_id=item.work_id, session=item.session, envelopes=[result]))


def shared(counts):
    """Whether both workers have done something, and both were cut."""
    return all(counts[name] and counts[name + " connections"] > 2 for name in ("gRPC", "WebSocket"))


async def publish(service, counts):
    """Calls until there was work for both; returns how often."""
    began, n = time.monotonic(), 0
    while n < CALLS or not shared(counts) and time.monotonic() - began < PATIENCE:
        request = service_pb2.AppendRequest(session=SESSIONS[n % len(SESSIONS)])
        e = request.envelopes.add(request_id="r%d" % n)
        e.tool_call.call_id, e.tool_call.name, e.tool_call.arguments_json = str(n), "square", '{"of":%d}' % n
        await service.Append(request, metadata=AUTHORIZED, timeout=PATIENCE)
        n += 1
        await asyncio.sleep(0.005)
    return n


async def tail(service, seen, leave):
    """A member of the analytics group: reads, acknowledges, and leaves in good order when it is told to."""
    call = service.Tail(metadata=AUTHORIZED)
    await call.write(service_pb2.TailRequest(open=service_pb2.TailOpen(group=NAME, session_prefix=NAME, types=["tool_call", "tool_result"])))

    async def read():
        behind = {}
        async for said in call:
            if said.HasField("assigned"):
                # A partition that comes back begins behind what was acknowledged.
                behind.clear()
                continue
            for s in said.batch.sessions:
                for e in s.envelopes:
                    assert e.seq > behind.get(s.session, 0), "seq %d of %s comes behind %d" % (e.seq, s.session, behind[s.session])
                    behind[s.session] = e.seq
                    seen[s.session, e.seq] += 1
            await call.write(service_pb2.TailRequest(ack=service_pb2.TailAck(partition=said.batch.partition, through=said.batch.through)))

    reading = asyncio.create_task(read())
    leaving = asyncio.create_task(leave.wait())
    await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
    assert not reading.done(), "the tail ended by itself: %s" % (reading.exception() or await call.details())
    await call.done_writing()
    await reading
    assert await call.code() == grpc.StatusCode.OK, await call.details()


async def stored(service, session):
    """All envelopes of a session."""
    head = (await service.GetSession(service_pb2.GetSessionRequest(session=session), metadata=AUTHORIZED)).session.head_seq
    got = []
    call = service.Follow(wire_pb2.Attach(session=session), metadata=AUTHORIZED)
    async for frame in call:
        got.extend(frame.events.envelopes)
        if len(got) >= head:
            break
    call.cancel()
    return got


async def until(what, holds, background):
    """Waits until it holds, unless something in the background fails before."""
    began = time.monotonic()
    while not await holds():
        for task in background:
            if task.done():
                await task
        assert time.monotonic() - began < PATIENCE, "waited in vain for " + what
        await asyncio.sleep(0.1)


async def main():
    calm = service_pb2_grpc.SessionServiceStub(grpc.aio.insecure_channel(os.environ["EDGE_GRPC"]))
    cut = service_pb2_grpc.SessionServiceStub(grpc.aio.insecure_channel(os.environ["CUT_GRPC"], options=QUICKLY))
    counts, seen, able, enough, early = Counter(), Counter(), asyncio.Event(), asyncio.Event(), asyncio.Event()
    workers = [
        asyncio.create_task(work(lambda: over_grpc(cut), counts, "gRPC", able)),
        asyncio.create_task(work(lambda: over_websocket(os.environ["CUT_HTTP"]), counts, "WebSocket", able)),
    ]
    members = [asyncio.create_task(tail(calm, seen, leave)) for leave in (enough, early)]

    async def envelopes():
        return {session: await stored(calm, session) for session in SESSIONS}

    async def letters():
        request = service_pb2.ListDeadLettersRequest(group=NAME, redriven=True)
        return (await calm.ListDeadLetters(request, metadata=AUTHORIZED)).letters

    async def answered(n):
        return sum(e.HasField("tool_result") for got in (await envelopes()).values() for e in got) >= n

    async def given_up():
        return len(await letters()) == len(HOPELESS)

    async def settled():
        (group,) = (g for g in (await calm.ListWorkGroups(service_pb2.ListWorkGroupsRequest(), metadata=AUTHORIZED)).groups if g.group == NAME)
        return group.waiting == group.in_hand == 0

    calls = await publish(calm, counts)
    early.set()
    await until("the results", lambda: answered(calls - len(HOPELESS)), workers + members)
    await until("the dead letters", given_up, workers + members)
    able.set()
    ids = [l.id for l in await letters()]
    for want in ((len(ids), 0), (0, len(ids))):
        said = await calm.Redrive(service_pb2.RedriveRequest(ids=ids), metadata=AUTHORIZED)
        assert (said.redriven, said.before) == want, said
    await until("the results of what was handed out again", lambda: answered(calls), workers + members)
    await until("the group to have nothing left", settled, workers + members)
    for task in workers:
        task.cancel()
    outcomes = await asyncio.gather(*workers, return_exceptions=True)
    assert all(isinstance(o, asyncio.CancelledError) for o in outcomes), outcomes

    want = set()
    for session, got in (await envelopes()).items():
        results = Counter(e.tool_result.call_id for e in got if e.HasField("tool_result"))
        called = {e.tool_call.call_id: e.seq for e in got if e.HasField("tool_call")}
        assert results == Counter(called.keys()), "not every call has one result: %r" % results
        failed = Counter(e.reply_to for e in got if e.HasField("work_failed"))
        assert failed == Counter(called[n] for n in HOPELESS & called.keys()), failed
        want |= {(session, e.seq) for e in got if e.HasField("tool_result") or e.HasField("tool_call")}

    async def tailed():
        return want <= seen.keys()

    await until("the analytics group", tailed, members)
    enough.set()
    await asyncio.gather(*members)
    assert seen.keys() == want, "the analytics group read what it had not asked for: %r" % (seen.keys() - want)
    assert shared(counts), counts
    print(
        "%d tool calls have one result each, over %d gRPC streams and %d WebSockets; %d were given up and redriven, %d done again; 2 analytics members read it all"
        % (calls, counts["gRPC connections"], counts["WebSocket connections"], len(HOPELESS), counts["done before"])
    )


asyncio.run(main())
