"""Enqueueing: one by one, each awaited, and in bulk; beside what the server does at its barest in the same round."""

import time

from benchmarks.measure import Bench, Sample, Workload, bench
from benchmarks.server import Server
from benchmarks.workloads.floors import copy_executions, insert_with_psycopg

SINGLE = 2_000
BULK = 20_000
BATCH = 5_000


async def single(server: Server) -> Sample:
    """Enqueue one by one."""
    async with bench(server) as it:
        await it.tasks.noop.invoke(0)
        await it.database.settle_down()
        began_at = time.perf_counter()
        for number in range(SINGLE):
            await it.tasks.noop.invoke(number)
        sample = await _sample(it, SINGLE, time.perf_counter() - began_at, stored=SINGLE + 1)
        return _beside(sample, "of_bare_insert", await insert_with_psycopg(it.database.dsn, SINGLE))


async def bulk(server: Server) -> Sample:
    """Enqueue in statements of 5,000."""
    async with bench(server) as it:
        await it.tasks.noop.invoke(0)
        await it.database.settle_down()
        began_at = time.perf_counter()
        for start in range(0, BULK, BATCH):
            await it.app.invoke_many([it.tasks.noop.bind(number) for number in range(start, start + BATCH)])
        sample = await _sample(it, BULK, time.perf_counter() - began_at, stored=BULK + 1)
        return _beside(sample, "of_copy", await copy_executions(it.database.dsn, BULK))


async def _sample(it: Bench, count: int, seconds: float, stored: int) -> Sample:
    found = await it.database.value("select count(*) from pgconductor.ready")
    return Sample(count / seconds, faults=[] if found == stored else [f"{found} executions are ready, not {stored}"])


def _beside(sample: Sample, name: str, floor: float) -> Sample:
    sample.details[name] = sample.value / floor
    return sample


WORKLOADS = [
    Workload("enqueue", "enqueue one by one, awaited", "executions/s", single),
    Workload("enqueue-bulk", "enqueue in bulk, 5,000 a statement", "executions/s", bulk),
]
