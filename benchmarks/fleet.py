"""Worker processes: started together, watched, stopped."""

import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.machine import cpu_seconds
from benchmarks.marks import Seen

READY_SECONDS_MAX = 60
STOP_SECONDS_MAX = 40
GO = "go"

Command = Callable[[Path, int], Sequence[str]]


def our_workers(dsn: str, size: int, count: int, concurrency: int, *, queues: int = 1) -> "Fleet":
    """Return worker processes of the engine.

    Args:
        dsn: Their database.
        size: How many.
        count: How many jobs they will mark.
        concurrency: How many executions each runs at once.
        queues: How many queues each serves.
    """

    def command(directory: Path, number: int) -> Sequence[str]:
        arguments = (dsn, directory, number, count, concurrency, queues)
        return [sys.executable, "-m", "benchmarks.worker", *map(str, arguments)]

    return Fleet(command, size, count)


class Fleet:
    """Some worker processes; leaving the block stops them.

    Args:
        command: What starts the worker of a number, which keeps its files in a directory.
        size: How many.
        count: How many jobs they will mark.
        env: Their environment; ours by default.
        stop_seconds_max: How long they may take to leave before they are killed.
    """

    def __init__(
        self,
        command: Command,
        size: int,
        count: int,
        *,
        env: Mapping[str, str] | None = None,
        stop_seconds_max: float = STOP_SECONDS_MAX,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pgconductor-bench-")
        self._directory = directory = Path(self._folder.name)
        self._stop_seconds_max = stop_seconds_max
        self._ready = [directory / f"ready.{number}" for number in range(size)]
        self._logs = [(directory / f"log.{number}").open("wb+") for number in range(size)]
        self._processes = [
            subprocess.Popen(command(directory, number), stdout=log, stderr=log, env=env)
            for number, log in enumerate(self._logs)
        ]
        self.seen = Seen([directory / f"marks.{number}" for number in range(size)], count)

    @property
    def pids(self) -> list[int]:
        """The processes."""
        return [process.pid for process in self._processes]

    async def __aenter__(self) -> Self:
        """Wait until all are connected. If they do not come to that, none of them stays."""
        try:
            await self._until_ready()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS_MAX
        while not all(path.exists() for path in self._ready):
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError("the workers are not ready")
            await asyncio.sleep(0.01)

    def go(self) -> None:
        """Tell those that wait for it to begin."""
        (self._directory / GO).touch()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop them gracefully; what they complained of is printed."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                await asyncio.to_thread(process.wait, self._stop_seconds_max)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if complaints := self._complaints():
            print(f"[workers] {complaints[-2000:]}", file=sys.stderr)
        for log in self._logs:
            log.close()
        self._folder.cleanup()

    def check(self) -> None:
        """Raise if one of them has died."""
        for process in self._processes:
            if process.poll() is not None:
                raise RuntimeError(f"a worker left with {process.returncode}: {self._complaints()[-3000:]}")

    def cpu_seconds(self) -> float:
        """Return the processor time used so far; 0 where /proc does not tell."""
        return sum(cpu_seconds(pid) for pid in self.pids)

    def _complaints(self) -> str:
        return "".join(Path(log.name).read_text(errors="replace") for log in self._logs).strip()
