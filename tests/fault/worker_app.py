"""A worker process of the fault tests: `python -m tests.fault.worker_app '{"concurrency": 4, ...}' [MODULE...]`.

The modules may add tasks to those of the programs. Its address comes from `PGCONDUCTOR_URL`, its armed faults from
`PGCONDUCTOR_FAULT`. Once it has started it logs `UP`.
"""

import asyncio
import importlib
import json
import logging
import sys

from pgconductor import Orchestrator
from pgconductor.membership import Timing
from tests.fault import programs

UP = "this worker is up"


async def work(concurrency: int, beat: float, expiry: float, sweep: float) -> None:
    """Run until a signal stops it."""
    timing = Timing(beat=beat, expiry=expiry, sweep=sweep)
    orchestrator = Orchestrator(programs.app, concurrency=concurrency, _timing=timing)
    await orchestrator.start()
    logging.getLogger(__name__).info(UP)
    await orchestrator.stopped


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for module in sys.argv[2:]:
        importlib.import_module(module)
    asyncio.run(work(**json.loads(sys.argv[1])))
