"""F5 52: what an outage leaves undone, by policy; and what a clock that is put back changes: nothing."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace

import pgconductor
from pgconductor.model import CatchUp
from pgconductor.schedules import DueSchedule, plan
from pgconductor.ticks import TICKS_MAX

SOURCE = Path(pgconductor.__file__).parent
START = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def due(expr: str, now: float, catch_up: CatchUp = "latest", decided: float = 0) -> DueSchedule:
    return DueSchedule(1, 7, expr, "UTC", catch_up, after(decided), after(now))


def slots(due: DueSchedule) -> list[float]:
    """The ticks that run, as seconds since the start."""
    return [(slot - START).total_seconds() for slot in plan(due).slots]


@pytest.mark.parametrize("catch_up", ["skip", "latest", "all"])
def test_each_tick_runs_however_few_seconds_late(catch_up: CatchUp) -> None:
    assert slots(due("* * * * * *", 3.5, catch_up)) == [1, 2, 3]
    assert slots(due("* * * * *", 90, catch_up, decided=30)) == [60]
    assert slots(due("* * * * *", 60, catch_up)) == [60]


@pytest.mark.covers("F52")
@pytest.mark.parametrize(
    ("catch_up", "expected"), [("skip", []), ("latest", [3600.0]), ("all", [600.0 * n for n in range(1, 7)])]
)
def test_ticks_of_an_outage_of_an_hour(catch_up: CatchUp, expected: list[float]) -> None:
    assert slots(due("*/10 * * * *", 3700, catch_up)) == expected


@pytest.mark.covers("F52")
@pytest.mark.parametrize(("catch_up", "count"), [("skip", 1), ("latest", 1), ("all", TICKS_MAX)])
def test_ticks_of_an_outage_of_a_day_are_bounded(catch_up: CatchUp, count: int) -> None:
    found = slots(due("* * * * *", 86_461.5, catch_up, decided=1))
    assert found == [60.0 * n for n in range(1442)][-count:]


@pytest.mark.covers("F52")
def test_skip_runs_a_tick_that_comes_at_the_end_of_an_outage() -> None:
    assert slots(due("0 * * * *", 2 * 3600 + 5, "skip")) == [7200]


def test_nothing_runs_before_the_next_tick() -> None:
    early = plan(due("*/10 * * * *", 599))
    assert early.slots == []
    assert early.next_at == after(600)


def test_the_answer_names_the_state_that_it_is_an_answer_to() -> None:
    fired = plan(due("*/10 * * * *", 601))
    assert (fired.id, fired.revision, fired.until, fired.next_at) == (1, 7, after(601), after(1200))


@pytest.mark.covers("F41")
def test_a_clock_that_is_put_back_fires_nothing_twice() -> None:
    back = plan(due("*/10 * * * *", 0, decided=3600))
    assert back.slots == []
    assert back.next_at == after(4200)


@pytest.mark.covers("F50", "P32")
def test_50_the_wall_clock_is_read_for_ids_and_for_what_people_see_alone() -> None:
    reading = re.compile(r"time\.time(_ns)?\(|datetime\.now\(|utcnow\(|\.today\(|[gl]\w+time\(\)")
    modules = {str(path.relative_to(SOURCE)): path.read_text() for path in SOURCE.rglob("*.py")}
    readers = {name for name, text in modules.items() if reading.search(text)}
    assert readers == {
        "ids.py",  # nothing relies on the order of ids
        "checks.py",  # in the text of an error
        "testing/harness.py",  # where a virtual clock begins
        "cli/run_page.py",
        "cli/text.py",
    }


@pytest.mark.covers("F51")
def test_a_zone_that_this_process_lacks_is_told_not_raised() -> None:
    gone = plan(replace(due("* * * * *", 60), zone="Mars/Olympus"))
    assert gone.slots == []
    assert "Mars/Olympus" in str(gone.error)


def test_an_expression_without_further_ticks_is_not_looked_at_again() -> None:
    last = DueSchedule(
        1, 1, "0 0 1 1 *", "UTC", "latest", datetime(9999, 1, 2, tzinfo=UTC), datetime(9999, 1, 3, tzinfo=UTC)
    )
    assert plan(last).next_at is None
