"""Handles of many calls are made with the garbage collector held off, and it is as it was afterwards."""

import gc
from typing import Any, cast

import pytest

from pgconductor import Conductor, Context
from pgconductor.run import runs_of
from pgconductor.task import Call

app = Conductor("postgresql://nowhere/nothing")


@app.task
async def work(ctx: Context, number: int) -> int:
    return number


@pytest.fixture(params=[True, False])
def collector_is_on(request: pytest.FixtureRequest) -> Any:
    (gc.enable if request.param else gc.disable)()
    yield request.param
    gc.enable()


def test_the_collector_is_as_it_was_after_many_handles(collector_is_on: bool) -> None:
    calls = [work.bind(number) for number in range(3)]
    assert [run.id.int for run in runs_of([f"{n:032x}" for n in range(3)], calls, app)] == [0, 1, 2]
    assert gc.isenabled() == collector_is_on


def test_the_collector_is_on_again_after_a_handle_that_could_not_be_made() -> None:
    with pytest.raises(AttributeError):
        runs_of(["x"], [cast("Call[Any]", None)], app)
    assert gc.isenabled()


def test_no_collection_comes_between_handles() -> None:
    phases: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        phases.append(phase)

    calls = [work.bind(number) for number in range(5_000)]
    ids = [f"{n:032x}" for n in range(5_000)]
    gc.collect()
    gc.callbacks.append(note)
    try:
        runs = runs_of(ids, calls, app)
    finally:
        gc.callbacks.remove(note)
    assert len(runs) == 5_000
    assert phases.count("start") <= 1  # when it is on again; one each 700 otherwise
