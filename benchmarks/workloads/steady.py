"""Enqueueing and running at once: as fast as both go together, and at a share of that, with the wait of each job.

The peak is that of the whole system: one producer that enqueues without pause and one worker process, on one machine.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from benchmarks.fleet import Fleet, our_workers
from benchmarks.measure import CONCURRENCY, DONE, Sample, Workload, bench, quantiles, ran_once, until_done
from benchmarks.pace import produce
from benchmarks.server import Database, Server

PEAK_JOBS = 10_000
SECONDS = 4
SHARES = (50, 80)
COMMON_RATE = 1_000  # jobs a second, the same for all who are not at their limit then

Produce = Callable[[int, float], Awaitable[list[float]]]


async def measure(run: Callable[[int, float], Coroutine[Any, Any, "Waits"]], peak_jobs: int) -> Sample:
    """Find the peak, then run at shares of it, and at the common rate; `run` takes a number of jobs and a rate."""
    flat_out = await run(peak_jobs, 0)
    peak, details, faults = flat_out.rate, dict[str, float](), flat_out.faults
    rates = {str(share): peak * share / 100 for share in SHARES}
    if peak * max(SHARES) / 100 >= COMMON_RATE:
        rates["common"] = COMMON_RATE
    for name, rate in rates.items():
        waits = await run(int(rate * SECONDS), rate)
        details |= {f"{quantile}_at_{name}": value for quantile, value in quantiles(waits.seconds).items()}
        details[f"rate_at_{name}"] = waits.rate
        faults = faults + waits.faults
    return Sample(peak, details, faults)


class Waits:
    """How long each job waited, jobs a second from the first enqueue to the last start, and what was not correct."""

    def __init__(self, sent_at: list[float], fleet: Fleet) -> None:
        began_at = fleet.seen.began_at()
        self.seconds = [began - sent for sent, began in zip(sent_at, began_at, strict=True)]
        self.rate = len(sent_at) / (max(began_at) - sent_at[0])
        self.faults = ran_once(fleet.seen.runs_of_each())


async def watch(database: Database, fleet: Fleet, send: Produce, count: int, rate: float, done: str) -> Waits:
    """Produce, and wait until all is done."""
    sent_at = await send(count, rate)
    await until_done(database, fleet, count, done)
    return Waits(sent_at, fleet)


async def run(server: Server) -> Sample:
    """Measure ours."""

    async def once(count: int, rate: float) -> Waits:
        async with bench(server) as it:
            await it.resume()

            async def send(count: int, rate: float) -> list[float]:
                enqueue = it.app.invoke_many
                return await produce(count, rate, lambda some: enqueue([it.tasks.noop.bind(i) for i in some]))

            async with our_workers(it.database.dsn, 1, count, CONCURRENCY) as fleet:
                return await watch(it.database, fleet, send, count, rate, DONE)

    return await measure(once, PEAK_JOBS)


WORKLOADS = [
    Workload(
        "steady", "enqueue and run at once: the peak, waits at 50 and 80 % and at 1,000", "executions/s", run, long=True
    )
]
