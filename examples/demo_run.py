"""The demo: `make demo`. A survey of the standard library by two workers, one of which is killed on the way.

It starts a Postgres of its own, enqueues `survey_library` of demo_tasks.py, starts two worker processes, and sends
SIGKILL to one when a third of the files are measured. What the survey finds is compared with what this process
computes directly, without the engine. Leaves with 0 only if the two are equal and every file was counted once.
"""

import asyncio
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo_screen import Screen, Snapshot, WorkerLine
from demo_tasks import Survey, aggregate, app, count_tokens, measure, python_files, read, survey_library
from demo_watch import Watch

from pgconductor import Run
from pgconductor.embedded import EmbeddedServer

LIMIT_SECONDS = 120.0
FRAME_SECONDS = 0.1


class Workers:
    """Two worker processes, and what becomes of them."""

    def __init__(self, folder: Path) -> None:
        script = Path(__file__).with_name("demo_tasks.py")
        self.log = folder / "workers.log"
        with self.log.open("w") as log:
            self.processes = [subprocess.Popen([sys.executable, script], stdout=log, stderr=log) for _ in range(2)]

    @property
    def victim(self) -> "subprocess.Popen[bytes]":
        """The one that will be killed."""
        return self.processes[1]

    def kill_one(self) -> None:
        """Kill the victim without a warning."""
        self.victim.send_signal(signal.SIGKILL)
        self.victim.wait()

    def stop(self) -> None:
        """Let the others finish."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)

    def raise_if_dead(self) -> None:
        """Raise if a worker has left that was not killed."""
        if self.processes[0].poll() is not None:
            raise RuntimeError(f"a worker left by itself:\n{self.log.read_text()[-4000:]}")


@contextmanager
def running_workers() -> Iterator[Workers]:
    """Start the workers, and leave none behind."""
    with tempfile.TemporaryDirectory(prefix="pgconductor-demo-") as folder:
        workers = Workers(Path(folder))
        try:
            yield workers
        finally:
            workers.stop()


async def perform(screen: Screen, root: str) -> bool:
    """Run the demo on a server that is up; tell whether the survey is right."""
    await app.migrate()
    run = await survey_library.invoke(root)
    screen.event(f"enqueued survey_library({root!r}) as {run.id}")
    with running_workers() as workers:
        async with app, Watch(app.dsn, run.id) as watch:
            expected = await _kill_on_the_way(screen, watch, workers, root)
            survey = await _finish(screen, watch, workers, run)
            snapshot = await watch.look()
            screen.event(f"the survey is complete; {snapshot.lost} runs were lost with their worker and run again")
        return screen.report(survey, await expected, lost=snapshot.lost)


async def _kill_on_the_way(screen: Screen, watch: Watch, workers: Workers, root: str) -> "asyncio.Future[Survey]":
    """Watch until a third of the files are done; kill a worker; begin to compute directly what it should come to."""
    while True:
        snapshot = await _frame(screen, watch, workers)
        if snapshot.total and snapshot.completed >= snapshot.total / 3:
            break
    workers.kill_one()
    screen.killed(workers.victim.pid, *await watch.held_by(workers.victim.pid))
    return asyncio.ensure_future(asyncio.to_thread(compute_directly, root))


async def _finish(screen: Screen, watch: Watch, workers: Workers, run: Run[Survey]) -> Survey:
    """Watch until the survey is there."""
    result = asyncio.ensure_future(run.result(timeout=LIMIT_SECONDS))
    while not result.done():
        await _frame(screen, watch, workers)
    return await result


async def _frame(screen: Screen, watch: Watch, workers: Workers) -> Snapshot:
    """Show how it stands."""
    workers.raise_if_dead()
    snapshot = await watch.look()
    screen.show(snapshot, [_line(process, snapshot) for process in workers.processes])
    for event in watch.news(snapshot):
        screen.event(event)
    await asyncio.sleep(FRAME_SECONDS)
    return snapshot


def _line(process: "subprocess.Popen[bytes]", snapshot: Snapshot) -> WorkerLine:
    running, silent = snapshot.workers.get(process.pid, (0, None))
    return WorkerLine(process.pid, is_killed=process.returncode is not None, running=running, silent_seconds=silent)


def compute_directly(root: str) -> Survey:
    """Compute what the survey should find: the same functions, and nothing else."""
    files = []
    for path in python_files(root):
        source = read(path)
        files.append(measure(path, source, count_tokens(source)))
    return aggregate(files)


def main() -> int:
    """Run the demo; return the process's exit code."""
    began_at = time.monotonic()
    screen = Screen(began_at)
    screen.event("starting Postgres, from the wheel, for this demo alone")
    with EmbeddedServer() as server:
        os.environ["PGCONDUCTOR_URL"] = server.start().dsn
        with screen:
            is_right = asyncio.run(perform(screen, sysconfig.get_path("stdlib")))
    screen.event("done" if is_right else "the survey is WRONG")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
