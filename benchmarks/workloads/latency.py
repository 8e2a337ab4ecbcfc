"""From before an enqueue to the start of its handler, one every 50 ms, on one idle worker."""

import asyncio
import time

from benchmarks.fleet import our_workers
from benchmarks.measure import Sample, Workload, bench, quantiles, ran_once
from benchmarks.server import Server
from benchmarks.tasks import QUEUE

COUNT = 100
WARM_UP = 5
GAP_SECONDS = 0.05


async def run(server: Server) -> Sample:
    """Return the median in ms, and the tail."""
    async with bench(server) as it:
        await it.app.resume(QUEUE)
        async with our_workers(it.database.dsn, 1, WARM_UP + COUNT, 10) as fleet:
            await asyncio.sleep(1)
            sent = []
            for number in range(WARM_UP + COUNT):
                sent.append(time.time())
                await it.tasks.noop.invoke(number)
                await asyncio.sleep(GAP_SECONDS)
            while fleet.seen.runs() < WARM_UP + COUNT:
                fleet.check()
                await asyncio.sleep(0.01)
            began = fleet.seen.began_at()
            faults = ran_once(fleet.seen.runs_of_each())
    details = quantiles([at - was for at, was in list(zip(began, sent, strict=True))[WARM_UP:]])
    return Sample(details["p50_ms"], details, faults)


WORKLOADS = [Workload("latency", "idle: enqueue to start, median of 100", "ms", run)]
