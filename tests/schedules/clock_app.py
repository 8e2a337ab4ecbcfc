"""A worker process that fires a schedule every second: `python -m tests.schedules.clock_app DSN [SECONDS A BEAT]`."""

import asyncio
import logging
import sys

from pgconductor import Conductor, Context, Orchestrator, Tick, cron
from pgconductor.membership import Timing


async def beat(ctx: Context, tick: Tick) -> str:
    """Return the tick."""
    return tick.scheduled_at.isoformat()


async def work(dsn: str, pause: float = 0.2) -> None:
    """Run until a signal stops it, with so many seconds from beat to beat."""
    app = Conductor(dsn)
    app.create_task(beat, on=cron("* * * * * *", name="second"))
    orchestrator = Orchestrator(app, concurrency=4, _timing=Timing(beat=pause, expiry=10 * pause, sweep=pause))
    await orchestrator.start()
    await orchestrator.stopped


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    asyncio.run(work(sys.argv[1], *map(float, sys.argv[2:])))
