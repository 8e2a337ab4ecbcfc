"""Executions that carry something, and executions that fail once."""

from collections.abc import Callable, Coroutine
from typing import Any

from benchmarks.measure import Sample, Workload, bench, costs, drain
from benchmarks.server import Server
from benchmarks.workloads.drain import drained_sample

FAILING = 10_000
SMALL_BYTES, SMALL = 1_000, 10_000
LARGE_BYTES, LARGE = 100_000, 500
BATCH_BYTES = 5_000_000


def _padded(size: int, count: int) -> Callable[[Server], Coroutine[Any, Any, Sample]]:
    async def run(server: Server) -> Sample:
        async with bench(server) as it:
            padding, batch = "x" * size, BATCH_BYTES // size
            for start in range(0, count, batch):
                numbers = range(start, min(count, start + batch))
                await it.app.invoke_many([it.tasks.padded.bind(number, padding) for number in numbers])
            drained = await drain(it, jobs=count, executions=count)
            return drained_sample(drained, count, costs(drained, count))

    return run


async def failing(server: Server) -> Sample:
    """Of ten executions three fail at their first attempt, and are retried without delay."""
    async with bench(server) as it:
        for start in range(0, FAILING, 5_000):
            await it.app.invoke_many([it.tasks.failing.bind(number) for number in range(start, start + 5_000)])
        drained = await drain(it, jobs=FAILING, executions=FAILING)
        return drained_sample(drained, FAILING, costs(drained, FAILING))


WORKLOADS = [
    Workload("payload-1k", "drain 10,000 with 1 KB each", "executions/s", _padded(SMALL_BYTES, SMALL), long=True),
    Workload("payload-100k", "drain 500 with 100 KB each", "executions/s", _padded(LARGE_BYTES, LARGE), long=True),
    Workload("failing", "drain 10,000 of which 30 % fail once", "executions/s", failing, long=True),
]
