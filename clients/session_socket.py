"""The session socket from Python, with the package websockets: publishes a workflow over a wire that is cut at random, follows it over that wire, and compares with who follows it undisturbed."""

import asyncio
import json
import os
import random
import sys
import time
from urllib.parse import urlencode

import websockets

TOKEN = os.environ["TOKEN"]
SESSION = "workflow of Python %d" % time.time_ns()
DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
# How long opening a connection may take, in seconds, for who may not lose it.
PATIENCE = 90


def ulid():
    return "0" + "".join(random.choices(DIGITS, k=25))


def workflow():
    """Everything a workflow says: 400 tokens, a question, its answer, the end."""
    yield "start_run", {"run_id": "r1", "input": {"question": "What is the tide doing?", "id": 12345678901234567890}}
    for i in range(400):
        if i % 100 == 0:
            yield "workflow_progress", {"step": "part %d" % (i // 100), "message": "writing", "progress": i / 400}
        yield "token", {"message_id": "m1", "text": random.choice(["ebb ", "flood ", "Wattenmeer ", "潮 ", "🌊 ", '"\\\n '])}
    yield "message_completed", {"message_id": "m1", "finish_reason": "stop"}
    yield "workflow_waiting_for_input", {"prompt": "Go on?", "options": ["yes", "no"]}
    yield "user_input", {"response": "yes"}
    yield "run_status", {"run_id": "r1", "status": "completed"}


def address(host, **query):
    return "ws://%s/ws?%s" % (host, urlencode(dict(sessionName=SESSION, token=TOKEN, **query)))


async def publish(messages):
    """Sends what is not acknowledged again on each new connection; its id keeps it from being stored twice."""
    waiting, connections = [dict(type=t, id=ulid(), data=d) for t, d in messages], 0
    while waiting:
        try:
            async with websockets.connect(address(os.environ["CUT_HTTP"], lastSeq="latest"), max_size=None) as ws:
                connections += 1
                sent = 0
                while waiting:
                    while sent < min(len(waiting), 10):
                        await ws.send(json.dumps(waiting[sent]))
                        sent += 1
                    said = json.loads(await ws.recv())
                    if said["type"] == "error" and not said["data"].get("retryable"):
                        sys.exit("the publisher is told %r" % said)
                    if said["type"] == "published":
                        assert said["data"]["id"] == waiting[0]["id"] and said["data"]["durability"] == "fsync", said
                        del waiting[0]
                        sent -= 1
                        await asyncio.sleep(0.003)
        except websockets.ConnectionClosedOK as e:
            # The session has ended, and takes nothing more. What of ours it had taken, and could not tell us any more, is among what is replayed.
            assert e.rcvd.code == 1000 and e.rcvd.reason == "completed", e
            stored = {said["id"] for said in (await follow(os.environ["CUT_HTTP"], "run_status"))[0]}
            assert stored.issuperset(message["id"] for message in waiting), "the session has ended without %r" % waiting
            waiting = []
        except (OSError, websockets.ConnectionClosed, websockets.InvalidHandshake, EOFError):
            await asyncio.sleep(0.02)
    return connections


async def follow(host, until):
    """Follows up to the envelope of that type; returns the envelopes and the number of connections."""
    got, epoch, connections = [], "", 0
    while True:
        try:
            query = {k: v for k, v in dict(lastSeq=len(got), epoch=epoch).items() if v}
            async with websockets.connect(address(host, **query), max_size=None, open_timeout=PATIENCE) as ws:
                connections += 1
                async for text in ws:
                    said = json.loads(text)
                    if "seq" in said:
                        assert said["seq"] == len(got) + 1, "seq %d comes behind %d" % (said["seq"], len(got))
                        got.append(said)
                        if said["type"] == until:
                            return got, connections
                    elif said["type"] == "attached":
                        assert said["data"].get("after_seq", 0) == len(got), said
                        epoch = said["data"].get("epoch") or epoch
                    else:
                        assert said["type"] == "going_away" or said["data"].get("retryable"), said
        except (OSError, websockets.ConnectionClosed, websockets.InvalidHandshake, EOFError):
            assert host != os.environ["EDGE_HTTP"], "the wire that nobody cuts was cut"
            await asyncio.sleep(0.02)


def text(envelopes):
    return "".join(e["data"]["text"] for e in envelopes if e["type"] == "token")


async def refused(**query):
    """What the edge says to a client that comes with this."""
    async with websockets.connect(address(os.environ["EDGE_HTTP"], **query), open_timeout=PATIENCE) as ws:
        said = json.loads(await ws.recv())
        assert said["type"] == "error", said
        return said["data"]["code"]


async def main():
    messages = list(workflow())
    undisturbed = asyncio.create_task(follow(os.environ["EDGE_HTTP"], "run_status"))
    cut = asyncio.create_task(follow(os.environ["CUT_HTTP"], "run_status"))
    published = await publish(messages)
    calm, _ = await undisturbed
    got, connections = await cut
    assert got == calm, "who was cut got something else"
    assert [e["type"] for e in got] == [t for t, _ in messages]
    assert text(got) == "".join(d["text"] for t, d in messages if t == "token")
    assert got[0]["data"]["input"]["id"] == 12345678901234567890, got[0]
    assert published > 2 and connections > 2, "hardly anything was cut: %d and %d connections" % (published, connections)
    assert await refused(lastSeq=1, epoch="01JBV0000000000000000000XY") == "epoch_mismatch"
    assert await refused(lastSeq=len(got) + 1) == "seq_beyond_head"
    try:
        await websockets.connect("ws://%s/ws?sessionName=s&token=no" % os.environ["EDGE_HTTP"], open_timeout=PATIENCE)
        sys.exit("a wrong token was accepted")
    except websockets.InvalidStatus as e:
        assert e.response.status_code == 401, e
    print("%d envelopes published over %d connections, and read over %d, are those of an undisturbed client" % (len(got), published, connections))


asyncio.run(main())
