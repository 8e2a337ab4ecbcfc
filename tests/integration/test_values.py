"""Product section 3: a step gives the same value on the first run and on replay; what cannot is refused by name."""

import dataclasses
import enum
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import DictRow
from pydantic import BaseModel

from pgconductor import Conductor, Context, ExecutionFailed, SyncContext
from tests.integration.conftest import Working

App = Conductor[None]
Db = psycopg.Connection[DictRow]


@dataclasses.dataclass
class Point:
    x: int
    label: str | None = None


class Order(BaseModel):
    id: int
    lines: list[str]


class Colour(enum.Enum):
    RED = "red"


VALUES: list[tuple[Any, Any]] = [
    (tuple[int, str], (1, "a")),
    (list[tuple[int, ...]], [(1, 2), ()]),
    (Order, Order(id=1, lines=["a"])),
    (dict[str, Order], {"a": Order(id=1, lines=[])}),
    (Point, Point(1, "ä \N{GRINNING FACE}")),
    (Decimal, Decimal("0.10")),
    (datetime, datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)),
    (date, date(2026, 1, 2)),
    (timedelta, timedelta(days=1, microseconds=1)),
    (UUID, UUID(int=7)),
    (bytes, b"\x00\xff"),
    (Colour, Colour.RED),
    (set[int], {1, 2}),
    (int, 2**63),
    (float, -0.0),
    (int, 0),
    (str, ""),
    (bool, False),
    (list[int], []),
    (dict[str, int], {}),
    (None, None),
    (str, "x" * (1024 * 1024 - 2)),
]
UNANNOTATED: list[Any] = [0, "", False, [], {}, None, 1.5, {"a": [1, {"b": None}]}, 2**62]


def giving(annotation: Any, value: Any) -> Callable[[], Any]:
    """A function that returns a value and is annotated with its type."""

    def give() -> Any:
        return value

    give.__annotations__["return"] = annotation
    return give


def circle() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


REFUSED: dict[str, Any] = {
    "nan": {"price": [float("nan")]},
    "infinity": float("inf"),
    "nul": "a\0b",
    "lone surrogate": ["a\ud800b"],
    "circle": circle(),
    "too large": "x" * (1024 * 1024 - 1),
    "tuple without annotation": (1, 2),
    "object": object(),
    "coroutine function": giving,
}


@pytest.mark.covers("F57")
async def test_a_step_gives_an_equal_value_on_the_first_run_and_on_replay(app: App, working: Working) -> None:
    seen: list[list[Any]] = []

    @app.task
    async def work(ctx: Context) -> None:
        values = [await ctx.step(f"value-{n}", giving(*pair)) for n, pair in enumerate(VALUES)]
        values += [await ctx.step(f"plain-{n}", UNANNOTATED.__getitem__, n) for n in range(len(UNANNOTATED))]
        seen.append(values)
        await ctx.sleep("resume", 0.01)

    async with working():
        await (await work.invoke()).result(30)
    expected = [value for _, value in VALUES] + UNANNOTATED
    assert seen == [expected, expected]
    assert [[type(each) for each in run] for run in seen] == [[type(each) for each in expected]] * 2


async def test_a_plain_handlers_step_does_the_same(app: App, working: Working) -> None:
    seen: list[list[Any]] = []

    @app.task
    def work(ctx: SyncContext) -> None:
        seen.append([ctx.step(f"value-{n}", giving(*pair)) for n, pair in enumerate(VALUES)])
        ctx.sleep("resume", 0.01)

    async with working():
        await (await work.invoke()).result(30)
    expected = [value for _, value in VALUES]
    assert seen == [expected, expected]


async def test_a_value_is_decoded_on_the_first_run_so_that_it_is_a_copy(app: App, working: Working) -> None:
    original = [1, 2]

    @app.task
    async def work(ctx: Context) -> bool:
        return await ctx.step("list", giving(list[int], original)) is original

    async with working():
        assert await (await work.invoke()).result(20) is False


@pytest.mark.covers("F58", "P13", "P14")
@pytest.mark.parametrize("value", [0, "", False, [], None, {}])
async def test_an_empty_result_comes_back_equal(app: App, working: Working, value: Any) -> None:
    @app.task
    async def work(ctx: Context) -> Any:
        return value

    async with working():
        result = await (await work.invoke()).result(20)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.covers("F56", "F57", "P9")
async def test_what_cannot_be_stored_fails_its_execution_alone_and_names_the_step(
    app: App, db: Db, working: Working
) -> None:
    @app.task
    async def step(ctx: Context, name: str) -> None:
        await ctx.step(f"the {name}", lambda: REFUSED[name])

    @app.task
    def plain(ctx: SyncContext, name: str) -> None:
        ctx.step(f"the {name}", lambda: REFUSED[name])

    @app.task
    async def result(ctx: Context, name: str) -> Any:
        return REFUSED[name]

    @app.task
    async def neighbour(ctx: Context, n: int) -> int:
        return n

    calls = [task.bind(name) for task in (step, plain, result) for name in REFUSED]
    bad = [await app.invoke(call) for call in calls]
    good = await app.invoke_many([neighbour.bind(n) for n in range(100)])
    async with working(concurrency=50):
        assert [await run.result(30) for run in good] == list(range(100))
        for run, call in zip(bad, calls, strict=True):
            with pytest.raises(ExecutionFailed) as caught:
                await run.result(30)
            assert caught.value.error_type == "pgconductor.errors.EncodeError"
            where = "cannot store result" if call.task == "result" else "cannot store step 'the "
            assert caught.value.message.startswith(where)
    rows = db.execute("select distinct attempt from failed_executions").fetchall()
    assert rows == [{"attempt": 1}]


async def test_an_encode_error_tells_the_path(app: App, working: Working) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        await ctx.step("load", lambda: REFUSED["nan"])

    async with working():
        with pytest.raises(ExecutionFailed, match=r"cannot store step 'load'\.price\[0\]"):
            await (await work.invoke()).result(20)


@pytest.mark.covers("P9")
async def test_outcomes_that_the_database_refuses_fail_alone_in_their_batch(app: App, db: Db, working: Working) -> None:
    db.execute("alter table execution add constraint no_seven check (result is null or result::text <> '7')")

    @app.task
    async def work(ctx: Context, n: int) -> int:
        return n

    runs = await app.invoke_many([work.bind(n) for n in range(50)])
    async with working(concurrency=50):
        for n, run in enumerate(runs):
            if n == 7:
                with pytest.raises(ExecutionFailed, match="no_seven"):
                    await run.result(30)
            else:
                assert await run.result(30) == n


async def test_a_payload_that_no_longer_decodes_fails_at_once(app: App, db: Db, working: Working) -> None:
    @app.task
    async def work(ctx: Context, n: int) -> int:
        return n

    run = await app.define_task("other", dict[str, str], int).with_options(delay="1h").invoke({"n": "text"})
    db.execute("update lane set task_id = (select id from task where name = 'other')")
    db.execute("update task set name = 'work' where name = 'other'")
    db.execute("update timer set due_at = clock_timestamp()")
    async with working():
        with pytest.raises(ExecutionFailed) as caught:
            await run.result(20)
    assert caught.value.error_type == "pgconductor.errors.DecodeError"
    assert "payload.n" in caught.value.message
