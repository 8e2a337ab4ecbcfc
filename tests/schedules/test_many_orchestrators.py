"""F5 53 and F1 21: several processes fire one schedule; they are killed and stopped in the middle of a tick."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.waiting import until

Db = psycopg.Connection[dict[str, Any]]
Spawn = Callable[[str], "Clock"]
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.fault


class Clock:
    """A process of clock_app.py with an armed fault."""

    def __init__(self, dsn: str, fault: str, fault_log: Path) -> None:
        self._fault_log = fault_log
        environment = os.environ | {"PGCONDUCTOR_FAULT": fault, "PGCONDUCTOR_FAULT_LOG": str(fault_log)}
        command = [sys.executable, "-m", "tests.schedules.clock_app", dsn]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment)

    def is_struck(self) -> bool:
        return self._fault_log.exists()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def spawn(database: str, tmp_path: Path) -> Iterator[Spawn]:
    started: list[Clock] = []

    def start(fault: str) -> Clock:
        started.append(Clock(database, fault, tmp_path / f"faults-{len(started)}.txt"))
        return started[-1]

    yield start
    for each in started:
        each.end()


def ticks(db: Db, state: str = "%") -> list[datetime]:
    """The ticks of the executions in a state, in order."""
    return [
        datetime.fromisoformat(row["tick"])
        for row in db.execute(
            "select trigger_data ->> 'scheduled_at' as tick from execution e join executions s using (id)"
            " where s.state like %s order by 1",
            (state,),
        )
    ]


def span(found: list[datetime]) -> int:
    """How many ticks there are from the first to the last of them."""
    return int((found[-1] - found[0]).total_seconds()) + 1 if found else 0


@pytest.mark.covers("F21", "F53")
@pytest.mark.slow
@pytest.mark.timeout(150)
async def test_sixty_ticks_are_sixty_executions_whoever_dies(spawn: Spawn, db: Db) -> None:
    killed, stopped, _ = spawn("before_fire:kill:4"), spawn("before_fire:stop:7"), spawn("")
    await until(lambda: killed.is_struck() and stopped.is_struck(), 60)
    await until(lambda: span(ticks(db)) >= 55, 90)
    stopped.process.send_signal(signal.SIGCONT)  # its answer is to a state that is long gone
    await until(lambda: span(ticks(db, "completed")) >= 60, 60)
    sixty = [tick for tick in ticks(db) if (tick - ticks(db)[0]).total_seconds() < 60]
    assert len(sixty) == len(set(sixty)) == 60
    await until(lambda: set(sixty) <= set(ticks(db, "completed")), 30)


@pytest.mark.covers("F21")
@pytest.mark.parametrize("point", ["before_fire", "after_fire"])
async def test_a_tick_outlives_the_only_process_that_fires_it(spawn: Spawn, db: Db, point: str) -> None:
    first = spawn(f"{point}:kill:2")
    await until(lambda: first.process.poll() is not None)
    spawn("")
    await until(lambda: len(ticks(db, "completed")) >= 3)
    found = ticks(db)
    assert len(found) == len(set(found)) == span(found)
