"""Handlers alone, without a database. These tests double as examples."""

import asyncio
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from pgconductor import (
    ChildFailed,
    Conductor,
    ConductorError,
    Context,
    DuplicateStep,
    EncodeError,
    Fail,
    Retry,
    RetryPolicy,
    SyncContext,
)
from pgconductor.errors import ConfigurationError
from pgconductor.testing import FakeContext, FakeSyncContext
from tests.testing.orders_app import Bank, Deps, Receipt, archive, charge, checkout, close_day, place, ship_soon

app = Conductor(name="fakes")
WRONG: Any = "five"


async def test_checkout_without_a_database() -> None:
    ctx = FakeContext(results={"charge": Receipt("charge-9", 700)})

    assert await checkout(ctx, 7) == "charge-9"

    assert ctx.calls == [
        ("step", "price", (7,)),
        ("invoke", "charge", charge.bind(700)),
        ("sleep", "cool-off", timedelta(days=1)),
    ]


async def test_a_step_runs_with_the_deps_of_the_test() -> None:
    bank = Bank()
    assert await charge(FakeContext(deps=Deps(bank)), 500) == Receipt("charge-1", 500)
    assert bank.charged == [500]


async def test_a_result_takes_the_place_of_a_step() -> None:
    ctx = FakeContext(deps=Deps(Bank(failures_left=1)), results={"bank": "charge-5"})
    assert await charge(ctx, 500) == Receipt("charge-5", 500)


async def test_an_error_among_the_results_is_raised() -> None:
    ctx = FakeContext(results={"charge": ChildFailed("card declined")})
    with pytest.raises(ChildFailed, match="Child execution failed: card declined"):
        await checkout(ctx, 7)


async def test_a_missing_result_says_what_to_give() -> None:
    with pytest.raises(AssertionError, match=r"invoke 'charge' has no result: give FakeContext\(results=\{'charge'"):
        await checkout(FakeContext(), 7)


async def test_a_result_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(EncodeError, match="annotation is"):
        await checkout(FakeContext(results={"charge": "charge-9"}), 7)


async def test_children_of_a_fan_out_get_their_results_in_order() -> None:
    ctx = FakeContext(results={"charges": [Receipt("a", 100), Receipt("b", 200)]})
    assert await close_day(ctx, [1, 2]) == ["a", "b"]


async def test_failed_children_of_a_fan_out_come_as_a_group() -> None:
    ctx = FakeContext(results={"charges": [Receipt("a", 100), ChildFailed("declined")]})
    with pytest.raises(ExceptionGroup) as caught:
        await close_day(ctx, [1, 2])
    assert [str(error) for error in caught.value.exceptions] == ["Child execution failed: declined"]


async def test_as_many_results_as_calls_are_needed() -> None:
    with pytest.raises(AssertionError, match="2 calls, but 1 results are given"):
        await close_day(FakeContext(results={"charges": [Receipt("a", 100)]}), [1, 2])


async def test_a_transaction_needs_a_result() -> None:
    assert await place(FakeContext(results={"insert": 7}), 7) == 7
    with pytest.raises(AssertionError, match=r"transaction 'insert' has no result: .*conductor_test"):
        await place(FakeContext(), 7)


def test_a_plain_handler_is_called_as_it_is() -> None:
    ctx = FakeSyncContext[None]()
    assert archive(ctx, 3) == 8
    assert [call.verb for call in ctx.calls] == ["step", "sleep", "step"]


@app.task
async def race(ctx: Context, orders: list[int]) -> list[str]:
    children = [await ctx.start(f"ship-{order}", ship_soon.bind(order)) for order in orders]
    done, late = await ctx.wait("first", children, count=1, timeout="1h")
    for child in late:
        await ctx.cancel(child.id, "too late")
    return [await child.result() for child in done]


async def test_the_first_child_with_a_result_wins() -> None:
    ctx = FakeContext(results={"ship-2": "parcel-2"})
    assert await race(ctx, [1, 2]) == ["parcel-2"]
    assert ctx.calls[-1][0] == "cancel"
    assert ctx.calls[-1].value == "too late"


async def test_a_wait_that_is_not_answered_times_out() -> None:
    assert await race(FakeContext(), [1, 2]) == []


async def test_the_result_of_a_wait_names_who_has_ended() -> None:
    ctx = FakeContext(results={"first": ["ship-1"], "ship-1": "parcel-1", "ship-2": "parcel-2"})
    assert await race(ctx, [1, 2]) == ["parcel-1"]


async def test_a_wait_without_results_says_what_to_give() -> None:
    ctx = FakeContext[None]()
    child = await ctx.start("ship", ship_soon.bind(1))
    with pytest.raises(AssertionError, match=r"start 'ship' has no result: .*'all' waits for 1 of 1"):
        await ctx.wait("all", [child])


@dataclass
class Paid:
    cents: int


paid = app.event("paid", Paid)


@app.task
async def announce(ctx: Context, target: UUID) -> bool:
    event = await ctx.wait_for("payment", paid, timeout="1h")
    await ctx.emit(paid, Paid(event.cents * 2))
    await ctx.schedule("daily", announce.bind(target), cron="@daily")
    await ctx.sleep_until("noon", datetime(2030, 1, 1, 12, tzinfo=UTC))
    await ctx.checkpoint()
    await ctx.unschedule("daily", announce)
    return await ctx.cancel(target, "done")


async def test_what_reaches_out_is_noted() -> None:
    target = uuid4()
    ctx = FakeContext(results={"payment": Paid(5), "cancel#1": False})

    assert await announce(ctx, target) is False

    assert ctx.calls == [
        ("wait_for", "payment", None),
        ("emit", "paid", Paid(10)),
        ("schedule", "daily", announce.bind(target)),
        ("sleep_until", "noon", datetime(2030, 1, 1, 12, tzinfo=UTC)),
        ("checkpoint", "", None),
        ("unschedule", "daily", "announce"),
        ("cancel", str(target), "done"),
    ]


async def flaky(ctx: Context[Bank], cents: int) -> str:
    steady = ctx.step_options(max_attempts=3, retry=RetryPolicy(first="1h", give_up_on=[KeyError]))
    return await steady.step("bank", ctx.deps.charge, cents)


async def test_tries_of_a_step_follow_each_other_at_once() -> None:
    assert await flaky(FakeContext(deps=Bank(failures_left=2)), 5) == "charge-1"
    with pytest.raises(ConnectionError):
        await flaky(FakeContext(deps=Bank(failures_left=3)), 5)


@app.task
async def careless(ctx: Context, how: str) -> object:
    if how == "twice":
        return [await ctx.step("one", lambda: 1), await ctx.step("one", lambda: 1)]
    if how == "inside":
        return await ctx.step("outer", ctx.sleep, "inner", 5)
    return await ctx.step("tuple", lambda: (1, 2))


@pytest.mark.parametrize(
    ("how", "error"), [("twice", DuplicateStep), ("inside", ConductorError), ("unannotated", EncodeError)]
)
async def test_what_production_refuses_is_refused(how: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await careless(FakeContext(), how)


@pytest.mark.parametrize(
    ("error", "tries"), [(ValueError("later"), 3), (KeyError("never"), 1), (Fail("at once"), 1), (Retry("1h"), 1)]
)
async def test_a_step_is_tried_as_often_as_in_production(error: Exception, tries: int) -> None:
    steady = RetryPolicy(first="1h", give_up_on=[KeyError])
    tried: list[str] = []

    def fail(kind: str) -> None:
        tried.append(kind)
        raise error

    with pytest.raises(type(error)):
        await FakeContext[None]().step_options(max_attempts=3, retry=steady).step("one", fail, "async")
    with pytest.raises(type(error)):
        FakeSyncContext[None]().step_options(max_attempts=3, retry=steady).step("one", fail, "plain")
    assert tried == ["async"] * tries + ["plain"] * tries


def test_a_step_that_would_end_the_process_fails() -> None:
    with pytest.raises(ConductorError, match="step 'one' raised SystemExit"):
        FakeSyncContext[None]().step("one", sys.exit)


async def answered(asked: Callable[[Any], Any], ctx: Any) -> None:
    answer = asked(ctx)
    if inspect.isawaitable(answer):
        await answer


CALL = ship_soon.bind(1)
KEYED = ship_soon.with_options(dedupe_key="k").bind(1)
REFUSED: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda ctx: ctx.emit(paid, Paid(WRONG)), EncodeError, "event 'paid'.cents"),
    (lambda ctx: ctx.emit("paid", Paid(5)), ConfigurationError, "emit: 'paid' is not an event definition"),
    (lambda ctx: ctx.invoke("ship", KEYED), ConfigurationError, "invoke 'ship': dedupe_key: cannot be given to a"),
    (lambda ctx: ctx.invoke_all("ships", [KEYED]), ConfigurationError, "invoke_all 'ships': dedupe_key: cannot be"),
    (lambda ctx: ctx.start("ship", KEYED), ConfigurationError, "start 'ship': dedupe_key: cannot be given to a child"),
    (
        lambda ctx: ctx.start("ship", ship_soon.with_options(conn={}).bind(1)),
        ConfigurationError,
        "start 'ship': conn: cannot be given to a child",
    ),
    (lambda ctx: ctx.invoke("ship", CALL, timeout="soon"), ValueError, "invoke 'ship': timeout: 'soon' is not a"),
    (lambda ctx: ctx.invoke("ship", CALL, on_timeout="drop"), ConfigurationError, "on_timeout: 'drop' is unknown"),
    (lambda ctx: ctx.invoke_all("ships", [CALL], timeout=-1), ValueError, "invoke_all 'ships': timeout: -1 is"),
    (lambda ctx: ctx.wait_for("payment", paid, timeout="soon"), ValueError, "wait_for 'payment': timeout: 'soon' is"),
    (lambda ctx: ctx.sleep("nap", "soon"), ValueError, "sleep 'nap': duration: 'soon' is not a duration"),
    (lambda ctx: ctx.step("", lambda: 1), ConfigurationError, "step: name: '' is not a text"),
]


@pytest.mark.parametrize("kind", [FakeContext, FakeSyncContext])
@pytest.mark.parametrize(("asked", "error", "message"), REFUSED)
async def test_what_an_operation_refuses_in_production_a_fake_refuses(
    kind: type[Any], asked: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    ctx = kind(results={"ship": "parcel", "ships": ["parcel"], "payment": Paid(5)})
    with pytest.raises(error, match=re.escape(message)):
        await answered(asked, ctx)


async def test_waits_for_children_are_refused_as_in_production() -> None:
    ctx = FakeContext[None](results={"ship": "parcel", "apart": "parcel"})
    child = await ctx.start("ship", CALL)
    apart = await ctx.start("apart", CALL, detached=True)

    with pytest.raises(ValueError, match="wait 'all': timeout: 'soon' is not a duration"):
        await ctx.wait("all", [child], timeout="soon")
    with pytest.raises(ValueError, match=r"wait 'ship\.result#1': timeout: 'soon' is not a duration"):
        await child.result(timeout="soon")
    with pytest.raises(ConfigurationError, match="child 'apart' is detached"):
        await apart.result()
    assert await child.result(timeout="5s") == "parcel"


@app.task
async def patient(ctx: Context, seconds: int) -> str:
    if ctx.cancelled or ctx.attempt > 1:
        return f"attempt {ctx.attempt} of {ctx.trigger}"
    await ctx.sleep("long", seconds)
    return "slept"


async def test_the_facts_of_a_run_are_the_tests_to_set() -> None:
    assert await patient(FakeContext(attempt=2, trigger="nightly"), 5) == "attempt 2 of nightly"
    ctx = FakeContext[None](cancelled=True)
    with pytest.raises(asyncio.CancelledError):
        await ctx.sleep("long", 5)


async def test_deps_that_were_not_given_are_named() -> None:
    with pytest.raises(ConductorError, match=r"the handler uses ctx\.deps; give it deps="):
        await charge(FakeContext(), 5)


def helper(ctx: SyncContext, pages: int) -> int:
    return ctx.step("count", lambda: pages)


def test_a_fake_fits_where_a_context_is_asked_for() -> None:
    assert helper(FakeSyncContext(), 3) == 3
