"""A replayed operation is answered from memory, once a run, where nothing stands in its way."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import msgspec
import pytest
from msgspec import Raw

from pgconductor import Conductor, Context
from pgconductor.attempt import Attempt, Host
from pgconductor.claimed import NULL, Claimed, Recorded, StepStatus
from pgconductor.errors import (
    ChildCancelled,
    ChildFailed,
    ChildTimeout,
    DecodeError,
    DuplicateStep,
    StepMismatch,
    Suspend,
)
from pgconductor.logs import current_run
from pgconductor.memos import Memos

app = Conductor("postgresql:///nowhere")


@app.task()
async def child(ctx: Context, number: int) -> int:
    return number


@app.task()
async def nothing(ctx: Context) -> None:
    pass


def recorded(name: str, status: StepStatus = "completed") -> Recorded:
    return Recorded(name, 0, 0, "invoke", status, Raw(b"7"), NULL, str(UUID(int=7)), "child", dropped=False)


def attempt_of(*steps: Recorded) -> Attempt:
    loop = asyncio.get_running_loop()
    host = SimpleNamespace(loop=loop, is_leaving=False, is_fenced=lambda: False, deps=None)
    claimed = Claimed("01a22a52-68f2-7d93-ae47-8a9fc9dbeac6", 1, 1, Raw(b"{}"))
    attempt = Attempt(claimed, 1, nothing, "default", cast("Host", host), Memos.of(steps))
    attempt._main = asyncio.current_task()
    return attempt


async def test_an_answer_is_given_once_a_run() -> None:
    attempt = attempt_of(recorded("a"))
    memo = attempt.recall("a", "invoke", "child")
    assert memo is not None
    assert msgspec.json.decode(memo.value) == 7
    assert attempt.recall("a", "invoke", "child") is None
    with pytest.raises(DuplicateStep):
        attempt.journal.begin("a", "invoke", "child")


async def test_what_has_no_answer_is_to_be_begun() -> None:
    attempt = attempt_of(recorded("a"), recorded("b", "pending"))
    assert attempt.recall("b", "invoke", "child") is None
    assert attempt.recall("c", "step") is None
    memo = attempt.journal.begin("b", "invoke", "child")
    assert memo is not None
    assert memo.status == "pending"
    assert attempt.journal.is_replaying
    assert attempt.journal.begin("c", "step") is None
    assert not attempt.journal.is_replaying


async def test_an_answer_to_something_else_is_refused() -> None:
    attempt = attempt_of(recorded("a"), recorded("b"))
    with pytest.raises(StepMismatch):
        attempt.recall("a", "step")
    with pytest.raises(StepMismatch):
        attempt.recall("b", "invoke", "another")
    with pytest.raises(DuplicateStep):
        attempt.journal.begin("b", "invoke", "child")


async def test_what_a_run_has_not_come_to_is_known() -> None:
    attempt = attempt_of(recorded("a"), recorded("b"), recorded("c", "pending"))
    attempt.recall("b", "invoke", "child")
    assert attempt.journal.unasked() == ["a", "c"]


def _disturb(attempt: Attempt, how: str) -> None:
    if how == "abandoned":
        attempt.exit = "abandoned"
    elif how == "cancelled":
        attempt.cancelled = True
    elif how == "closed":
        attempt.closed = True
    elif how == "released":
        attempt.request_release()
    elif how == "the process stops":
        attempt.host.is_leaving = True
    elif how == "the window may close":
        attempt.claimed.closes_at = time.monotonic() + 60
    elif how == "a timeout was raised":
        attempt.journal.late_tasks.append(cast("asyncio.Task[Any]", attempt._main))
    elif how == "a step runs":
        attempt.begin_work("step")


@pytest.mark.parametrize(
    "how",
    [
        "abandoned", "cancelled", "closed", "released", "the process stops", "the window may close",
        "a timeout was raised", "a step runs",
    ],
)  # fmt: skip
async def test_what_stands_in_the_way_is_not_passed_over(how: str) -> None:
    attempt = attempt_of(recorded("a"))
    _disturb(attempt, how)
    assert attempt.recall("a", "invoke", "child") is None
    assert attempt.journal.begin("a", "invoke", "child") is not None  # and the answer is still there


async def test_another_task_of_the_handler_begins_its_operations_in_full() -> None:
    attempt = attempt_of(recorded("a"))

    async def beside() -> Recorded | None:
        return attempt.recall("a", "invoke", "child")

    assert await asyncio.create_task(beside()) is None
    assert attempt.recall("a", "invoke", "child") is not None


async def test_a_fenced_process_answers_from_memory_and_begins_nothing() -> None:
    attempt = attempt_of(recorded("a"))
    cast("Any", attempt.host).is_fenced = lambda: True
    assert attempt.recall("a", "invoke", "child") is not None
    with pytest.raises(Suspend):
        attempt.must_stay()


@pytest.mark.parametrize("status", ["failed", "cancelled", "timed_out"])
async def test_a_child_that_did_not_complete_raises_in_every_run(status: StepStatus) -> None:
    step = recorded("a", status)
    step.error = Raw(b'{"type":"builtins.ValueError","message":"no","timeout":1.5}')
    attempt = attempt_of(step)
    current_run.set(attempt)
    call = child.bind(1)
    with pytest.raises((ChildFailed, ChildCancelled, ChildTimeout)) as caught:
        await Context[Any](attempt).invoke("a", call)
    assert type(caught.value).__name__ == {"failed": "ChildFailed", "cancelled": "ChildCancelled"}.get(
        status, "ChildTimeout"
    )
    assert bool(attempt.journal.late_tasks) == (status == "timed_out")


async def test_a_result_that_does_not_fit_is_named_once() -> None:
    step = recorded("a")
    step.value = Raw(b'"seven"')
    with pytest.raises(DecodeError, match="result of child 'a'") as caught:
        await Context[Any](attempt_of(step)).invoke("a", child.bind(1))
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.__context__ is None
