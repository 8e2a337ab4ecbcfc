"""The claimer: one per process, one claim at a time, for the free slots of all its queues.

It claims when a queue wants something *and* there is reason to expect work: a hint, an own call that made work, a
claim that brought as much as was asked for. A timer that is due is a reason too. Without any, it looks once a poll
interval, so that the loss of every hint costs a second of waiting and nothing else.

A claim whose reply was lost may have taken work that nobody knows of. The process tells the engine which claims it
does know (`reconcile`); the rest is ready again, at no cost. It does so again now and then, since a claim that was
lost may commit later than the first reconciliation.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from pgconductor.claimed import Claimed
from pgconductor.engine import Claim
from pgconductor.faults import InjectedFault, fault
from pgconductor.membership import Membership
from pgconductor.scan import PAUSE_FACTOR, Cost, Scan, Start
from pgconductor.session import ConnectionLost, Session, backoff_seconds
from pgconductor.written import Names, Want

if TYPE_CHECKING:
    from pgconductor.crew import Crew
    from pgconductor.engine import Engine, Query
    from pgconductor.schedules import DueSchedule
    from pgconductor.worker import Worker

log = logging.getLogger("pgconductor.claimer")
RECONCILE_SECONDS: Final = 30.0
RECONCILE_AGAIN_SECONDS: Final = 5.0
RECONCILE_SECONDS_MAX: Final = 300.0
STUCK_SECONDS: Final = 0.25
LAST_CLAIM_SECONDS: Final = 1.0
_FOR_EVER: Final = 1e9


class Claimer:
    """Runs the claim loop of a process.

    Args:
        session: A connection of its own.
        engine: Builds the queries.
        membership: The boot id to claim under.
        crew: Who wants work and is given it.
        unsettled_tokens: The claims of which outcomes are not stored yet.
        is_listening: Whether hints arrive; without them the poll interval is halved.
        on_declared_dead: Told that the engine no longer knows the boot id.
        on_schedules: Given the schedules that are due.
    """

    def __init__(
        self,
        session: Session,
        engine: "Engine",
        membership: Membership,
        crew: "Crew",
        *,
        unsettled_tokens: Callable[[], set[int]],
        is_listening: Callable[[], bool],
        on_declared_dead: Callable[[str], None],
        on_schedules: Callable[["list[DueSchedule] | None"], None],
    ) -> None:
        self.error_count = 0
        self.claim_count = 0
        self.claimed_count = 0
        self.poll_seconds = min((worker.poll_seconds for worker in crew.workers), default=1.0)
        self._session = session
        self._engine = engine
        self._membership = membership
        self._crew = crew
        self._task_ids = sorted(crew.tasks)
        self._unsettled_tokens = unsettled_tokens
        self._is_listening = is_listening
        self._on_declared_dead = on_declared_dead
        self._on_schedules = on_schedules
        self._token = 0
        self._expected: set[int] = set()
        self._named: Names | None = None  # to be claimed by themselves
        self._wake = asyncio.Event()
        self._poll_at = 0.0
        self._due_at = 0.0
        self._overdue_count = 0
        self._looked: dict[int, int] = {}  # by queue: the last claim that came to it
        self._scan = Scan()
        self._head_at = _FOR_EVER
        self._stuck_at = 0.0
        self._reconcile_at = time.monotonic() + RECONCILE_SECONDS
        self._is_claiming = False
        self._is_stopping = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to claim."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="pgconductor claimer")

    async def warm_up(self, timeout: float) -> None:
        """Connect, and let the server plan what a claim does; what takes too long the first claim does."""
        with contextlib.suppress(ConnectionLost, TimeoutError):
            nothing = self._engine.claim(self._membership.id, self._token, None, self._task_ids)
            await self._session.run(nothing, timeout=timeout)

    async def stop(self) -> None:
        """Claim nothing more. A claim under way is waited for briefly; what it may still bring is retired later."""
        if self._task is not None:
            self._is_stopping = True
            self._wake.set()
            await asyncio.wait([self._task], timeout=LAST_CLAIM_SECONDS)
            self._task.cancel()
            await asyncio.wait([self._task])

    @property
    def last_token(self) -> int:
        """The number of the last claim."""
        return self._token

    @property
    def scan(self) -> Scan:
        """Where claims have come to."""
        return self._scan

    # ------------------------------------------------------------ reasons to claim

    def expect(self, queue_ids: Iterable[int]) -> None:
        """Expect work in these queues."""
        mine = self._crew.by_queue.keys() & set(queue_ids)
        if mine:
            self._expected |= mine
            self._wake.set()

    def expect_named(self, names: Names) -> None:
        """Expect executions, which are claimed by themselves if there is nothing else to look for."""
        if names.queue_id not in self._crew.by_queue or names.task_id not in self._crew.tasks:
            return
        if self._named is None and not self._expected and self._has_slots(names):
            self._named = names
        else:
            self._expected.add(names.queue_id)
        self._wake.set()

    def look(self) -> None:
        """Look at everything now."""
        self._poll_at = 0.0
        self._wake.set()

    def on_slot_free(self, worker: "Worker") -> None:
        """Claim again where more is expected."""
        if self._named or worker.queue_id in self._expected:
            self._wake.set()

    def note_due(self, seconds: float | None) -> None:
        """Remember when the next timer is due; one that stays overdue is not hunted, as in `_set_due`."""
        if seconds is None or (seconds <= 0 and self._overdue_count > 1):
            return
        if time.monotonic() + seconds < self._due_at:
            self._due_at = time.monotonic() + max(0.0, seconds)
            self._wake.set()

    @property
    def is_quiet(self) -> bool:
        """Whether everything was looked at, nothing more is expected and no timer is due."""
        has_looked = not (self._is_claiming or self._expected or self._named) and self._head_at == _FOR_EVER
        return has_looked and min(self._poll_at, self._due_at) > time.monotonic()

    # ------------------------------------------------------------ the loop

    async def _run(self) -> None:
        failure_count = 0
        while not self._is_stopping:
            try:
                await self._wait()
                if not self._is_stopping:
                    await self._round()
                failure_count = 0
            except (ConnectionLost, InjectedFault) as error:
                log.warning("the outcome of a claim is unknown (%s): what it took is given back", error)
                self._reconcile_at = 0.0
                self._scan.forget()
                self.look()
            except Exception:
                self.error_count += 1
                failure_count += 1
                log.exception("a claim failed; the claimer goes on")
                self.look()
                await asyncio.sleep(backoff_seconds(failure_count))

    async def _wait(self) -> None:
        """Return when there is reason to claim."""
        while not self._is_stopping and not self._has_reason():
            self._wake.clear()
            timeout = min(self._poll_at, self._due_at, self._head_at) - time.monotonic()
            if self._crew.is_held() or self._membership.is_fenced():
                timeout = self.poll_seconds
            if self._crew.has_buffered:
                timeout = min(timeout, STUCK_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(timeout, 0.001)):
                    await self._wake.wait()
            self._release_stuck()

    def _release_stuck(self) -> None:
        """Give back, now and then, what is buffered behind handlers that do not end soon."""
        if self._stuck_at <= time.monotonic():
            self._stuck_at = time.monotonic() + STUCK_SECONDS
            self._crew.release_stuck()

    def _has_reason(self) -> bool:
        if self._crew.is_held() or self._membership.is_fenced():
            return False
        if self._named or min(self._poll_at, self._due_at, self._head_at) <= time.monotonic():
            return True
        return any(self._wants(queue_id) for queue_id in self._expected)

    def _wants(self, queue_id: int) -> bool:
        worker = self._crew.by_queue[queue_id]
        return len(worker.buffer) <= worker.low_water and worker.wanted() > 0

    async def _round(self) -> None:
        now = time.monotonic()
        is_poll, is_due = self._poll_at <= now, self._due_at <= now
        if is_poll:
            self._poll_at = now + self.poll_seconds * (2 if self._is_listening() else 1)
        if self._reconcile_at <= now:
            await self._reconcile()
        if (names := self._take_named(is_alone=not is_poll and not is_due)) is not None:
            await self._claim_named(names)
            return
        wants = self._collect_wants(everything=is_poll or is_due or self._head_at <= now)
        self._head_at = _FOR_EVER if self._head_at <= now else self._head_at
        if wants or is_due or is_poll:  # schedules are due whether or not there is a free slot
            await self._claim(wants, fire=is_due or is_poll)

    def _take_named(self, *, is_alone: bool) -> Names | None:
        """Return what is to be claimed by itself.

        Where there is more to look for, or not a free slot for each any more, the queue is looked at instead.
        """
        names, self._named = self._named, None
        if names is not None and (self._expected or not is_alone or not self._has_slots(names)):
            self._expected.add(names.queue_id)
            return None
        return names

    def _has_slots(self, names: Names) -> bool:
        return self._crew.by_queue[names.queue_id].free(names.task_id) >= len(names.ids)

    def _collect_wants(self, *, everything: bool) -> list[Want]:
        wants: list[Want] = []
        for worker in self._crew.workers:
            if everything or worker.queue_id in self._expected:
                count = worker.wanted()
                if count > 0:
                    wants.append(Want(worker.queue_id, count, worker.limited_room()))
                    self._expected.discard(worker.queue_id)
        # a claim that has enough ends: the queues that it did not come to are looked at first by the next
        return sorted(wants, key=lambda want: self._looked.get(want.queue, 0))

    async def _claim(self, wants: list[Want], *, fire: bool) -> None:
        self._token += 1
        token, start = self._token, self._scan.start(time.monotonic())
        ranges = self._scan.ranges(start)
        claim = await self._ask(
            self._engine.claim(self._membership.id, token, wants, self._task_ids, fire=fire, ranges=ranges)
        )
        if claim is not None:
            self._set_due(claim.next_due, fired=fire)
            self._on_schedules(claim.schedules)
            self._expect_more(claim, wants, start)
            self._distribute(claim, token)

    async def _claim_named(self, names: Names) -> None:
        self._token += 1
        token = self._token
        claim = await self._ask(self._engine.claim_named(self._membership.id, token, names))
        if claim is not None:
            self._distribute(claim, token)

    async def _ask(self, query: "Query[Claim | None]") -> Claim | None:
        """Return what a claim brought; None if it no longer counts, since this process is not what it was."""
        id = self._membership.id
        self._is_claiming = True
        try:
            fault("before_claim")
            claim = await self._session.run(query)
            fault("after_claim_reply")
        finally:
            self._is_claiming = False
        if claim is None:
            self._on_declared_dead(id)
        return claim if id == self._membership.id and not self._membership.is_fenced() else None

    def _expect_more(self, claim: Claim, wants: list[Want], start: Start) -> None:
        """Expect more where it was left, or came as asked for; else look again at the head, if this did not."""
        claimed = claim.claimed or []
        counts = Counter(each.queue_id for each in claimed)
        full = {want.queue for want in wants if counts[want.queue] >= want.limit}
        lane_count = len(wants) + len(self._task_ids)  # a task has mostly one
        cost = Cost(claim.seconds, claim.search_seconds, lane_count, len(claimed))
        self._scan.note(start, claim.last or (), cost, time.monotonic(), is_full=bool(full))
        more = set(claim.more or ())
        # what came from a queue shows that the claim came to it, though limits may have left some there
        self._looked.update((each.queue, self._token) for each in wants if counts[each.queue] or each.queue not in more)
        more |= full
        self._expected |= more
        if (start is not Start.HEAD or self._scan.is_in_pass) and len(more) < len(wants):
            self._head_at = self._scan.head_at

    def _distribute(self, claim: Claim, token: int) -> None:
        claimed = claim.claimed or []
        if claim.closing:
            _set_closing(claimed, claim.closing)
        self.claim_count += 1
        self.claimed_count += len(claimed)
        self._crew.take(claimed, token)

    def _set_due(self, next_due: float | None, *, fired: bool) -> None:
        """Plan the next look at the timers; one that stays overdue, since another process fires it, is not hunted."""
        self._overdue_count = self._overdue_count + 1 if fired and next_due is not None and next_due <= 0 else 0
        pause = backoff_seconds(self._overdue_count) if self._overdue_count > 1 else 0.0
        self._due_at = time.monotonic() + (_FOR_EVER if next_due is None else max(next_due, pause))

    async def _reconcile(self) -> None:
        """Give back claims whose reply never came. No claim is under way: this is the same loop."""
        was_lost = self._reconcile_at == 0.0
        known = self._crew.known_tokens() | self._unsettled_tokens()
        id, began_at = self._membership.id, time.monotonic()
        moved = await self._session.run(self._engine.reconcile(id, sorted(known)))
        now = time.monotonic()
        # it reads what this process has leased and no vacuum removed, and claims wait for it; of what it took,
        # an outage of the server may be a part
        pause = min(max(RECONCILE_SECONDS, PAUSE_FACTOR * (now - began_at)), RECONCILE_SECONDS_MAX)
        self._reconcile_at = now + (RECONCILE_AGAIN_SECONDS if was_lost else pause)
        if moved is None:
            self._on_declared_dead(id)
        elif moved.queues:
            self._scan.forget()
            log.info("claims whose replies were lost have been given back")
            self.expect(moved.queues)


def _set_closing(claimed: Iterable[Claimed], closing: Mapping[int, float]) -> None:
    """Note when the windows of what was claimed close."""
    now = time.monotonic()
    for each in claimed:
        seconds = closing.get(each.task_id)
        if seconds is not None:
            each.closes_at = now + seconds
