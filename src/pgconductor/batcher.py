"""Group commit: many small writes in one call.

What is added while nothing is under way is sent with the next pass of the event loop; what gathers while a call is
under way goes with the next one. Where each pass brings dozens, a few more are awaited: what a call costs the server by
itself is dear beside what an item does. Under no load an item costs one round trip, under load a round trip carries
hundreds. One item that the database refuses for its content fails no other: the batch is halved until the item stands
alone (`reject`), and the rest goes through.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

import psycopg

from pgconductor.errors import ConductorError
from pgconductor.session import ConnectionLost, backoff_seconds

Item = TypeVar("Item")
log = logging.getLogger("pgconductor.batcher")

ITEMS_MAX: Final = 2_000
BYTES_MAX: Final = 16 * 1024 * 1024
BURST_ITEMS: Final = 32
"""How many more a pass of the event loop has to bring for the next one to be awaited."""
BURST_SECONDS: Final = 0.02
"""After so long, no further pass is awaited; a worker's passes are short, see `PASS_SECONDS` there."""


def is_refused_content(error: BaseException) -> bool:
    """Tell whether a call was refused for what an item holds, so that it would be refused for ever."""
    if isinstance(error, ConductorError):
        return not isinstance(error, ConnectionLost)
    return isinstance(error, psycopg.Error) and (error.sqlstate or "")[:2] in {"21", "22", "23", "54"}


def _closed(name: str) -> ConductorError:
    return ConductorError(f"{name}: the process stops; it was not stored")


class Batcher(Generic[Item]):
    """Gathers items and sends them in batches, one batch at a time, in the order in which they were added.

    Args:
        name: For the log.
        send: Writes a batch; returns when it is stored.
        reject: Told of the one item that the database refuses, or of each that is left at the end, with the error.
        weigh: The size of an item in bytes.
        items_max: The most items in one batch.
        bytes_max: About the most bytes in one batch.

    Attributes:
        is_closed: Whether it takes nothing any more.
    """

    def __init__(
        self,
        name: str,
        send: Callable[[Sequence[Item]], Awaitable[None]],
        reject: Callable[[Item, Exception], None],
        weigh: Callable[[Item], int],
        *,
        items_max: int = ITEMS_MAX,
        bytes_max: int = BYTES_MAX,
    ) -> None:
        self.name = name
        self.error_count = 0
        self._send = send
        self._reject = reject
        self._weigh = weigh
        self._items_max = items_max
        self._bytes_max = bytes_max
        self._waiting: deque[Item] = deque()
        self._under_way: Sequence[Item] = ()
        self._flusher: asyncio.Task[None] | None = None
        self.is_closed = False

    def __len__(self) -> int:
        """How many items are not stored yet."""
        return len(self._waiting) + len(self._under_way)

    @property
    def pending(self) -> list[Item]:
        """The items that are not stored yet."""
        return [*self._under_way, *self._waiting]

    def add(self, item: Item) -> None:
        """Take an item to be sent with the next batch; reject it after `close`."""
        if self.is_closed:
            self._reject(item, _closed(self.name))
            return
        self._waiting.append(item)
        if self._flusher is None:
            # not by the loop's task factory: one that starts tasks at once could end it before it is noted here
            loop = asyncio.get_running_loop()
            self._flusher = asyncio.Task(self._flush(), loop=loop, name=f"pgconductor {self.name}")

    async def flush(self) -> None:
        """Wait until everything added so far is stored, or rejected."""
        while self._flusher is not None:
            await asyncio.wait([self._flusher])

    async def close(self) -> None:
        """Reject what has not been sent, and what is still to come."""
        self.is_closed = True
        pending = self.pending
        self._waiting.clear()
        if self._flusher is not None:
            self._flusher.cancel()
            await asyncio.wait([self._flusher])
        for item in pending:
            self._reject(item, _closed(self.name))

    async def _flush(self) -> None:
        try:
            while self._waiting:
                await self._until_burst_ends()
                batch = self._next_batch()
                self._under_way = batch
                await self._store(batch)
                self._under_way = ()
        finally:
            self._under_way = ()
            self._flusher = None

    async def _until_burst_ends(self) -> None:
        waiting, count, deadline = self._waiting, 0, time.monotonic() + BURST_SECONDS
        while count + BURST_ITEMS <= len(waiting) < self._items_max and time.monotonic() < deadline:
            count = len(waiting)
            await asyncio.sleep(0)

    def _next_batch(self) -> Sequence[Item]:
        waiting, weigh = self._waiting, self._weigh
        batch: list[Item] = []
        size = 0
        while waiting and len(batch) < self._items_max and size < self._bytes_max:
            item = waiting.popleft()
            size += weigh(item)
            batch.append(item)
        return batch

    async def _store(self, batch: Sequence[Item]) -> None:
        """Send a batch; halve it while the database refuses something in it; wait out everything else."""
        failure_count = 0
        while True:
            try:
                return await self._send(batch)
            except Exception as error:
                self.error_count += 1
                failure_count += 1
                if is_refused_content(error):
                    return await self._split(batch, error)
                log.log(
                    logging.ERROR if failure_count < 4 else logging.DEBUG,
                    "%s: a batch of %d failed, trying again",
                    self.name,
                    len(batch),
                    exc_info=error,
                )
            if len(batch) > 1 and failure_count > 1:
                return await self._halve(batch)
            await asyncio.sleep(backoff_seconds(failure_count))

    async def _split(self, batch: Sequence[Item], error: Exception) -> None:
        if len(batch) == 1:
            log.error("%s: the database refuses one item: %s", self.name, error)
            self._reject(batch[0], error)
        else:
            await self._halve(batch)

    async def _halve(self, batch: Sequence[Item]) -> None:
        middle = len(batch) // 2
        await self._store(batch[:middle])
        await self._store(batch[middle:])
