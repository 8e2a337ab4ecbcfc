"""Enqueueing: one by one, each awaited, and in bulk; by turns with what the server does at its barest.

The machine's pace changes within a second: the ratio of two that ran one after the other says more of it than of them.
"""

from benchmarks.measure import Bench, Sample, Workload, bench
from benchmarks.server import Server
from benchmarks.workloads.floors import Write, copying, inserting, seconds_of

SINGLE = 2_000
TURN = 200
BULK = 40_000
BATCH = 5_000


async def single(server: Server) -> Sample:
    """Enqueue one by one."""
    async with bench(server) as it, inserting(it.database.dsn) as insert:

        async def invoke(numbers: range) -> None:
            for number in numbers:
                await it.tasks.noop.invoke(number)

        return await _by_turns(it, invoke, insert, SINGLE, TURN, "of_bare_insert")


async def bulk(server: Server) -> Sample:
    """Enqueue in statements of 5,000."""
    async with bench(server) as it, copying(it.database.dsn) as copy:

        async def invoke(numbers: range) -> None:
            await it.app.invoke_many([it.tasks.noop.bind(number) for number in numbers])

        return await _by_turns(it, invoke, copy, BULK, BATCH, "of_copy")


async def _by_turns(it: Bench, ours: Write, floor: Write, count: int, turn: int, name: str) -> Sample:
    await it.tasks.noop.invoke(0)
    await it.database.settle_down()
    seconds, floor_seconds = 0.0, 0.0
    for start in range(0, count, turn):
        numbers = range(start, start + turn)
        seconds += await seconds_of(ours, numbers)
        floor_seconds += await seconds_of(floor, numbers)
    found = await it.database.value("select count(*) from pgconductor.ready")
    faults = [] if found == count + 1 else [f"{found} executions are ready, not {count + 1}"]
    return Sample(count / seconds, {name: floor_seconds / seconds}, faults)


WORKLOADS = [
    Workload("enqueue", "enqueue one by one, awaited", "executions/s", single),
    Workload("enqueue-bulk", "enqueue in bulk, 5,000 a statement", "executions/s", bulk),
]
