"""The clients that README.md shows, as they stand there: each must print what is published, once and in order, while its connection is cut, the server killed and the session deleted; and end when the session has."""

import ast
import asyncio
import json
import os
import re
import sys
import urllib.request

from wire import Wire

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
# The address that README.md uses, and the one of the wire instead.
ADDRESS = "127.0.0.1:8080"
# How long everybody may take to print what was published, in seconds.
PATIENCE = 90


def snippets(heading, language):
    """All that stands there in that language."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        section = f.read().split("\n## %s\n" % heading)[1].split("\n## ")[0]
    return re.findall(r"^```%s\n(.*?)^```$" % language, section, re.S | re.M)


def snippet(language):
    """The one client in that language, of those that follow a session."""
    found = snippets("A client in ten lines", language)
    assert len(found) == 1 and ADDRESS in found[0], "README.md shows %d clients in %s" % (len(found), language)
    return found[0]


def after(prefix, parse):
    """Reads the lines that begin so."""
    return lambda line: parse(line[len(prefix) :]) if line.startswith(prefix) else ""


class Client:
    """A snippet that runs."""

    def __init__(self, language, text):
        # text finds the published text in a line of output, "" where there is none.
        self.language, self.text, self.texts, self.errors = language, text, [], []

    async def start(self, env, *command):
        self.process = await asyncio.create_subprocess_exec(*command, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=1 << 22)
        self.reading = [asyncio.create_task(self._read()), asyncio.create_task(self._listen())]

    async def _read(self):
        async for line in self.process.stdout:
            if text := self.text(line.decode()).strip():
                self.texts.append(text)

    async def _listen(self):
        async for line in self.process.stderr:
            self.errors = self.errors[-20:] + [line.decode()]

    async def stop(self):
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        for task in self.reading:
            await task


async def build(cache, wire):
    """Puts the snippets where their languages find what they need, and returns the commands that run them."""
    js, py, go = (snippet(l).replace(ADDRESS, wire.address) for l in ("js", "python", "go"))
    at = {l: os.path.join(cache, place) for l, place in (("js", "node/readme.cjs"), ("python", "readme-snippet.py"), ("go", "readme-snippet.go"))}
    # What README.md says to do before, and where TOKEN comes from.
    js = "globalThis.WebSocket ??= require('ws')\nconst TOKEN = process.env.TOKEN\n" + js
    py = "import os\nTOKEN = os.environ['TOKEN']\n" + py
    for language, text in (("js", js), ("python", py), ("go", go)):
        with open(at[language], "w", encoding="utf-8") as f:
            f.write(text)
    program = os.path.join(cache, "readme-snippet")
    p = await asyncio.create_subprocess_exec("go", "build", "-o", program, at["go"], cwd=ROOT)
    assert await p.wait() == 0, "the client in Go does not compile"
    return ["node", at["js"]], [sys.executable, "-u", at["python"]], [program]


async def check(system, cache):
    wire = await Wire(system.http).open()
    commands = await build(cache, wire)
    clients = [Client("JavaScript", lambda line: line), Client("Python", after("token ", lambda data: ast.literal_eval(data)["text"])), Client("Go", after("token ", str))]
    env = dict(system.env, TOKEN=(await system.run("token")).strip())
    admin = (await system.run("token", "--role", "admin")).strip()
    published = []

    async def publish(lines):
        await system.run("publish", "hello", input="".join(line + "\n" for line in lines))
        published.extend(lines)

    def ask(method, **request):
        """Makes a call as an administrator, by the Connect protocol."""
        body = json.dumps(dict(request, session="hello")).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer " + admin}
        urllib.request.urlopen(urllib.request.Request("http://%s/tidemark.v1.SessionService/%s" % (system.grpc, method), body, headers), timeout=PATIENCE).close()

    async def all_printed():
        for _ in range(PATIENCE * 50):
            if all(len(c.texts) >= len(published) for c in clients):
                break
            await asyncio.sleep(0.02)
        for c in clients:
            said = "; it says:\n" + "".join(c.errors) if c.errors else ""
            assert c.process.returncode is None, "the client in %s ended%s" % (c.language, said)
            assert c.texts == published, "the client in %s printed %r, published was %r%s" % (c.language, c.texts, published, said)

    try:
        for client, command in zip(clients, commands):
            await client.start(env, *command)
        await publish(["Hello from a shell", "low tide", "潮"])
        await all_printed()
        # Cut, and published to before they are back.
        wire.cut()
        await publish(["while you were away %d" % i for i in range(10)])
        await all_printed()
        # The whole server is gone, and comes back with what it had.
        await system.kill()
        await asyncio.sleep(0.5)
        await system.start()
        await publish(["high tide", "the end"])
        await all_printed()
        # The session is deleted, and begins anew: at once, so that their cursors are of another history, and when they have come back, so that their cursors are of none.
        for pause in (0, 2.5):
            await asyncio.to_thread(ask, "DeleteSession")
            await asyncio.sleep(pause)
            await publish(["another tide", "after %g s" % pause])
            await all_printed()
        # It ends, and they with it: whoever comes back is told that there is no more.
        await asyncio.to_thread(ask, "Append", envelopes=[{"runStatus": {"status": "STATUS_COMPLETED"}}])
        wire.cut()
        for c in clients:
            try:
                code = await asyncio.wait_for(c.process.wait(), PATIENCE)
            except asyncio.TimeoutError:
                raise AssertionError("the client in %s goes on although the session has ended" % c.language)
            assert code == 0, "the client in %s ended with %d:\n%s" % (c.language, code, "".join(c.errors))
        assert wire.cuts >= len(clients), "nothing was cut"
    finally:
        for client in clients:
            if hasattr(client, "process"):
                await client.stop()
        wire.close()
    return "its clients in JavaScript, Python and Go print all %d lines once, over a cut, a kill -9 and two deletions, and end with the session" % len(published)


async def check_work(system, cache):
    """Who asks for a tool gets what the tool runner says; and waits no longer than it wants to where there is none."""
    found = snippets("Work", "python")
    assert len(found) == 2, "README.md shows %d programs in Python that have to do with work" % len(found)
    commands = []
    for name, role, text in zip(("runner", "asker"), ("worker", "agent"), found):
        assert ADDRESS in text and "sessionName=hello" in text, "README.md's %s names another address or session" % name
        text = text.replace(ADDRESS, system.http).replace("sessionName=hello", "sessionName=asked").replace('ask("ls", 30)', 'ask("ls", PATIENCE)')
        at = os.path.join(cache, "readme-%s.py" % name)
        with open(at, "w", encoding="utf-8") as f:
            f.write("import os\nTOKEN, PATIENCE = os.environ['TOKEN'], float(os.environ['PATIENCE'])\n" + text)
        commands.append((dict(system.env, TOKEN=(await system.run("token", "--role", role)).strip()), sys.executable, "-u", at))
    runner, asker = Client("Python, the runner", str), Client("Python, the asker", str)

    async def ask(patience):
        await asker.start(dict(commands[1][0], PATIENCE=str(patience)), *commands[1][1:])
        await asyncio.wait_for(asker.process.wait(), PATIENCE)
        for task in asker.reading:
            await task

    try:
        await ask(0.5)
        assert asker.process.returncode and "TimeoutError" in asker.errors[-1], "without a runner the asker printed %r; it says:\n%s" % (asker.texts, "".join(asker.errors))
        await runner.start(dict(commands[0][0], PATIENCE="0"), *commands[0][1:])
        await ask(PATIENCE)
        assert asker.texts and ast.literal_eval(asker.texts[-1])["result"] == "done", "the asker printed %r; it says:\n%s" % (asker.texts, "".join(asker.errors))
    finally:
        for client in (runner, asker):
            if hasattr(client, "process"):
                await client.stop()
    return "who asks for a tool waits in vain no longer than it wants to, and gets the runner's result"
