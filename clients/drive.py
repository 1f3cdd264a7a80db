"""Starts `tidemark dev` as a process of its own, runs every client against it, and says of each whether it is as it should be."""

import asyncio
import contextlib
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time

import readme
from wire import Wire

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = sys.argv[1]
NODE = os.path.join(CACHE, "node")
# How long one client may take, in seconds, on a machine that does much else: longer than its own deadlines, so that it can say what it waited for.
PATIENCE = 300


def quiet_addresses(n):
    """Addresses with free ports below those that systems hand out by themselves: while a process is down nobody gets its port by chance."""
    with contextlib.ExitStack() as bound:
        found = []
        for _ in range(1000):
            s = bound.enter_context(socket.socket())
            try:
                s.bind(("127.0.0.1", random.randrange(15000, 30000)))
            except OSError:
                continue
            found.append("127.0.0.1:%d" % s.getsockname()[1])
            if len(found) == n:
                return found
    raise Exception("no free ports")


class System:
    """A `tidemark dev`, on free ports and in a directory that are the same when it is started again."""

    def __init__(self, dir):
        self.binary = os.path.join(CACHE, "tidemark")
        self.dir = dir
        self.http, self.grpc, self.nats = quiet_addresses(3)
        self.log = open(os.path.join(dir, "log"), "w+")
        # What is set for somebody else's deployment is not for this one.
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("TIDEMARK_")}

    async def start(self):
        self.process = await asyncio.create_subprocess_exec(
            self.binary, "dev", "--data-dir", self.dir + "/data", "--http", self.http, "--grpc", self.grpc, "--nats-listen", self.nats, "--origins", "https://app.example.com",
            env=self.env, stdout=asyncio.subprocess.PIPE, stderr=self.log,
        )
        line = (await asyncio.wait_for(self.process.stdout.readline(), PATIENCE)).decode()
        ready = re.fullmatch(r"ready http=(\S+) grpc=(\S+) nats=(\S+)\n", line)
        if not ready:
            raise Exception("tidemark dev printed %r instead of its ready line" % line)
        self.http, self.grpc, self.nats = ready.groups()

    async def kill(self):
        self.process.kill()
        await self.process.wait()

    async def stop(self):
        self.process.terminate()
        if code := await asyncio.wait_for(self.process.wait(), PATIENCE):
            raise Exception("tidemark dev ended with exit code %d" % code)

    async def run(self, *args, input=None):
        """Runs a command of tidemark and returns what it printed."""
        p = await asyncio.create_subprocess_exec(
            self.binary, *args, "--data-dir", self.dir + "/data", env=self.env, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await asyncio.wait_for(p.communicate((input or "").encode()), PATIENCE)
        if p.returncode:
            raise Exception("tidemark %s: %s" % (" ".join(args), err.decode()))
        return out.decode()


async def script(system, *command, away=0, **settings):
    """Runs a client whose connections are cut at random, and once are not made for `away` attempts; its last line says what it has seen. It finds settings in its environment."""
    http, grpc = await Wire(system.http).open(), await Wire(system.grpc).open()
    cutting = [asyncio.create_task(w.cut_at_random(0.03, 0.25)) for w in (http, grpc)]
    absence = [asyncio.get_running_loop().call_later(1, http.go_away, away)] if away else []
    env = dict(system.env, TOKEN=await system.run("token", "--role", "agent"), EDGE_HTTP=system.http, EDGE_GRPC=system.grpc, CUT_HTTP=http.address, CUT_GRPC=grpc.address)
    env["TOKEN"] = env["TOKEN"].strip()
    env["GENERATED"] = os.path.join(CACHE, "generated")
    env.update(settings)
    p = await asyncio.create_subprocess_exec(*command, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    try:
        out, _ = await asyncio.wait_for(p.communicate(), PATIENCE)
    except asyncio.TimeoutError:
        raise Exception("it was not done after %d s" % PATIENCE)
    finally:
        if p.returncode is None:
            p.kill()
            await p.wait()
        idle = [task for task in cutting if task.done()]
        for task in (*cutting, *absence):
            task.cancel()
        http.close()
        grpc.close()
    text = out.decode().strip()
    if idle:
        raise Exception("nobody cut its wire: %r" % idle)
    if p.returncode:
        raise Exception(text)
    return text.splitlines()[-1]


async def alone(system, *command):
    """Runs a client that is agent and user in one, which an administrator may be."""
    return await script(system, *command, TOKEN=(await system.run("token", "--role", "admin")).strip())


async def workflow(system, *command):
    """Runs an agent and a UI, whose pauses are a hundredth of those in life, with tokens of every kind that they need."""

    async def token(*args):
        return (await system.run("token", *args)).strip()

    # Of so many attempts that come to nothing each of the two makes about half. The brief token is made last, and yet must last until the interpreter has started and two connections are open.
    return await script(
        system, *command, away=24, BACKOFF_FACTOR="0.01", LONGEST="1 2 4 8 16 30 30", USER_TOKEN=await token(), OTHER_TOKEN=await token("--session", "another*"), BRIEF_TOKEN=await token("--ttl", "15s")
    )


async def raw(system):
    """Reads a session from NATS itself, past the edges: what was stored, what is stored meanwhile, and behind a deletion the next history."""
    session = "raw NATS: ü/1 *.>"
    with open(system.dir + "/data/nats-password") as f:
        env = dict(system.env, NATS_URL="nats://tidemark:%s@%s" % (f.read().strip(), system.nats))

    async def start(**settings):
        return await asyncio.create_subprocess_exec(
            sys.executable, os.path.join(HERE, "raw_nats.py"), session, env=dict(env, **settings), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )

    async def once():
        p = await start(ONCE="1")
        out, err = await asyncio.wait_for(p.communicate(), PATIENCE)
        assert p.returncode == 0, err.decode()
        return out.decode()

    assert await once() == "", "there is something in a session without envelopes"
    await system.run("publish", session, input="one\ntwo ü\n")
    assert await once() == "one\ntwo ü\n", "what was stored is not what was read"
    reader = await start()
    try:
        for published, want in (("", ["one\n", "two ü\n"]), ("three\n", ["three\n"]), (None, []), ("four\n", ["four\n"])):
            if published is None:
                await system.run("sessions", "rm", session)
            elif published:
                await system.run("publish", session, input=published)
            for line in want:
                got = (await asyncio.wait_for(reader.stdout.readline(), PATIENCE)).decode()
                assert got == line, "%r was read where %r is stored: %s" % (got, line, "" if got else (await reader.stderr.read()).decode())
    finally:
        if reader.returncode is None:
            reader.kill()
        await reader.wait()
    assert await once() == "four\n", "a history that was deleted is still read"
    return "4 lines in 2 histories, from streams, subjects and frames alone"


async def page(system, chromium):
    """Opens the page in a browser."""
    user = await system.run("token", "--role", "user")
    return await script(system, "node", os.path.join(NODE, "page.mjs"), USER_TOKEN=user.strip(), CHROMIUM=chromium)


async def generate():
    """Generates Python and JavaScript code from the protobuf definitions."""
    out = os.path.join(CACHE, "generated")
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    sources = os.path.join(HERE, "..", "schema", "proto")
    names = [os.path.join("tidemark", "v1", n) for n in sorted(os.listdir(os.path.join(sources, "tidemark", "v1")))]
    p = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "grpc_tools.protoc", "-I", sources, "--python_out", out, "--grpc_python_out", out,
        "--plugin=protoc-gen-es=" + os.path.join(NODE, "node_modules", ".bin", "protoc-gen-es"), "--es_out", out, "--es_opt", "target=js,import_extension=js", *names,
    )
    if await p.wait():
        raise Exception("the protobuf definitions cannot be compiled")
    # Node looks for modules beside the file that imports them, and above.
    for name in os.listdir(NODE):
        if name.endswith(".mjs"):
            os.remove(os.path.join(NODE, name))
    for name in os.listdir(HERE):
        if name.endswith(".mjs"):
            shutil.copy(os.path.join(HERE, name), NODE)
    shutil.rmtree(os.path.join(NODE, "generated"), ignore_errors=True)
    shutil.copytree(out, os.path.join(NODE, "generated"))


async def main():
    await generate()
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="tidemark-clients-") as dir:
        system = System(dir)
        await system.start()
        in_browser = []
        if chromium := os.environ.get("CHROMIUM"):
            in_browser = [("Chromium, the page", lambda: page(system, chromium))]
        else:
            print("skipped Chromium, the page: no Chromium", flush=True)
        try:
            for name, check in in_browser + [
                ("Python, session socket", lambda: alone(system, sys.executable, os.path.join(HERE, "session_socket.py"))),
                ("Node, session socket", lambda: alone(system, "node", os.path.join(NODE, "session_socket.mjs"))),
                ("Python, agent and UI", lambda: workflow(system, sys.executable, os.path.join(HERE, "workflow.py"))),
                ("Node, agent and UI", lambda: workflow(system, "node", os.path.join(NODE, "workflow.mjs"))),
                ("Python, gRPC", lambda: script(system, sys.executable, os.path.join(HERE, "over_grpc.py"))),
                ("Node, gRPC-Web", lambda: script(system, "node", os.path.join(NODE, "over_grpc_web.mjs"))),
                ("Python, work and analytics", lambda: alone(system, sys.executable, os.path.join(HERE, "work.py"))),
                ("Python, NATS itself", lambda: raw(system)),
                ("README.md", lambda: readme.check(system, CACHE)),
                ("README.md, work", lambda: readme.check_work(system, CACHE)),
            ]:
                began = time.monotonic()
                try:
                    said = await check()
                    passed += 1
                    print("ok      %s: %s (%.1f s)" % (name, said, time.monotonic() - began), flush=True)
                except Exception as wrong:
                    failed += 1
                    print("failed  %s: %s" % (name, wrong or repr(wrong)), flush=True)
            await system.stop()
        except BaseException:
            if system.process.returncode is None:
                await system.kill()
            raise
        finally:
            if failed:
                system.log.seek(0)
                print("\nThe log of tidemark dev:\n" + system.log.read()[-20000:])
    print("%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


sys.exit(asyncio.run(main()))
