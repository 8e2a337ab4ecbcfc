"""All the workers of a process: what they share, and the two things that concern them together.

**Kept memos.** A process keeps the recorded steps of executions that it parked, so that a resume loads only what is
new. The cache is bounded by bytes and number, and what it has lost is simply loaded.

**Last lives.** An execution whose process died under it so often that one more crash ends it runs alone: everything
that runs ends first, what is buffered and whatever else is on its last life goes back, all of that is stored, and
nothing starts until it has ended. If it kills the process, it takes no other execution along. Where the others take
too long, it goes back for a while instead, at no cost.
"""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from pgconductor.attempt import Attempt
from pgconductor.batch import BatchMember
from pgconductor.claimed import Claimed, Loaded, Missing
from pgconductor.host import ProcessHost
from pgconductor.isolated import IsolatedAttempt
from pgconductor.memos import Memos
from pgconductor.running_steps import RunningStep
from pgconductor.settler import Settlement, Settler
from pgconductor.task import Task
from pgconductor.worker import Worker
from pgconductor.written import Outcome

log = logging.getLogger("pgconductor.crew")

KEPT_BYTES_MAX: Final = 64 * 1024 * 1024
KEPT_COUNT_MAX: Final = 100_000
ALONE_WAIT_SECONDS: Final = 30.0
ALONE_RETRY_SECONDS: Final = 60.0


class KeptMemos:
    """The memos of parked executions, least recently kept first out.

    They count once the park is known to be stored: a park that is lost has opened nothing, and what its run believed
    to have opened must not be taken for recorded by the next one.
    """

    def __init__(self, bytes_max: int = KEPT_BYTES_MAX, count_max: int = KEPT_COUNT_MAX) -> None:
        self._bytes_max = bytes_max
        self._count_max = count_max
        self._kept: OrderedDict[str, tuple[Memos, int, int]] = OrderedDict()
        self._unconfirmed: set[str] = set()
        self._bytes = 0

    def keep(self, execution_id: str, token: int, memos: Memos) -> None:
        """Keep the memos of an execution that is being parked under a token."""
        self.take(execution_id)
        self._kept[execution_id] = (memos, memos.size, token)
        self._unconfirmed.add(execution_id)
        self._bytes += memos.size
        while self._bytes > self._bytes_max or len(self._kept) > self._count_max:
            oldest, (_, size, _) = self._kept.popitem(last=False)
            self._unconfirmed.discard(oldest)
            self._bytes -= size

    def confirm(self, execution_id: str, token: int) -> None:
        """Let what was kept count: its park is stored."""
        kept = self._kept.get(execution_id)
        if kept is not None and kept[2] == token:
            self._unconfirmed.discard(execution_id)

    def take(self, execution_id: str) -> Memos | None:
        """Return what was kept, unless its park may not be stored; forget it either way."""
        memos, size, _ = self._kept.pop(execution_id, (None, 0, 0))
        self._bytes -= size
        if execution_id in self._unconfirmed:
            self._unconfirmed.discard(execution_id)
            return None
        return memos

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._unconfirmed.clear()
        self._bytes = 0


class Crew:
    """The workers of a process; the `Floor` that each of them stands on.

    Args:
        workers: One a queue.
        tasks: What this process knows, by the task's id in the database.
        host: What runs are given.
        settler: Takes outcomes.
        on_slot_free: Told that a worker can take more.
        on_busy: Told that the first run began.
        on_idle: Told that the last one has ended, and that nothing is buffered.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        tasks: dict[int, Task[..., Any]],
        host: ProcessHost,
        settler: Settler,
        *,
        on_slot_free: Callable[[Worker], None],
        on_busy: Callable[[], None],
        on_idle: Callable[[], None],
    ) -> None:
        self.workers = list(workers)
        self.tasks = tasks
        self.by_queue: dict[int, Worker] = {}
        self.kept = KeptMemos()
        self._limited = {id for id, task in tasks.items() if task.config.concurrency or task.config.rate_limit}
        self.settle: Callable[[Settlement], None] = settler.add
        self.is_closed = False
        self._host = host
        self._on_slot_free = on_slot_free
        self._on_busy = on_busy
        self._on_idle = on_idle
        self._alone: deque[tuple[Worker, Claimed, int]] = deque()
        self._alone_id: str | None = None
        self._chosen: tuple[Worker, Claimed, int] | None = None
        self._choosing: asyncio.Task[None] | None = None
        self._flush = settler.batcher.flush
        self._alone_timer: asyncio.TimerHandle | None = None

    def attach(self, queue_ids: dict[str, int]) -> None:
        """Tell the workers where they belong."""
        for worker in self.workers:
            worker.attach(self, queue_ids[worker.queue])
            self.by_queue[worker.queue_id] = worker

    def detach(self) -> None:
        """Let the workers go."""
        for worker in self.by_queue.values():
            worker.detach()
        self.by_queue.clear()

    # ------------------------------------------------------------ state

    @property
    def running_count(self) -> int:
        """How many executions run."""
        return sum(len(worker.running) for worker in self.workers)

    @property
    def has_buffered(self) -> bool:
        """Whether anything was claimed and has not started."""
        return any(worker.buffer for worker in self.workers)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nothing is buffered."""
        return not self._alone and self._chosen is None and all(worker.is_idle for worker in self.workers)

    def known_tokens(self) -> set[int]:
        """The claims of which something runs or is buffered."""
        tokens = {token for worker in self.workers for _, token in worker.buffer}
        tokens.update(attempt.token for worker in self.workers for attempt, _ in worker.running.values())
        tokens.update(token for _, _, token in self._waiting_alone())
        return tokens

    def is_held(self) -> bool:
        """Whether nothing new may start."""
        return self.is_closed or self._alone_id is not None or bool(self._alone)

    # ------------------------------------------------------------ taking work

    def take(self, claimed: Iterable[Claimed], token: int) -> None:
        """Hand out what a claim brought; limited work first, since its starts are counted from the claim on."""
        if self.is_closed:
            self.release((each, token) for each in claimed)
            return
        by_queue, tasks, limited = self.by_queue, self.tasks, self._limited
        first: list[tuple[Worker, Claimed]] = []
        for each in claimed:
            worker = by_queue[each.queue_id]
            if each.crashes and each.crashes >= tasks[each.task_id].config.max_crashes - 1:
                self._alone.append((worker, each, token))
            elif each.task_id in limited:
                first.append((worker, each))
            else:
                worker.buffer.append((each, token))
        for worker, each in reversed(first):
            worker.buffer.appendleft((each, token))
        if self._alone:
            self._prepare_alone()
        for worker in self.workers:
            worker.fill()
            self.release(worker.take_surplus())
        if not self.is_idle:
            self._on_busy()

    def on_slot_free(self, worker: Worker) -> None:
        """Look for more work, or for what waits to be alone."""
        if self._alone or self._alone_id:
            self._advance_alone()
        if worker.is_idle and self.is_idle:
            self._on_idle()
        self._on_slot_free(worker)

    def attempt(self, claimed: Claimed, token: int, task: Task[..., Any], queue: str, memos: Memos | None) -> Attempt:
        """Make the run of a claimed execution."""
        if task.config.executor == "process":
            return IsolatedAttempt(self._host.processes, claimed, token, task, queue, self._host, memos)
        return Attempt(claimed, token, task, queue, self._host, memos)

    def member(self, claimed: Claimed, token: int, task: Task[..., Any], queue: str) -> BatchMember:
        """Make the part of a claimed execution in a batch."""
        return BatchMember(claimed, token, task, queue, self._host)

    def release(self, items: Iterable[tuple[Claimed, int]], delay: float | None = None) -> None:
        """Give back what was claimed and has not started; for so many seconds."""
        for claimed, token in items:
            self.settle(Outcome(claimed.id, token, "unstarted", delay=delay))

    def release_stuck(self) -> None:
        """Give back what would stay buffered too long; called now and then."""
        for worker in self.workers:
            stuck = worker.take_stuck()
            if stuck:
                log.debug("queue %r: %d that would not begin soon go back", worker.queue, len(stuck))
                self.release(stuck)

    # ------------------------------------------------------------ memos

    def keep(self, execution_id: str, token: int, memos: Memos) -> None:
        """Keep the memos of an execution that is being parked."""
        self.kept.keep(execution_id, token, memos)

    def recall(self, claimed: Claimed) -> Memos | None:
        """Return the kept memos with what is new, and complete the input; None when they are gone or out of date."""
        memos = self.kept.take(claimed.id)
        if memos is None or memos.input is None or not claimed.cached:
            return None
        claimed.payload, claimed.trigger_data = memos.input
        if not isinstance(claimed.steps, int):
            memos.merge(claimed.steps)
        return memos

    async def load(self, missing: Missing) -> Loaded:
        """Load what a claim left out of an execution."""
        return await self._host.load(missing)

    # ------------------------------------------------------------ last lives

    def _prepare_alone(self) -> None:
        for worker in self.workers:
            self.release(worker.take_buffered())
        if self._alone_timer is None:
            loop = asyncio.get_running_loop()
            self._alone_timer = loop.call_later(ALONE_WAIT_SECONDS, self._give_up_alone)
        self._advance_alone()

    def _waiting_alone(self) -> list[tuple[Worker, Claimed, int]]:
        return [*self._alone, *filter(None, [self._chosen])]

    def _advance_alone(self) -> None:
        if self.running_count or self._chosen is not None:
            return
        self._alone_id = None
        if self._alone_timer is not None:
            self._alone_timer.cancel()
            self._alone_timer = None
        if self._alone and not self.is_closed:
            self._chosen = self._alone.popleft()
            self._alone_id = self._chosen[1].id
            self._choosing = asyncio.get_running_loop().create_task(self._start_alone(self._chosen))
        elif not self.is_closed:
            for worker in self.workers:
                worker.fill()
                self._on_slot_free(worker)

    async def _start_alone(self, chosen: tuple[Worker, Claimed, int]) -> None:
        """Start it once nothing else of this process is unsettled: what is, would be lost with it."""
        self.release((claimed, token) for _, claimed, token in self._alone)
        self._alone.clear()
        await self._flush()
        if self._chosen is chosen:
            self._chosen = None
            worker, claimed, token = chosen
            log.warning("execution %s runs alone: another lost process ends it", claimed.id)
            worker.start(claimed, token)

    def _give_up_alone(self) -> None:
        self._alone_timer = None
        if self._alone_id is None:
            self._release_alone(ALONE_RETRY_SECONDS)
        for worker in self.workers:
            worker.fill()
            self._on_slot_free(worker)

    def _release_alone(self, delay: float) -> None:
        self.release(((claimed, token) for _, claimed, token in self._waiting_alone()), delay)
        self._alone.clear()
        self._chosen = None

    # ------------------------------------------------------------ leaving

    def close(self) -> None:
        """Start nothing more; give back what has not started; ask runs to leave at their next boundary."""
        self.is_closed = True
        if self._alone_timer is not None:
            self._alone_timer.cancel()
            self._alone_timer = None
        self._release_alone(0.0)
        for worker in self.workers:
            self.release(worker.take_buffered())
            worker.each(lambda attempt: attempt.request_release())

    def abandon(self) -> None:
        """Drop everything: the leases are lost."""
        self.kept.clear()
        self._alone.clear()
        self._chosen = self._alone_id = None
        for worker in self.workers:
            worker.take_buffered()
            worker.each(lambda attempt: attempt.abandon())

    async def wait_until_empty(self, seconds: float) -> bool:
        """Wait until nothing runs; False when the time is over."""
        tasks = [task for worker in self.workers for task in worker.tasks()]
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, seconds))
        return self.running_count == 0

    def interrupt(self) -> None:
        """Leave every run at once."""
        for worker in self.workers:
            worker.each(lambda attempt: attempt.request_release(hard=True))

    def cancel(self, execution_ids: Iterable[str]) -> None:
        """Tell runs that their executions are being cancelled."""
        wanted = set(execution_ids)
        for worker in self.workers:
            for id in wanted & worker.running.keys():
                worker.running[id][0].request_cancel()
            for item in [item for item in worker.buffer if item[0].id in wanted]:
                worker.buffer.remove(item)
                self.release([item])

    def told_steps(self) -> list[RunningStep] | None:
        """Return the steps that a beat tells of."""
        return self._host.steps.told()

    def name_of(self, task: "asyncio.Task[Any] | None") -> str:
        """Say what an asyncio task runs."""
        for worker in self.workers:
            for attempt, running in list(worker.running.values()):
                if running is task:
                    return f"task {attempt.task.name!r} execution {attempt.claimed.id}"
        return "something that is no handler"
