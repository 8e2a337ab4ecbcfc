"""Which fan-outs are sent as arrays."""

import json

import pytest

from pgconductor import Call, Conductor, Context
from pgconductor.journal import ALIKE_MIN, alike_children

app = Conductor("postgresql://nowhere/nothing")


@app.task
async def child(ctx: Context, n: int) -> int:
    return n


@app.task
async def other(ctx: Context, n: int) -> int:
    return n


def calls(count: int = ALIKE_MIN, **options: object) -> list[Call[int]]:
    task = child.with_options(**options) if options else child  # type: ignore[arg-type]
    return [task.bind(n) for n in range(count)]


def test_many_equal_calls_are_sent_as_arrays() -> None:
    alike = alike_children(calls())
    assert alike is not None
    assert (alike.task, alike.queue, alike.priority) == ("child", None, 0)
    assert json.loads(bytes(alike.payloads)) == [{"n": n} for n in range(ALIKE_MIN)]
    assert len(set(alike.ids)) == ALIKE_MIN
    assert alike.ids == sorted(alike.ids)


def test_queue_and_priority_go_along() -> None:
    alike = alike_children(calls(queue="other", priority=7))
    assert alike is not None
    assert (alike.queue, alike.priority) == ("other", 7)


@pytest.mark.parametrize(
    "given",
    [
        calls(ALIKE_MIN - 1),
        calls(delay=1),
        [*calls(), other.bind(1)],
        [*calls(), child.with_options(priority=1).bind(1)],
        [child.with_options(priority=1).bind(1), *calls()],
    ],
    ids=["few", "later", "another task", "another priority", "the first another"],
)
def test_others_are_sent_one_by_one(given: list[Call[int]]) -> None:
    assert alike_children(given) is None
