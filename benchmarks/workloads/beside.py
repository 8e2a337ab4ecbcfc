"""The drain of 20,000 beside much else: a backlog, delayed and finished work, many queues, a snapshot that is held.

What lies about is enqueued by the engine's own SQL function, or for a history written in the shape that the engine
gives it. Each figure is a share of what the same drain reaches in an empty system in the same round; `snapshot` is
the speed of its last 50,000 jobs as a share of that of its first.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import psycopg

from benchmarks.fleet import our_workers
from benchmarks.measure import CONCURRENCY, Bench, Sample, Workload, bench, drain, ran_once, until_done
from benchmarks.server import Database, Server
from benchmarks.tasks import queue_names
from benchmarks.workloads import drain as drains
from benchmarks.workloads.retention import FILL as FINISHED

COUNT = 20_000
MILLION = 1_000_000
QUEUES = 1_000
HELD_JOBS = 500_000
HELD_SHARE = 50_000
HELD_SECONDS_MAX = 300.0
CHUNK = 20_000

FIRST_DONE = "select not exists (select from pgconductor.ready) and not exists (select from pgconductor.lease)"

PAUSE_ALL = "update pgconductor.queue set paused_at = clock_timestamp()"
RESUME_ALL = """
with resumed as (update pgconductor.queue set paused_at = null)
select cast(pg_notify('pgconductor', 'ready') as text)"""

ENQUEUE = """
select length(cast(pgconductor.enqueue((
  select json_agg(json_build_object('id', pgconductor.uuid7(), 'task', 'noop', 'delay', cast(%s as float8),
                                    'payload', json_build_object('i', g)))
  from generate_series(cast(%s as int), cast(%s as int)) g)) as text))"""

Prepare = Callable[[Bench], Awaitable[None]]
Measure = Callable[[Server], Coroutine[Any, Any, Sample]]


async def enqueue_by_sql(database: Database, first: int, count: int, delay_seconds: float | None = None) -> None:
    """Enqueue the jobs from `first` on."""
    for start in range(first, first + count, CHUNK):
        await database.value(ENQUEUE, delay_seconds, start, min(first + count, start + CHUNK) - 1)


async def _rate(server: Server, prepare: Prepare | None = None, queued_beside: int = 0) -> tuple[float, list[str]]:
    """Drain 20,000, or the first 20,000 of more; return jobs a second and what was not correct."""
    count = COUNT + queued_beside
    async with bench(server) as it:
        await drains.fill(it, COUNT)
        if prepare:
            await prepare(it)
        await it.database.settle_down()
        async with our_workers(it.database.dsn, 1, count, CONCURRENCY) as fleet:
            resumed_at = time.time()
            await it.resume()
            await until_done(it.database, fleet, COUNT, "select true" if queued_beside else FIRST_DONE)
            runs, began = fleet.seen.runs_of_each(), sorted(at for at in fleet.seen.began_at() if at)
    faults = [] if max(runs) == 1 else ["jobs ran twice"]
    return COUNT / (began[COUNT - 1] - resumed_at), faults


def _beside(prepare: Prepare, queued_beside: int = 0) -> Measure:
    async def run(server: Server) -> Sample:
        empty, faults = await _rate(server)
        beside, more = await _rate(server, prepare, queued_beside)
        return Sample(beside / empty, {"empty_per_s": empty, "beside_per_s": beside}, faults + more)

    return run


def _ready(count: int) -> Measure:
    async def prepare(it: Bench) -> None:
        await enqueue_by_sql(it.database, COUNT, count)

    return _beside(prepare, count)


async def _delayed(it: Bench) -> None:
    await enqueue_by_sql(it.database, COUNT, MILLION, 86_400)


def _finished(count: int) -> Measure:
    async def prepare(it: Bench) -> None:
        await it.database.execute(FINISHED.format(age="6 days", spread=500_000, rows=count))

    return _beside(prepare)


async def queues(server: Server) -> Sample:
    """Drain 20,000 that are spread over 1,000 queues, all served by one process.

    To resume a thousand queues one by one takes longer than the drain: here one statement does it.
    """
    empty, faults = await _rate(server)
    async with bench(server) as it:
        for start, queue in enumerate(queue_names(QUEUES)):
            first = start * (COUNT // QUEUES)
            calls = [it.tasks.noop.bind(number) for number in range(first, first + COUNT // QUEUES)]
            await it.app.invoke_many(calls, queue=queue)
        await it.database.execute(PAUSE_ALL)
        await it.database.settle_down()
        async with our_workers(it.database.dsn, 1, COUNT, CONCURRENCY, queues=QUEUES) as fleet:
            resumed_at = time.time()
            await it.database.execute(RESUME_ALL)
            await until_done(it.database, fleet, COUNT, FIRST_DONE)
            many = COUNT / (max(fleet.seen.began_at()) - resumed_at)
            faults += ran_once(fleet.seen.runs_of_each())
    return Sample(many / empty, {"empty_per_s": empty, "beside_per_s": many}, faults)


async def snapshot(server: Server) -> Sample:
    """Drain 500,000 while another session holds the snapshot that it took before."""
    async with bench(server) as it:
        await it.tasks.noop.invoke(0)
        await enqueue_by_sql(it.database, 1, HELD_JOBS - 1)
        async with _held_snapshot(it.database.dsn):
            drained = await drain(it, jobs=HELD_JOBS, executions=HELD_JOBS, limit=HELD_SECONDS_MAX)
    began = sorted(drained.began_at)
    first, last = began[HELD_SHARE] - began[0], began[-1] - began[-1 - HELD_SHARE]
    details = {"first_per_s": HELD_SHARE / first, "last_per_s": HELD_SHARE / last}
    return Sample(first / last, details | {"all_per_s": HELD_JOBS / drained.seconds}, ran_once(drained.runs_of_each))


@asynccontextmanager
async def _held_snapshot(dsn: str) -> AsyncIterator[None]:
    async with await psycopg.AsyncConnection.connect(dsn) as holder:
        await holder.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
        await holder.execute("select count(*) from pgconductor.queue")
        yield


def _workload(name: str, title: str, run: Measure) -> Workload:
    return Workload(name, title, "of empty", run, long=True)


WORKLOADS = [
    _workload("beside-ready", "drain 20,000 of 1 million more that are ready", _ready(MILLION)),
    _workload("beside-delayed", "drain 20,000 beside 1 million delayed", _beside(_delayed)),
    _workload("beside-finished", "drain 20,000 beside 1 million finished", _finished(MILLION)),
    _workload("beside-queues", "drain 20,000 over 1,000 queues, 1 process", queues),
    _workload("beside-10m-ready", "drain 20,000 of 10 million more that are ready", _ready(10 * MILLION)),
    _workload("beside-10m-finished", "drain 20,000 beside 10 million finished", _finished(10 * MILLION)),
    Workload("snapshot", "drain 500,000 beside a held snapshot: last 50,000", "of first", snapshot, long=True),
]
