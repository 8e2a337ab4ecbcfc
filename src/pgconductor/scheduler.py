"""The part of an orchestrator that fires schedules. Every orchestrator does, for all schedules of the engine.

No process is the leader. Each one's claimer knows when the next schedule is due, from the claims and settles that it
makes anyway, and claims then; the claim brings the due schedules along. Several processes may be told of the same tick:
they compute the same, and the first to say so wins (sql/functions/55_schedules.sql). What a process forgets, because it
was killed or stopped in between, stays due, and the claims of the others bring it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from pgconductor.faults import fault
from pgconductor.schedules import DueSchedule, FiredSchedule, plan
from pgconductor.settler import Effects

if TYPE_CHECKING:
    from pgconductor.engine import Engine
    from pgconductor.session import Session

log = logging.getLogger("pgconductor.scheduler")
TICKS_PER_CALL_MAX: Final = 1000
LAST_SECONDS: Final = 1.0


class Scheduler:
    """Fires the schedules that the claims of a process bring.

    Args:
        session: For its calls.
        engine: Builds the queries.
        on_effects: Told of new work, and when the next thing is due.

    Attributes:
        error_count: How often firing failed; the schedules stay due.
    """

    def __init__(self, session: "Session", engine: "Engine", on_effects: Callable[[Effects], None]) -> None:
        self.error_count = 0
        self._session = session
        self._engine = engine
        self._on_effects = on_effects
        self._firing: asyncio.Task[None] | None = None
        self._told: set[int] = set()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is being fired."""
        return self._firing is None or self._firing.done()

    def look(self, due: Sequence[DueSchedule] | None) -> None:
        """Fire what is due, unless that is under way: its end brings all that has become due meanwhile."""
        if due and self.is_quiet:
            self._firing = asyncio.get_running_loop().create_task(self._fire(due), name="pgconductor scheduler")

    async def stop(self) -> None:
        """Fire nothing more. What is under way is waited for briefly; what is cut off stays due, or has been done."""
        if self._firing is not None:
            await asyncio.wait([self._firing], timeout=LAST_SECONDS)
            self._firing.cancel()
            await asyncio.wait([self._firing])

    async def _fire(self, due: Sequence[DueSchedule] | None) -> None:
        try:
            while due:
                due = await self._fire_once(due)
        except Exception:
            self.error_count += 1
            log.exception("schedules could not be fired; they stay due")

    async def _fire_once(self, due: Sequence[DueSchedule]) -> Sequence[DueSchedule] | None:
        planned = await asyncio.to_thread(lambda: [plan(each) for each in due])
        for each, fired in zip(due, planned, strict=True):
            self._report(each, fired)
        fault("before_fire")
        left: Sequence[DueSchedule] | None = None
        for part in _parts(planned):
            answer = await self._session.run(self._engine.fire_schedules(part))
            fault("after_fire")
            self._on_effects(Effects(answer.queues, next_due=answer.next_due))
            left = answer.due
        return left

    def _report(self, due: DueSchedule, fired: FiredSchedule) -> None:
        """Log, once each, what this process cannot read, and what an outage has cost or brings."""
        if fired.error is not None:
            if due.id not in self._told:
                self._told.add(due.id)
                log.error("schedule %d does not fire here: %s", due.id, fired.error)
            return
        self._told.discard(due.id)
        if len(fired.slots) > 100:
            log.warning("schedule %d (%s): %d missed ticks run now", due.id, due.expr, len(fired.slots))


def _parts(planned: Sequence[FiredSchedule]) -> list[list[FiredSchedule]]:
    """Split so that no call starts many more than `TICKS_PER_CALL_MAX` executions."""
    parts: list[list[FiredSchedule]] = [[]]
    count = 0
    for each in planned:
        if count + len(each.slots) > TICKS_PER_CALL_MAX and parts[-1]:
            parts.append([])
            count = 0
        parts[-1].append(each)
        count += len(each.slots)
    return parts
