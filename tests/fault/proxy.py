"""A TCP proxy between a worker and Postgres that understands enough of the protocol to fail at a chosen call.

It reads the frontend's messages and remembers which statement each prepared name stands for, so it knows what a message
calls: an engine function (`claim`, `settle`, `save`, `beat`, `enqueue`), or the verb of anything else (`commit`).
A *rule* acts on the n-th call of one name:

    swallow   the request is forwarded, the server's whole reply dropped, then both ends are reset: the server has
              committed, and the client cannot know
    hold      as swallow, but the connection stays open and silent
    refuse    the request never reaches the server; both ends are reset

Whole links, chosen by their application name, can be reset, silenced (nothing passes in either direction), left half
open (the server's end is gone, and what the client sends is not even acknowledged), or delayed. The client must not ask
for TLS.
"""

import asyncio
import contextlib
import ctypes
import re
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from itertools import chain
from typing import Literal

Action = Literal["swallow", "hold", "refuse"]
_ENGINE_CALL = re.compile(rb'^select cast\("[^"]+"\.(\w+)\(')
_PROTOCOL_3 = 196608
_SO_ATTACH_FILTER = 26  # Linux; the module `socket` does not name it
_DROP_ALL = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
"""A socket filter of one instruction: let nothing of a packet in."""
_ENDS_OF_BATCH = (b"Q", b"S")  # a simple query, or Sync: the server answers with ReadyForQuery


class Rule:
    """What to do at the n-th call of a name, or at every n-th; `fired` is set once it has been done."""

    def __init__(self, action: Action, call: str, nth: int = 1, *, again: bool = False) -> None:
        self.action = action
        self.call = call
        self.fired = asyncio.Event()
        self._nth = nth
        self._again = again
        self._count = 0

    def strikes(self, call: str) -> bool:
        """Count a call of the name, and tell whether it is one to act on."""
        if call != self.call:
            return False
        self._count += 1
        return self._count % self._nth == 0 if self._again else self._count == self._nth

    def miss(self) -> None:
        """Strike the next call: the one that was struck met another rule, or its server or link went away."""
        if not (self._again or self.fired.is_set()):
            self._count = self._nth - 1


def name_of(statement: bytes) -> str:
    """Return the engine function that a statement calls, else its first word."""
    found = _ENGINE_CALL.match(statement)
    if found is not None:
        return found[1].decode()
    return statement.split(None, 1)[0].decode(errors="replace").lower() if statement.strip() else ""


class _Frontend:
    """Reads what a client sends and tells, message by message, which calls it makes."""

    def __init__(self) -> None:
        self._statements: dict[bytes, bytes] = {}

    def call_in(self, kind: bytes, body: bytes) -> str | None:
        if kind == b"Q":
            return name_of(body.rstrip(b"\0"))
        if kind == b"P":
            name, statement, _ = body.split(b"\0", 2)
            self._statements[name] = statement
        elif kind == b"B":
            _, name, _ = body.split(b"\0", 2)
            return name_of(self._statements.get(name, b""))
        return None


class Link:
    """One connection through the proxy."""

    def __init__(
        self, proxy: "Proxy", client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:  # fmt: skip
        self.application = ""
        self.is_silent = False
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._frontend = _Frontend()
        self._batch: list[Rule] = []
        self._batches: deque[list[Rule]] = deque()

    async def serve(self) -> None:
        pumps = [asyncio.create_task(self._forwards()), asyncio.create_task(self._backwards())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if self.is_silent:
                await asyncio.wait(pumps[:1])  # the client is to notice nothing until it gives up by itself
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
            self.reset()
            for rule in chain(self._batch, *self._batches):
                rule.miss()

    def reset(self) -> None:
        """Cut both ends at once."""
        self._to_client.transport.abort()
        self._to_server.transport.abort()

    def half_open(self) -> None:
        """Cut the server's end only, as when its machine is gone: the client's kernel is not answered any more either.

        The filter drops the packets before this end's kernel sees them. So the client learns of it when its own kernel
        gives up, by `tcp_user_timeout` or keepalives, and in no other way.
        """
        self.fall_silent()
        program = struct.pack("HL", 1, ctypes.addressof(_DROP_ALL))
        self._to_client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        self._to_server.transport.abort()

    def fall_silent(self) -> None:
        """Let nothing pass any more; the link is cut after as long as it takes until keepalives are missed."""
        self.is_silent = True
        if self._proxy.keepalive_seconds is not None:
            asyncio.get_running_loop().call_later(self._proxy.keepalive_seconds, self.reset)

    # ------------------------------------------------------------ client to server

    async def _forwards(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            startup = await _read_sized(self._from_client)
            self.application = _application_in(startup)
            self._proxy.opened.append((time.monotonic(), self.application))
            if self._proxy.silences(self.application):
                self.fall_silent()
            self._send(self._to_server, startup)
            while True:
                kind = await self._from_client.readexactly(1)
                message = await _read_sized(self._from_client)
                if self._meets_refusal(kind, message[4:]):
                    return
                if kind in _ENDS_OF_BATCH:
                    await self._proxy.pause()
                self._send(self._to_server, kind + message)

    def _meets_refusal(self, kind: bytes, body: bytes) -> bool:
        call = self._frontend.call_in(kind, body)
        rule = self._proxy.rule_for(call) if call is not None else None
        if rule is not None and rule.action == "refuse":
            rule.fired.set()
            return True
        if rule is not None:
            self._batch.append(rule)
        if kind in _ENDS_OF_BATCH:
            self._batches.append(self._batch)
            self._batch = []
        return False

    # ------------------------------------------------------------ server to client

    async def _backwards(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            is_started = False
            while True:
                kind = await self._from_server.readexactly(1)
                message = await _read_sized(self._from_server)
                rule = self._rule_now() if is_started else None
                if rule is None:
                    self._send(self._to_client, kind + message)
                if kind == b"Z":
                    if rule is not None and self._strike(rule):
                        return
                    if is_started and self._batches:
                        self._batches.popleft()
                    is_started = True

    def _rule_now(self) -> Rule | None:
        return self._batches[0][0] if self._batches and self._batches[0] else None

    def _strike(self, rule: Rule) -> bool:
        """The server has done what it was asked; the client will not hear of it. Tell whether to hang up."""
        if rule.action == "hold":
            self.fall_silent()
        rule.fired.set()
        return rule.action == "swallow"

    def _send(self, writer: asyncio.StreamWriter, message: bytes) -> None:
        if not (self.is_silent or writer.transport.is_closing()):
            writer.write(message)


class Proxy:
    """Listens on a port of its own and passes everything on to one server."""

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self.delay_seconds = 0.0
        self.is_refusing = False
        self.keepalive_seconds: float | None = None
        """After how long the end of a silent link is told, as by keepalives that nobody answers; never by itself."""
        self.links: set[Link] = set()
        self.opened: list[tuple[float, str]] = []
        """When clients of which application name have connected, whether or not the server let them in."""
        self._silenced: set[str] = set()
        self._rules: list[Rule] = []
        self._target = (host, port)
        self._tasks: set[asyncio.Task[None]] = set()

    def arm(self, action: Action, call: str, nth: int = 1, *, again: bool = False) -> Rule:
        """Do something at the n-th call of a name, or at every n-th, counted over all links from now on."""
        rule = Rule(action, call, nth, again=again)
        self._rules.append(rule)
        return rule

    def rule_for(self, call: str) -> Rule | None:
        """Count a call, and return the rule that it meets; where it meets several, the others strike the next one."""
        struck = [rule for rule in self._rules if rule.strikes(call)]
        for rule in struck[1:]:
            rule.miss()
        return struck[0] if struck else None

    def chosen(self, application: str = "") -> list[Link]:
        """Return the links of clients whose application name ends so."""
        return [link for link in self.links if link.application.endswith(application)]

    def reset(self, application: str = "") -> None:
        """Cut links."""
        for link in self.chosen(application):
            link.reset()

    def silence(self, application: str = "") -> None:
        """Let nothing pass, on the links there are and on those to come."""
        self._silenced.add(application)
        for link in self.chosen(application):
            link.fall_silent()

    def unsilence(self, application: str = "") -> None:
        """Let new links of this name work, and cut those that were silent."""
        self._silenced.discard(application)
        for link in self.chosen(application):
            if link.is_silent:
                link.reset()

    def heal(self) -> None:
        """End everything: silent links are cut, since bytes are missing, and new ones work."""
        self._silenced.clear()
        self._rules.clear()
        self.is_refusing = False
        self.delay_seconds = 0.0
        for link in [link for link in self.links if link.is_silent]:
            link.reset()

    def silences(self, application: str) -> bool:
        """Tell whether links of this name are to be silent."""
        return any(application.endswith(name) for name in self._silenced)

    async def pause(self) -> None:
        """Hold a request up."""
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            if self.is_refusing:
                raise ConnectionRefusedError
            server = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        link = Link(self, (reader, writer), server)
        self.links.add(link)
        try:
            await link.serve()
        finally:
            self.links.discard(link)

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator["Proxy"]:
        """Serve for the length of a block."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for link in list(self.links):
                link.reset()
            if self._tasks:
                await asyncio.wait(list(self._tasks), timeout=5)


async def _read_sized(reader: asyncio.StreamReader) -> bytes:
    """Read a length, which counts itself, and that much; return both."""
    size = await reader.readexactly(4)
    return size + await reader.readexactly(int.from_bytes(size, "big") - 4)


def _application_in(startup: bytes) -> str:
    """Return the application name of a startup message; a request to cancel has none."""
    if int.from_bytes(startup[4:8], "big") != _PROTOCOL_3:
        return ""
    words = startup[8:].split(b"\0")
    settings = dict(zip(words[::2], words[1::2], strict=False))
    return settings.get(b"application_name", b"").decode()
