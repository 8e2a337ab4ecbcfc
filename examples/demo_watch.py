"""What the demo sees: a few queries on the engine's public views, which anybody may ask."""

from types import TracebackType
from typing import Any, Self
from uuid import UUID

import psycopg
from demo_screen import Snapshot

FILES = """
select count(*) filter (where state = 'completed'), count(*), coalesce(sum(crashes), 0)
from pgconductor.executions where parent_id = %s and task = 'measure_file'"""
WORKERS = "select pid, running_count, extract(epoch from clock_timestamp() - beat_at) from pgconductor.workers"
STEPS = (
    "select name, kind, status from pgconductor.steps where execution_id = %s and index = 0 order by created_at, kind"
)
PROOFREAD = """
select attempt, error ->> 'message' from pgconductor.executions
where parent_id = %s and task = 'proofread' and state <> 'completed'"""
HELD = """
select count(distinct e.id), count(s.name)
from pgconductor.workers w
join pgconductor.executions e on e.orchestrator_id = w.id
left join pgconductor.steps s on s.execution_id = e.id
where w.pid = %s"""


class Watch:
    """Looks at the survey from outside."""

    def __init__(self, dsn: str, survey: UUID) -> None:
        self._dsn = dsn
        self._survey = survey
        self._told: set[str] = set()

    async def __aenter__(self) -> Self:
        """Connect."""
        self._connection = await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect."""
        await self._connection.close()

    async def look(self) -> Snapshot:
        """Return how the survey stands."""
        ((completed, total, lost),) = await self._rows(FILES, self._survey)
        workers = {pid: (running, float(silent)) for pid, running, silent in await self._rows(WORKERS)}
        steps = [(name, status) for name, _, status in await self._rows(STEPS, self._survey)]
        proofread = await self._rows(PROOFREAD, self._survey)
        failure = proofread[0] if proofread and proofread[0][1] else None
        return Snapshot(completed, total, int(lost), workers, steps, failure)

    async def held_by(self, pid: int) -> tuple[int, int]:
        """Return how many runs a worker process holds, and how many finished steps they have."""
        ((runs, steps),) = await self._rows(HELD, pid)
        return runs, steps

    def news(self, snapshot: Snapshot) -> list[str]:
        """Return what has happened since the last time."""
        news = [f"finished {name!r}" for name, status in snapshot.steps if status == "completed"]
        if snapshot.lost:
            news.append(f"the other worker has taken over: {snapshot.lost} lost runs begin again after their last step")
        if snapshot.failure:
            attempt, message = snapshot.failure
            news.append(f"proofread failed: {message}; it waits and tries again as attempt {attempt}")
        fresh = [each for each in news if each not in self._told]
        self._told.update(fresh)
        return fresh

    async def _rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        return await (await self._connection.execute(query.encode(), parameters or None)).fetchall()
