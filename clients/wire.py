"""A wire that can be cut: a TCP proxy on loopback."""

import asyncio
import random
import socket
import struct


class Wire:
    """Forwards connections to host:port. cut() breaks them all, as a network does that is gone: without a goodbye, in the middle of whatever is under way."""

    def __init__(self, target):
        self.host, port = target.rsplit(":", 1)
        self.port = int(port)
        self.pairs = set()
        self.armed = False
        self.refusing = 0
        self.cuts = 0

    async def open(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = "127.0.0.1:%d" % self.server.sockets[0].getsockname()[1]
        return self

    def cut(self):
        self.cuts += len(self.pairs)
        for pair in list(self.pairs):
            self._abort(pair)

    @staticmethod
    def _abort(pair):
        for writer in pair:
            try:
                # A reset, and nothing more of what is still to be sent.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass  # it is closed already
            writer.transport.abort()

    async def cut_at_random(self, least, most):
        """Cuts until it is cancelled, after random times in seconds: at once, or at what the client says next, before or behind it, so that its requests are hit however rare they are."""
        while True:
            await asyncio.sleep(random.uniform(least, most))
            if random.random() < 0.5:
                self.cut()
            else:
                self.armed = True

    def go_away(self, attempts):
        """Breaks all connections, and makes none until so many have been attempted."""
        self.refusing = attempts
        self.cut()

    def close(self):
        self.server.close()
        self.cut()

    async def _serve(self, reader, writer):
        if self.refusing:
            self.refusing -= 1
            writer.transport.abort()
            return
        try:
            theirs = await asyncio.open_connection(self.host, self.port)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, theirs[1])
        if self.refusing:
            self._abort(pair)
            return
        self.pairs.add(pair)
        pumps = [asyncio.create_task(self._pump(reader, theirs[1], True)), asyncio.create_task(self._pump(theirs[0], writer, False))]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        self.pairs.discard(pair)
        # Who closed has sent all that he had; that still goes through.
        for w in pair:
            if not w.is_closing():
                w.close()
        await asyncio.wait(pumps)

    async def _pump(self, reader, writer, requests):
        try:
            while data := await reader.read(65536):
                cut = requests and self.armed
                if cut:
                    self.armed = False
                    if random.random() < 0.5:
                        self.cut()
                        return
                writer.write(data)
                await writer.drain()
                if cut:
                    await asyncio.sleep(0.001)
                    self.cut()
                    return
        except OSError:
            pass  # cut
