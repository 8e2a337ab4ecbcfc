"""A coroutine that runs in context variables of its own, in the asyncio task of whoever awaits it."""

import asyncio
import contextlib
import gc
import weakref
from contextvars import ContextVar, copy_context

import pytest

from pgconductor.own_context import OwnContext

place: ContextVar[str] = ContextVar("place", default="outside")


async def go(first: str, *, wait: bool) -> str:
    place.set(first)
    if wait:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return place.get()


@pytest.mark.parametrize("wait", [False, True])
async def test_what_is_set_inside_stays_inside(wait: bool) -> None:
    inside = await OwnContext(go("inside", wait=wait), copy_context(), lambda: None)
    assert (inside, place.get()) == ("inside", "outside")


@pytest.mark.parametrize(("wait", "count"), [(False, 0), (True, 1)])
async def test_the_first_suspension_is_told_once(wait: bool, count: int) -> None:
    told: list[bool] = []
    run = OwnContext(go("inside", wait=wait), copy_context(), lambda: told.append(True))
    await run
    assert (len(told), run.suspended_at is not None) == (count, wait)


async def test_it_runs_in_the_task_of_whoever_awaits_it() -> None:
    async def current() -> "asyncio.Task[object] | None":
        return asyncio.current_task()

    assert await OwnContext(current(), copy_context(), lambda: None) is asyncio.current_task()


async def test_a_cancellation_reaches_the_coroutine_which_may_go_on() -> None:
    began = asyncio.Event()

    async def stubborn() -> str:
        place.set("inside")
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return place.get()

    async def wait_for_it() -> str:
        return await OwnContext(stubborn(), copy_context(), lambda: None)

    task = asyncio.create_task(wait_for_it())
    await began.wait()
    task.cancel()
    assert await task == "inside"


async def test_what_it_raises_is_raised() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("inside")

    with pytest.raises(LookupError, match="inside"):
        await OwnContext(fail(), copy_context(), lambda: None)


async def test_what_was_cancelled_is_freed_without_the_collector() -> None:
    """Else every parked run waits for the collector, which then takes a third of a worker's time."""

    async def left(held: set[str]) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        held.clear()

    async def wait_for_it(held: set[str]) -> None:
        await OwnContext(left(held), copy_context(), lambda: None)

    held = {"by the run"}
    gone = weakref.ref(held)
    task = asyncio.create_task(wait_for_it(held))
    await asyncio.sleep(0)
    gc.disable()
    try:
        task.cancel()
        await task
        del task, held
        assert gone() is None
    finally:
        gc.enable()
