"""Worker processes: started together, watched, stopped."""

import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.machine import cpu_seconds
from benchmarks.marks import Seen

READY_SECONDS_MAX = 60
STOP_SECONDS_MAX = 40


class Fleet:
    """Some worker processes; leaving the block stops them.

    Args:
        dsn: Their database.
        size: How many.
        count: How many jobs they will mark.
        concurrency: How many executions each runs at once.
    """

    def __init__(self, dsn: str, size: int, count: int, concurrency: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pgconductor-bench-")
        directory = Path(self._folder.name)
        self._ready = [directory / f"ready.{number}" for number in range(size)]
        self._logs = [(directory / f"log.{number}").open("wb+") for number in range(size)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", dsn, directory, str(number), str(count), str(concurrency)],
                stdout=log,
                stderr=log,
            )
            for number, log in enumerate(self._logs)
        ]
        self.seen = Seen([directory / f"marks.{number}" for number in range(size)], count)

    @property
    def pids(self) -> list[int]:
        """The processes."""
        return [process.pid for process in self._processes]

    async def __aenter__(self) -> Self:
        """Wait until all are connected."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        while not all(path.exists() for path in self._ready):
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError("the workers are not ready")
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop them gracefully; what they complained of is printed."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                await asyncio.to_thread(process.wait, STOP_SECONDS_MAX)
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
