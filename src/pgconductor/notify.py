"""Hints over LISTEN and NOTIFY: they shorten a wait, and nothing depends on them.

The channel is the schema's name. A hint is text: `ready <queue ids>` (these queues have new work), `named <queue id>
<task id> <execution ids>` (just these), or `told <watcher ids>` (a result is there, a signal waits). Hints may be lost,
doubled, late or about nothing; whoever gets one looks at the tables. A pooler gives no session to listen on, and a
LISTEN would stay behind in one that others are given: where one is found, nothing is listened to, and polling does.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Literal

import psycopg
from psycopg import sql

from pgconductor.route import Route
from pgconductor.session import Session, backoff_seconds

if TYPE_CHECKING:
    from pgconductor.engine import Engine

log = logging.getLogger("pgconductor.notify")
Kind = Literal["ready", "told"]
POOLED_SECONDS: Final = 60.0  # until it is looked again whether the pooler is still there


class Listener:
    """Listens on a connection of its own for as long as it lives; connects again by itself.

    Args:
        dsn: Where to.
        channel: The schema's name.
        hear: Called in the loop with the kind of hint and its words.
        name: For `pg_stat_activity`.

    Attributes:
        is_live: Whether hints arrive at the moment.
        error_count: How often the connection failed.
    """

    def __init__(
        self, dsn: str, channel: str, hear: Callable[[str, list[str]], None], name: str = "pgconductor listener"
    ) -> None:
        self.is_live = False
        self.error_count = 0
        self._route = Route(dsn, name)
        self._channel = channel
        self._hear = hear
        self._name = name
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=self._name)

    @property
    def is_pooled(self) -> bool:
        """Whether the last connection found a pooler, through which no hint arrives."""
        return self._route.is_pooled

    async def stop(self) -> None:
        """Stop listening and close the connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None  # how it ended holds what it was about to open

    async def _run(self) -> None:
        failure_count, was_pooled = 0, False
        while True:
            try:
                async with await self._route.connect(psycopg.AsyncConnection[Any]) as connection:
                    failure_count = 0
                    if not self.is_pooled:
                        await self._listen(connection)
            except Exception as error:  # noqa: BLE001 (a loop that must outlive every error: logged, backed off)
                failure_count += 1
                self.error_count += 1
                level = logging.WARNING if failure_count == 1 else logging.DEBUG
                log.log(level, "no hints: %s; polling meanwhile", error)
                await asyncio.sleep(backoff_seconds(failure_count))
            else:
                log.log(logging.DEBUG if was_pooled else logging.INFO, "no hints through a pooler; polling instead")
                was_pooled = True
                await asyncio.sleep(POOLED_SECONDS)
            finally:
                self.is_live = False

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> None:
        await connection.execute(sql.SQL("listen {}").format(sql.Identifier(self._channel)))
        self.is_live = True
        self._hear("ready", [])  # whatever was said while nobody listened
        async for hint in connection.notifies():
            if words := hint.payload.split():  # anybody may send anything on the channel, and nothing too
                self._hear(words[0], words[1:])


class Notifier:
    """Sends hints: one message at a time, and what gathers meanwhile goes with the next.

    Args:
        session: A connection on which a wait delays nobody.
        engine: Builds the query.
    """

    def __init__(self, session: Session, engine: "Engine") -> None:
        self.error_count = 0
        self._session = session
        self._engine = engine
        self._words: dict[Kind, set[str]] = {"ready": set(), "told": set()}
        self._sender: asyncio.Task[None] | None = None

    def tell(self, kind: Kind, words: Iterable[object]) -> None:
        """Send a hint soon."""
        self._words[kind].update(map(str, words))
        if self._sender is None and self._words[kind]:
            self._sender = asyncio.get_running_loop().create_task(self._send(), name="pgconductor notifier")

    async def close(self) -> None:
        """Send what is left, for a second at most."""
        sender = self._sender
        if sender is not None:
            await asyncio.wait([sender], timeout=1)
            sender.cancel()
            await asyncio.wait([sender])

    async def _send(self) -> None:
        try:
            for payload in iter(self._next_payload, ""):
                with contextlib.suppress(TimeoutError):  # a hint that late is worth nothing
                    await self._session.run(self._engine.notify(payload), timeout=5)
        except Exception:
            self.error_count += 1
            log.exception("a hint could not be sent; polling will find the work")
        finally:
            self._sender = None

    def _next_payload(self) -> str:
        for kind, words in self._words.items():
            if words:
                some = [words.pop() for _ in range(min(len(words), 150))]
                return " ".join([kind, *some])
        return ""
