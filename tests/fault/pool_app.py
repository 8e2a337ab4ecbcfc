"""A worker with a handler in a process of its own: `python -m tests.fault.pool_app <directory>`.

The handler writes its process id to `pid` in the directory and then keeps its interpreter busy for good.
"""

import asyncio
import os
import sys
from pathlib import Path

from pgconductor import Conductor, Orchestrator, SyncContext
from pgconductor.membership import Timing

app = Conductor(name="pool")
TIMING = Timing(beat=0.2, expiry=2.0, sweep=0.2)


@app.task(executor="process", max_crashes=1)
def held(ctx: SyncContext, directory: str) -> None:
    """Never return."""
    Path(directory, "pid.new").write_text(str(os.getpid()))
    Path(directory, "pid.new").rename(Path(directory, "pid"))
    while True:
        pass


async def work() -> None:
    """Run until a signal stops it."""
    orchestrator = Orchestrator(app, _timing=TIMING)
    await orchestrator.start()
    await orchestrator.stopped


if __name__ == "__main__":
    from tests.fault import pool_app  # so that its task is that of the module, which the child can import

    asyncio.run(pool_app.work())
    sys.exit(0)
