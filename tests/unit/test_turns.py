"""Tasks of one run are given what is recorded in the order in which it was recorded."""

import asyncio
from collections.abc import Coroutine
from typing import Any, cast

import pytest
from msgspec import Raw

from pgconductor.claimed import NULL, Recorded, StepKind
from pgconductor.journal import Journal
from pgconductor.memos import Memos
from pgconductor.turns import Turns


def recorded(name: str, kind: StepKind = "step") -> Recorded:
    return Recorded(name, 0, 0, kind, "completed", Raw(b"1"), NULL, None, None, dropped=False)


class Run:
    """A run whose tasks ask for what is recorded, and note what they get."""

    def __init__(self, names: str, kind: StepKind = "step") -> None:
        self.given: list[str] = []
        self.journal = Journal(cast("Any", None), 0, Memos.of([recorded(name, kind) for name in names]))
        self.turns = Turns(self.journal, asyncio.get_running_loop())

    async def ask(self, *names: str, after_passes: int = 0) -> None:
        for name in names:
            for _ in range(after_passes):
                await asyncio.sleep(0)
            await self.turns.wait(name)
            self.journal.unvisited.pop(name, None)
            self.given.append(name)


async def together(*asking: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(20):
        await asyncio.gather(*asking)


async def test_answers_are_given_in_the_order_in_which_they_were_recorded() -> None:
    run = Run("bca")
    await together(run.ask("a"), run.ask("b"), run.ask("c"))
    assert run.given == ["b", "c", "a"]


async def test_what_follows_an_answer_comes_before_a_later_one() -> None:
    run = Run("bdac")
    await together(run.ask("a", "c"), run.ask("b", "d"))
    assert run.given == ["b", "d", "a", "c"]


async def test_a_task_that_takes_some_passes_is_waited_for() -> None:
    run = Run("bdac")
    await together(run.ask("a", "c"), run.ask("b", "d", after_passes=20))
    assert run.given == ["b", "d", "a", "c"]


async def test_whoever_waits_for_several_goes_on_after_the_first() -> None:
    run = Run("bca")
    seen: list[list[str]] = []

    async def first_of() -> None:
        tasks = [asyncio.create_task(run.ask(name), name=name) for name in "abc"]
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        seen.append([each.get_name() for each in done])
        await asyncio.gather(*rest)

    await together(first_of())
    assert seen == [["b"]]


async def test_a_task_group_hears_of_a_failure_before_the_next_answer() -> None:
    run = Run("bca")

    async def fail(name: str) -> None:
        await run.ask(name)
        raise ValueError(name)

    async def group() -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for name in "abc":
                    tasks.create_task(fail(name))
        except* ValueError as errors:
            run.given += [str(each) for each in errors.exceptions]

    await together(group())
    assert run.given == ["b", "b"]


async def test_what_is_not_asked_for_any_more_holds_up_nobody_for_long() -> None:
    run = Run("xcyba")
    await together(run.ask("a"), run.ask("b"), run.ask("c"))
    assert run.given == ["c", "b", "a"]
    await together(run.ask("y"), run.ask("x"))  # late, and at once
    assert run.given[3:] == ["y", "x"]


async def test_what_has_been_given_otherwise_is_passed_by() -> None:
    run = Run("ba")
    del run.journal.unvisited["b"]
    await together(run.ask("a"))
    assert run.given == ["a"]


async def test_the_start_of_a_child_and_what_is_numbered_have_no_turn() -> None:
    kinds: tuple[StepKind, ...] = ("start", "call")
    for kind in kinds:
        run = Run("ab", kind)
        await together(run.ask("b"), run.ask("a"))
        assert run.given == ["b", "a"]


async def test_one_that_gives_up_does_not_hold_up_the_others() -> None:
    run = Run("ab")
    waiting = asyncio.create_task(run.ask("b"))
    leaving = asyncio.create_task(run.ask("a", after_passes=3))
    await asyncio.sleep(0)
    leaving.cancel()
    await together(run.ask("c"))
    async with asyncio.timeout(20):
        await waiting
    assert run.given == ["c", "b"]


@pytest.mark.parametrize("passes", range(12))
async def test_one_that_is_cancelled_at_any_moment_does_not_hold_up_the_others(passes: int) -> None:
    run = Run("ab")
    first, second = (asyncio.create_task(run.ask(name)) for name in "ab")
    for _ in range(passes):
        await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(20):
        await asyncio.wait([first, second])
    assert run.given[-1] == "b"


async def test_the_end_of_a_run_ends_who_waits() -> None:
    run = Run("ab")
    waiting = asyncio.create_task(run.ask("b"))
    await asyncio.sleep(0)
    assert len(run.turns) == 1
    run.turns.end()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert len(run.turns) == 0
    assert run.given == []
