"""`ctx.transaction`: what a function writes and the record of its step are one commit, for both contexts.

**A connection that is lost.** The commit may have happened, so the step is looked up first. If it is not there, nothing
is, and the function is called again: the server may just have been restarted. But some functions lose it each time, by
standing idle for longer than the server allows, or by a query that its process is killed for. So the losses are counted
from the function's beginning on, and after `LOST_MAX` of them the error is the step's, as any other. That there was no
connection to begin with is nobody's failure, and is waited out.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from pgconductor.attempt import Attempt
from pgconductor.claimed import Missing, Recorded
from pgconductor.codec import Codec
from pgconductor.connections import plain_cursor
from pgconductor.errors import ConfigurationError, Suspend
from pgconductor.faults import fault
from pgconductor.operations import Trying
from pgconductor.session import backoff_seconds, level_of
from pgconductor.wire import text_of
from pgconductor.written import SavedStep

LOST_MAX: Final = 5
"""How many connections a transaction may lose under its function within one run."""

log = logging.getLogger("pgconductor.transactions")


class OutcomeUnknown(Exception):
    """A transaction's connection was lost, or an earlier try of it has committed: look the step up."""


class NoConnection(OutcomeUnknown):
    """There was no connection, or it was gone before the function began: nothing was done."""


class _Tries:
    """What has become of the tries of one transaction."""

    def __init__(self, attempt: Attempt, name: str) -> None:
        self._label = f"{attempt.label}: transaction {name!r}"
        self._absent_count = 0
        self._lost_count = 0

    def after(self, error: OutcomeUnknown) -> float:
        """Return how long to wait before the next try; raise what the connection was lost by when there is none."""
        return self._absent(error) if isinstance(error, NoConnection) else self._lost(error)

    def _absent(self, error: NoConnection) -> float:
        self._absent_count += 1
        count = self._absent_count
        log.log(level_of(count), "%s has no connection, try %d: %s", self._label, count, error.__cause__)
        return backoff_seconds(count)

    def _lost(self, error: OutcomeUnknown) -> float:
        self._lost_count += 1
        cause = error.__cause__ or error
        log.warning("%s lost its connection, %d of %d: %s", self._label, self._lost_count, LOST_MAX, cause)
        if self._lost_count >= LOST_MAX:
            raise cause
        return backoff_seconds(self._lost_count)


async def commit_once(attempt: Attempt, name: str, fn: Callable[[Any], Any], codec: Codec[Any]) -> Any:
    """Call a function in a transaction until it and the record of its step are committed.

    Args:
        attempt: The run.
        name: The step's.
        fn: Called with the connection; returns an awaitable.
        codec: Of what it returns.

    Returns:
        What the function returned, or what a try had recorded whose answer was lost.
    """
    tries = _Tries(attempt, name)
    while True:
        try:
            return await _transact(attempt, name, fn, codec)
        except OutcomeUnknown as unknown:
            error = unknown
        memo = await _look_up(attempt, name)
        if memo is not None:
            return _take_over(attempt, memo, codec)
        await asyncio.sleep(tries.after(error))
        attempt.enter()


def commit_once_sync(attempt: Attempt, name: str, fn: Callable[[Any], Any], codec: Codec[Any]) -> Any:
    """Do as `commit_once` in a thread, with a plain function."""
    tries = _Tries(attempt, name)
    while True:
        try:
            return _transact_sync(attempt, name, fn, codec)
        except OutcomeUnknown as unknown:
            error = unknown
        memo = asyncio.run_coroutine_threadsafe(_look_up(attempt, name), attempt.host.loop).result()
        if memo is not None:
            return _take_over(attempt, memo, codec)
        time.sleep(tries.after(error))
        attempt.enter()


async def _transact(attempt: Attempt, name: str, fn: Callable[[Any], Any], codec: Codec[Any]) -> Any:
    has_begun, began_at = False, time.monotonic()
    async with attempt.host.transaction() as conn:
        try:
            async with conn.transaction():  # the outermost block: it begins here, and commits at its end only
                if settings := attempt.host.transaction_settings:
                    await conn.execute(settings.encode())
                has_begun = True
                raw, copied = await _call(attempt, name, fn, conn, codec)
                step = attempt.journal.finished(name, "transaction", raw, began_at)
                await _save(attempt, conn, step)
                fault("before_transaction_commit")
        except Exception as error:
            if conn.closed:  # whatever the function made of it
                raise (OutcomeUnknown if has_begun else NoConnection) from error
            raise
    fault("after_transaction_commit")
    attempt.journal.remember(step)
    return copied


async def _call(
    attempt: Attempt, name: str, fn: Callable[[Any], Any], conn: Any, codec: Codec[Any]
) -> tuple[bytes, Any]:
    with Trying(attempt, name):
        awaited = fn(conn)
        if not inspect.isawaitable(awaited):
            raise ConfigurationError(f"transaction {name!r}", "is a plain function", "use async def")
        return codec.store(await awaited, f"transaction {name!r}")


async def _save(attempt: Attempt, conn: Any, step: SavedStep) -> None:
    query = attempt.host.save_transaction(step)
    async with plain_cursor(conn) as cursor:
        await cursor.execute(query.statement.encode(), list(query.parameters))
        _accept(attempt, text_of(cursor.pgresult))


def _transact_sync(attempt: Attempt, name: str, fn: Callable[[Any], Any], codec: Codec[Any]) -> Any:
    has_begun, began_at = False, time.monotonic()
    with attempt.host.sync_transaction() as conn:
        try:
            with conn.transaction():  # the outermost block: it begins here, and commits at its end only
                if settings := attempt.host.transaction_settings:
                    conn.execute(settings.encode())
                has_begun = True
                with Trying(attempt, name):
                    raw, copied = codec.store(fn(conn), f"transaction {name!r}")
                step = attempt.journal.finished(name, "transaction", raw, began_at)
                _save_sync(attempt, conn, step)
                fault("before_transaction_commit")
        except Exception as error:
            if conn.closed:  # whatever the function made of it
                raise (OutcomeUnknown if has_begun else NoConnection) from error
            raise
    fault("after_transaction_commit")
    attempt.journal.remember(step)
    return copied


def _save_sync(attempt: Attempt, conn: Any, step: SavedStep) -> None:
    query = attempt.host.save_transaction(step)
    with plain_cursor(conn) as cursor:
        cursor.execute(query.statement.encode(), list(query.parameters))
        _accept(attempt, text_of(cursor.pgresult))


def _accept(attempt: Attempt, answer: str | None) -> None:
    """Go on to the commit, or leave: by what `save_transaction` answered.

    Raises:
        Suspend: The lease is lost.
        OutcomeUnknown: An earlier try has committed.
    """
    if answer == "lost":
        attempt.exit = "abandoned"
        raise Suspend
    if answer != "saved":
        raise OutcomeUnknown


async def _look_up(attempt: Attempt, name: str) -> Recorded | None:
    loaded = await attempt.host.load(Missing(attempt.claimed.id, with_input=False, since=0))
    return next((step for step in loaded.steps if step.name == name and not step.dropped), None)


def _take_over(attempt: Attempt, memo: Recorded, codec: Codec[Any]) -> Any:
    attempt.journal.memos.add(memo)
    return codec.decode(memo.value, "transaction", memo.name)
