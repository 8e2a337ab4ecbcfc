"""One worker process: `python -m benchmarks.worker DSN DIRECTORY NUMBER COUNT CONCURRENCY QUEUES`, until SIGTERM.

It says that it is ready once it is connected; the queue is paused until all are.
"""

import logging
import sys
from pathlib import Path

from benchmarks.marks import Marks
from benchmarks.tasks import queue_names, register
from pgconductor import Conductor, Orchestrator
from pgconductor.cli.devote import devote_process
from pgconductor.cli.loop import run


async def work(dsn: str, directory: Path, number: str, count: int, concurrency: int, queues: int) -> None:
    """Run until told to stop. Attempts that fail by design are not logged, here as by the peers."""
    logging.getLogger("pgconductor").setLevel(logging.ERROR)
    app = Conductor(dsn)
    register(app, Marks(directory / f"marks.{number}", count).hit)
    orchestrator = Orchestrator(app, queues=dict.fromkeys(queue_names(queues), concurrency))
    await orchestrator.start()
    devote_process()  # as `pgconductor worker` does
    (directory / f"ready.{number}").touch()
    await orchestrator.stopped
    await app.close()


if __name__ == "__main__":
    dsn, directory, number, *counts = sys.argv[1:]
    run(work(dsn, Path(directory), number, *map(int, counts)))
