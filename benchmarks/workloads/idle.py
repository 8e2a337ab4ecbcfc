"""A worker process with nothing to do: what it asks of the server."""

import asyncio

from benchmarks.fleet import our_workers
from benchmarks.measure import Sample, Workload, bench
from benchmarks.server import Server
from benchmarks.tasks import QUEUE

SETTLING_SECONDS = 3
SECONDS = 20


async def run(server: Server) -> Sample:
    """Return the queries a second."""
    async with bench(server) as it:
        await it.app.resume(QUEUE)
        await it.app.close()
        async with our_workers(it.database.dsn, 1, 1, 10) as fleet:
            await asyncio.sleep(SETTLING_SECONDS)
            await it.database.begin_counting()
            cpu = fleet.cpu_seconds()
            await asyncio.sleep(SECONDS)
            counted = await it.database.counted()
            details = {
                "connections": float(await it.database.connections()),
                "worker_cpu_percent": (fleet.cpu_seconds() - cpu) * 100 / SECONDS,
            }
            return Sample(counted.round_trips / SECONDS, details)


WORKLOADS = [Workload("idle", "idle: queries of a worker process", "queries/s", run)]
