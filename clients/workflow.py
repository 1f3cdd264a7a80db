"""A whole workflow from Python, with the package websockets: an agent and a UI, each a process that has nothing but a WebSocket and JSON, over a wire that is cut at random and once is gone for a while."""

import asyncio
import json
import os
import random
import sys
import time
from urllib.parse import urlencode

import websockets

DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
# How long opening a connection may take, in seconds, for who may not lose it.
PATIENCE = 90
LOST = (OSError, websockets.ConnectionClosed, websockets.InvalidHandshake, EOFError, TimeoutError)
TERMINAL = ("completed", "failed", "cancelled")
# How much shorter than in life the pauses between connections are.
FACTOR = float(os.environ["BACKOFF_FACTOR"])
# What ends a client for good; after everything else it comes again with the cursor it has.
FATAL = ("invalid_message", "unknown_type", "forbidden", "unauthenticated", "epoch_mismatch", "seq_beyond_head", "too_large")


def ulid():
    return "0" + "".join(random.choices(DIGITS, k=25))


def address(host, session, token, **query):
    return "ws://%s/ws?%s" % (host, urlencode(dict(sessionName=session, token=token, **{k: v for k, v in query.items() if v})))


class Client:
    """Follows a session and publishes to it over as many connections as it takes."""

    def __init__(self, host, session, token):
        self.host, self.session, self.token = host, session, token
        self.got, self.epoch, self.connections = [], "", 0
        # What is not answered, by id, in the order in which it was sent.
        self.unanswered = {}
        # The pauses before each connection, as they would be in life, in seconds.
        self.pauses = []
        self.replaced = 0
        self.ws = None
        self.progress = asyncio.Condition()

    async def run(self):
        """Until the session has ended. It waits 1, 2, 4 … 30 s between connections that do not come about."""
        failures = 0
        while True:
            try:
                async with websockets.connect(address(self.host, self.session, self.token, lastSeq=len(self.got), epoch=self.epoch), max_size=None, open_timeout=PATIENCE, proxy=None) as ws:
                    first = json.loads(await ws.recv())
                    if first["type"] == "attached":
                        self.connections += 1
                        failures = 0
                        assert first["data"]["after_seq"] == len(self.got), first
                        self.epoch = first["data"]["epoch"] or self.epoch
                        self.ws = ws
                        for envelope in list(self.unanswered.values()):
                            await ws.send(json.dumps(envelope))
                        async for text in ws:
                            if await self.hear(json.loads(text)):
                                return
                    else:
                        await self.hear(first)
            except LOST:
                pass
            self.ws = None
            pause = min(30, 2**failures)
            failures += 1
            self.pauses.append(pause)
            await asyncio.sleep(pause * FACTOR)

    async def hear(self, said):
        """Takes in what the edge says; true where that was the end."""
        kind, data = said["type"], said["data"]
        if "seq" in said:
            assert said["seq"] == len(self.got) + 1, "seq %d comes behind %d" % (said["seq"], len(self.got))
            self.got.append(said)
            # It is stored, whether or not the answer to it arrived.
            await self.envelope(kind, data)
        elif kind == "published":
            assert data["durability"] == "fsync", said
            self.replaced += data.get("replaced", False)
            await self.answered(data["id"], "")
        elif kind == "attached":
            # The session was empty, and has begun.
            assert not self.got and data["epoch"], said
            self.epoch = data["epoch"]
        elif kind == "error" and "id" in data:
            if not data.get("retryable"):
                await self.answered(data["id"], data["code"])
        elif kind == "error":
            assert data["code"] not in FATAL, said
        else:
            assert kind == "going_away", said
        async with self.progress:
            self.progress.notify_all()
        return kind == "run_status" and "seq" in said and data["status"] in TERMINAL

    async def envelope(self, kind, data):
        pass

    async def answered(self, id, code):
        self.unanswered.pop(id, None)

    async def say(self, kind, data):
        """Publishes one envelope; it is sent again on each new connection until it is answered."""
        envelope = dict(type=kind, id=ulid(), data=data)
        self.unanswered[envelope["id"]] = envelope
        if self.ws:
            try:
                await self.ws.send(json.dumps(envelope))
            except LOST:
                pass  # run sends it again
        return envelope["id"]

    async def until(self, true):
        async with self.progress:
            await self.progress.wait_for(true)


class Agent(Client):
    """Says what an agent says, and goes on once its question is answered."""

    async def envelope(self, kind, data):
        if kind == "user_input":
            self.answer = data["response"]

    async def answered(self, id, code):
        assert not code, "the agent is refused: " + code
        await super().answered(id, code)

    async def tokens(self, n):
        for i in range(n):
            if i % 50 == 0:
                # Faster than once a second: of these only the last must be stored.
                for k in range(5):
                    await self.say("workflow_progress", {"step": "writing", "message": "part %d, %d of 5" % (i // 50, k + 1), "progress": i / n})
            await self.say("token", {"message_id": "m1", "text": random.choice(["ebb ", "flood ", "Wattenmeer ", "潮 ", "🌊 ", '"\\\n '])})
            await self.until(lambda: len(self.unanswered) < 10)
            await asyncio.sleep(0.002)
        await self.until(lambda: not self.unanswered)

    async def work(self):
        self.answer = None
        following = asyncio.create_task(self.run())
        await self.say("start_run", {"run_id": "r1", "input": {"question": "What is the tide doing?"}})
        await self.tokens(250)
        await self.say("workflow_waiting_for_input", {"prompt": "Go on?", "options": ["approve", "reject"], "context": {"written": 250}})
        await self.until(lambda: self.answer is not None)
        assert self.answer == "approve", self.answer
        await self.tokens(150)
        await self.say("message_completed", {"message_id": "m1", "finish_reason": "stop"})
        await self.until(lambda: not self.unanswered)
        await self.say("run_status", {"run_id": "r1", "status": "completed"})
        await following
        return dict(connections=self.connections, replaced=self.replaced)


class UI(Client):
    """Watches, and approves: at first it says what is no option, and at last it answers once more."""

    def __init__(self, *args):
        super().__init__(*args)
        self.tries, self.codes = ["maybe", "approve", "approve"], []

    async def envelope(self, kind, data):
        if kind == "workflow_waiting_for_input":
            assert data["options"] == ["approve", "reject"], data
            await self.say("user_input", {"response": self.tries.pop(0)})

    async def answered(self, id, code):
        if id in self.unanswered:
            self.codes.append(code)
            if self.tries:
                await self.say("user_input", {"response": self.tries.pop(0)})
        await super().answered(id, code)

    async def work(self):
        await self.run()
        for before, pause in zip([0] + self.pauses, self.pauses):
            assert pause == 1 or pause == min(30, 2 * before), self.pauses
        return dict(connections=self.connections, pauses=self.pauses, codes=self.codes, got=self.got)


async def part(role, session):
    """One of the two processes: prints what it has seen."""
    agent = role == "agent"
    client = (Agent if agent else UI)(os.environ["CUT_HTTP"], session, os.environ["TOKEN" if agent else "USER_TOKEN"])
    print(json.dumps(await client.work()))


async def process(role, session):
    """Runs a part in a process of its own."""
    p = await asyncio.create_subprocess_exec(sys.executable, __file__, role, session, stdout=asyncio.subprocess.PIPE, limit=1 << 24)
    try:
        out, _ = await p.communicate()
    finally:
        if p.returncode is None:
            p.kill()
            await p.wait()
    assert p.returncode == 0, "the %s failed" % role
    return json.loads(out)


async def connect(session, token, **query):
    return await websockets.connect(address(os.environ["EDGE_HTTP"], session, token, **query), max_size=None, open_timeout=PATIENCE, proxy=None)


async def turned_away(session, token):
    """What the edge answers instead of an upgrade."""
    try:
        await connect(session, token)
    except websockets.InvalidStatus as e:
        body = json.loads(e.response.body)
        assert body["error"] == "Unauthorized" and body["details"], body
        return e.response.status_code, body["code"]
    raise AssertionError("it was let in")


async def heard(ws, kind):
    while (said := json.loads(await ws.recv()))["type"] != kind:
        pass
    return said["data"]


async def closed(ws):
    """How the edge ends a connection: the last error it says before, the close code and the reason's first word."""
    code = ""
    try:
        while True:
            said = json.loads(await ws.recv())
            if said["type"] == "error" and "seq" not in said:
                code = said["data"]["code"]
    except websockets.ConnectionClosed as e:
        return code, e.rcvd.code, e.rcvd.reason.split(":")[0]


async def manners(session):
    """How refusals are told, on sessions of their own and wires that nobody cuts."""
    user, agent = os.environ["USER_TOKEN"], os.environ["TOKEN"]
    for wrong in ("", "nonsense", agent[:-2]):
        assert await turned_away(session, wrong) == (401, "unauthenticated")
    assert await turned_away(session, os.environ["OTHER_TOKEN"]) == (403, "forbidden")

    # Nobody has asked: said, and nothing more.
    ws = await connect(session + " quiet", user)
    for _ in range(2):
        await ws.send(json.dumps(dict(type="user_input", data=dict(response="yes"))))
        assert (await heard(ws, "error"))["code"] == "not_waiting"
    await ws.send(json.dumps(dict(type="user_message", data=dict(message="hello"))))
    assert (await heard(ws, "published"))["seq"] == 1
    # A type that is not a user's, a field that is missing, too much at once.
    await ws.send(json.dumps(dict(type="token", data=dict(message_id="m", text="x"))))
    assert await closed(ws) == ("forbidden", 1008, "forbidden")
    ws = await connect(session + " quiet", user)
    await ws.send(json.dumps(dict(type="user_input", data={})))
    assert await closed(ws) == ("invalid_message", 1008, "invalid_message")
    ws = await connect(session + " quiet", user)
    for i in range(200):
        try:
            await ws.send(json.dumps(dict(type="user_message", data=dict(message=str(i)))))
        except websockets.ConnectionClosed:
            break
    assert await closed(ws) == ("rate_exceeded", 1008, "rate_exceeded")


async def expiry(session):
    """A token that ends on a live connection ends it; a new one before that does not."""
    lasting, ending = await connect(session + " brief", os.environ["BRIEF_TOKEN"]), await connect(session + " brief", os.environ["BRIEF_TOKEN"])
    await lasting.send(json.dumps(dict(type="refresh", data=dict(token=os.environ["USER_TOKEN"]))))
    assert (await heard(lasting, "refreshed"))["expires"]
    assert await closed(ending) == ("token_expired", 4401, "token_expired")
    await lasting.send(json.dumps(dict(type="user_message", data=dict(message="still here"))))
    await heard(lasting, "published")
    await lasting.close()
    # Whoever closes is answered.
    assert lasting.close_code == 1000
    assert await turned_away(session, os.environ["BRIEF_TOKEN"]) == (401, "unauthenticated")


def text(envelopes):
    return "".join(e["data"]["text"] for e in envelopes if e["type"] == "token")


async def main():
    session = "a workflow in Python %d" % time.time_ns()
    calm = Client(os.environ["EDGE_HTTP"], session, os.environ["TOKEN"])
    agent, ui, _, _, _ = await asyncio.gather(process("agent", session), process("ui", session), calm.run(), manners(session), expiry(session))
    got = ui["got"]
    assert calm.connections == 1 and not calm.pauses, "the wire that nobody cuts was cut"
    assert text(got) == text(calm.got) != "", "who was cut read another text"
    assert got == calm.got, "who was cut got something else"
    assert sum(e["type"] == "token" for e in got) == 400 and sum(e["type"] == "user_input" for e in got) == 1
    assert ui["codes"][:2] == ["invalid_response", ""] and ui["codes"][2:] in ([], ["not_waiting"], ["session_ended"]), ui["codes"]
    assert os.environ["LONGEST"] in " ".join(map(str, ui["pauses"])), "it never waited longer and longer: %r" % ui["pauses"]
    progress = [e["data"]["message"] for e in got if e["type"] == "workflow_progress"]
    assert agent["replaced"] and len(progress) < 40, "progress is stored as often as it is sent: %r" % progress
    assert [m for m in progress if "5 of 5" in m] == ["part %d, 5 of 5" % n for n in (0, 1, 2, 3, 4, 0, 1, 2)], progress
    # Who comes late to a session that has ended gets what is missing, and the end.
    ws = await connect(session, os.environ["USER_TOKEN"], lastSeq=len(got) - 1, epoch=calm.epoch)
    assert (await heard(ws, "attached"))["status"] == "completed"
    assert json.loads(await ws.recv()) == got[-1]
    assert await closed(ws) == ("", 1000, "completed")
    print(
        "%d envelopes over %d connections of the agent and %d of the UI are those of an undisturbed client; the UI waited %d times, and at most %d s"
        % (len(got), agent["connections"], ui["connections"], len(ui["pauses"]), max(ui["pauses"]))
    )


asyncio.run(part(*sys.argv[1:]) if len(sys.argv) > 1 else main())
