"""Claims without a worker: what one costs. Every claim has to take what it asks for, else the figure is none."""

import json
import time
from collections.abc import Sequence

from benchmarks.measure import Bench
from benchmarks.tasks import QUEUE
from pgconductor.id_array import IdArray

CLAIMS = 200
WARM_UP = 20  # a session plans its functions' statements during its first calls
BATCH = 100

_REGISTER = "select cast(pgconductor.register_tasks('bench', cast(%s as json)) as text)"
_JOIN = "select cast(pgconductor.register_orchestrator(%s, 'bench', '0', 'bench', 1, '{}') as text)"
_CLAIM = "select cast(pgconductor.claim(%s, %s, %s, %s) as text)"
_SETTLE = "select length(cast(pgconductor.settle(%s, %s, %s, %s, '[]') as text))"
_QUEUES = "select array_agg(id) from pgconductor.queue where name = any(%s)"
_TASKS = "select array_agg(id) from pgconductor.task where name = any(%s)"


class Claims:
    """The claims of a process that runs no handlers.

    Args:
        it: The database.
        queues: Which queues it has workers for.
        tasks: Which tasks it knows.
        batch: How many a claim takes from a queue.
    """

    def __init__(
        self, it: Bench, queues: Sequence[str] = (QUEUE,), tasks: Sequence[str] = ("noop",), batch: int = BATCH
    ) -> None:
        self._database = it.database
        self._queues = list(queues)
        self._tasks = list(tasks)
        self._batch = batch
        self._token = 0

    async def join(self) -> None:
        """Become known."""
        self._id = await self._database.value("select gen_random_uuid()")
        await self._database.value(_JOIN, self._id)
        queues = await self._database.value(_QUEUES, self._queues)
        self._wants = json.dumps([{"queue": queue, "limit": self._batch} for queue in queues])
        self._known = await self._database.value(_TASKS, self._tasks)

    async def take(self) -> list[str]:
        """Claim up to a batch from each queue; return the ids of the executions that came."""
        self._token += 1
        answer = await self._database.value(_CLAIM, self._id, self._token, self._wants, self._known)
        return [row[0] for row in json.loads(answer)["claimed"] or []]

    async def complete(self, ids: Sequence[str]) -> None:
        """Settle what the last claim took."""
        tokens, results = [self._token] * len(ids), json.dumps([None] * len(ids))
        await self._database.value(_SETTLE, self._id, IdArray(ids), tokens, results)

    async def milliseconds(self, count: int = CLAIMS, warm_up: int = WARM_UP) -> float:
        """Return what one of so many full claims costs, after some that do not count."""
        taken = sum([len(await self.take()) for _ in range(warm_up)])
        began_at = time.perf_counter()
        taken += sum([len(await self.take()) for _ in range(count)])
        milliseconds = (time.perf_counter() - began_at) * 1000 / count
        if taken != (warm_up + count) * self._batch:
            raise RuntimeError(
                f"{warm_up + count} claims took {taken} executions, not {(warm_up + count) * self._batch}"
            )
        return milliseconds


async def register_task(it: Bench, name: str, *, queue: str = QUEUE, limit: int | None = None, key: str = "") -> None:
    """Register a task as a worker does, so that its lane is the queue's; `limit`: of concurrency, for each `key`."""
    limits = [] if limit is None else [{"kind": "concurrency", "key_path": key or None, "max": limit}]
    task = {"name": name, "queue": queue, "max_attempts": 3, "max_crashes": 5, "limits": limits}
    await it.database.value(_REGISTER, json.dumps([task]))


async def claim_ms(it: Bench, claims: Claims | None = None, *, priority: int = 0) -> float:
    """Enqueue what does nothing and claim it again in batches of 100; return the milliseconds of one claim."""
    await register_task(it, "noop")
    task = it.tasks.noop.with_options(priority=priority)
    await it.app.invoke_many([task.bind(number) for number in range((WARM_UP + CLAIMS) * BATCH)])
    await it.app.resume(QUEUE)
    await it.database.settle_down()
    claims = claims or Claims(it)
    await claims.join()
    return await claims.milliseconds()
