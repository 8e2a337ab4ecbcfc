"""One connection to Postgres that mends itself, for the engine's calls.

An engine call is one function in one statement, autocommitted: one message to the server, so a process that is stopped
between two statements holds no locks. What a failure means is decided here, once:

- The server refused and rolled back (deadlock, serialization, lock or statement timeout, too many connections,
  read-only standby, disk full): the call did not happen. It is repeated, with back-off.
- The connection went away during the call: nobody knows whether it happened. A `harmless` query is repeated; of any
  other, the caller learns by `ConnectionLost` and must look.
- Everything else is the caller's: SQLSTATE class PC arrives as the class of `errors` that belongs to it.

The functions assume read committed, whatever the role's default, and no state in the session: see `route`.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg

from pgconductor.errors import ConductorError, engine_error
from pgconductor.route import FailedOver, Route, Timeline
from pgconductor.wire import Wire

if TYPE_CHECKING:
    from pgconductor.engine import Query

T = TypeVar("T")
log = logging.getLogger("pgconductor.session")

BACKOFF_SECONDS_FIRST: Final = 0.05
BACKOFF_SECONDS_MAX: Final = 2.0
# The server rolled back and said so: the call did not happen.
_ROLLED_BACK: Final = {"40001", "40P01", "55P03", "57014", "25006", "57P03"}
# A statement timeout may be too short for what is asked; after so many the caller had better ask for less.
_TOO_SLOW: Final = "57014"
_TOO_SLOW_MAX: Final = 3
# The server went away while it worked: unknown.
_UNKNOWN: Final = {"57P01", "57P02", "57P04", "57P05", "25P03"}


class ConnectionLost(ConductorError):
    """The connection broke during a call: whether the call took effect is not known."""


def is_rolled_back(error: psycopg.Error) -> bool:
    """Tell whether the server refused a call and did nothing of it, so that it may simply be repeated."""
    return error.sqlstate is not None and (error.sqlstate in _ROLLED_BACK or error.sqlstate.startswith("53"))


def is_lost(error: psycopg.Error) -> bool:
    """Tell whether a call's outcome is unknown because the connection went away."""
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return error.sqlstate in _UNKNOWN or error.sqlstate.startswith("08")


def translate(error: psycopg.Error) -> Exception:
    """Return the library's error for what an engine function reported; other errors as they are."""
    if error.sqlstate is not None and error.sqlstate.startswith("PC"):
        return engine_error(error.sqlstate, error.diag.message_primary or "", error.diag.message_detail)
    return error


def backoff_seconds(failure_count: int) -> float:
    """Return how long to wait after so many failures in a row: doubling, capped, with jitter."""
    ceiling: float = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_FIRST * 2.0 ** min(failure_count - 1, 10))
    return ceiling * (0.5 + random.random() / 2)  # noqa: S311 (spreads load; guards nothing)


def level_of(failure_count: int) -> int:
    """Return how loud so many failures in a row are: the first, the tenth and every hundredth are warnings."""
    return logging.WARNING if failure_count in (1, 10) or failure_count % 100 == 0 else logging.DEBUG


class _Judge:
    """Decides what a failed try means."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failure_count = 0

    def after(self, error: psycopg.Error, *, is_connecting: bool, is_harmless: bool) -> float:
        """Return how long to wait before the next try, or raise what the caller must know."""
        if not is_connecting and not is_rolled_back(error):
            if not is_lost(error):
                raise translate(error)
            if not is_harmless:
                raise ConnectionLost(f"the connection was lost during a call: {error}") from error
        if error.sqlstate == _TOO_SLOW and self.failure_count >= _TOO_SLOW_MAX:
            self.failure_count = 0
            raise error
        self.failure_count += 1
        pause = backoff_seconds(self.failure_count)
        level = level_of(self.failure_count)
        log.log(level, "%s: try %d failed, again in %.2f s: %s", self.name, self.failure_count, pause, error)
        return pause

    def succeeded(self) -> None:
        if self.failure_count:
            log.info("%s: works again after %d failed tries", self.name, self.failure_count)
            self.failure_count = 0


@contextlib.asynccontextmanager
async def _given_up_after(wire: Wire, seconds: float) -> AsyncGenerator[None]:
    """Raise `TimeoutError` where no answer comes in time, and close the connection first.

    On one that is still open, the server would be asked to end the call, which may take ten seconds more.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:

        def give_up() -> None:
            limit.reschedule(loop.time())  # first, so that it is no connection that was lost
            wire.close()

        timer = loop.call_later(seconds, give_up)
        try:
            yield
        finally:
            timer.cancel()


class Session:
    """One asyncio connection; calls queue up. It connects on first use and again whenever it must.

    Args:
        dsn: Where to.
        name: For `pg_stat_activity` and the log.
        timeline: Told of the timeline that each connection finds.
        voids: Whether a call that a failover interrupts is not made again, since it may rest on what is gone.
    """

    def __init__(
        self, dsn: str, name: str = "pgconductor", timeline: Timeline | None = None, *, voids: bool = False
    ) -> None:
        self.name = name
        self.route = Route(dsn, name, timeline=timeline)
        self._voided_by = timeline if voids else None
        self._wire: Wire | None = None
        self._lock = asyncio.Lock()
        self._judge = _Judge(name)
        self._closed = False

    @property
    def failure_count(self) -> int:
        """How many tries in a row have failed."""
        return self._judge.failure_count

    async def run(self, query: "Query[T]", *, timeout: float | None = None, answer_timeout: float | None = None) -> T:
        """Run one engine call.

        Args:
            query: What to call.
            timeout: Seconds for all tries together; None waits for as long as it takes.
            answer_timeout: Seconds for the answer on a connection that is open, so that a silent one is given up before
                the time is over which opening another may take; None is no such limit.

        Returns:
            What the query reads from the answer.

        Raises:
            ConnectionLost: The connection broke during a call that is not harmless, which may have taken effect; or the
                database has failed over, and nothing was asked of it.
            TimeoutError: The time is over; the call may have taken effect.
            ConductorError: The engine refused. Nothing happened.
            psycopg.Error: The server refused. Nothing happened.
        """
        heard_count = 0 if self._voided_by is None else self._voided_by.heard_count
        async with asyncio.timeout(timeout), self._lock:
            return await self._run(query, answer_timeout, heard_count)

    async def close(self) -> None:
        """Close the connection; calls under way fail with `ConnectionLost`."""
        self._closed = True
        self._drop()

    async def _run(self, query: "Query[T]", answer_timeout: float | None, heard_count: int) -> T:
        while True:
            is_connecting = True
            try:
                wire = await self._open_wire()
                is_connecting = False
                if self._voided_by is not None and self._voided_by.change_count != heard_count:
                    raise FailedOver("the database has failed over since the call was made")
                answer = await self._ask(wire, query, answer_timeout)
            except psycopg.Error as error:
                await self._recover(error, is_connecting, query.harmless)
            except FailedOver as error:
                raise ConnectionLost(str(error)) from error
            except BaseException:
                self._drop()  # cancelled in the middle: the connection may still be at work
                raise
            else:
                if self._judge.failure_count:
                    self._judge.succeeded()
                return query.read(answer)

    async def _ask(self, wire: Wire, query: "Query[T]", timeout: float | None) -> Any:
        if timeout is None:
            return await wire.ask(query)
        async with _given_up_after(wire, timeout):
            return await wire.ask(query)

    async def _recover(self, error: psycopg.Error, is_connecting: bool, is_harmless: bool) -> None:
        if self._closed:
            raise ConnectionLost(f"{self.name} was closed") from error
        if is_lost(error) or error.sqlstate == "25006":
            self._drop()
        await asyncio.sleep(self._judge.after(error, is_connecting=is_connecting, is_harmless=is_harmless))
        if self._closed:
            raise ConnectionLost(f"{self.name} was closed") from error

    async def _open_wire(self) -> Wire:
        """Return the connection; another one, if the server has closed it since the last call."""
        if self._wire is not None and not self._wire.is_closed:
            return self._wire
        self._check_open()
        connection = await self.route.connect(psycopg.AsyncConnection)
        self._wire = Wire(connection, is_pooled=self.route.is_pooled)
        try:
            self._check_open()
        except ConnectionLost:
            self._drop()
            raise
        return self._wire

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionLost(f"{self.name} is closed")

    def _drop(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()
