"""Windows, limits, expiry, batches and row changes under the testing kit's clock."""

from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from pgconductor import (
    Batch,
    BatchContext,
    Change,
    Conductor,
    Context,
    ExecutionFailed,
    RateLimit,
    table,
)
from pgconductor.errors import ConfigurationError
from pgconductor.testing import ConductorTest, Harness

FAR = timedelta(days=2)


@pytest.fixture
def app() -> Conductor[None]:
    return Conductor()


def hours_from(t: Harness[Any], first: int, last: int) -> tuple[str, str, str]:
    """Return a window that begins and ends so many hours after the test's clock."""
    begin, end = (t.now + timedelta(hours=first), t.now + timedelta(hours=last))
    return begin.strftime("%H:%M"), end.strftime("%H:%M"), "UTC"


async def test_advance_stops_where_a_window_opens(app: Conductor[None], conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    ran_at: list[datetime] = []

    @app.task(window=hours_from(t, 3, 5))
    async def nightly(ctx: Context) -> None:
        ran_at.append(t.now)

    await nightly.invoke()
    await t.drain()
    assert ran_at == []
    await t.advance(days=1)

    (found,) = ran_at
    assert timedelta(hours=2, minutes=59) <= found - (t.now - timedelta(days=1)) <= timedelta(hours=3)


async def test_a_sleep_that_ends_outside_of_the_window_goes_on_when_it_opens(
    app: Conductor[None], conductor_test: ConductorTest
) -> None:
    t = await conductor_test(app)
    start = t.now

    @app.task(window=hours_from(t, -1, 1))
    async def nightly(ctx: Context) -> float:
        await ctx.sleep("over the end", "4h")
        return (t.now - start) / timedelta(hours=1)

    run = await nightly.invoke()
    await t.advance(FAR)

    assert 22.9 < await run.result() <= 23


async def test_advance_lets_in_what_a_rate_limit_held_back(app: Conductor[None], conductor_test: ConductorTest) -> None:
    @app.task(rate_limit=RateLimit(2, per="1m", key="account"))
    async def call_api(ctx: Context, account: str, number: int) -> int:
        return number

    t = await conductor_test(app)
    runs = await app.invoke_many([call_api.bind(account, n) for n in range(6) for account in ("ada", "bob")])
    await t.advance("3m")

    assert [await run.result() for run in runs] == [n for n in range(6) for _ in range(2)]


async def test_the_first_call_before_any_drain_expires(app: Conductor[None], conductor_test: ConductorTest) -> None:
    @app.task(expires="1m", rate_limit=RateLimit(1, per="1h"))
    async def work(ctx: Context) -> None: ...

    t = await conductor_test(app)
    first, second = await app.invoke_many([work.bind(), work.bind()])
    await t.advance("2m", raise_errors=False)

    await first.result()
    with pytest.raises(ExecutionFailed, match="was not started within"):
        await second.result()


async def test_a_batch_takes_what_is_ready_up_to_its_size(app: Conductor[None], conductor_test: ConductorTest) -> None:
    sizes: list[int] = []

    @app.task(batch=Batch(size=3, timeout="1h"))
    async def index(ctx: BatchContext, ids: list[int]) -> list[str]:
        sizes.append(len(ids))
        return [f"indexed {id}" for id in ids]

    t = await conductor_test(app)
    runs = await app.invoke_many([index.bind(n) for n in range(7)])
    await t.drain()

    assert [await run.result() for run in runs] == [f"indexed {n}" for n in range(7)]
    assert sizes == [3, 3, 1]


async def test_the_error_of_a_batch_is_raised_as_itself(app: Conductor[None], conductor_test: ConductorTest) -> None:
    @app.task(batch=Batch(size=3, timeout=1), max_attempts=1)
    async def index(ctx: BatchContext, ids: list[int]) -> list[int]:
        raise LookupError("no index")

    t = await conductor_test(app)
    await app.invoke_many([index.bind(n) for n in range(2)])

    with pytest.raises(ExceptionGroup) as failure:
        await t.drain()
    assert [type(error) for error in failure.value.exceptions] == [LookupError, LookupError]


async def test_a_row_change_starts_its_task_once_the_test_has_made_the_table(
    app: Conductor[None], conductor_test: ConductorTest
) -> None:
    found: list[Any] = []

    @app.task(on=table("public.contact", "insert", columns=["id"]))
    async def welcome(ctx: Context, change: Change[dict[str, Any]]) -> None:
        found.append(change.new)

    t = await conductor_test(app)
    await t.drain()
    with psycopg.connect(t.dsn, autocommit=True) as connection:
        connection.execute("create table public.contact (id int)")
        await t.drain()
        connection.execute("insert into public.contact values (7)")
    await t.drain()

    assert found == [{"id": 7}]


async def test_assert_invoked_refuses_what_is_no_call(app: Conductor[None], conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)

    with pytest.raises(ConfigurationError, match="assert_invoked: 5 is not a call"):
        t.assert_invoked(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
