"""F5 50 and 53, F1 21: processes that fire one schedule; they are killed and stopped in the middle of a tick.

Nobody leads, so nobody need be found dead before another fires: the bound of 15 seconds holds by the poll interval.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fault.clocks import FAST, SLOW, needs_faketime, wrong_clock
from tests.waiting import until

Db = psycopg.Connection[dict[str, Any]]
Spawn = Callable[..., "Clock"]
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.fault


class Clock:
    """A process of clock_app.py with an armed fault."""

    def __init__(self, dsn: str, fault: str, fault_log: Path, beat: float, clock: Mapping[str, str]) -> None:
        self._fault_log = fault_log
        environment = os.environ | {"PGCONDUCTOR_FAULT": fault, "PGCONDUCTOR_FAULT_LOG": str(fault_log), **clock}
        command = [sys.executable, "-m", "tests.schedules.clock_app", dsn, str(beat)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment)

    def is_struck(self) -> bool:
        return self._fault_log.exists()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def spawn(database: str, tmp_path: Path) -> Iterator[Spawn]:
    started: list[Clock] = []

    def start(fault: str = "", *, beat: float = 0.2, clock: Mapping[str, str] | None = None) -> Clock:
        started.append(Clock(database, fault, tmp_path / f"faults-{len(started)}.txt", beat, clock or {}))
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


@pytest.mark.covers("F21")
async def test_the_next_tick_is_fired_before_anybody_misses_a_beat_of_who_was_killed(spawn: Spawn, db: Db) -> None:
    doomed, _ = spawn("before_fire:kill:2", beat=3600), spawn(beat=3600)
    await until(lambda: doomed.process.poll() is not None)
    known = len(ticks(db))
    await until(lambda: len(ticks(db)) >= known + 3)
    found = ticks(db)
    assert len(found) == len(set(found)) == span(found)
    assert db.execute("select from orchestrator").rowcount == 2  # nobody has been found dead


@needs_faketime
@pytest.mark.covers("F50", "P32")
@pytest.mark.parametrize("clock", [FAST, SLOW])
async def test_a_process_whose_clock_is_wrong_fires_each_tick_once_when_the_database_comes_to_it(
    spawn: Spawn, db: Db, clock: str
) -> None:
    (before,) = db.execute("select clock_timestamp() as at").fetchall()
    spawn(clock=wrong_clock(clock))
    await until(lambda: len(ticks(db, "completed")) >= 3)
    found = ticks(db)
    assert len(found) == len(set(found)) == span(found)
    assert found[0] >= before["at"]
    early = "select from execution where created_at < (trigger_data ->> 'scheduled_at')::timestamptz"
    assert db.execute(early).rowcount == 0
