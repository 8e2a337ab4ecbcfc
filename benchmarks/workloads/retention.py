"""A long history: what it costs a claim, how fast what is due goes, and what pruning costs when nothing is due.

The rows are written by SQL in the shape that the engine gives them. `BENCH_FINISHED` sets how many; 10,000,000 are
what is promised, and take about a quarter of an hour and 5 GB.
"""

import os
import time

from benchmarks.claims import claim_ms
from benchmarks.measure import Sample, Workload, bench
from benchmarks.server import Database, Server

ROWS = int(os.environ.get("BENCH_FINISHED", "1000000"))
DUE = min(ROWS, 100_000)
IDLE_CALLS = 50

FILL = """
insert into pgconductor.execution (id, created_at, lane_id, payload, result, outcome, started_at, finished_at)
select cast(lpad(to_hex(cast(extract(epoch from at) * 1000 as bigint)), 12, '0') || '70008'
            || lpad(to_hex(g), 15, '0') as uuid),
       at, (select l.id from pgconductor.lane l join pgconductor.task t on t.id = l.task_id where t.name = 'noop'),
       '{{"i": 1}}', 'null', 'completed', at, at
from (select g, now() - interval '{age}' + g * interval '1 second' * {spread} / {rows} as at
      from generate_series(1, {rows}) g) x
"""


async def beside(server: Server) -> Sample:
    """Return what a claim costs beside a long history, as a multiple of what it costs without one."""
    async with bench(server) as it:
        empty = await claim_ms(it)
    async with bench(server) as it:
        await it.tasks.noop.invoke(0)
        await it.database.execute(FILL.format(age="6 days", spread=500_000, rows=ROWS))
        full = await claim_ms(it)
    return Sample(full / empty, {"empty_ms": empty, "full_ms": full, "finished_rows": float(ROWS)})


async def prune(server: Server) -> Sample:
    """Return how many executions a second go; and what a call costs when nothing is due."""
    async with bench(server) as it:
        await it.tasks.noop.invoke(0)
        await it.database.execute(FILL.format(age="6 days", spread=500_000, rows=ROWS))
        await it.database.execute(FILL.format(age="8 days", spread=80_000, rows=DUE))
        await it.database.settle_down()
        began_at = time.perf_counter()
        removed = await _prune_all(it.database)
        seconds = time.perf_counter() - began_at
        began_at = time.perf_counter()
        for _ in range(IDLE_CALLS):
            await _prune_all(it.database)
        idle_ms = (time.perf_counter() - began_at) * 1000 / IDLE_CALLS
    faults = [] if removed == DUE else [f"{removed} of {DUE} were removed"]
    return Sample(removed / seconds, {"idle_ms": idle_ms, "finished_rows": float(ROWS)}, faults)


async def _prune_all(database: Database) -> int:
    removed, more = 0, True
    while more:
        answer = await database.value("select pgconductor.prune()")
        removed, more = removed + int(answer["removed"]), bool(answer["more"])
    return removed


WORKLOADS = [
    Workload("retention-claims", "a claim of 100 beside a long history, against none", "times", beside),
    Workload("retention-prune", "executions that retention removes", "executions/s", prune),
]
