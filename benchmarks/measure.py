"""What a workload is, and what it hands back."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.fleet import Fleet, our_workers
from benchmarks.server import Counted, Database, Server
from benchmarks.tasks import QUEUE, Tasks, register
from pgconductor import Conductor

LIMIT_SECONDS = 120.0
DONE = """select /* bench */ not exists (select from pgconductor.ready) and not exists (select from pgconductor.lease)
  and not exists (select from pgconductor.wait) and not exists (select from pgconductor.timer)"""
CONCURRENCY = 100


@dataclass
class Sample:
    """One round of a workload.

    Attributes:
        value: The figure the workload is known by.
        details: Others, by name.
        faults: What was not as it must be; empty when the round was correct.
    """

    value: float
    details: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Workload:
    """Something to measure; `unit` is that of its value. One that is `long` runs only when it is named."""

    name: str
    title: str
    unit: str
    run: Callable[[Server], Coroutine[Any, Any, Sample]]
    long: bool = False


class NotAvailableError(Exception):
    """There is nothing to measure: the engine, the peer or the machine has no such thing. The message says what."""


@dataclass
class Bench:
    """A fresh database, a client for it and the tasks."""

    database: Database
    app: Conductor[None]
    tasks: Tasks

    async def resume(self) -> None:
        """Let the workers begin."""
        await self.app.resume(QUEUE)


@asynccontextmanager
async def bench(server: Server) -> AsyncIterator[Bench]:
    """Yield a client on a fresh database. Its queue is paused, so that workers connect before the clock starts."""
    async with server.database() as database, Conductor(database.dsn) as app:
        tasks = register(app, lambda _: None)
        await app.pause(QUEUE)
        yield Bench(database, app, tasks)


@dataclass
class Drained:
    """How a drain went."""

    seconds: float
    counted: Counted
    cpu_seconds: float
    runs_of_each: list[int]
    began_at: list[float]


async def drain(it: Bench, *, jobs: int, executions: int, workers: int = 1, limit: float = LIMIT_SECONDS) -> Drained:
    """Let workers run what waits, from the resume of the queue until nothing is left in the database to do.

    Args:
        it: The database, with everything enqueued.
        jobs: How many marks the handlers make.
        executions: How many completed executions there must be at the end.
        workers: How many processes.
        limit: The seconds after which it has failed.
    """
    await it.database.settle_down()
    async with our_workers(it.database.dsn, workers, jobs, CONCURRENCY) as fleet:
        await it.database.begin_counting()
        cpu, began_at = fleet.cpu_seconds(), time.perf_counter()
        await it.resume()
        await until_done(it.database, fleet, jobs, DONE, limit)
        seconds = time.perf_counter() - began_at
        counted = await it.database.counted()
        cpu = fleet.cpu_seconds() - cpu
        drained = Drained(seconds, counted, cpu, fleet.seen.runs_of_each(), fleet.seen.began_at())
    done = await it.database.value("select count(*) from pgconductor.execution where outcome = 'completed'")
    if done != executions:
        raise RuntimeError(f"{done} executions completed, not {executions}")
    return drained


async def until_done(database: Database, fleet: Fleet, jobs: int, done: str, limit: float = LIMIT_SECONDS) -> None:
    """Watch the marks, which costs the server nothing; only then ask the database, with the query `done`."""
    deadline = time.monotonic() + limit
    while fleet.seen.runs() < jobs or not await database.value(done):
        fleet.check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{fleet.seen.runs()} of {jobs} jobs ran in {limit:.0f} s")
        await asyncio.sleep(0.005)


def costs(drained: Drained, jobs: int) -> dict[str, float]:
    """Return what a drain cost, a job."""
    counted = drained.counted
    return {
        "round_trips_per_job": counted.round_trips / jobs,
        "jobs_per_claim": jobs / max(1, counted.calls("claim")),
        "jobs_per_settle": jobs / max(1, counted.calls("settle")),
        "wal_bytes_per_job": counted.wal_bytes / jobs,
        "worker_us_per_job": drained.cpu_seconds * 1e6 / jobs,
        "server_us_per_job": counted.cpu_seconds * 1e6 / jobs,
    }


def quantiles(waits: list[float]) -> dict[str, float]:
    """Return p50, p95, p99 and the maximum of waits in seconds, in ms."""
    ordered, count = sorted(wait * 1000 for wait in waits), len(waits)
    found = {f"p{percent}_ms": ordered[min(count - 1, count * percent // 100)] for percent in (50, 95, 99)}
    return found | {"max_ms": ordered[-1]}


def ran_once(runs: list[int]) -> list[str]:
    """Return what is wrong with the number of runs of each job."""
    lost, doubled = runs.count(0), sum(1 for each in runs if each > 1)
    return ([f"{lost} jobs did not run"] if lost else []) + ([f"{doubled} jobs ran twice"] if doubled else [])
