"""Calls that come at the same time are sent together.

A call that comes alone is sent at once. Calls that come while others are on their way are gathered and sent as soon as
one of a few statements is back: the busier the process, the fewer commits. If a statement of many is refused, each call
is sent by itself, so that one bad call delays no other. If the server is not to be had, or nothing is known of what it
did, all of them say so.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final

import psycopg

from pgconductor.session import is_lost, is_rolled_back
from pgconductor.written import NewExecution

CALLS_PER_STATEMENT_MAX: Final = 1_000
BYTES_PER_STATEMENT_MAX: Final = 8 * 1024 * 1024
SINGLY_SECONDS_MAX: Final = 15.0
"""After so long, the calls of a refused statement that have not been sent by themselves fail as it did."""
_ONES_FAULT: Final = {"55P03", "57014"}
"""A lock, or the statement as a whole, took too long: others of it may not."""

Send = Callable[[Sequence[NewExecution]], Awaitable[list[str]]]


class _Waiting:
    """A call on its way, and where its answer goes."""

    __slots__ = ("answer", "row", "size")

    def __init__(self, row: NewExecution) -> None:
        self.row = row
        self.size = len(bytes(row.payload))
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class Gathering:
    """The calls of one event loop that may share statements.

    Args:
        send: Enqueues calls in one statement; returns their ids.
        spawn: Runs a coroutine in a task that is waited for before the connections close.
        statements_max: How many statements are on their way at once.
    """

    def __init__(self, send: Send, spawn: Callable[[Coroutine[Any, Any, None]], None], *, statements_max: int) -> None:
        self._send = send
        self._spawn = spawn
        self._statements_max = statements_max
        self._statement_count = 0
        self._gathered: list[_Waiting] = []

    async def enqueue(self, row: NewExecution) -> str:
        """Enqueue a call, alone or with others; return its id. One that is cancelled before it is sent is not sent."""
        if self._statement_count == 0 and not self._gathered:
            return await self._send_alone(row)
        waiting = _Waiting(row)
        self._gathered.append(waiting)
        self._take_off()
        return await waiting.answer

    async def _send_alone(self, row: NewExecution) -> str:
        self._statement_count += 1
        try:
            return (await self._send([row]))[0]
        finally:
            self._statement_count -= 1
            self._take_off()

    def _take_off(self) -> None:
        if self._gathered and self._statement_count < self._statements_max:
            self._statement_count += 1
            self._spawn(self._fly())

    async def _fly(self) -> None:
        try:
            while batch := self._take_gathered():
                await self._send_together(batch)
        finally:
            self._statement_count -= 1
            self._take_off()

    def _take_gathered(self) -> list[_Waiting]:
        gathered = [waiting for waiting in self._gathered if not waiting.answer.done()]  # cancelled meanwhile
        count = size = 0
        for waiting in gathered:
            size += waiting.size
            if count == CALLS_PER_STATEMENT_MAX or (count and size > BYTES_PER_STATEMENT_MAX):
                break
            count += 1
        taken, self._gathered = gathered[:count], gathered[count:]
        return taken

    async def _send_together(self, batch: Sequence[_Waiting]) -> None:
        """Send a batch, and answer each call of it, whatever comes."""
        try:
            ids = await self._send([waiting.row for waiting in batch])
        except Exception as error:  # noqa: BLE001 (each caller is told)
            if len(batch) > 1 and _may_be_of_one(error):
                await self._send_singly(batch, error)
            else:
                _fail(batch, error)
        except BaseException:  # the loop ends
            for waiting in batch:
                waiting.answer.cancel()
            raise
        else:
            for waiting, execution_id in zip(batch, ids, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(execution_id)

    async def _send_singly(self, batch: Sequence[_Waiting], error: Exception) -> None:
        now = asyncio.get_running_loop().time
        deadline = now() + SINGLY_SECONDS_MAX
        for waiting in batch:
            if now() > deadline:
                _fail([waiting], error)
            elif not waiting.answer.done():
                await self._send_together([waiting])


def _fail(batch: Sequence[_Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)


def _may_be_of_one(error: Exception) -> bool:
    """Tell whether a statement was refused, with nothing done, for what one call of it may be the reason."""
    cause = error.__cause__
    if not isinstance(cause, psycopg.Error) or is_lost(cause):
        return False
    return not is_rolled_back(cause) or cause.sqlstate in _ONES_FAULT
