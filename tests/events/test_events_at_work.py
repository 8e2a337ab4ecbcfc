"""Events in handlers and clients, with real workers."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from pydantic import AliasChoices, AliasPath, BaseModel, Field

from pgconductor import (
    BatchContext,
    Change,
    Conductor,
    Context,
    EncodeError,
    Event,
    ExecutionFailed,
    Orchestrator,
    RetryPolicy,
    SyncContext,
    WaitTimeout,
    event,
    invocable,
    table,
)
from pgconductor.errors import ConfigurationError
from tests.events.support import emit as emit_by_sql
from tests.integration.conftest import Working
from tests.waiting import until_row

App = Conductor[None]
Db = psycopg.Connection[dict[str, Any]]
AT_ONCE = RetryPolicy(first=0.01, max=0.01)


@dataclass
class Paid:
    order_id: int
    cents: int = 0
    note: str = ""


@dataclass
class Amount:
    cents: int


class Shipped(BaseModel):
    order_id: int


class Numbered(BaseModel):
    order_id: int = Field(alias="orderId")


class Billed(Numbered):
    cents: int = Field(validation_alias=AliasChoices("amount", AliasPath("price", "cents")))
    note: str = ""


WAITS = "select 1 from event_wait"


# ---------------------------------------------------------------- starting tasks


async def test_an_event_reaches_the_handlers_that_subscribe(app: App, working: Working) -> None:
    paid = app.event("order.paid", Paid)
    seen: asyncio.Queue[tuple[str, str, object]] = asyncio.Queue()

    @app.task(on=event(paid))
    async def whole(ctx: Context, it: Event[Paid]) -> None:
        await seen.put(("whole", it.name, it.payload))

    @app.task(on=event(paid, fields=["cents"], where="$.cents > 1000"))
    def large(ctx: SyncContext, it: Event[Amount]) -> None:
        asyncio.run_coroutine_threadsafe(seen.put(("large", ctx.trigger, it.payload)), loop)

    loop = asyncio.get_running_loop()
    async with working():
        await app.emit(paid, Paid(7, cents=500))
        assert await seen.get() == ("whole", "order.paid", Paid(7, 500))
        await app.emit(paid, Paid(8, cents=5000))
        found = sorted([await seen.get(), await seen.get()], key=lambda each: each[0])
    assert found == [("large", "order.paid", Amount(5000)), ("whole", "order.paid", Paid(8, 5000))]
    assert seen.empty()


async def test_a_task_that_events_and_calls_start_tells_them_apart(app: App, working: Working) -> None:
    paid = app.event("order.paid", dict[str, Any])

    @app.task(on=[event(paid), invocable()])
    async def handle(ctx: Context, it: Event[dict[str, Any]] | None = None, order: dict[str, Any] | None = None) -> Any:
        return [ctx.trigger, None if it is None else it.payload, order]

    async with working():
        looks_like_one = {"event": "order.paid", "payload": {"n": 1}}
        run = await handle.invoke(order=looks_like_one)
        assert await run.result(20) == ["invoke", None, looks_like_one]


async def test_code_that_is_gone_is_started_no_more(database: str, db: Db) -> None:
    for has_trigger in (True, False):
        async with Conductor(database) as app:
            paid = app.event("order.paid", Paid)

            @app.task(on=[event(paid), invocable()] if has_trigger else invocable())
            async def handle(ctx: Context, it: Event[Paid] | None = None) -> None: ...

            async with Orchestrator(app):
                await app.emit(paid, Paid(1))
    assert db.execute("select count(*) as count from execution").fetchone() == {"count": 1}


async def test_a_predicate_that_postgres_cannot_read_stops_the_start(app: App, working: Working) -> None:
    paid = app.event("order.paid", Paid)

    @app.task(on=event(paid, where="cents >> 3"))
    async def handle(ctx: Context, it: Event[Paid]) -> None: ...

    with pytest.raises(ConfigurationError, match="jsonpath input") as refused:
        async with working():
            pass
    assert refused.value.place == "task 'handle': event('order.paid'): where"


def test_fields_that_are_not_there_or_not_enough_are_refused(app: App) -> None:
    paid, shipped = app.event("order.paid", Paid), app.event("order.shipped", Shipped)

    async def takes_paid(ctx: Context, it: Event[Paid]) -> None: ...
    async def takes_shipped(ctx: Context, it: Event[Shipped] | None = None) -> None: ...

    with pytest.raises(ConfigurationError, match="'centz' is not a field"):
        app.create_task(takes_paid, on=event(paid, fields=["centz"]))
    with pytest.raises(ConfigurationError, match="needs 'order_id' too"):
        app.create_task(takes_paid, on=event(paid, fields=["cents"]))
    with pytest.raises(ConfigurationError, match="'n' is not a field"):
        app.create_task(takes_shipped, on=event(shipped, fields=["n"]))
    app.create_task(takes_paid, on=event(paid, fields=["order_id"]))


async def test_fields_of_a_model_with_aliases_are_handed_on_by_name(app: App, working: Working) -> None:
    billed = app.event("order.billed", Billed)
    seen: asyncio.Queue[Numbered] = asyncio.Queue()

    @app.task(on=event(billed, fields=["order_id"]))
    async def handle(ctx: Context, it: Event[Numbered]) -> None:
        await seen.put(it.payload)

    async with working():
        await app.emit(billed, Billed.model_validate({"orderId": 7, "amount": 500}))
        assert (await asyncio.wait_for(seen.get(), 20)).order_id == 7


def test_what_a_model_with_aliases_needs_may_be_given_by_either_name(app: App) -> None:
    billed = app.event("order.billed", Billed)

    async def takes_billed(ctx: Context, it: Event[Billed]) -> None: ...
    async def takes_row(ctx: Context, it: Change[Billed]) -> None: ...

    with pytest.raises(ConfigurationError, match="'orderId' is not a field"):
        app.create_task(takes_billed, on=event(billed, fields=["orderId", "cents"]))
    with pytest.raises(ConfigurationError, match="needs 'order_id' too"):
        app.create_task(takes_billed, on=event(billed, fields=["cents", "note"]))
    with pytest.raises(ConfigurationError, match="needs 'cents' too"):
        app.create_task(takes_row, on=table("bill", "insert", columns=["orderId", "note"]))
    app.create_task(takes_billed, on=event(billed, fields=["order_id", "cents"]))
    for number, columns in enumerate([["orderId", "amount"], ["order_id", "price"], ["order_id", "cents"]]):
        app.create_task(takes_row, on=table("bill", "insert", columns=columns), name=f"row {number}")


def test_a_type_that_no_json_can_hold_is_no_events(app: App) -> None:
    with pytest.raises(ConfigurationError):
        app.event("order.paid", asyncio.Queue)


# ---------------------------------------------------------------- emitting


async def test_a_payload_is_checked_before_it_is_sent(app: App, db: Db) -> None:
    paid = app.event("order.paid", Paid)
    with pytest.raises(EncodeError, match=r"event 'order\.paid'"):
        await app.emit(paid, Paid(7, cents="many"))  # type: ignore[arg-type]
    with pytest.raises(EncodeError, match="U\\+0000"):
        await app.emit(paid, Paid(7, note="\0"))
    with pytest.raises(EncodeError, match="at most"):
        await app.emit(paid, Paid(7, note="x" * 2_000_000))
    assert db.execute("select from event").fetchall() == []


async def test_an_emit_in_the_callers_transaction_shares_its_fate(app: App, database: str, db: Db) -> None:
    paid = app.event("order.paid", Paid)
    async with await psycopg.AsyncConnection.connect(database) as conn:
        await app.emit(paid, Paid(1), conn=conn)
        assert db.execute("select from event").fetchall() == []
        await conn.rollback()
        id = await app.emit(paid, Paid(2), conn=conn)
        await conn.commit()
    assert db.execute("select id, payload from events").fetchall() == [
        {"id": id, "payload": {"order_id": 2, "cents": 0, "note": ""}}
    ]


def test_code_without_a_loop_emits_too(database: str, db: Db) -> None:
    app = Conductor(database)
    paid = app.event("order.paid", Paid)
    first = app.emit_sync(paid, Paid(1))
    with psycopg.connect(database) as conn:
        second = app.emit_sync(paid, Paid(2), conn=conn)
    assert [each["id"] for each in db.execute("select id from event order by ord").fetchall()] == [first, second]
    asyncio.run(app.close())


async def test_a_connection_of_the_wrong_kind_is_refused(app: App, database: str, db: Db) -> None:
    paid = app.event("order.paid", Paid)
    with psycopg.connect(database) as conn, pytest.raises(TypeError, match="synchronous"):
        await app.emit(paid, Paid(1), conn=conn)
    assert db.execute("select from event").fetchall() == []


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_handler_emits_once_whatever_happens_to_it(app: App, db: Db, working: Working, is_async: bool) -> None:
    paid = app.event("order.paid", Paid)
    ids: list[list[str]] = []

    def fails_twice(seen: list[str]) -> None:
        ids.append(seen)
        if len(ids) < 3:
            raise ValueError("again")

    @app.task(retry=AT_ONCE, name="emitter")
    async def on_loop(ctx: Context) -> None:
        fails_twice([str(await ctx.emit(paid, Paid(n))) for n in (1, 2)])
        await ctx.sleep("nap", 0.01)

    @app.task(retry=AT_ONCE, name="plain emitter")
    def in_thread(ctx: SyncContext) -> None:
        fails_twice([str(ctx.emit(paid, Paid(n))) for n in (1, 2)])
        ctx.sleep("nap", 0.01)

    async with working():
        await (await (on_loop if is_async else in_thread).invoke()).result(20)
    stored = [str(each["id"]) for each in db.execute("select id from event order by ord").fetchall()]
    assert len(ids) == 4
    assert all(seen == stored for seen in ids)
    names = db.execute("select name from step where kind = 'call' order by name").fetchall()
    assert names == [{"name": "emit:order.paid#1"}, {"name": "emit:order.paid#2"}]


async def test_an_event_of_a_long_name_can_be_emitted(app: App, db: Db, working: Working) -> None:
    long = app.event("x" * 200, int)

    @app.task
    async def emitter(ctx: Context) -> None:
        await ctx.emit(long, 1)

    async with working():
        await (await emitter.invoke()).result(20)
    assert db.execute("select payload from events").fetchall() == [{"payload": 1}]


# ---------------------------------------------------------------- waiting


@pytest.mark.parametrize("emitter", ["client", "sql", "handler"])
async def test_a_wait_returns_the_payload(app: App, db: Db, working: Working, emitter: str) -> None:
    paid = app.event("order.paid", Paid)

    @app.task
    async def order(ctx: Context, id: int) -> Paid:
        return await ctx.wait_for("payment", paid, where={"order_id": id})

    @app.task
    async def pay(ctx: Context, id: int) -> None:
        await ctx.emit(paid, Paid(id, 5))

    async with working():
        run = await order.invoke(7)
        await until_row(db, WAITS)
        assert await run.state() == "waiting"
        await app.emit(paid, Paid(8, 3))
        if emitter == "client":
            await app.emit(paid, Paid(7, 5))
        elif emitter == "sql":
            emit_by_sql(db, {"order_id": 7, "cents": 5})
        else:
            await pay.invoke(7)
        assert await run.result(20) == Paid(7, 5)


async def test_a_plain_handler_waits_too(app: App, db: Db, working: Working) -> None:
    paid = app.event("order.paid", Paid)

    @app.task
    def order(ctx: SyncContext) -> list[int]:
        return [ctx.wait_for(f"payment {n}", paid).order_id for n in range(3)]

    async with working():
        run = await order.invoke()
        for n in range(3):
            await app.emit(paid, Paid(n))
        assert await run.result(20) == [0, 1, 2]


async def test_waits_side_by_side_are_answered_as_events_come(app: App, db: Db, working: Working) -> None:
    paid, shipped = app.event("order.paid", Paid), app.event("order.shipped", Shipped)

    @app.task
    async def order(ctx: Context) -> list[int]:
        first, second, third = await asyncio.gather(
            ctx.wait_for("shipment", shipped), ctx.wait_for("a", paid), ctx.wait_for("b", paid)
        )
        return [first.order_id, *sorted([second.order_id, third.order_id])]

    async with working():
        run = await order.invoke()
        await app.emit(paid, Paid(1))
        await until_row(db, "select 1 from step where kind = 'wait_for' and status = 'completed'")
        await app.emit(shipped, Shipped(order_id=9))
        await app.emit(paid, Paid(2))
        assert await run.result(20) == [9, 1, 2]


async def test_a_timeout_is_an_outcome_that_stays(app: App, working: Working) -> None:
    paid = app.event("order.paid", Paid)
    caught: list[WaitTimeout] = []

    @app.task(max_attempts=1)
    async def order(ctx: Context) -> str:
        try:
            await ctx.wait_for("payment", paid, timeout=0.05)
        except WaitTimeout as error:
            caught.append(error)
        await ctx.sleep("nap", 0.01)
        return "unpaid"

    async with working():
        assert await (await order.invoke()).result(20) == "unpaid"
    assert [(error.step, error.timeout) for error in caught] == [("payment", timedelta(seconds=0.05))] * 2


async def test_an_uncaught_timeout_fails_the_attempt_and_the_next_one_waits_afresh(
    app: App, db: Db, working: Working
) -> None:
    paid = app.event("order.paid", Paid)

    @app.task(retry=AT_ONCE, max_attempts=3)
    async def order(ctx: Context) -> int:
        await ctx.wait_for("payment", paid, timeout=0.05 if ctx.attempt == 1 else 20)
        return ctx.attempt

    async with working():
        run = await order.invoke()
        await until_row(db, "select 1 from event_wait where round = 1")
        await app.emit(paid, Paid(1))
        assert await run.result(20) == 2


async def test_a_cancelled_wait_ends_at_once(app: App, db: Db, working: Working) -> None:
    paid = app.event("order.paid", Paid)

    @app.task
    async def order(ctx: Context) -> None:
        await ctx.wait_for("payment", paid)

    async with working():
        run = await order.invoke()
        await until_row(db, WAITS)
        assert await run.cancel()
        assert (await run.state(), db.execute(WAITS).fetchall()) == ("cancelled", [])


async def test_a_redriven_execution_hears_the_event(app: App, db: Db, working: Working) -> None:
    paid = app.event("order.paid", Paid)

    @app.task
    async def order(ctx: Context) -> int:
        return (await ctx.wait_for("payment", paid)).order_id

    async with working():
        run = await order.invoke()
        await until_row(db, WAITS)
        await run.cancel()
        assert await app.retry(run.id)
        await app.emit(paid, Paid(3))
        assert await run.result(20) == 3


async def test_a_payload_that_is_not_of_the_type_fails_the_execution(app: App, db: Db, working: Working) -> None:
    paid = app.event("order.paid", Paid)

    @app.task
    async def order(ctx: Context) -> None:
        await ctx.wait_for("payment", paid)

    async with working():
        run = await order.invoke()
        await until_row(db, WAITS)
        emit_by_sql(db, {"order_id": "seven"})
        with pytest.raises(ExecutionFailed, match="order_id"):
            await run.result(20)


async def test_a_wait_that_now_means_another_event_is_a_mismatch(app: App, db: Db, working: Working) -> None:
    paid, shipped = app.event("order.paid", Paid), app.event("order.shipped", Shipped)

    @app.task(max_attempts=1)
    async def order(ctx: Context) -> None:
        if db.execute("select from event").fetchall():
            await ctx.wait_for("it", shipped)
        await ctx.wait_for("it", paid)

    async with working():
        run = await order.invoke()
        await until_row(db, WAITS)
        await app.emit(paid, Paid(1))
        with pytest.raises(ExecutionFailed, match=r"wait_for of 'order\.paid'"):
            await run.result(20)


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ([1], "is not a dict"),
        ({"a": float("nan")}, "not a JSON number"),
        ({"a": UUID(int=7)}, r"where\.a: .* as the str .*; write it as the payload's JSON has it, such as `str\(order"),
    ],
)
async def test_where_must_be_a_dict_of_plain_values(app: App, working: Working, where: Any, fault: str) -> None:
    paid = app.event("order.paid", Paid)

    @app.task(max_attempts=1)
    async def order(ctx: Context) -> None:
        await ctx.wait_for("payment", paid, where=where)

    async with working():
        with pytest.raises(ExecutionFailed, match=fault):
            await (await order.invoke()).result(20)


async def test_a_wait_under_a_step_that_runs_is_answered(app: App, db: Db, working: Working) -> None:
    paid = app.event("order.paid", Paid)
    gate = asyncio.Event()

    @app.task
    async def order(ctx: Context) -> int:
        _, payment = await asyncio.gather(ctx.step("slow", gate.wait), ctx.wait_for("payment", paid))
        return payment.order_id

    async with working():
        run = await order.invoke()
        await until_row(db, WAITS)
        await app.emit(paid, Paid(4))
        await until_row(db, "select 1 from step where kind = 'wait_for' and status = 'completed'")
        gate.set()
        assert await run.result(20) == 4


async def test_many_executions_each_get_their_own_event(app: App, db: Db, working: Working) -> None:
    paid = app.event("order.paid", Paid)

    @app.task
    async def order(ctx: Context, id: int) -> int:
        return (await ctx.wait_for("payment", paid, where={"order_id": id})).cents

    async with working(concurrency=50):
        runs = await app.invoke_many([order.bind(n) for n in range(200)])
        await asyncio.gather(*(app.emit(paid, Paid(n, cents=n * 2)) for n in range(200)))
        assert await asyncio.gather(*(run.result(30) for run in runs)) == [n * 2 for n in range(200)]
    assert db.execute("select from event_pending").fetchall() == db.execute("select from event_wait").fetchall() == []


async def test_a_batch_context_has_no_events(app: App) -> None:
    assert not hasattr(BatchContext, "wait_for")
