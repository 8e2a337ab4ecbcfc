"""One queue of one process: slots, what is buffered for them, and the runs that hold them.

A slot is free as soon as its run has returned; settling does not hold it. The next buffered execution starts at once,
so a slot is never idle while there is work at hand. How much is fetched beyond the free slots follows the measured rate
at which the queue finishes work: about what it finishes in `PREFETCH_SECONDS`, nothing at all for slow handlers, so
that nothing is hoarded behind a long one. What was fetched and then does not begin soon goes back at no cost.

**The server.** An asyncio task costs as much as the run of a handler that never waits for anything. So one task runs
the buffer, one execution after the other, each in context variables of its own, until a run suspends. That run keeps
the task to its end, and what is buffered starts in tasks of its own, until a run ends without having suspended.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from functools import partial
from typing import Any, Final, Literal, Protocol

from pgconductor.attempt import Attempt
from pgconductor.batch import BatchMember, BatchRun, Settlements
from pgconductor.checks import check_duration, check_integer, check_name
from pgconductor.claimed import Claimed, Loaded, Missing
from pgconductor.durations import Duration
from pgconductor.errors import ConfigurationError
from pgconductor.loading import complete, missing_of
from pgconductor.memos import Memos
from pgconductor.own_context import OwnContext
from pgconductor.task import Task
from pgconductor.written import Completion, Outcome

log = logging.getLogger("pgconductor.worker")

FETCH_SIZE: Final = 2000
PREFETCH_SECONDS: Final = 0.1
RATE_WINDOW_SECONDS: Final = 0.02
_PUT_OFF_SECONDS: Final = 1.0
_BROKEN_SECONDS: Final = 5.0
SERVED_A_PASS: Final = 64
PASS_SECONDS: Final = 0.01
"""How many executions the server runs, and for how long, before the event loop may look at anything else."""
Settlement = Completion | Outcome


class Floor(Protocol):
    """What a worker needs of the process around it."""

    tasks: dict[int, Task[..., Any]]

    def settle(self, settlement: Settlement, /) -> None:
        """Have an outcome stored."""
        ...

    def is_held(self) -> bool:
        """Tell whether nothing new may start."""
        ...

    def on_slot_free(self, worker: "Worker", /) -> None:
        """A slot of the worker is free and it has nothing buffered, or soon will have nothing."""
        ...

    def attempt(
        self, claimed: Claimed, token: int, task: Task[..., Any], queue: str, memos: Memos | None, /
    ) -> Attempt:
        """Make the run of a claimed execution."""
        ...

    def recall(self, claimed: Claimed, /) -> Memos | None:
        """Return the memos that this process kept of an execution, and complete its input; None: they are gone."""
        ...

    def member(self, claimed: Claimed, token: int, task: Task[..., Any], queue: str, /) -> BatchMember:
        """Make the part of a claimed execution in a batch."""
        ...

    async def load(self, missing: Missing, /) -> Loaded:
        """Load what a claim left out of an execution."""
        ...

    def keep(self, execution_id: str, token: int, memos: Memos, /) -> None:
        """Keep the memos of an execution that is being parked."""
        ...


class Worker:
    """Runs the executions of one queue, up to `concurrency` at once. Made by `Conductor.create_worker`.

    Args:
        queue: The queue's name.
        concurrency: How many run at once, 1 to 10,000.
        fetch_size: The most that is fetched ahead.
        poll_interval: How often to look for work that no hint announced, where none comes; twice as long while hints
            do. The least of the workers of a process holds for all of them.

    Raises:
        ConfigurationError: A number is out of bounds.
    """

    def __init__(
        self, queue: str, *, concurrency: int = 10, fetch_size: int | None = None, poll_interval: Duration = 1
    ) -> None:
        place = f"worker {queue!r}"
        self.queue = check_name(queue, f"{place}: queue")
        self.concurrency = check_integer(concurrency, f"{place}: concurrency", 1, 10_000)
        self.fetch_size = check_integer(
            FETCH_SIZE if fetch_size is None else fetch_size, f"{place}: fetch_size", 1, 10_000
        )
        self.poll_seconds = check_duration(poll_interval, f"{place}: poll_interval").total_seconds()
        if self.poll_seconds < 0.01:
            raise ConfigurationError(f"{place}: poll_interval", "is too short", "10 milliseconds are the least")
        self.queue_id = 0
        self.buffer: deque[tuple[Claimed, int]] = deque()
        self.running: dict[str, tuple[Attempt, asyncio.Task[None]]] = {}
        self.low_water = 0
        self.prefetch_max = 0
        self._floor: Floor | None = None
        self._context = copy_context()
        self._server: asyncio.Task[None] | None = None
        self._is_swift = True
        self._batch_sizes: dict[int, int] = {}
        self._gathering: dict[int, BatchRun] = {}
        self._batches: set[BatchRun] = set()
        self._finished_count = 0
        self._finished_before = 0  # the window
        self._window_began_at = 0.0
        self._slow_count = 0  # of those that ended in it: runs that suspended, and how long they took
        self._slow_seconds = 0.0
        self._ended_before = 0  # the last look at what is stuck
        self._buffered_before = 0

    def attach(self, floor: Floor, queue_id: int) -> None:
        """Become a part of a process.

        Raises:
            ConfigurationError: It is part of one already.
        """
        if self._floor is not None:
            raise ConfigurationError(f"worker {self.queue!r}", "already belongs to an orchestrator", "create another")
        self._floor = floor
        self._context = copy_context()
        self.queue_id = queue_id
        self._batch_sizes = {
            id: task.config.batch.size
            for id, task in floor.tasks.items()
            if task.config.batch is not None and task.queue == self.queue
        }
        self._window_began_at = time.monotonic()
        self._buffered_before = 0

    def detach(self) -> None:
        """Cease to be part of the process."""
        self._floor = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nothing is buffered."""
        return not self.running and not self.buffer

    # ------------------------------------------------------------ how much to fetch

    def wanted(self) -> int:
        """Return how many executions to claim now."""
        self._measure()
        return min(self.free() + self.prefetch_max, self.fetch_size)

    def free(self, task_id: int | None = None) -> int:
        """Return how many executions, of one task if it is given, have a slot, those included that batches can take."""
        free = self.concurrency - self._used()
        return free + self._batch_room(task_id, is_free=free > 0) - len(self.buffer)

    def limited_room(self) -> int:
        """Return how many executions of limited tasks to claim now.

        They are fetched for free slots alone, since each holds a permit; but where others are fetched ahead no slot
        counts as free, and limited ones would wait until nothing else is left. So there as many are fetched as there
        are slots, and have the next that become free.
        """
        return max(self.free(), self.concurrency) if self.buffer else self.free()

    def _used(self) -> int:
        """Return how many slots are taken; a batch takes one."""
        return len(self.running) - sum(len(batch.members) - 1 for batch in self._batches)

    def _batch_room(self, task_id: int | None, *, is_free: bool) -> int:
        room = 0
        for id, size in self._batch_sizes.items():
            if task_id not in (None, id):
                continue
            gathering = self._gathering.get(id)
            if gathering is not None and gathering.is_open:
                room += gathering.room
            elif is_free:
                room += size - 1
        return room

    def _measure(self) -> None:
        """Set the prefetch to what the queue finished lately; it may double from one measurement to the next.

        Runs that suspend may end together, long after they began: they count for no more than all slots finish of
        their length.
        """
        elapsed = max(time.monotonic() - self._window_began_at, 0.001)
        finished_count = self._finished_count - self._finished_before
        if elapsed < RATE_WINDOW_SECONDS and finished_count < self.prefetch_max:
            return
        pace = (finished_count - self._slow_count) / elapsed
        if self._slow_count:
            slots_pace = self.concurrency * self._slow_count / max(self._slow_seconds, 0.001)
            pace += min(self._slow_count / elapsed, slots_pace)
        ceiling = min(self.fetch_size, 2 * self.prefetch_max + self.concurrency)
        self._fetch_ahead(int(min(pace * PREFETCH_SECONDS, ceiling)))

    def _fetch_ahead(self, count: int) -> None:
        """Fetch so many ahead, until the next measurement."""
        self.prefetch_max = count
        self.low_water = count * 2 // 3
        self._window_began_at, self._finished_before = time.monotonic(), self._finished_count
        self._slow_count, self._slow_seconds = 0, 0.0

    def take_stuck(self) -> list[tuple[Claimed, int]]:
        """Return what is to be given back, since the buffer lasts longer than from one call to the next.

        Then as many stay as have ended since the last call, and nothing is fetched ahead until the pace is measured
        anew. Claims are numbered in their order; limited work of a later one may stand before what others brought.
        """
        ended_count = self._finished_count - self._ended_before
        self._ended_before = self._finished_count
        tokens = [token for _, token in self.buffer]
        is_stuck = bool(tokens) and min(tokens) <= self._buffered_before
        self._buffered_before = max(tokens, default=self._buffered_before)
        if not is_stuck:
            return []
        self._fetch_ahead(0)
        return [self.buffer.pop() for _ in range(len(self.buffer) - ended_count)]

    def take_surplus(self) -> list[tuple[Claimed, int]]:
        """Return what was fetched for the room in batches, is of other tasks, and exceeds what is fetched ahead."""
        if not self._batch_sizes:
            return []
        others = [item for item in self.buffer if item[0].task_id not in self._batch_sizes]
        surplus = others[self.prefetch_max :]
        if surplus:
            tokens = {(claimed.id, token) for claimed, token in surplus}
            self.buffer = deque(item for item in self.buffer if (item[0].id, item[1]) not in tokens)
        return surplus

    def take_buffered(self) -> list[tuple[Claimed, int]]:
        """Empty the buffer and return what was in it."""
        taken = list(self.buffer)
        self.buffer.clear()
        return taken

    # ------------------------------------------------------------ running

    def fill(self) -> None:
        """Start buffered executions in the free slots."""
        while self._server is None and (attempt := self._next()) is not None:
            self._serve_in_task(attempt)

    def _next(self) -> Attempt | None:
        """Take the next buffered execution that has a slot."""
        floor, buffer = self._floor, self.buffer
        while buffer and floor is not None and not floor.is_held() and self._has_slot(buffer[0][0]):
            attempt = self._prepare(*buffer.popleft())
            if attempt is not None:
                return attempt
        return None

    def _has_slot(self, claimed: Claimed) -> bool:
        if not self._batch_sizes:
            return len(self.running) < self.concurrency
        gathering = self._gathering.get(claimed.task_id)
        return self._used() < self.concurrency or (gathering is not None and gathering.is_open)

    def start(self, claimed: Claimed, token: int) -> None:
        """Start one execution."""
        attempt = self._prepare(claimed, token)
        if attempt is not None:
            self._serve_in_task(attempt)

    def _prepare(self, claimed: Claimed, token: int) -> Attempt | None:
        """Return the run of an execution; None: it starts elsewhere, in a batch or when what it lacks is loaded."""
        floor = self._owner()
        if claimed.id in self.running:
            self._put_off(claimed, token)
            return None
        if claimed.task_id in self._batch_sizes:
            self._gather(claimed, token)
            return None
        memos = floor.recall(claimed) if claimed.cached is not None else None
        if (missing := missing_of(claimed, memos)) is not None:
            task = self._begin(self._load(claimed, token, memos, missing))
            self.running[claimed.id] = (self._attempt(claimed, token, Memos()), task)
            return None
        return self._attempt(claimed, token, memos)

    def _put_off(self, claimed: Claimed, token: int) -> None:
        """Give back an execution that this process still runs under an earlier claim, and leave that run.

        It happens when a crash of the server undoes a claim, whose commit is asynchronous: the old run's writes are
        refused already, and there is one place here for a run of an execution.
        """
        log.warning("execution %s was claimed again while it runs here: the server lost the first claim", claimed.id)
        self.running[claimed.id][0].abandon()
        self._owner().settle(Outcome(claimed.id, token, "released", delay=_PUT_OFF_SECONDS))

    def _attempt(self, claimed: Claimed, token: int, memos: Memos | None) -> Attempt:
        floor = self._owner()
        return floor.attempt(claimed, token, floor.tasks[claimed.task_id], self.queue, memos)

    def _begin(self, run: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Make a task in the process's context: this may be called at the end of a run.

        Not by the loop's task factory: one that starts tasks at once would start it before its place here is taken.
        """
        return asyncio.Task(run, loop=asyncio.get_running_loop(), context=self._context.copy())

    def _serve_in_task(self, attempt: Attempt) -> None:
        task = self._begin(self._serve(attempt))
        self.running[attempt.claimed.id] = (attempt, task)
        if self._is_swift:
            self._server = task

    async def _serve(self, attempt: Attempt) -> None:
        """Run an execution; go on with what is buffered while no run suspends and no other task does so."""
        task = self.running[attempt.claimed.id][1]
        served_count, began_at = 0, time.monotonic()
        following: Attempt | None = attempt
        try:
            while following is not None:
                self.running[following.claimed.id] = (following, task)
                await self._run(following, task)
                served_count += 1
                is_over = served_count == SERVED_A_PASS or time.monotonic() - began_at >= PASS_SECONDS
                if self._server is task and is_over:
                    await asyncio.sleep(0)
                    served_count, began_at = 0, time.monotonic()
                following = self._next() if self._server is task else None
        finally:
            if self._server is task:
                self._server = None

    def _note_pace(self, task: asyncio.Task[None], *, is_swift: bool) -> None:
        """Make a task the server whose run did not suspend, unless there is one; a run that does ends its service."""
        self._is_swift = is_swift
        if is_swift:
            self._server = self._server or task
        elif self._server is task:
            self._server = None
            self.fill()

    def _gather(self, claimed: Claimed, token: int) -> None:
        """Add an execution to the batch that its task has open, or open one."""
        floor = self._owner()
        batch, task = self._gathering.get(claimed.task_id), None
        if batch is not None and batch.is_open:
            task = self.running[batch.members[0].claimed.id][1]
        else:
            batch = self._gathering[claimed.task_id] = BatchRun(floor.tasks[claimed.task_id])
            self._batches.add(batch)
        member = floor.member(claimed, token, batch.task, self.queue)
        batch.add(member)
        if floor.is_held():
            batch.close()
        self.running[claimed.id] = (member, task or self._begin(self._run_batch(batch)))

    async def _run_batch(self, batch: BatchRun) -> None:
        settlements: Settlements
        try:
            settlements = await batch.run()
        except BaseException as error:  # noqa: BLE001 (a run that breaks must not take its slot along)
            settlements = [(member, self._broken(member, error)) for member in batch.members]
        self._batches.discard(batch)
        for member, settlement in settlements:
            self._end(member, settlement)

    async def _load(self, claimed: Claimed, token: int, memos: Memos | None, missing: Missing) -> None:
        floor = self._owner()
        placeholder = self.running[claimed.id][0]
        try:
            memos = complete(claimed, memos, await floor.load(missing))
        except Exception as error:  # noqa: BLE001 (logged and released: the run has not begun)
            self._end(placeholder, self._broken(placeholder, error, "unstarted"))
            return
        if placeholder.is_over() or placeholder.is_leaving:
            self._end(placeholder, placeholder.unstarted())
            return
        attempt = self._attempt(claimed, token, memos)
        self.running[claimed.id] = (attempt, self.running[claimed.id][1])
        await self._serve(attempt)

    async def _run(self, attempt: Attempt, task: asyncio.Task[None]) -> None:
        on_suspend = partial(self._note_pace, task, is_swift=False)
        run = OwnContext(attempt.run(), self._context.copy(), on_suspend)
        try:
            settlement = await run
        except BaseException as error:  # noqa: BLE001 (a run that breaks must not take its slot along)
            settlement = self._broken(attempt, error)
        if run.suspended_at is not None:
            self._slow_count += 1
            self._slow_seconds += time.monotonic() - run.suspended_at
        self._note_pace(task, is_swift=run.suspended_at is None and not task.cancelling())
        self._end(attempt, settlement)

    def _end(self, attempt: Attempt, settlement: Settlement | None) -> None:
        """Free the slot, pass the outcome on, start what is next."""
        floor = self._owner()
        del self.running[attempt.claimed.id]
        self._finished_count += 1
        if settlement is not None:
            if type(settlement) is Outcome and settlement.cached:
                attempt.journal.memos.keep_input(attempt.claimed)
                floor.keep(settlement.id, settlement.token, attempt.journal.memos)
            floor.settle(settlement)
        self.fill()
        if len(self.buffer) <= self.low_water:
            floor.on_slot_free(self)

    def _broken(
        self, attempt: Attempt, error: BaseException, way: Literal["released", "unstarted"] = "released"
    ) -> Outcome | None:
        delay = 0.0
        if not isinstance(error, asyncio.CancelledError):
            delay = _BROKEN_SECONDS
            log.error("the run of execution %s broke; it goes back for %gs", attempt.claimed.id, delay, exc_info=error)
        return None if attempt.exit == "abandoned" else Outcome(attempt.claimed.id, attempt.token, way, delay=delay)

    def _owner(self) -> Floor:
        if self._floor is None:
            raise ConfigurationError(f"worker {self.queue!r}", "is not part of a running orchestrator")
        return self._floor

    # ------------------------------------------------------------ leaving

    def each(self, act: Callable[[Attempt], None]) -> None:
        """Do something to every run."""
        for attempt, _ in list(self.running.values()):
            act(attempt)

    def tasks(self) -> list[asyncio.Task[None]]:
        """Return the asyncio tasks of the runs."""
        return [task for _, task in self.running.values()]
