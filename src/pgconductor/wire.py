"""Calls over one asyncio connection, past psycopg's cursors: a prepared statement, and one answer.

A call here is one message to the server and one back, so the client's share of a short one is what it does around them.
A cursor for each statement, and a reader that is added to the event loop for each wait and removed after it, take four
times the processor that libpq and the adapters of psycopg need by themselves, and these are what is used here. One
reader stays with the connection. So one that the server closes while it is idle is known to be closed before the next
call, which is not lost with it.

Through a pooler each call travels as begin, call and commit, by psycopg's pipeline: see `route`.
"""

import asyncio
import contextlib
import os
import re
import weakref
from collections.abc import Callable, Generator
from itertools import count
from typing import Any, Final, cast

import psycopg
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult

from pgconductor.id_array import IdArray
from pgconductor.queries import Query, Table

CANCEL_SECONDS: Final = 5.0
"""How long each may take: telling the server that nobody awaits an answer any more, and its end of the call."""
_BEGIN: Final = "begin isolation level read committed read write"
_TEXT: Final = PyFormat.TEXT  # looked up there, an enum's member costs a call
_BINARY: Final = PyFormat.BINARY
_MARK: Final = re.compile("%%|%s")


class Wire:
    """A connection that calls go over, one at a time. Whoever has it closes it by this, and by nothing else.

    Args:
        connection: In autocommit, of the running event loop.
        is_pooled: Whether a pooler stands between here and the server.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], *, is_pooled: bool) -> None:
        self.is_closed = False
        self._connection = connection
        self._pgconn = connection.pgconn
        self._encoding = connection.info.encoding
        self._adapter = Transformer(connection)
        self._prepared: dict[str, bytes] = {}
        self._numbers = count(1)
        self._waiter: asyncio.Future[None] | None = None
        self._error: psycopg.Error | None = None
        self._loop = asyncio.get_running_loop()
        self._socket = _Socket(self._loop, self._pgconn.socket)
        self._is_pooled = is_pooled
        if not is_pooled:  # there, psycopg adds and removes readers of its own
            self._socket.watch(self._on_readable)

    @property
    def is_idle(self) -> bool:
        """Whether it is open, and nothing is under way."""
        return self._pgconn.transaction_status == TransactionStatus.IDLE

    def close(self) -> None:
        """Close the connection at once; a call under way fails as one that was lost. Also after the end of its loop."""
        self.is_closed = True
        self._pgconn.finish()
        self._socket.close()
        self._wake()

    async def ask(self, query: Query[Any]) -> Any:
        """Send a call as one message, and return its answer, unread. An error leaves no transaction open.

        Raises:
            psycopg.Error: The server refused, or the connection is lost.
        """
        if self._is_pooled:
            return await self._ask_in_pipeline(query)
        try:
            return self._read(query, await self._call(query))
        except asyncio.CancelledError:
            await self._call_off()
            raise

    def _read(self, query: Query[Any], result: PGresult) -> Any:
        return table_of(result) if query.is_table else text_of(result, self._encoding)

    async def _call(self, query: Query[Any]) -> PGresult:
        name = self._prepared.get(query.statement) or await self._prepare(query.statement)
        # text is what the statement casts to its type, such as an integer of any size
        formats = [_BINARY if isinstance(each, IdArray) else _TEXT for each in query.parameters]
        parameters = self._adapter.dump_sequence(query.parameters, formats)
        self._pgconn.send_query_prepared(name, parameters, self._adapter.formats)
        return await self._answer()

    async def _prepare(self, statement: str) -> bytes:
        """Let the server plan a statement once; the types of its parameters are those that it casts them to."""
        name = f"pgconductor_{next(self._numbers)}".encode()
        marks = count(1)
        numbered = _MARK.sub(lambda mark: "%" if mark[0] == "%%" else f"${next(marks)}", statement)
        self._pgconn.send_prepare(name, numbered.encode(self._encoding))
        await self._answer()
        self._prepared[statement] = name
        return name

    async def _answer(self) -> PGresult:
        last = None
        try:
            await self._flush()
            while (result := await self._next_result()) is not None:
                last = result
        except psycopg.Error:
            if last is None or last.status != ExecStatus.FATAL_ERROR:  # else it says why there is nothing more
                raise
        if last is None:
            raise psycopg.OperationalError("the connection was closed")
        if last.status == ExecStatus.FATAL_ERROR:
            raise self._refusal(last)
        return last

    def _refusal(self, result: PGresult) -> psycopg.Error:
        """Return the server's error; what has no code is libpq's own, of a connection that is lost."""
        error = error_from_result(result, self._encoding)
        return error if error.sqlstate is not None else psycopg.OperationalError(str(error))

    async def _flush(self) -> None:
        """Send what does not fit into the buffers of the socket, too."""
        while self._pgconn.flush():
            with self._socket.writing(self._wake):
                await self._stir()

    async def _next_result(self) -> PGresult | None:
        while self._pgconn.is_busy():
            await self._stir()
        return self._pgconn.get_result()

    async def _stir(self) -> None:
        """Return when something has come, or can be sent."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self.is_closed:
            raise self._error or psycopg.OperationalError("the connection was closed")

    def _on_readable(self) -> None:
        try:
            self._pgconn.consume_input()
        except psycopg.Error as error:
            self._error = error
            self.close()
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _call_off(self) -> None:
        """Let the server end what nobody awaits, so that it does not go on with its locks."""
        if self._pgconn.transaction_status == TransactionStatus.ACTIVE:
            with contextlib.suppress(psycopg.Error, TimeoutError):
                await self._connection.cancel_safe(timeout=CANCEL_SECONDS)
                async with asyncio.timeout(CANCEL_SECONDS):
                    await self._answer()

    async def _ask_in_pipeline(self, query: Query[Any]) -> Any:
        connection = self._connection
        try:
            async with connection.pipeline():
                await connection.execute(_BEGIN)
                cursor = await connection.execute(query.statement.encode(), query.parameters)
                await connection.execute("commit")
        except psycopg.Error:
            if connection.pgconn.transaction_status == TransactionStatus.INERROR:
                with contextlib.suppress(psycopg.Error):  # broken, then; the error under way says more
                    await connection.execute("rollback")
            raise
        return self._read(query, cast("PGresult", cursor.pgresult))


class _Socket:
    """The socket of a connection as the event loop watches it: under a number of its own, and not keeping its owner.

    libpq closes its number as soon as it finds the connection lost. The loop would then watch what is no more: it could
    not be told to stop, and a forked child that has the socket, too, would let it find something to read for ever.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        self._loop = loop
        self._pid = os.getpid()
        self._is_closed = True
        self._number = os.dup(number)
        self._is_closed = False

    def watch(self, on_readable: Callable[[], None]) -> None:
        """Call a method whenever there is something to read."""
        self._loop.add_reader(self._number, _tell, weakref.WeakMethod(on_readable))

    @contextlib.contextmanager
    def writing(self, on_writable: Callable[[], None]) -> Generator[None]:
        """Call something whenever more can be sent."""
        self._loop.add_writer(self._number, on_writable)
        try:
            yield
        finally:
            if not self._is_closed:
                self._loop.remove_writer(self._number)

    def close(self) -> None:
        """Watch it no more. Also after the end of the loop."""
        if not self._is_closed:
            self._is_closed = True
            _forget(self._loop, self._number)

    def __del__(self) -> None:
        """Close what its owner has not, in whatever thread that may be."""
        if self._is_closed:
            return
        if self._pid != os.getpid():  # the loop is the parent's
            os.close(self._number)
            return
        try:
            self._loop.call_soon_threadsafe(_forget, self._loop, self._number)
        except RuntimeError:  # it is closed
            os.close(self._number)


def _tell(on_readable: "weakref.WeakMethod[Callable[[], None]]") -> None:
    method = on_readable()
    if method is not None:
        method()


def _forget(loop: asyncio.AbstractEventLoop, number: int) -> None:
    if not loop.is_closed():
        loop.remove_reader(number)
        loop.remove_writer(number)
    os.close(number)


def text_of(result: PGresult, encoding: str = "utf-8") -> str | None:
    """Return the one value of an answer as it came; None where it is null, or there is no row."""
    value = result.get_value(0, 0) if result.ntuples else None
    return None if value is None else value.decode(encoding)


def table_of(result: PGresult) -> Table:
    """Return all rows of an answer as they came."""
    return [[result.get_value(row, column) for column in range(result.nfields)] for row in range(result.ntuples)]
