"""Claiming while much else lies about: ready, delayed and finished rows, and many queues.

The rows are written by SQL in the shape that the engine gives them: enqueueing millions would take longer than the
measurement. `--backlog` sets how many of each kind.
"""

import os

from benchmarks.claims import claim_ms, register_task
from benchmarks.measure import Sample, Workload, bench
from benchmarks.server import Server

QUEUES = 1_000
ROWS = int(os.environ.get("BENCH_BACKLOG", "200000"))

FILL = """
insert into pgconductor.queue (name) select 'other ' || g from generate_series(1, {queues}) g;
insert into pgconductor.task (name, queue_id)
  select 'other ' || g, q.id from generate_series(1, {queues}) g join pgconductor.queue q on q.name = 'other ' || g;
insert into pgconductor.lane (queue_id, task_id)
  select queue_id, id from pgconductor.task where name like 'other %';
insert into pgconductor.execution (id, created_at, lane_id, payload)
  select pgconductor.uuid7(), now(), l.ids[1 + g % array_length(l.ids, 1)], '{{"i": 1}}'
  from generate_series(1, {rows}) g, (select array_agg(id) as ids from pgconductor.lane) l;
insert into pgconductor.ready (lane_id, priority, ord, execution_id)
  select lane_id, priority, ord, id from pgconductor.execution where outcome is null
  on conflict do nothing;
insert into pgconductor.timer (execution_id, due_at)
  select gen_random_uuid(), now() + interval '1 day' + g * interval '1 second' from generate_series(1, {rows}) g;
insert into pgconductor.execution (id, created_at, lane_id, payload, outcome, finished_at)
  select pgconductor.uuid7(), now(), min(l.id), '{{"i": 1}}', 'completed', now()
  from pgconductor.lane l, generate_series(1, {rows}) g group by g;
"""


async def run(server: Server) -> Sample:
    """Return what a claim costs beside a backlog, as a multiple of what it costs without."""
    async with bench(server) as it:
        empty = await claim_ms(it, priority=1)
    async with bench(server) as it:
        await register_task(it, "noop")
        await it.tasks.noop.invoke(0)
        for statement in FILL.format(rows=ROWS, queues=QUEUES).split(";\n"):
            if statement.strip():
                await it.database.execute(statement)
        full = await claim_ms(it, priority=1)
    return Sample(full / empty, {"empty_ms": empty, "full_ms": full, "rows_of_each_kind": float(ROWS)})


WORKLOADS = [Workload("backlog", "a claim of 100 beside a backlog, against none", "times", run)]
