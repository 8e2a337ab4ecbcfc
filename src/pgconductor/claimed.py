"""What a claim hands out of the database: executions, and what they have recorded so far.

A claim answers for many executions in one value, so what is large is not in it. A run that needs it loads it when it
begins; see `loading.py`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec
from msgspec import Raw, Struct

NULL: Final = Raw(b"null")
StepKind = Literal["step", "transaction", "sleep", "invoke", "invoke_all", "start", "wait", "wait_for", "call"]
StepStatus = Literal["pending", "completed", "failed", "cancelled", "timed_out"]
TriggerKind = Literal["schedule", "event", "change"]


class ChildAnswer(Struct, array_like=True, gc=False):
    """What became of one child of an `invoke_all`. Where all are of one task, a completed one tells its value alone."""

    value: Raw
    status: StepStatus = "completed"
    error: Raw = NULL
    child_id: str | None = None
    child_task: str | None = None


class Recorded(Struct, array_like=True, gc=False):
    """A recorded operation of an execution.

    The children of an `invoke_all` are its `answers`, in their order, as JSON; or, where they may be large, rows of
    their own, whose `index` is from 1.
    """

    name: str
    round: int
    index: int
    kind: StepKind
    status: StepStatus
    value: Raw
    error: Raw
    child_id: str | None
    child_task: str | None
    dropped: bool
    answers: Raw = NULL


class Claimed(Struct, array_like=True, gc=False):
    """An execution that this process may run until it settles it.

    Of a call that has not run yet, four values come; of such a child, seven.

    `payload` and `trigger_data`, which is what a trigger of `trigger_kind` hands to the handler, are its input. They
    are null where they are large, and with `cached`, which says that this very process parked the execution.

    `steps` holds what was recorded earlier: None for a first run; with `cached`, only what changed since the park.
    Where that is large, it is the number to load from.

    `closes_at` is set here, not by the database: when its task's window closes, on this machine's monotonic clock.
    """

    id: str
    task_id: int
    queue_id: int
    payload: Raw
    depth: int = 0
    parent_id: str | None = None
    root_id: str | None = None
    failures: int = 0
    crashes: int = 0
    trigger: str | None = None
    cached: bool | None = None
    steps: list[Recorded] | int | None = None
    trigger_kind: TriggerKind | None = None
    trigger_data: Raw = NULL
    closes_at: float | None = None


class Missing(Struct):
    """What of an execution is to be loaded: its input, and the operations recorded after `since`, unless it is None."""

    id: str
    with_input: bool
    since: int | None


class Loaded:
    """What was missing. `payload`: None if it was not asked for, or there is no such execution."""

    __slots__ = ("payload", "steps", "trigger_data")

    def __init__(self) -> None:
        self.payload: Raw | None = None
        self.trigger_data = NULL
        self.steps: list[Recorded] = []


_recorded = msgspec.json.Decoder(Recorded)
_answers = msgspec.json.Decoder(list[ChildAnswer])


def read_answers(answers: Raw) -> list[ChildAnswer]:
    """Read the answers of a fan-out's children; they hold these bytes alone, and not the whole reply."""
    return _answers.decode(bytes(answers))


def read_loaded(rows: Sequence[Sequence[bytes | None]]) -> Mapping[str, Loaded]:
    """Read what `load_executions` brought, by execution."""
    found: defaultdict[str, Loaded] = defaultdict(Loaded)
    for id, payload, trigger_data, step in rows:
        loaded = found[id.decode() if id else ""]
        if step is not None:
            loaded.steps.append(_recorded.decode(step))
        elif payload is not None:
            loaded.payload, loaded.trigger_data = Raw(payload), Raw(trigger_data or b"null")
    return found
