"""What an execution has recorded: which of it is open, and whether it ties the execution to others."""

from typing import Any

import pytest

from pgconductor.claimed import NULL, Recorded, StepKind, StepStatus
from pgconductor.memos import Memos


def row(
    status: StepStatus, *, kind: StepKind = "invoke", in_round: int = 0, dropped: bool = False, child: str | None = None
) -> Recorded:
    return Recorded("it", in_round, 0, kind, status, NULL, NULL, child, None, dropped)


def test_an_operation_is_open_until_it_is_answered() -> None:
    memos = Memos.of([row("pending")])
    assert list(memos.open) == ["it"]
    memos.add(row("completed"))
    assert not memos.open


def test_what_the_next_attempt_does_afresh_counts_as_open() -> None:
    memos = Memos.of([row("timed_out", dropped=True)])
    assert list(memos.open) == ["it"]
    memos.merge([row("pending", in_round=1), row("completed", in_round=1)])
    assert not memos.open


def test_a_row_of_an_earlier_round_opens_nothing() -> None:
    assert not Memos.of([row("completed", in_round=1), row("pending")]).open


@pytest.mark.parametrize(
    ("recorded", "is_tied"),
    [
        ({"kind": "step"}, False),
        ({"kind": "sleep"}, False),
        ({"kind": "start", "child": "c"}, False),
        ({"kind": "invoke_all"}, True),
        ({"kind": "wait_for"}, True),
    ],
)
def test_fan_outs_and_events_tie_an_execution_even_when_they_are_answered(
    recorded: dict[str, Any], is_tied: bool
) -> None:
    assert Memos.of([row("completed", **recorded)]).is_tied is is_tied
