"""A worker process of the fault tests: `python -m tests.fault.worker_app '{"concurrency": 4, ...}'`.

Its address comes from `PGCONDUCTOR_URL`, its armed faults from `PGCONDUCTOR_FAULT`.
"""

import asyncio
import json
import logging
import sys

from pgconductor import Orchestrator
from pgconductor.membership import Timing
from tests.fault import programs


async def work(concurrency: int, beat: float, expiry: float, sweep: float) -> None:
    """Run until a signal stops it."""
    timing = Timing(beat=beat, expiry=expiry, sweep=sweep)
    orchestrator = Orchestrator(programs.app, concurrency=concurrency, _timing=timing)
    await orchestrator.start()
    await orchestrator.stopped


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    asyncio.run(work(**json.loads(sys.argv[1])))
