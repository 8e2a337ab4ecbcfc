"""The children of an operation: what they are called with, and what came back of them."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from msgspec.structs import replace

from pgconductor.claimed import ChildAnswer, Recorded
from pgconductor.errors import NO_ID, ChildCancelled, ChildFailed, ConfigurationError, StepMismatch
from pgconductor.ids import new_ids
from pgconductor.options import CallOptions
from pgconductor.stored_error import error_from_json
from pgconductor.task import Call, payloads_of
from pgconductor.written import AlikeChildren, Children


def new_children(calls: Sequence[Call[Any]], place: str) -> Children:
    """Make the children that calls ask for, with new ids.

    Raises:
        ConfigurationError: A call has an option that an attached child cannot have.
    """
    alike: list[AlikeChildren] = []
    called: AlikeChildren | None = None
    options: CallOptions | None = None
    for call in calls:
        if called is None or call.options is not options or call.task != called.task:
            options = call.options
            if (other := _called(call.task, options, place)) != called:
                called = other
                alike.append(replace(called))
        alike[-1].count += 1
    return Children(new_ids(len(calls)), payloads_of(calls), alike)


def _called(task: str, options: CallOptions, place: str) -> AlikeChildren:
    for option in ("conn", "dedupe_key", "throttle", "debounce"):
        if getattr(options, option) is not None:
            raise ConfigurationError(f"{place}: {option}", "cannot be given to a child", "drop it, or use app.invoke")
    delay = None if options.delay is None else options.delay.total_seconds()
    return AlikeChildren(0, 0, task, options.queue, options.priority or 0, options.run_at, delay)


def check_children(memo: Recorded, children: Sequence[ChildAnswer], calls: Sequence[Call[Any]]) -> None:
    """Refuse a fan-out that was recorded with another number of children, or of other tasks.

    Raises:
        StepMismatch: It was.
    """
    if len(children) != len(calls):
        raise StepMismatch(memo.name, f"invoke_all of {len(children)} children", f"invoke_all of {len(calls)}")
    for index, (child, call) in enumerate(zip(children, calls, strict=True), 1):
        task = child.child_task or memo.child_task
        if task != call.task and task is not None:
            raise StepMismatch(
                memo.name, f"invoke_all with {task!r} as child {index}", f"invoke_all with {call.task!r}"
            )


def gathered(name: str, calls: Sequence[Call[Any]], answers: Sequence[ChildAnswer]) -> list[Any]:
    """Return what the children of a fan-out returned.

    Raises:
        ExceptionGroup: Some of them failed or were cancelled; each by its own error.
        DecodeError: A result does not fit the type of its task.
    """
    values: list[Any] = []
    failures: list[Exception] = []
    for answer, call in zip(answers, calls, strict=True):
        if answer.status == "completed":
            values.append(call.returns.decode(answer.value, "result of child", name))
        else:
            failures.append(_error_of(answer, call))
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(calls)} children of {name!r} failed", failures)
    return values


def value_of(answer: Recorded, name: str, call: Call[Any]) -> Any:
    """Return what a child returned.

    Raises:
        ChildFailed: It failed, or was cancelled.
        DecodeError: Its result does not fit the type of its task.
    """
    if answer.status == "completed":
        return call.returns.decode(answer.value, "result of child", name)
    raise _error_of(answer, call)


def _error_of(answer: Recorded | ChildAnswer, call: Call[Any]) -> ChildFailed:
    stored = error_from_json(bytes(answer.error))
    child_id = UUID(answer.child_id) if answer.child_id else NO_ID
    if answer.status == "cancelled":
        return ChildCancelled(stored.message, execution_id=child_id, task=call.task)
    return ChildFailed(
        stored.message,
        execution_id=child_id,
        task=call.task,
        error_type=stored.type,
        remote_traceback=stored.render(),
    )
