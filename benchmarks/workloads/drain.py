"""Draining waiting executions that do nothing: few and many, by one worker process and by two, kept and removed."""

from collections.abc import Callable, Coroutine
from typing import Any

from benchmarks.measure import Bench, Drained, Sample, Workload, bench, costs, drain, ran_once
from benchmarks.server import Server
from pgconductor import Task

COUNT = 20_000
LONG = 200_000
BATCH = 5_000

Measure = Callable[[Server], Coroutine[Any, Any, Sample]]


async def fill(it: Bench, count: int, task: Task[[int], None] | None = None) -> float:
    """Enqueue in bulk, what does nothing if no task is given; return the WAL bytes of it."""
    task = task or it.tasks.noop
    await task.invoke(0)  # interns the names
    await it.database.begin_counting()
    for start in range(1, count, BATCH):
        await it.app.invoke_many([task.bind(number) for number in range(start, min(count, start + BATCH))])
    return (await it.database.counted()).wal_bytes


def _by(workers: int, count: int = COUNT, *, removed: bool = False, busy: bool = False) -> Measure:
    async def run(server: Server) -> Sample:
        async with bench(server) as it:
            task = it.tasks.brief if removed else it.tasks.busy if busy else it.tasks.noop
            enqueue_bytes = await fill(it, count, task)
            drained = await drain(it, jobs=count, executions=0 if removed else count, workers=workers)
            details = costs(drained, count)
            details["wal_bytes_per_job"] += enqueue_bytes / count
            details["full_pages"] = drained.counted.full_pages
            await it.app.close()
            details["index_inserts_per_job"] = await it.database.index_inserts() / count
            return drained_sample(drained, count, details)

    return run


def drained_sample(drained: Drained, count: int, details: dict[str, float]) -> Sample:
    """Return jobs a second, from the resume on."""
    return Sample(count / drained.seconds, details, ran_once(drained.runs_of_each))


def _workload(name: str, title: str, run: Measure, *, long: bool = True) -> Workload:
    return Workload(name, f"drain {title}", "executions/s", run, long)


WORKLOADS = [
    _workload("drain-1", "20,000 no-op executions, 1 process", _by(1), long=False),
    _workload("drain-2", "20,000 no-op executions, 2 processes", _by(2), long=False),
    _workload("drain-busy-1", "20,000 that compute for 0.1 ms, 1 process", _by(1, busy=True)),
    _workload("drain-busy-2", "20,000 that compute for 0.1 ms, 2 processes", _by(2, busy=True)),
    _workload("drain-removed-1", "20,000, removed when finished, 1 process", _by(1, removed=True)),
    _workload("drain-removed-2", "20,000, removed when finished, 2 processes", _by(2, removed=True)),
    _workload("drain-long-1", "200,000, 1 process", _by(1, LONG)),
    _workload("drain-long-2", "200,000, 2 processes", _by(2, LONG)),
    _workload("drain-long-removed-1", "200,000, removed when finished, 1 process", _by(1, LONG, removed=True)),
]
