"""What a run has to load of what a claim left out."""

from typing import Any

import pytest
from msgspec import Raw

from pgconductor.claimed import NULL, Claimed, Loaded, Missing, Recorded, read_loaded
from pgconductor.errors import ConductorError
from pgconductor.loading import complete, missing_of
from pgconductor.memos import Memos

SMALL = Raw(b"{}")


def claimed_with(payload: Raw, cached: bool | None, steps: list[Recorded] | int | None) -> Claimed:
    return Claimed("id", 1, 1, payload, 0, None, None, 0, 0, None, cached, steps)


def recorded(name: str) -> Recorded:
    return Recorded(name, 0, 0, "step", "completed", Raw(b"1"), NULL, None, None, False)


@pytest.mark.parametrize(
    ("payload", "cached", "steps", "is_kept", "missing"),
    [
        (SMALL, None, None, False, None),  # a first run
        (NULL, None, None, False, (True, None)),  # a large payload
        (SMALL, None, [recorded("a")], False, None),  # a retry
        (SMALL, None, 0, False, (False, 0)),  # with large values
        (SMALL, True, [], True, None),  # a resume here; what was kept has the input
        (SMALL, True, 7, True, (False, 7)),  # with large values
        (NULL, True, [], False, (True, 0)),  # what was kept is gone
        (NULL, True, 7, False, (True, 0)),
        (SMALL, False, None, False, None),  # parked by another process
        (NULL, False, 0, False, (True, 0)),
    ],
)
def test_what_is_missing(payload: Raw, cached: Any, steps: Any, is_kept: bool, missing: Any) -> None:
    found = missing_of(claimed_with(payload, cached, steps), Memos() if is_kept else None)
    assert found == (missing and Missing("id", *missing))


def test_what_is_loaded_completes_an_execution() -> None:
    (loaded,) = read_loaded(
        [
            [b"id", None, None, b'["b",0,0,"step","completed",2,null,null,null,false]'],
            [b"id", b'{"n":1}', b'"event"', None],
        ]
    ).values()
    claimed = claimed_with(NULL, None, 0)
    memos = complete(claimed, Memos.of([recorded("a")]), loaded)
    assert (claimed.payload, claimed.trigger_data) == (Raw(b'{"n":1}'), Raw(b'"event"'))
    assert {name: bytes(step.value) for name, step in memos.operations.items()} == {"a": b"1", "b": b"2"}


def test_an_execution_that_is_gone_is_not_run_with_nothing() -> None:
    with pytest.raises(ConductorError, match="execution id is gone"):
        complete(claimed_with(NULL, None, None), None, Loaded())


def test_what_is_kept_has_bytes_of_its_own() -> None:
    memos, reply = Memos(), b'{"n":1}' + b" " * 1_000
    memos.keep_input(claimed_with(Raw(reply), None, None))
    assert memos.input == (Raw(reply), NULL)
    assert memos.size == len(reply) + len(b"null")
