"""A worker with handlers in processes of their own: `python -m tests.fault.pool_app`.

They write their process id to `pid` in the directory that they are given, and keep their interpreter busy for good.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

from pgconductor import Conductor, Context, Orchestrator, SyncContext
from pgconductor.membership import Timing

app = Conductor(name="pool")
TIMING = Timing(beat=0.2, expiry=2.0, sweep=0.2)


@app.task(executor="process", max_crashes=1)
def held(ctx: SyncContext, directory: str) -> None:
    """Never return."""
    stay(directory)


@app.task(executor="process", max_crashes=1)
async def held_on_its_loop(ctx: Context, directory: str) -> None:
    """Never return, nor let the loop go on."""
    stay(directory)


@app.task(executor="process", max_crashes=1)
async def held_beside_its_loop(ctx: Context, directory: str) -> None:
    """Never return; whoever closes the loop waits for the thread."""
    await asyncio.to_thread(stay, directory)


def stay(directory: str) -> None:
    Path(directory, "pid.new").write_text(str(os.getpid()))
    Path(directory, "pid.new").rename(Path(directory, "pid"))
    while True:
        pass


@app.task
def copy(ctx: SyncContext) -> int:
    """Make a copy of the worker that outlives it."""
    pid = os.fork()
    while pid == 0:
        signal.pause()
    return pid


async def work() -> None:
    """Run until a signal stops it."""
    orchestrator = Orchestrator(app, _timing=TIMING)
    await orchestrator.start()
    await orchestrator.stopped


if __name__ == "__main__":
    from tests.fault import pool_app  # so that its task is that of the module, which the child can import

    asyncio.run(pool_app.work())
    sys.exit(0)
