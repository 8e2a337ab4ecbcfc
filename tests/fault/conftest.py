"""Worker processes of their own for the fault tests, with armed faults and a ledger outside the database."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from pgconductor import Conductor
from tests.fault.workload import make_app
from tests.fault.worlds import mortal_server, pytest_runtest_makereport, world

__all__ = ["mortal_server", "pytest_runtest_makereport", "world"]

ROOT = Path(__file__).parents[2]
WAIT_SECONDS_MAX = 60


class Ledger:
    """What the workers' handlers and steps have noted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def count(self, *words: object) -> int:
        """Count the lines that begin with these words."""
        wanted = [str(word) for word in words]
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return sum(line.split()[: len(wanted)] == wanted for line in lines)

    def has(self, *words: object) -> bool:
        """Tell whether a line begins with these words."""
        return self.count(*words) > 0

    def release(self) -> None:
        """Let the handlers that wait go on."""
        (self.path.parent / "release").touch()


class Process:
    """A worker process."""

    def __init__(self, dsn: str, ledger: Ledger, fault: str, fault_log: Path) -> None:
        self._fault_log = fault_log
        environment = os.environ | {"PGCONDUCTOR_FAULT": fault, "PGCONDUCTOR_FAULT_LOG": str(fault_log)}
        command = [sys.executable, "-m", "tests.fault.workload", dsn, str(ledger.path)]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment)
        self.pid = self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; return the exit code."""
        return self._process.wait(WAIT_SECONDS_MAX)

    def fired(self) -> list[str]:
        """Return the names of the faults that have struck it."""
        lines = self._fault_log.read_text().splitlines() if self._fault_log.exists() else []
        return [line.split()[0] for line in lines]

    def end(self) -> None:
        """Kill it, whatever it does."""
        self._process.kill()
        self._process.wait()


Spawn = Callable[..., Process]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """An empty ledger."""
    return Ledger(tmp_path / "ledger.txt")


@pytest.fixture
async def workload(database: str, ledger: Ledger) -> AsyncIterator[Conductor[None]]:
    """The app that the spawned workers run, as a client."""
    async with make_app(database, ledger.path) as app:
        yield app


@pytest.fixture
def spawn(database: str, ledger: Ledger, tmp_path: Path) -> Iterator[Spawn]:
    """`spawn("point:kill")` starts a worker process; all are ended with the test."""
    processes: list[Process] = []

    def start(fault: str = "") -> Process:
        processes.append(Process(database, ledger, fault, tmp_path / f"faults-{len(processes)}.txt"))
        return processes[-1]

    yield start
    for process in processes:
        process.end()
