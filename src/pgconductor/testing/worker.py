"""A worker that runs only while it is told to, on the clock that it is given.

It claims, runs and settles with the parts that production uses, and the same SQL functions; what it leaves out is all
that works by real time: heartbeat, polling, prefetch, and the time that a batch waits for more: what is ready goes.
Whatever a run is to remember goes through the database: nothing is kept in memory between two runs of an execution.

A *crash* drops a run right after the commit of a step. The other runs end first; then the process is made to look dead
for long, the engine's sweep takes the execution over as it does from a process that died, and the worker goes on as a
new process.
"""

import asyncio
import os
import platform
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

import msgspec
import psycopg

from pgconductor.attempt import Attempt
from pgconductor.batch import BatchMember, BatchRun
from pgconductor.changes import declared_changes, register_changes
from pgconductor.claimed import Claimed
from pgconductor.engine import Engine, Query, quote
from pgconductor.errors import ChildFailed, ConductorError, Crash
from pgconductor.events import subscriptions_of
from pgconductor.host import ProcessHost
from pgconductor.loading import complete, missing_of
from pgconductor.membership import Membership, Timing
from pgconductor.registration import task_row
from pgconductor.running_steps import RunningSteps
from pgconductor.schedules import declared_schedules, plan
from pgconductor.session import Session
from pgconductor.settler import Effects, Saver, Settler
from pgconductor.task import Task
from pgconductor.threads import Threads
from pgconductor.written import Completion, Operation, Outcome, SavedStep, Want

if TYPE_CHECKING:
    from pgconductor.conductor import Conductor

RUNS_MAX: Final = 100
LOOK_SECONDS: Final = 0.05
LEAVE_SECONDS: Final = 5.0
_FOR_EVER: Final = 1e9

OPENINGS_MAX: Final = 200
"""How many executions that are held back are looked at for the next opening, the oldest first."""
_queues = msgspec.json.Decoder(dict[str, int]).decode
_names = msgspec.json.Decoder(list[str]).decode
_opening = msgspec.json.Decoder(datetime | None).decode
_last_transaction: ContextVar[SavedStep | None] = ContextVar("last_transaction", default=None)


class ManualEngine(Engine):
    """Builds the queries on a clock of its own, and notes which step a transaction is about to commit."""

    def save_transaction(self, orchestrator: str, step: SavedStep, idle_seconds: float) -> Any:
        """As in production."""
        _last_transaction.set(step)
        return super().save_transaction(orchestrator, step, idle_seconds)

    def queue_ids(self) -> Query[dict[str, int]]:
        """All queues, by name."""
        statement = f"select coalesce(json_object_agg(name, id), '{{}}')::text from {self._schema_name()}.queue"  # noqa: S608 (the schema is quoted)
        return Query(statement, (), _queues)

    def next_opening(self) -> Query[datetime | None]:
        """When the first of the executions that a window or a rate limit holds back may start, by what `why` says."""
        schema = self._schema_name()
        statement = f"""
            select coalesce(to_json(min(opens_at))::text, 'null') from (
              select (reason ->> 'opens_at')::timestamptz as opens_at
              from (select id from {schema}.executions where state = 'ready' order by created_at limit {OPENINGS_MAX}) e
              cross join lateral json_array_elements({schema}.why_not_running(e.id, p_now => %s) -> 'reasons') reason
            ) o where opens_at > %s"""  # noqa: S608 (the schema is quoted)
        return Query(statement, (self._now(), self._now()), _opening)

    def existing(self, tables: Sequence[str]) -> Query[list[str]]:
        """Those of some tables, as code writes them, that exist."""
        statement = """
            select coalesce(json_agg(name), '[]')::text
            from unnest(%s::text[]) name where to_regclass(name) is not null"""
        return Query(statement, (list(tables),), _names)

    def silence(self, orchestrator: str) -> Query[str]:
        """Make a process look as if it had stopped beating long ago."""
        table = f"{self._schema_name()}.orchestrator"
        statement = f"update {table} set beat_at = beat_at - interval '1 day' where id = %s returning id::text"  # noqa: S608 (the schema is quoted)
        return Query(statement, (orchestrator,), str)

    def _schema_name(self) -> str:
        return quote(self.schema).replace("%", "%%")


class _Host(ProcessHost):
    """The host of production, with a point after each commit at which a run may crash."""

    crash: Callable[[str, str], None]
    """Told the execution and the name of what was committed; raises `Crash` to drop the run."""

    def save(self, step: SavedStep) -> "asyncio.Future[None]":
        return asyncio.ensure_future(self._stored(super().save(step), step))

    def open(self, operation: Operation) -> "asyncio.Future[None]":
        return asyncio.ensure_future(self._stored(super().open(operation), operation))

    async def _stored(self, stored: "asyncio.Future[None]", what: SavedStep | Operation) -> None:
        await stored
        self.crash(what.id, what.name)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
        async with super().transaction() as connection:
            yield connection
        self._committed()

    @contextmanager
    def sync_transaction(self) -> Generator[psycopg.Connection[Any]]:
        with super().sync_transaction() as connection:
            yield connection
        self._committed()

    def _committed(self) -> None:
        step = _last_transaction.get()
        if step is not None:
            self.crash(step.id, step.name)


class _Attempt(Attempt):
    """A run that keeps the error with which it failed."""

    __slots__ = ("error",)

    error: BaseException | None

    def _failed(self, error: BaseException) -> Outcome | None:
        self.error = error
        return super()._failed(error)


class _Member(BatchMember):
    """A part of a batch that keeps the error with which it failed."""

    __slots__ = ("error",)

    error: BaseException | None

    def _failed(self, error: BaseException) -> Outcome | None:
        self.error = error
        return super()._failed(error)


class ManualWorker:
    """Runs the tasks of a conductor until nothing is left to run.

    Args:
        app: The conductor.
        dsn: Its database.
        engine: Builds the queries, on the test's clock.
        deps: What handlers find as `ctx.deps`.

    Attributes:
        crashes: Where runs are to crash: the name of a step by execution.
        errors: What executions failed with for good, by their ids.
    """

    def __init__(self, app: "Conductor[Any]", dsn: str, engine: ManualEngine, deps: Any) -> None:
        self.crashes: dict[str, str] = {}
        self.errors: dict[str, BaseException] = {}
        self._app = app
        self._engine = engine
        self._dsn = dsn
        self._session = Session(dsn, "pgconductor test")
        self._membership = Membership(Timing(expiry=_FOR_EVER))
        self._settler = Settler(self._session, engine, self._membership, self._tell, self._on_declared_dead)
        self._saver = Saver(self._session, engine, self._membership, self._tell, self._on_declared_dead)
        self._threads = Threads(RUNS_MAX)
        self._host = _Host(dsn, engine, self._membership, self._saver, self._session, self._threads, deps)
        self._host.crash = self._crash
        self._host.steps = RunningSteps(pauses=False)  # the clock of the test stands still while a handler runs
        self._tasks: dict[int, Task[..., Any]] = {}
        self._tables: set[str] = set()
        self._queues: dict[str, int] = {}
        self._running: dict[str, _Attempt | _Member] = {}
        self._runs: set[asyncio.Task[None]] = set()
        self._crashed: set[str] = set()
        self._watchers: set[str] = set()
        self._news = asyncio.Event()
        self._token = 0

    async def open(self) -> None:
        """Join the engine as a process, and tell it of the tasks: what they say of calls holds from the first on."""
        await self._join()
        await self._register()

    async def close(self) -> None:
        """Leave the engine and close the connections."""
        try:
            await self._host.close()
        finally:
            await self._session.close()

    async def next_due(self) -> datetime | None:
        """Return the instant at which the next timer is due, a window opens or a rate limit lets something in."""
        timer = (await self._session.run(self._engine.outstanding(self._membership.id, [], []))).next_due
        opening = await self._session.run(self._engine.next_opening())
        return min((at for at in (timer, opening) if at is not None), default=None)

    async def run_until_idle(self) -> None:
        """Run what is ready or due now, and what becomes so by it, until nothing is."""
        await self._register()
        await self._register_changes()
        try:
            while await self._round():
                pass
        finally:
            if self._runs:
                await self._leave()

    # ------------------------------------------------------------ one round

    async def _round(self) -> bool:
        """Claim, wait until something has happened, store it; returns whether anything may be left."""
        if self._crashed and not self._runs:
            await self._die()
        is_more_due = not self._crashed and await self._claim()
        if not self._runs:
            return is_more_due
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                await self._news.wait()
        self._news.clear()
        self._raise_what_broke()
        await self._settler.batcher.flush()
        await self._notify()
        await self._pass_on_cancels()
        return True

    async def _claim(self) -> bool:
        """Start what is ready; returns whether there is more that is due."""
        free = RUNS_MAX - len(self._running)
        self._queues = await self._session.run(self._engine.queue_ids())
        wants = [Want(id, free) for id in self._queues.values()] if free > 0 else []
        self._token += 1
        query = self._engine.claim(self._membership.id, self._token, wants, sorted(self._tasks), fire=True)
        claim = await self._session.run(query)
        if claim is None:
            self._on_declared_dead(self._membership.id)
            return False
        batches: dict[int, BatchRun] = {}
        for each in claim.claimed or ():
            if self._tasks[each.task_id].config.batch is None:
                await self._start(each)
            else:
                self._gather(each, batches)
        for batch in batches.values():
            batch.close()
        if claim.schedules:
            await self._session.run(self._engine.fire_schedules([plan(each) for each in claim.schedules]))
            return True
        return claim.next_due is not None and claim.next_due <= 0

    async def _start(self, claimed: Claimed) -> None:
        queue = next(name for name, id in self._queues.items() if id == claimed.queue_id)
        task = self._tasks[claimed.task_id]
        missing, memos = missing_of(claimed, None), None
        if missing is not None:
            memos = complete(claimed, None, await self._host.load(missing))
        attempt = self._running[claimed.id] = _Attempt(claimed, self._token, task, queue, self._host, memos)
        self._runs.add(asyncio.create_task(self._run(attempt)))

    def _gather(self, claimed: Claimed, batches: dict[int, BatchRun]) -> None:
        """Add an execution to the open batch of its task; what is ready at an instant goes together."""
        batch = batches.get(claimed.task_id)
        if batch is None or not batch.room:
            batch = batches[claimed.task_id] = BatchRun(self._tasks[claimed.task_id])
            self._runs.add(asyncio.create_task(self._run_batch(batch)))
        queue = next(name for name, id in self._queues.items() if id == claimed.queue_id)
        member = self._running[claimed.id] = _Member(claimed, self._token, batch.task, queue, self._host)
        batch.add(member)

    async def _run(self, attempt: _Attempt) -> None:
        try:
            outcome = await attempt.run()
        finally:
            del self._running[attempt.claimed.id]
            self._news.set()
        self._conclude(attempt, outcome)

    async def _run_batch(self, batch: BatchRun) -> None:
        try:
            settlements = await batch.run()
        finally:
            for member in batch.members:
                del self._running[member.claimed.id]
            self._news.set()
        for attempt, outcome in settlements:
            self._conclude(attempt, outcome)

    def _conclude(self, attempt: Attempt, outcome: Outcome | Completion | None) -> None:
        if type(outcome) is Outcome:
            outcome.cached = False
            error = getattr(attempt, "error", None)
            if outcome.outcome == "failed" and error is not None:
                self._keep_error(attempt.claimed.id, error)
        if outcome is not None:
            self._settle(outcome)

    def _settle(self, outcome: Outcome | Completion) -> None:
        self._settler.add(outcome)

    def _keep_error(self, id: str, error: BaseException) -> None:
        """Keep what an execution failed with; the failure of a child shows the child's own error as its cause."""
        self.errors[id] = error
        if isinstance(error, ChildFailed) and error.__cause__ is None:
            error.__cause__ = self.errors.get(str(error.execution_id))

    def _raise_what_broke(self) -> None:
        """Raise the error of a run that did not even come to an outcome."""
        done = {run for run in self._runs if run.done()}
        self._runs -= done
        for run in done:
            run.result()

    async def _pass_on_cancels(self) -> None:
        """Ask for signals, as a heartbeat does."""
        if self._running:
            beat = await self._session.run(self._engine.beat(self._membership.id))
            for id in beat.cancel:
                if id in self._running:
                    self._running[id].request_cancel()

    async def _leave(self) -> None:
        """Give back what runs: the caller was cancelled, or something broke."""
        for attempt in list(self._running.values()):
            attempt.request_release(hard=True)
        await asyncio.wait(self._runs, timeout=LEAVE_SECONDS)
        self._runs.clear()
        await self._settler.batcher.flush()

    # ------------------------------------------------------------ the process

    async def _register(self) -> None:
        """Tell the engine of the conductor's tasks, unless it knows them."""
        tasks = {name: task for name, task in self._app.tasks.items() if task.fn is not None}
        if not tasks or list(self._tasks.values()) == list(tasks.values()):
            return
        rows = [task_row(each) for each in tasks.values()]
        named = await self._session.run(self._engine.register_tasks(self._app.name, rows))
        schedules = declared_schedules(tasks.values())
        await self._session.run(self._engine.register_schedules(self._app.name, schedules))
        subscriptions = subscriptions_of(tasks.values())
        await self._session.run(self._engine.register_subscriptions(self._app.name, subscriptions))
        ids = {each.name: each.id for each in named or ()}
        self._tasks = {ids[name]: task for name, task in tasks.items()}

    async def _register_changes(self) -> None:
        """Make the triggers of the tables that the test has made by now; production refuses a table that is missing."""
        wanted = {row.table for row in declared_changes(self._tasks.values())}
        if wanted <= self._tables:
            return
        existing = await self._session.run(self._engine.existing(sorted(wanted)))
        present = set(existing)
        if present - self._tables:
            tasks = [
                task for task in self._tasks.values() if {row.table for row in declared_changes([task])} <= present
            ]
            await register_changes(self._session, self._dsn, self._engine, self._app.name, tasks)
            self._tables = present

    async def _join(self) -> None:
        """Become a new process."""
        id = str(uuid4())
        query = self._engine.register_orchestrator(id, "test", "test", platform.node(), os.getpid(), [], None)
        await self._session.run(query)
        self._membership.join(id, asked_at=_FOR_EVER)
        self._host.orchestrator_id = id

    def _crash(self, id: str, name: str) -> None:
        if self.crashes.get(id) == name and id in self._running:
            del self.crashes[id]
            self._crashed.add(id)
            self._running[id].exit = "abandoned"
            raise Crash(name)

    async def _die(self) -> None:
        """End as a process that was killed: the sweep takes over what it held."""
        await self._settler.batcher.flush()
        await self._session.run(self._engine.silence(self._membership.id))
        await self._session.run(self._engine.sweep(Timing().expiry))
        self._crashed.clear()
        await self._join()

    def _on_declared_dead(self, id: str) -> None:
        raise ConductorError(
            f"the test's worker {UUID(id)} was declared dead by another process; give it its own database"
        )

    # ------------------------------------------------------------ telling others

    def _tell(self, effects: Effects) -> None:
        self._watchers.update(effects.watchers or ())
        if effects.queues:
            self._news.set()

    async def _notify(self) -> None:
        """Tell those who wait for a result, such as `await run.result()` in another task of the test."""
        watchers, self._watchers = self._watchers, set()
        if watchers:
            await self._session.run(self._engine.notify(f"told {' '.join(sorted(watchers))}"))
