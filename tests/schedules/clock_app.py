"""A worker process that fires a schedule every second: `python -m tests.schedules.clock_app DSN`."""

import asyncio
import logging
import sys

from pgconductor import Conductor, Context, Orchestrator, Tick, cron
from pgconductor.membership import Timing


async def beat(ctx: Context, tick: Tick) -> str:
    """Return the tick."""
    return tick.scheduled_at.isoformat()


async def work(dsn: str) -> None:
    """Run until a signal stops it."""
    app = Conductor(dsn)
    app.create_task(beat, on=cron("* * * * * *", name="second"))
    orchestrator = Orchestrator(app, concurrency=4, _timing=Timing(beat=0.2, expiry=2.0, sweep=0.2))
    await orchestrator.start()
    await orchestrator.stopped


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    asyncio.run(work(sys.argv[1]))
