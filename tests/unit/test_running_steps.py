"""Which steps a beat tells of."""

import pytest

from pgconductor import running_steps
from pgconductor.running_steps import TOLD_MAX, TOLD_SECONDS, RunningStep, RunningSteps

KEY = ("execution", "charge")


class Clock:
    """Stands for `time`, at an instant of the test's choice."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(running_steps, "time", clock)
    return clock


def test_a_step_is_told_of_once_its_code_has_run_for_a_moment_and_until_it_ends(clock: Clock) -> None:
    steps = RunningSteps()
    assert steps.told() is None
    steps.begin(KEY)
    assert steps.told() is None
    clock.now += TOLD_SECONDS
    assert steps.told() == [RunningStep(*KEY, TOLD_SECONDS)]
    steps.end(KEY)
    assert steps.told() is None


def test_a_failed_try_is_told_of_in_its_pause_and_during_the_next_one(clock: Clock) -> None:
    steps = RunningSteps()
    steps.begin(KEY)
    steps.end(KEY)
    assert steps.pause(KEY, 1, 3, ValueError("declined\nby the bank"), 30.0) == 30.0
    clock.now += 10
    assert steps.told() == [RunningStep(*KEY, None, 1, 3, "ValueError: declined", 20.0)]
    clock.now += 20
    steps.begin(KEY)
    clock.now += 2
    assert steps.told() == [RunningStep(*KEY, 2.0, 2, 3, "ValueError: declined")]
    steps.end(KEY)
    assert steps.told() is None


def test_a_pause_that_was_left_is_forgotten_when_it_is_over(clock: Clock) -> None:
    steps = RunningSteps()
    steps.pause(KEY, 1, 3, ValueError(), 5.0)
    clock.now += 6
    assert steps.told() is None
    assert steps.is_empty


def test_those_that_have_lasted_longest_are_told_first_and_no_more_than_fit(clock: Clock) -> None:
    steps = RunningSteps()
    for number in range(TOLD_MAX + 10):
        steps.begin(("execution", f"step {number}"))
        clock.now += 1
    told = steps.told() or []
    assert [each.step for each in told] == [f"step {number}" for number in range(TOLD_MAX)]


def test_where_time_stands_still_nothing_pauses() -> None:
    assert RunningSteps(pauses=False).pause(KEY, 1, 3, ValueError(), 30.0) == 0.0
