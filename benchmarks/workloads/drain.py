"""Draining 20,000 waiting executions that do nothing, by one worker process and by two."""

from collections.abc import Callable, Coroutine
from typing import Any

from benchmarks.measure import Bench, Sample, Workload, bench, costs, drain, ran_once
from benchmarks.server import Server

COUNT = 20_000


async def fill(it: Bench, count: int) -> float:
    """Enqueue in bulk; return the WAL bytes of it."""
    await it.tasks.noop.invoke(0)  # interns the names
    await it.database.begin_counting()
    for start in range(1, count, 5_000):
        stop = min(count, start + 5_000)
        await it.app.invoke_many([it.tasks.noop.bind(number) for number in range(start, stop)])
    return (await it.database.counted()).wal_bytes


def _by(workers: int) -> Callable[[Server], Coroutine[Any, Any, Sample]]:
    async def run(server: Server) -> Sample:
        async with bench(server) as it:
            enqueue_bytes = await fill(it, COUNT)
            drained = await drain(it, jobs=COUNT, executions=COUNT, workers=workers)
            details = costs(drained, COUNT)
            details["wal_bytes_per_job"] += enqueue_bytes / COUNT
            details["full_pages"] = drained.counted.full_pages
            await it.app.close()
            details["index_inserts_per_job"] = await it.database.index_inserts() / COUNT
            return Sample(COUNT / drained.seconds, details, ran_once(drained.runs_of_each))

    return run


WORKLOADS = [
    Workload("drain-1", "drain 20,000 no-op executions, 1 process", "executions/s", _by(1)),
    Workload("drain-2", "drain 20,000 no-op executions, 2 processes", "executions/s", _by(2)),
]
