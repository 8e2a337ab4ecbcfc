"""One application on a database of its own, run step by step on a clock that the test moves."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, cast
from uuid import UUID

from typing_extensions import TypeVar

from pgconductor.conductor import Conductor
from pgconductor.durations import Duration, parse_duration
from pgconductor.run import Run
from pgconductor.task import Call, check_call
from pgconductor.testing.databases import Databases
from pgconductor.testing.records import Records, StepRow, listed
from pgconductor.testing.worker import ManualEngine, ManualWorker

D = TypeVar("D", default=None)

_UNSET: Any = object()
_ENDED = ("completed", "failed", "cancelled")


class Harness(Generic[D]):
    """An application under test: its database, its clock, and the running of its executions.

    Made by the fixture: `t = await conductor_test(app, deps=...)`. Nothing runs but in `drain`, `advance` and
    `crash_after`; handlers run in this process, also those marked `executor="process"`. All queues are worked on.

    Attributes:
        dsn: The database, for queries of the test's own.
    """

    dsn: str

    def __init__(self, app: Conductor[D], databases: Databases, dsn: str, deps: D) -> None:
        self.dsn = dsn
        self._now = datetime.now(UTC)
        self._app = app
        self._engine = ManualEngine(app.schema, lambda: self._now)
        self._records = Records(dsn, self._engine)
        self._binding = ExitStack()
        self._binding.callback(databases.drop, dsn)
        self._binding.callback(self._records.close)
        given = {} if deps is _UNSET else {"deps": deps}
        binding = cast("Callable[..., Any]", app.bound_to)
        self._binding.enter_context(binding(dsn, self._engine, before_wait=self._refuse_to_hang, **given))
        self._drains = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._worker_made: asyncio.Future[ManualWorker] = self._loop.create_future()
        self._keeper = asyncio.create_task(self._keep(), name="pgconductor test")

    @property
    def now(self) -> datetime:
        """The clock of the engine in this test: aware, UTC. It stands still but for `advance`."""
        return self._now

    async def drain(self, *, raise_errors: bool = True) -> None:
        """Run executions until nothing is ready or running. What is scheduled or asleep stays so.

        Args:
            raise_errors: Whether to raise what executions failed with.

        Raises:
            ExceptionGroup: The errors of the executions that failed for good meanwhile and have no parent to handle it:
                the very errors that the handlers raised. A failed attempt that will be retried is not among them.
        """
        before = self._records.failed_roots()
        async with self._drains:
            await (await self._worker()).run_until_idle()
        if raise_errors:
            self._raise_failures(before)

    async def advance(self, duration: Duration | None = None, *, raise_errors: bool = True, **parts: float) -> None:
        """Move the clock, and run what becomes due on the way, each at its own instant.

        What is ready already runs first. A sleep that begins at a due instant on the way, and ends on the way, ends.

        Args:
            duration: How far: seconds, `"15m"` or a `timedelta`. None, and no parts: to the next due instant.
            raise_errors: As for `drain`.
            **parts: As `timedelta` takes them, such as `days=1`; added to the duration.

        Raises:
            ExceptionGroup: As for `drain`.
            AssertionError: No instant was given, and nothing is scheduled or asleep.
        """
        before = self._records.failed_roots()
        async with self._drains:
            worker = await self._worker()
            await worker.run_until_idle()
            if duration is None and not parts:
                target = await self._next_due(worker)
            else:
                target = self._now + parse_duration(duration or 0, "advance") + timedelta(**parts)
            await self._run_to(worker, target)
        if raise_errors:
            self._raise_failures(before)

    async def crash_after(self, run: Run[Any], *, step: str, raise_errors: bool = True) -> None:
        """Let the process die right after a step of a run was saved, then drain: another process runs it again.

        The crash counts as one of the task's `max_crashes`. If the run cannot reach the step yet, because it sleeps or
        waits for its retry, it crashes when `advance` takes it there; a crash that never came fails the test.

        Args:
            run: The execution.
            step: The name of a step, of a transaction, or of a child that is started.
            raise_errors: As for `drain`.

        Raises:
            AssertionError: The step was saved earlier, or the run ended without it.
            ExceptionGroup: As for `drain`.
        """
        __tracebackhide__ = True
        if step in {row.name for row in self._records.steps(run.id) if row.status == "completed"}:
            raise AssertionError(f"step {step!r} of {run.id} has been saved already: call crash_after before drain")
        worker = await self._worker()
        worker.crashes[str(run.id)] = step
        await self.drain(raise_errors=raise_errors)
        row = self._records.execution(run.id)
        if str(run.id) in worker.crashes and (row is None or row.state in _ENDED):
            del worker.crashes[str(run.id)]
            raise AssertionError(self._without_step(run.id, step, "has no step"))

    def assert_invoked(self, call: Call[Any], *, times: int = 1) -> None:
        """Assert how often a call was made, by whomever: the same task with an equal payload.

        Args:
            call: `task.bind(...)`.
            times: How many executions there must be, in whatever state.

        Raises:
            AssertionError: There are more or fewer; lists the executions that there are.
        """
        __tracebackhide__ = True
        check_call(call, "assert_invoked")
        found = self._records.count(call)
        if found != times:
            rows = sorted(self._records.executions(), key=lambda row: row.task != call.task)
            title = f"{call.task} {call.payload} was invoked {_times(found)}, not {_times(times)}; there are:"
            raise AssertionError(listed(title, rows))

    def assert_step(self, run: Run[Any], name: str) -> None:
        """Assert that an execution has a step, or another operation, of that name behind it.

        Args:
            run: The execution.
            name: The name given to `ctx.step`, `ctx.invoke`, `ctx.sleep` and so on.

        Raises:
            AssertionError: It has none, or it is not completed; lists what the execution has recorded.
        """
        __tracebackhide__ = True
        found = [row for row in self._records.steps(run.id) if row.name == name]
        if not found or found[0].status != "completed":
            raise AssertionError(self._without_step(run.id, name, "has not completed"))

    def __repr__(self) -> str:
        """Show the conductor and the clock."""
        return f"<Harness {self._app.name} now={self._now.isoformat()}>"

    # ------------------------------------------------------------ the clock

    async def _run_to(self, worker: ManualWorker, target: datetime) -> None:
        """Go from due instant to due instant, so that what is caused by one of them happens at its time."""
        while (due := await worker.next_due()) is not None and due <= target:
            self._now = max(self._now, due)
            await worker.run_until_idle()
        self._now = target
        await worker.run_until_idle()

    async def _next_due(self, worker: ManualWorker) -> datetime:
        due = await worker.next_due()
        if due is None:
            raise AssertionError(listed("nothing is scheduled or asleep; there are:", self._records.executions()))
        return due

    # ------------------------------------------------------------ messages

    def _refuse_to_hang(self, id: UUID) -> None:
        """Say so when a test waits without limit for an execution that nothing is going to run."""
        if self._drains.locked() or self._records.worker_count() > 1:
            return
        row = self._records.execution(id)
        if row is not None and row.state not in _ENDED:
            raise AssertionError(
                f"{row}, and nothing runs it now: call drain() or advance(), or give result() a timeout"
            )

    def _raise_failures(self, before: set[UUID]) -> None:
        __tracebackhide__ = True
        failed = self._records.failed_roots() - before
        if failed:
            known = self._worker_made.result().errors
            errors = self._records.errors_of(failed, lambda id: known.get(str(id)))
            count = "an execution" if len(failed) == 1 else f"{len(failed)} executions"
            raise BaseExceptionGroup(f"{count} failed", errors)

    def _without_step(self, id: UUID, name: str, verdict: str) -> str:
        row = self._records.execution(id)
        if row is None:
            return f"there is no execution {id}"
        steps: list[StepRow] = self._records.steps(id)
        return listed(f"{row}, and {verdict} {name!r}; it has recorded:", steps)

    # ------------------------------------------------------------ opening and closing

    async def _worker(self) -> ManualWorker:
        return await asyncio.shield(self._worker_made)

    async def open(self) -> None:
        """Open the lifespan; called by the fixture."""
        opened: list[asyncio.Future[Any]] = [self._keeper, self._worker_made]
        await asyncio.wait(opened, return_when=asyncio.FIRST_COMPLETED)
        if self._keeper.done():
            with self._binding:
                self._keeper.result()

    async def _keep(self) -> None:
        """Hold what is open in one task of the test's loop, until the test ends or the loop is being closed."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._app.close)
            deps = await stack.enter_async_context(self._app.lifespan_context())
            worker = ManualWorker(self._app, self.dsn, self._engine, deps)
            stack.push_async_callback(worker.close)
            await worker.open()
            self._worker_made.set_result(worker)
            with suppress(asyncio.CancelledError):
                await self._closing.wait()

    def close(self) -> None:
        """Close everything, put the conductor back, drop the database; called by the fixture.

        Raises:
            AssertionError: A crash that the test asked for never came.
            Exception: What the lifespan raised at its end.
        """
        with self._binding:
            if not self._loop.is_closed() and not self._loop.is_running():
                self._closing.set()
                self._loop.run_until_complete(asyncio.wait([self._keeper]))
            if self._keeper.done() and not self._keeper.cancelled():
                self._keeper.result()
            self._check_crashes()

    def _check_crashes(self) -> None:
        if self._worker_made.done():
            for id, step in self._worker_made.result().crashes.items():
                raise AssertionError(self._without_step(UUID(id), step, "did not crash: it never saved"))


class ConductorTest:
    """What the fixture `conductor_test` is: call it with an application to test it.

    Args:
        databases: Makes the databases.
        at_end: Takes what is to be done when the test has ended, last first, while its event loop is still there.
    """

    def __init__(self, databases: Databases, at_end: Callable[[Callable[[], None]], None]) -> None:
        self._databases = databases
        self._at_end = at_end

    async def __call__(self, app: Conductor[D], *, deps: D = _UNSET) -> Harness[D]:
        """Point an application at a fresh database for the length of the test.

        Args:
            app: The conductor; its own address is not used.
            deps: What handlers find as `ctx.deps`; without it, the conductor's `lifespan` or `context` provides it.

        Returns:
            The harness.

        Raises:
            ServerError: There is no server to test on; says what to install or set.
            Exception: What the conductor's lifespan raised.
        """
        dsn = await asyncio.to_thread(self._databases.create, app.schema)
        harness = Harness(app, self._databases, dsn, deps)
        await harness.open()
        self._at_end(harness.close)
        return harness


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
