"""Payloads, events and recorded values that do not go with a claim."""

import asyncio
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import (
    Batch,
    BatchContext,
    Conductor,
    Context,
    Event,
    ExecutionFailed,
    RetryPolicy,
    SyncContext,
    codec,
    event,
    journal,
    signature,
)
from tests.integration.conftest import Working
from tests.waiting import until, until_row

LARGE = 300_000
LARGEST = 1024 * 1024 - 100


def text_of(number: int) -> str:
    """Return a large text of its own."""
    return f"{number} " * (LARGE // len(f"{number} "))


async def test_handlers_are_given_large_payloads(app: Conductor[None], working: Working) -> None:
    @app.task
    async def on_loop(ctx: Context, text: str, number: int) -> list[int]:
        return [number, len(text)]

    @app.task
    def in_thread(ctx: SyncContext, text: str, number: int) -> list[int]:
        return [number, len(text)]

    calls = [task.bind(text_of(number), number) for task in (on_loop, in_thread) for number in range(30)]
    async with working():
        handles = await app.invoke_many(calls)
        results = await asyncio.gather(*(handle.result(30) for handle in handles))
    assert results == [[number, len(text_of(number))] for number in range(30)] * 2


async def test_a_batch_is_given_large_payloads_beside_small_ones(app: Conductor[None], working: Working) -> None:
    @app.task(batch=Batch(size=4, timeout=30))
    async def lengths(ctx: BatchContext, texts: list[str]) -> list[int]:
        return [len(text) * len(texts) for text in texts]

    async with working():
        handles = await app.invoke_many([lengths.bind("x" * size) for size in (LARGE, 1, LARGE + 1, 2)])
        results = await asyncio.gather(*(handle.result(30) for handle in handles))
    assert results == [4 * LARGE, 4, 4 * LARGE + 4, 8]


async def test_a_retry_is_given_its_large_steps(app: Conductor[None], working: Working) -> None:
    made: list[str] = []

    def remember(name: str, value: Any) -> Any:
        made.append(name)
        return value

    @app.task(retry=RetryPolicy(first=0.01))
    async def work(ctx: Context, text: str) -> list[int]:
        large = await ctx.step("large", lambda: remember("large", text))
        small = await ctx.step("small", lambda: remember("small", 1))
        if ctx.attempt == 1:
            raise RuntimeError("again")
        return [len(large), small]

    async with working():
        assert await (await work.invoke("x" * LARGE)).result(30) == [LARGE, 1]
    assert made == ["large", "small"]


async def test_a_parent_is_given_the_large_results_of_its_children(app: Conductor[None], working: Working) -> None:
    @app.task
    async def child(ctx: Context, text: str) -> str:
        return text

    @app.task
    async def parent(ctx: Context, text: str) -> list[int]:
        one_by_one = [await ctx.invoke(f"child {n}", child.bind(text + str(n))) for n in range(5)]
        at_once = await ctx.invoke_all("children", [child.bind(text_of(n)) for n in range(5)])
        return [len(each) for each in [*one_by_one, *at_once, text]]

    expected = [*(LARGE + 1 for _ in range(5)), *(len(text_of(n)) for n in range(5)), LARGE]
    async with working():
        assert await (await parent.invoke("x" * LARGE)).result(30) == expected


async def test_a_run_goes_on_in_another_process_with_what_is_large(
    app: Conductor[None], working: Working, db: psycopg.Connection[DictRow]
) -> None:
    go = app.event("go", str)

    @app.task
    async def work(ctx: Context, text: str) -> list[int]:
        large = await ctx.step("large", lambda: text + "!")
        arrived: str = await ctx.wait_for("event", go)
        return [len(large), len(arrived), len(text)]

    async with working():
        handle = await work.invoke("x" * LARGE)
        await until_row(db, "select 1 from event_wait")
    async with working():
        await app.emit(go, "y" * LARGE)
        assert await handle.result(30) == [LARGE + 1, LARGE, LARGE]


async def test_a_large_event_starts_a_task(app: Conductor[None], working: Working) -> None:
    go = app.event("go", str)
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @app.task(on=event(go))
    async def on_event(ctx: Context, it: Event[str]) -> None:
        found.set_result(len(it.payload))

    async with working():
        await app.emit(go, "y" * LARGE)
        assert await asyncio.wait_for(found, 30) == LARGE


async def test_what_is_large_holds_up_nothing_that_stands_behind_it(app: Conductor[None], working: Working) -> None:
    order: list[int] = []

    @app.task
    async def work(ctx: Context, text: str) -> None:
        order.append(len(text))

    await app.invoke_many([work.bind(text) for text in ["x" * LARGE] * 100 + ["y"]])
    async with working(queues={"default": 300}):
        await until(lambda: len(order) == 101)
    assert order[0] == 1


# ---------------------------------------------------------------- many children with large payloads


async def test_large_children_that_are_asked_for_together_are_stored_in_parts(
    app: Conductor[None], working: Working
) -> None:
    runs: list[int] = []

    @app.task
    async def child(ctx: Context, text: str, number: int) -> int:
        return len(text) * number

    @app.task
    async def parent(ctx: Context) -> int:
        runs.append(ctx.attempt)
        calls = [ctx.invoke(f"child {n}", child.bind("x" * LARGEST, n)) for n in range(20)]
        return sum(await asyncio.gather(*calls))

    async with working():
        assert await (await parent.invoke()).result(60) == LARGEST * sum(range(20))
    assert len(runs) >= 2
    assert set(runs) == {1}


async def test_one_of_them_that_the_database_refuses_fails_the_parent(
    app: Conductor[None], working: Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not park on something that was never opened, while what is opened is still under way."""
    for module in (codec, signature):
        monkeypatch.setattr(module, "VALUE_BYTES_MAX", 4 * LARGEST)

    @app.task
    async def child(ctx: Context, text: str) -> int:
        return len(text)

    @app.task(max_attempts=1)
    async def parent(ctx: Context) -> None:
        sizes = [LARGEST] * 20 + [2 * LARGEST]
        await asyncio.gather(*(ctx.invoke(f"child {n}", child.bind("x" * size)) for n, size in enumerate(sizes)))

    async with working():
        with pytest.raises(ExecutionFailed, match=r"child 20.*1048576"):
            await (await parent.invoke()).result(60)


@pytest.mark.covers("P14")
async def test_a_fan_out_that_no_statement_can_hold_is_refused_and_delays_nobody(
    app: Conductor[None], working: Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "BYTES_MAX", 2 * LARGE)

    @app.task
    async def child(ctx: Context, text: str) -> int:
        return len(text)

    @app.task
    async def parent(ctx: Context, count: int) -> int:
        return sum(await ctx.invoke_all("children", [child.bind("x" * (LARGE // 2)) for _ in range(count)]))

    async with working():
        too_many = await parent.invoke(5)
        assert await (await parent.invoke(3)).result(30) == 3 * (LARGE // 2)
        with pytest.raises(ExecutionFailed, match="cannot store invoke_all 'children': its children take") as caught:
            await too_many.result(30)
    assert caught.value.error_type == "pgconductor.errors.EncodeError"
