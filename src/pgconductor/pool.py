"""A few connections of a client on one event loop, and what is done when one of them breaks.

What a failure means is decided as in `session`. Two things differ, because a user waits for the answer: a call whose
reply was lost is repeated in a form that is harmless to repeat (`again`), and patience has an end. A server that was
never reached is reported at once; one that was there before has `PATIENCE_SECONDS` to come back from a restart or a
fail-over.

Connections are made on demand and kept; the one used last is used next, so that a quiet client holds one.
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast

import psycopg

from pgconductor.engine import Query
from pgconductor.errors import ConductorError, ServerError
from pgconductor.route import Route, first_line, unreachable
from pgconductor.session import backoff_seconds, is_lost, is_rolled_back, translate
from pgconductor.wire import Wire

T = TypeVar("T")

SIZE_MAX: Final = 4
PATIENCE_SECONDS: Final = 15.0
_LOCK_TIMEOUT: Final = "55P03"
_NO_RIGHT: Final = "42501"
_NOT_MIGRATED: Final = {"42883", "3F000", "42P01"}  # no such function, schema, table


class Connection(psycopg.AsyncConnection[Any]):
    """A connection that goes with its pool: a script that ends without `close` is not scolded for it."""

    def __del__(self, _warn: Any = None, /) -> None:
        """Let libpq close the socket, without the warning."""


class NotMigrated(ServerError):
    """The schema has no engine, or an older one's functions."""


class OutcomeUnknown(ServerError):
    """The connection was lost; the call may have been carried out."""


class _Unreachable(Exception):
    """A connection could not be made; nothing was sent. Its cause says why."""


class Pool:
    """Connections of one event loop.

    Args:
        address: Where the server is; asked before the first connection.
        schema: The engine's schema, for errors.
        name: For `pg_stat_activity`.
    """

    def __init__(self, address: Callable[[], Awaitable[str]], schema: str, name: str) -> None:
        self.address = address
        self._schema = schema
        self._name = name
        self._idle: list[Wire] = []
        self._slots = asyncio.Semaphore(SIZE_MAX)
        self._route: Route | None = None
        self._was_reached = False
        self._role = ""
        self._closed_count = 0
        self.query_count = 0

    async def run(self, query: Query[T], again: Callable[[Query[T]], Query[T]] | None = None) -> T:
        """Run a query and return its answer.

        Args:
            query: What to run.
            again: Makes what to run instead after a lost reply; needed for a query that is not harmless.

        Raises:
            NotMigrated: The engine, or this function of it, is not there. Nothing was done.
            ServerError: The server cannot be reached or refuses; says if it is unknown whether the call was done.
            ConductorError: What the engine reported. Nothing was done.
        """
        failure_count, was_lost = 0, False
        deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while True:
            try:
                return await self._try(query)
            except (psycopg.Error, _Unreachable) as error:
                failure_count += 1
                pause = 0.0 if failure_count == 1 else backoff_seconds(failure_count)
                is_late = asyncio.get_running_loop().time() + pause > deadline
                with _unknown_if(was_lost and not query.harmless):
                    if isinstance(error, _Unreachable):
                        self._judge_unreachable(error, is_late=is_late)
                    else:
                        self._judge(error, is_late=is_late, is_repeatable=query.harmless or again is not None)
                if isinstance(error, psycopg.Error) and is_lost(error):
                    query, was_lost = again(query) if again else query, True
            await asyncio.sleep(pause)

    async def close(self) -> None:
        """Close the idle connections, and those in use when they are free. The pool may be used again."""
        self._closed_count += 1
        self.abandon()

    def abandon(self) -> None:
        """Drop the idle connections without a word, as is needed when their event loop is gone."""
        idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    @property
    def is_pooled(self) -> bool:
        """Whether a pooler was found between here and the server."""
        return self._route is not None and self._route.is_pooled

    async def _connect(self) -> Wire:
        dsn = await self.address()
        if self._route is None or self._route.dsn != dsn:
            self._route = Route(dsn, self._name)
        connection = await self._route.connect(Connection)
        self._was_reached, self._role = True, connection.info.user
        return Wire(connection, is_pooled=self._route.is_pooled)

    async def _try(self, query: Query[T]) -> T:
        async with self._slots:
            closed_count = self._closed_count
            wire = await self._take()
            self.query_count += 1
            try:
                answer = await wire.ask(query)
            finally:
                if wire.is_idle and closed_count == self._closed_count:
                    self._idle.append(wire)
                else:
                    wire.close()  # it broke, its user was cancelled, or the pool was closed meanwhile
        return query.read(answer)

    async def _take(self) -> Wire:
        while self._idle:
            wire = self._idle.pop()
            if not wire.is_closed:
                return wire
        try:
            return await self._connect()
        except (psycopg.Error, OSError) as error:
            raise _Unreachable from error

    def _judge_unreachable(self, error: _Unreachable, *, is_late: bool) -> None:
        """Return if the query is to be tried again; raise what the caller is to see otherwise."""
        cause = cast("BaseException", error.__cause__)
        is_passing = isinstance(cause, psycopg.Error) and is_rolled_back(cause)
        if is_late or not (is_passing or self._was_reached):
            raise unreachable(cause) from cause

    def _judge(self, error: psycopg.Error, *, is_late: bool, is_repeatable: bool) -> None:
        """Return if the query is to be repeated; raise what the caller is to see otherwise."""
        lost = is_lost(error)
        if not lost and not is_rolled_back(error):
            raise reported(error, self._schema, self._role) from error
        if lost or error.sqlstate == "25006":
            self.abandon()  # where one connection broke, the others have most likely broken too
        if lost and (is_late or not is_repeatable):
            raise _unknown(error) from error
        if is_late:
            raise reported(error, self._schema, self._role) from error


def _unknown(error: BaseException) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"the connection was lost, and whether the call was carried out is unknown ({first_line(error)})",
        "look before you repeat it, or repeat it with the same dedupe_key",
    )


@contextmanager
def _unknown_if(was_lost: bool) -> Generator[None]:
    """Say that nothing is known of a call where its repetition is given up; what the engine reports counts, though."""
    try:
        yield
    except ServerError as error:
        if was_lost and not isinstance(error, OutcomeUnknown):
            raise _unknown(error) from error
        raise


def reported(error: psycopg.Error, schema: str, role: str) -> ConductorError:
    """Return what the caller is to see for an error of the server; `role` is whom it was said to."""
    known = translate(error)
    if isinstance(known, ConductorError):
        return known
    message = error.diag.message_primary or first_line(error)
    if error.sqlstate in _NOT_MIGRATED:
        return NotMigrated(
            f"schema {schema!r} has no engine, or an older one ({message})",
            "run `pgconductor migrate`, or `await app.migrate()`",
        )
    if error.sqlstate == _LOCK_TIMEOUT:
        return ServerError(
            f"another transaction holds what is needed, and has not ended ({message})",
            "end it, then repeat the call; it may have enqueued with the same dedupe_key, or a task that is new",
        )
    if error.sqlstate == _NO_RIGHT:
        return ServerError(
            f"role {role!r} may not do that: {message} (SQLSTATE {error.sqlstate})",
            "make it a member of one that may; the owner of the schema sees them with `pgconductor roles`",
        )
    return ServerError(f"the server refused: {message} (SQLSTATE {error.sqlstate})")
