"""The process: its workers, what claims and settles for them, its heartbeat, and how it starts and stops.

    claimer ──► crew ──► worker ──► attempt ──► settler         each on the event loop, claim and settle on their own
       ▲          │ kept memos        │ steps ──► saver          connections
       └── hints, timers, poll        └── signals ◄── heartbeat  on its own thread and connection

When the engine can no longer be sure of this process, or the process of itself, it is *fenced*: all runs are dropped,
the old boot id is retired, which gives the work back at no cost, and the process joins anew. It never exits for it.

So it is after a failover, too: a standby that was promoted may lack the last commits. What runs may have seen steps
that are gone by now, and what has ended may rest on them; all of it is run again from what is recorded.
"""

import asyncio
import importlib.metadata
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, Self, cast
from uuid import UUID, uuid4

from pgconductor import schema, stop_signals
from pgconductor.changes import register_changes
from pgconductor.checks import check_integer, check_names, check_sequence
from pgconductor.claimer import Claimer
from pgconductor.crew import Crew
from pgconductor.durations import Duration, parse_duration
from pgconductor.engine import Moved
from pgconductor.errors import ConfigurationError, ServerError
from pgconductor.events import subscriptions_of
from pgconductor.heartbeat import Heartbeat, Pulse
from pgconductor.host import ProcessHost
from pgconductor.membership import Membership, Timing
from pgconductor.notify import Listener, Notifier
from pgconductor.registration import task_row, warn_of_removed
from pgconductor.route import Timeline
from pgconductor.scheduler import Scheduler
from pgconductor.schedules import declared_schedules
from pgconductor.session import Session, backoff_seconds
from pgconductor.settler import Effects, Saver, Settler
from pgconductor.stop_signals import Block
from pgconductor.task import Task
from pgconductor.threads import Threads
from pgconductor.worker import Worker
from pgconductor.written import Names

if TYPE_CHECKING:
    from types import TracebackType

    from pgconductor.conductor import Conductor

log = logging.getLogger("pgconductor.orchestrator")
GRACE_SECONDS: Final = 30.0
LAST_SECONDS: Final = 5.0
START_SECONDS: Final = 30.0
WARM_UP_SECONDS: Final = 5.0
"""How long a start waits for what is only made ready, such as behind somebody who has locked a table."""


class Orchestrator:
    """Runs workers in this process.

    Args:
        conductor: Whose tasks to run, and where. Several orchestrators may share one.
        queues: The queues to work on, with a concurrency each if given as a dict; None means every queue that a task
            of the conductor names, unless `workers` are given.
        workers: Workers made by `Conductor.create_worker`, for queues with settings of their own.
        concurrency: How many executions run at once in each of the other queues.

    Attributes:
        id: The boot id under which the process is known; another after the process was declared dead.

    Raises:
        ConfigurationError: A queue is named twice, or there is none; a number is out of bounds.
    """

    def __init__(
        self,
        conductor: "Conductor[Any]",
        *,
        queues: Sequence[str] | Mapping[str, int] | None = None,
        workers: Sequence[Worker] = (),
        concurrency: int = 10,
        _timing: Timing | None = None,
        _listen: bool = True,
    ) -> None:
        if not hasattr(conductor, "engine"):
            raise ConfigurationError("orchestrator", f"{conductor!r:.80} is not a Conductor", "give Orchestrator(app)")
        self._conductor = conductor
        self._engine = conductor.engine
        check_sequence(workers, "orchestrator: workers", "workers")
        self._queues = _checked_queues(queues)
        self._given_workers = list(workers)
        self._concurrency = check_integer(concurrency, "orchestrator: concurrency", 1, 10_000)
        self._timing = _timing or Timing()
        self._listen = _listen
        self._membership = Membership(self._timing)
        self._process: _Process | None = None
        self._state = "new"
        self._stopping: asyncio.Task[None] | None = None
        self._block = Block()
        self._workers = self._make_workers() if queues is not None or workers else []

    @property
    def id(self) -> UUID:
        """The boot id under which the process is known."""
        return UUID(self._membership.id)

    @property
    def is_running(self) -> bool:
        """Whether it has started and not begun to stop."""
        return self._state == "running"

    @property
    def is_shutting_down(self) -> bool:
        """Whether it is stopping."""
        return self._state == "stopping"

    @property
    def is_stopped(self) -> bool:
        """Whether it has stopped."""
        return self._state == "stopped"

    @property
    def stopped(self) -> Awaitable[None]:
        """Something to await: ends when the orchestrator has stopped."""
        return self._block

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        self._block.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        """Stop gracefully. Where a signal has done that, it goes on, see `pgconductor.stop_signals`."""
        try:
            self._block.__exit__(kind, error, trace)
        finally:
            await self.stop()

    async def start(self) -> None:
        """Migrate if needed, register, and begin to run executions.

        Raises:
            ConfigurationError: It was started before, or has nothing to do. Nothing is left running.
            Exception: What the lifespan or the database raised. Nothing is left running.
        """
        if self._state != "new":
            raise ConfigurationError("orchestrator", f"is {self._state}", "create another one")
        self._state = "starting"
        self._workers = self._workers or self._make_workers()
        process = _Process(self, self._conductor, self._membership, self._workers)
        try:
            await process.start(listen=self._listen)
        except BaseException:
            self._state = "new"
            await process.tear_down()
            raise
        self._process = process
        self._state = "running"
        stop_signals.subscribe(self._on_signal)
        log.info("orchestrator %s works on %s", self.id, ", ".join(worker.queue for worker in self._workers))

    async def stop(self, *, grace: Duration = GRACE_SECONDS) -> None:
        """Stop: claim nothing new, give back what has not started, let running handlers come to their next operation.

        Args:
            grace: How long handlers may take until then; what still runs after it is cancelled and given back.

        A second call with a shorter grace hurries the first. Returns when everything is settled and closed.
        """
        seconds = parse_duration(grace, "stop: grace").total_seconds()
        if self._process is None:
            return
        self._process.hurry(seconds)
        if self._stopping is None:
            self._state = "stopping"
            self._stopping = asyncio.get_running_loop().create_task(self._stop(self._process), name="pgconductor stop")
        await asyncio.shield(self._stopping)

    async def drain(self) -> None:
        """Run until nothing is left that could run now, then stop; starts first if need be."""
        if self._state == "new":
            await self.start()
        with self._block:
            if self._process is not None:
                await self._process.wait_until_drained()
            await self.stop()

    def _make_workers(self) -> list[Worker]:
        workers = list(self._given_workers)
        queues = self._queues
        if queues is None and not workers:
            queues = sorted({task.queue for task in self._conductor.tasks.values() if task.fn is not None})
        sizes = queues if isinstance(queues, Mapping) else dict.fromkeys(queues or (), self._concurrency)
        workers.extend(Worker(queue, concurrency=size) for queue, size in sizes.items())
        for worker in workers:
            if not isinstance(cast("object", worker), Worker):
                raise ConfigurationError(
                    "orchestrator: workers", f"{worker!r:.80} is not a worker", "give what app.create_worker made"
                )
        names = [worker.queue for worker in workers]
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(f"orchestrator: queue {name!r}", "is given twice", "give it one worker")
        return workers

    async def _stop(self, process: "_Process") -> None:
        try:
            await process.stop()
        finally:
            self._state = "stopped"
            stop_signals.unsubscribe(self._on_signal, self._block)
            self._block.ended.set()
            log.info("orchestrator %s has stopped", self.id)

    def stop_soon(self, grace: Duration = GRACE_SECONDS) -> None:
        """Begin to stop and return at once; `stopped` tells when it is over."""
        self._signal_task = asyncio.get_running_loop().create_task(self.stop(grace=grace))

    def _on_signal(self, is_now: bool) -> None:
        self.stop_soon(0 if is_now else GRACE_SECONDS)


def _checked_queues(queues: Sequence[str] | Mapping[str, int] | None) -> Sequence[str] | Mapping[str, int] | None:
    place = "orchestrator: queues"
    if queues is None or (isinstance(queues, Mapping) and check_names(list(queues), place)):
        return queues
    return check_names(queues, place)


class _Process:
    """What exists between start and stop."""

    def __init__(
        self, owner: Orchestrator, conductor: "Conductor[Any]", membership: Membership, workers: list[Worker]
    ) -> None:
        self.owner = owner
        self._conductor = conductor
        self._engine = conductor.engine
        self._membership = membership
        self._workers = workers
        self._queue_ids: dict[str, int] = {}
        self._stack = AsyncExitStack()
        self._rejoining: asyncio.Task[None] | None = None
        self._deadline = math.inf
        self._fence_timer: asyncio.TimerHandle | None = None
        self._is_stopping = False
        self._is_begun = False
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()

    # ------------------------------------------------------------ start

    async def start(self, *, listen: bool) -> None:
        tasks = {name: task for name, task in self._conductor.tasks.items() if task.fn is not None}
        if not tasks or not self._workers:
            raise ConfigurationError("orchestrator", "has no task to run", "register tasks with @app.task first")
        await self._conductor.migrate()
        deps = await self._stack.enter_async_context(self._conductor.lifespan_context())
        self._open_sessions()
        known = await self._register(tasks)
        self._assemble(known, deps)
        await self._join()
        await self._begin(listen=listen)

    def _open_sessions(self) -> None:
        dsn = self._conductor.dsn
        self._timeline = Timeline(self._on_failover)
        self._claim_session = Session(dsn, "pgconductor claim", self._timeline)
        self._settle_session = Session(dsn, "pgconductor settle", self._timeline, voids=True)
        self._save_session = Session(dsn, "pgconductor save", self._timeline, voids=True)
        self._other_session = Session(dsn, "pgconductor worker", self._timeline)
        for session in (self._claim_session, self._settle_session, self._save_session, self._other_session):
            self._stack.push_async_callback(session.close)

    async def _register(self, tasks: Mapping[str, Task[..., Any]]) -> dict[int, Task[..., Any]]:
        rows = [task_row(task) for task in tasks.values()]
        engine, session = self._engine, self._other_session
        names = await session.run(engine.register_tasks(self._conductor.name, rows), timeout=START_SECONDS)
        await register_changes(session, self._conductor.dsn, engine, self._conductor.name, tasks.values())
        schedules = declared_schedules(tasks.values())
        gone = await session.run(engine.register_schedules(self._conductor.name, schedules), timeout=START_SECONDS)
        warn_of_removed(self._conductor.name, "schedules", gone)
        subscriptions = subscriptions_of(tasks.values())
        gone = await session.run(
            engine.register_subscriptions(self._conductor.name, subscriptions), timeout=START_SECONDS
        )
        warn_of_removed(self._conductor.name, "subscriptions", gone)
        wanted = [worker.queue for worker in self._workers]
        queues = await session.run(engine.register_queues(wanted), timeout=START_SECONDS)
        self._queue_ids = {queue.name: queue.id for queue in queues or ()}
        return {named.id: tasks[named.name] for named in names or ()}

    def _assemble(self, known: dict[int, Task[..., Any]], deps: Any) -> None:
        engine, membership = self._engine, self._membership
        self.settler = Settler(
            self._settle_session, engine, membership, self._on_effects, self.on_declared_dead, self._on_parked
        )
        self._saver = Saver(self._save_session, engine, membership, self._on_effects, self.on_declared_dead)
        threads = Threads(sum(worker.concurrency for worker in self._workers))
        self._host = ProcessHost(
            self._conductor.dsn, engine, membership, self._saver, self._other_session, threads, deps, self._timeline
        )
        self._stack.push_async_callback(self._host.close)
        self._pulse = Pulse()
        self._stack.callback(self._pulse.stop)
        self.crew = Crew(
            self._workers,
            known,
            self._host,
            self.settler,
            on_slot_free=self._on_slot_free,
            on_busy=self._pulse.start,
            on_idle=self._pulse.stop,
        )
        self.crew.attach(self._queue_ids)
        self._stack.callback(self.crew.detach)
        self._notifier = Notifier(self._other_session, engine)
        self._scheduler = Scheduler(self._other_session, engine, self._on_effects)
        self.claimer = Claimer(
            self._claim_session,
            engine,
            membership,
            self.crew,
            unsettled_tokens=self._unsettled_tokens,
            is_listening=self._is_listening,
            on_declared_dead=self.on_declared_dead,
            on_schedules=self._scheduler.look,
        )
        self._heartbeat = Heartbeat(self._conductor.dsn, engine, membership, self, self._pulse, self.claimer.scan)
        self._listener = Listener(self._conductor.dsn, engine.schema, self._hear)

    def _on_parked(self, execution_id: str, token: int) -> None:
        self.crew.kept.confirm(execution_id, token)

    async def _join(self, timeout: float | None = START_SECONDS) -> None:
        """Register under a new boot id."""
        id, asked_at = str(uuid4()), time.monotonic()
        query = self._engine.register_orchestrator(
            id,
            self._conductor.name,
            importlib.metadata.version("pgconductor"),
            platform.node(),
            os.getpid(),
            [worker.queue for worker in self._workers],
            schema.last_migration(),
        )
        told = await self._other_session.run(query, timeout=timeout)
        if told is not None:
            self.claimer.scan.begin_behind(told, time.monotonic())
        await self._other_session.run(self._engine.note_tasks(id, sorted(self.crew.tasks)), timeout=timeout)
        self._membership.join(id, asked_at)
        self._host.orchestrator_id = id

    async def _begin(self, *, listen: bool) -> None:
        self._is_begun = True
        self._stack.push_async_callback(self._notifier.close)
        self._stack.push_async_callback(self._retire)
        self._stack.push_async_callback(self.settler.batcher.close)
        self._stack.push_async_callback(self._saver.batcher.close)
        self._heartbeat.start()
        self._stack.push_async_callback(asyncio.to_thread, self._heartbeat.stop)
        if listen:
            self._listener.start()
            self._stack.push_async_callback(self._listener.stop)
        await asyncio.gather(self.claimer.warm_up(WARM_UP_SECONDS), self.settler.warm_up(WARM_UP_SECONDS))
        self._watch_fence()
        self._stack.callback(self._unwatch_fence)
        self._stack.push_async_callback(self._scheduler.stop)
        self.claimer.start()
        self._stack.push_async_callback(self.claimer.stop)

    # ------------------------------------------------------------ what is heard

    def _hear(self, kind: str, words: list[str]) -> None:
        if kind == "ready":
            if words:
                self.claimer.expect(int(word) for word in words if word.isdecimal())
            else:
                self.claimer.look()
        elif kind == "named":
            self._hear_names(words)
        elif kind == "told" and self._membership.id in words:
            self._heartbeat.poke()

    def _hear_names(self, words: list[str]) -> None:
        """Expect what is named: `<queue id> <task id> <execution ids>`; anybody may send anything on the channel."""
        with suppress(ValueError):
            queue_id, task_id, *ids = words
            if int(queue_id) in self.crew.by_queue:
                self.claimer.expect_named(
                    Names(int(queue_id), int(task_id), [*dict.fromkeys(str(UUID(id)) for id in ids)])
                )

    def _on_slot_free(self, worker: Worker) -> None:
        self.claimer.on_slot_free(worker)

    def _is_listening(self) -> bool:
        return self._listener.is_live

    def _unsettled_tokens(self) -> set[int]:
        return {each.token for each in self.settler.batcher.pending}

    def _on_effects(self, effects: Effects) -> None:
        self.claimer.note_due(effects.next_due)
        if effects.queues:
            self.claimer.expect(effects.queues)
            elsewhere = [id for id in effects.queues if not self._has_room(id)]
            if elsewhere:
                self._notifier.tell("ready", elsewhere)
        if effects.watchers:
            if self._membership.id in effects.watchers:
                self._heartbeat.poke()
            self._notifier.tell("told", [name for name in effects.watchers if name != self._membership.id])

    def _has_room(self, queue_id: int) -> bool:
        """Whether this process will take the work itself at once, so that nobody else need be woken for it."""
        worker = self.crew.by_queue.get(queue_id)
        return worker is not None and not self._is_stopping and worker.wanted() > 0

    def on_cancel(self, ids: list[str]) -> None:
        """Tell runs that their executions are being cancelled."""
        self.crew.cancel(ids)

    def on_stop_requested(self, id: str) -> None:
        """Stop gracefully: a newer release is about to change the schema in a way that breaks this one."""
        if id == self._membership.id and not self._is_stopping:
            log.warning("asked to stop: a migration that breaks this release waits for it; upgrade pgconductor here")
            self.owner.stop_soon()

    def on_swept(self, moved: Moved) -> None:
        """Look for the work that was taken over, and tell others of it."""
        self._on_effects(Effects(moved.queues, moved.watchers))
        if moved.queues:
            self._notifier.tell("ready", moved.queues)

    # ------------------------------------------------------------ fencing

    def on_declared_dead(self, id: str) -> None:
        """The engine no longer knows a boot id; if it is the present one, drop everything and join anew."""
        if id == self._membership.id:
            self._fence("was declared dead")

    def _watch_fence(self) -> None:
        """Give up in time when beats are no longer confirmed, whether or not a handler asks."""
        left = self._membership.seconds_left()
        if left <= 0:
            self._fence("could not confirm its lease")
        delay = max(left, self._membership.timing.trust / 20)
        self._fence_timer = asyncio.get_running_loop().call_later(delay, self._watch_fence)

    def _unwatch_fence(self) -> None:
        if self._fence_timer is not None:
            self._fence_timer.cancel()

    def _on_failover(self) -> None:
        """Trust nothing that was recorded before it. Called by whoever connects first, maybe in a thread."""
        if threading.get_ident() != self._thread_id:
            self._loop.call_soon_threadsafe(self._on_failover)
            return
        if self._is_begun:
            self.settler.void(self.claimer.last_token)
            self._fence("finds that the database has failed over")
        self._timeline.heard_count = self._timeline.change_count

    def _fence(self, reason: str) -> None:
        if self._rejoining is not None:
            return
        log.warning(
            "orchestrator %s %s: %d running executions are dropped",
            self._membership.id,
            reason,
            self.crew.running_count,
        )
        self._membership.give_up()
        self.crew.abandon()
        self._saver.give_up()
        if not self._is_stopping:
            self._rejoining = asyncio.get_running_loop().create_task(self._rejoin(), name="pgconductor rejoin")

    async def _rejoin(self) -> None:
        """Settle under the old id what had ended, give the rest back at no cost, join under a new id.

        Not before beats are answered again: a process that cannot renew a lease must not take one.
        """
        failure_count, fenced_at = 0, time.monotonic()
        while True:
            try:
                await self.settler.batcher.flush()
                await self._retire(None)
                while self._heartbeat.answered_at < fenced_at:  # noqa: ASYNC110 (it is noted in another thread)
                    await asyncio.sleep(self._membership.timing.beat / 4)
                await self._join(None)
                break
            except ServerError as error:
                log.error("cannot join again, and stops: %s", error)
                self.owner.stop_soon()
                return
            except Exception:
                failure_count += 1
                log.exception("could not join again; trying on")
                await asyncio.sleep(backoff_seconds(failure_count))
        self._rejoining = None
        log.warning("works again, as orchestrator %s", self._membership.id)
        self.claimer.look()

    async def _retire(self, timeout: float | None = LAST_SECONDS) -> None:
        try:
            moved = await self._other_session.run(self._engine.retire(self._membership.id), timeout=timeout)
        except TimeoutError:
            log.warning("could not say good-bye to Postgres; others take over after the lease's end")
            return
        if moved.queues:
            self._notifier.tell("ready", moved.queues)

    # ------------------------------------------------------------ drain and stop

    async def wait_until_drained(self) -> None:
        """Return when nothing that could be claimed, and nothing claimed, is left; or when stopping begins."""
        pause = 0.005
        self.claimer.look()
        while not self._is_stopping:
            if self._is_locally_quiet() and await self._is_nothing_left():
                return
            pause = min(pause * 1.5, 0.1) if self._is_locally_quiet() else 0.005
            await asyncio.sleep(pause)

    def _is_locally_quiet(self) -> bool:
        return (
            self.crew.is_idle
            and self.claimer.is_quiet
            and self._scheduler.is_quiet
            and not len(self.settler.batcher)
            and not self._membership.is_fenced()
        )

    async def _is_nothing_left(self) -> bool:
        query = self._engine.outstanding(self._membership.id, sorted(self.crew.by_queue), sorted(self.crew.tasks))
        left = await self._other_session.run(query)
        if left.ready:
            self.claimer.expect(self.crew.by_queue)
        return not left.ready and not left.leased and self._is_locally_quiet()

    def hurry(self, grace_seconds: float) -> None:
        """Stop by then at the latest."""
        self._deadline = min(self._deadline, time.monotonic() + grace_seconds)

    async def stop(self) -> None:
        """Stop gracefully, then tear down."""
        self._is_stopping = True
        self._heartbeat.is_stopping = True
        self._heartbeat.poke()
        self._host.is_leaving = True
        self.crew.close()
        await self.claimer.stop()
        await self._scheduler.stop()
        await self._let_runs_end()
        await self._flush()
        await self.tear_down()

    async def _let_runs_end(self) -> None:
        """Wait for handlers until the deadline, which a second call may bring nearer; then cut them short."""
        while self.crew.running_count and time.monotonic() < self._deadline:
            await self.crew.wait_until_empty(min(0.1, self._deadline - time.monotonic()))
        if self.crew.running_count:
            log.warning("the grace time is over: %d running executions are cut short", self.crew.running_count)
            self.crew.interrupt()
            if not await self.crew.wait_until_empty(LAST_SECONDS):
                log.error("%d handlers do not end; their executions go back all the same", self.crew.running_count)

    async def _flush(self) -> None:
        """Store what has been handed over. Without a database there is an end to waiting: leases end by themselves."""
        seconds = max(LAST_SECONDS, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(seconds):
                await self._saver.batcher.flush()
                await self.settler.batcher.flush()
        except TimeoutError:
            log.error("%d outcomes could not be stored; the executions run again", len(self.settler.batcher))

    async def tear_down(self) -> None:
        """Close and put back everything that was opened, last first."""
        if self._rejoining is not None:
            self._rejoining.cancel()
            await asyncio.wait([self._rejoining])
        await self._stack.aclose()
