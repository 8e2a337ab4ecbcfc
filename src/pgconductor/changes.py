"""Triggers on the user's tables follow the code: made, changed and removed when an orchestrator starts.

What differs is decided by `next_trigger` in `sql/functions/57_changes.sql`, which also enters it in the engine's own
table. Here its statements are carried out, in the same transaction, one trigger after the other. A condition (`when=`)
can only be read by the server: each statement is sent by the extended protocol, which takes one statement and no more,
and what the server says of it is passed on.

A trigger takes a lock on its table, which waits for the writers of that moment while later ones wait for it. So no
statement waits more than two seconds: it gives up, lets them pass, and tries again. Where nothing differs, no
statement is sent and no lock taken.
"""

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import psycopg
from psycopg import errors

from pgconductor.engine import Engine
from pgconductor.errors import ConfigurationError, ServerError
from pgconductor.model import OnChange
from pgconductor.registration import warn_of_removed
from pgconductor.relations import TriggerRow, TriggerStep
from pgconductor.route import Route
from pgconductor.session import Session, translate
from pgconductor.task import Task

_LOCK_SECONDS_MAX: Final = 60.0
_CHECK_SECONDS: Final = 30.0


def declared_changes(tasks: Iterable[Task[..., Any]]) -> list[TriggerRow]:
    """Return the subscriptions of tasks to row changes, in the order of the code."""
    return [
        TriggerRow(task.name, trigger.table, trigger.op, trigger.columns, trigger.when)
        for task in tasks
        for trigger in task.config.triggers
        if isinstance(trigger, OnChange)
    ]


async def register_changes(
    session: Session, dsn: str, engine: Engine, deployment: str, tasks: Iterable[Task[..., Any]]
) -> None:
    """Bring the triggers that a deployment declared in line with its tasks, which are registered already.

    Args:
        session: To look whether anything differs.
        dsn: Where to connect for the changes themselves.
        engine: Builds the queries.
        deployment: Whose triggers; those of other deployments are left alone.
        tasks: All that the deployment's code declares.

    Raises:
        ConfigurationError: A table, column or condition does not exist or is not valid, or a right is missing.
        ServerError: A table was locked for a minute. The triggers before it are in place; starting again goes on.

    Source: sql/functions/57_changes.sql
    """
    rows = declared_changes(tasks)
    if await session.run(engine.next_trigger(deployment, rows), timeout=_CHECK_SECONDS) is not None:
        done = await asyncio.to_thread(apply_changes, dsn, engine, deployment, rows)
        declared = {row.task for row in rows}
        gone = [f"{step.op} on {step.table} for task {step.task!r}" for step in done if step.task not in declared]
        warn_of_removed(deployment, "row triggers", gone)


def apply_changes(dsn: str, engine: Engine, deployment: str, rows: Sequence[TriggerRow]) -> list[TriggerStep]:
    """Make, change and remove triggers until they are as the code says; return what was done.

    Raises:
        ConfigurationError: As for `register_changes`, and so the other.
    """
    done: list[TriggerStep] = []
    deadline = time.monotonic() + _LOCK_SECONDS_MAX
    with Route(dsn, "pgconductor triggers").connect_sync() as conn:
        while True:
            try:
                step = _apply_next(conn, engine, deployment, rows)
            except errors.LockNotAvailable as error:
                if time.monotonic() > deadline:
                    raise ServerError(f"no lock for {_LOCK_SECONDS_MAX:.0f} s: {error}", "start again") from error
                time.sleep(random.uniform(0.05, 0.5))  # noqa: S311 - so that writers get their turn
                continue
            if step is None:
                return done
            done.append(step)


def _apply_next(
    conn: psycopg.Connection[Any], engine: Engine, deployment: str, rows: Sequence[TriggerRow]
) -> TriggerStep | None:
    query = engine.next_trigger(deployment, rows, apply=True)
    with conn.transaction():
        try:
            row = conn.execute(query.statement.encode(), list(query.parameters)).fetchone()
        except psycopg.Error as error:
            raise translate(error) from error
        step = query.read(row[0]) if row else None
        if step is not None:
            _carry_out(conn, step)
        return step


def _carry_out(conn: psycopg.Connection[Any], step: TriggerStep) -> None:
    try:
        _try(conn, step.statements)
    except errors.InsufficientPrivilege:
        if not step.otherwise:
            raise
        _try(conn, step.otherwise)
    except errors.LockNotAvailable:
        raise
    except psycopg.Error as error:
        raise _refusal(step, error) from error
    if step.comment is not None:
        try:
            _try(conn, [step.comment])
        except errors.InsufficientPrivilege:
            return  # only the table's owner may write one


def _try(conn: psycopg.Connection[Any], statements: Sequence[str]) -> None:
    """Run statements, all or none, each by the extended protocol, in which there is one at a time."""
    with conn.transaction():
        for statement in statements:
            conn.execute(statement.encode(conn.info.encoding), prepare=False, binary=True)


def _refusal(step: TriggerStep, error: psycopg.Error) -> Exception:
    """Say whose trigger the server refused, in the server's words."""
    if step.when is None:
        place, remedy = f"task {step.task!r}: table({step.table!r}, {step.op!r})", ""
    else:
        place = f"task {step.task!r}: table({step.table!r}, {step.op!r}): when="
        remedy = "write the condition of a Postgres trigger, over old and new"
    message = error.diag.message_primary or str(error)
    return ConfigurationError(place, f"Postgres refuses the trigger {step.name}: {message}", remedy)
