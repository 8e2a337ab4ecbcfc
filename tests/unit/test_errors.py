"""Errors say what happened, carry it as fields, and survive copying."""

import copy
import inspect
import re
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from pgconductor import errors
from pgconductor.errors import (
    BY_SQLSTATE,
    ChildCancelled,
    ChildFailed,
    ChildTimeout,
    ConductorError,
    DepthExceeded,
    DuplicateStep,
    EncodeError,
    EngineError,
    ExecutionFailed,
    Fail,
    Retry,
    StepMismatch,
    WaitTimeout,
    engine_error,
    error_type_of,
    is_permanent,
)

ID = UUID("0198c0de-0000-7000-8000-000000000001")
CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, BaseException)]


def test_child_failed_says_exactly_what_the_child_said() -> None:
    error = ChildFailed("card declined", execution_id=ID, task="charge", error_type="ValueError", remote_traceback="T")

    assert str(error) == "Child execution failed: card declined"
    assert (error.execution_id, error.task, error.error_type, error.remote_traceback) == (
        ID,
        "charge",
        "ValueError",
        "T",
    )


def test_failure_two_levels_down_keeps_both_prefixes() -> None:
    grandchild = ChildFailed("boom")

    assert str(ChildFailed(str(grandchild))) == "Child execution failed: Child execution failed: boom"


@pytest.mark.parametrize(("timeout", "text"), [(30, "30s"), ("5m", "5m"), (1.5, "1.5s"), (timedelta(hours=2), "2h")])
def test_child_timeout_renders_its_duration(timeout: float | str | timedelta, text: str) -> None:
    error = ChildTimeout(timeout, execution_id=ID, task="charge")

    assert str(error) == f"Child execution timed out after {text}"
    assert error.error_type == "pgconductor.errors.ChildTimeout"


def test_child_cancelled_says_why() -> None:
    assert str(ChildCancelled("closing time")) == "Child execution cancelled: closing time"
    assert str(ChildCancelled()) == "Child execution cancelled"


def test_execution_failed_names_task_and_error() -> None:
    error = ExecutionFailed("card declined", execution_id=ID, task="charge", error_type="shop.Declined")

    assert str(error) == f"task 'charge' failed: shop.Declined: card declined (execution {ID})"


def test_depth_error_names_the_limit() -> None:
    assert "maximum depth of 100 reached" in str(DepthExceeded("walk"))


@pytest.mark.parametrize(
    "error",
    [
        ChildTimeout("30s", execution_id=ID, task="charge"),
        ChildFailed("x", execution_id=ID),
        StepMismatch("load", "step", "sleep"),
        EncodeError("$.a[3]", "NaN"),
        EngineError("odd", code="PC999", facts={"a": 1}),
        Retry("5m", "later"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_copy_keeps_message_and_fields(error: Exception) -> None:
    twin = copy.copy(error)

    assert type(twin) is type(error)
    assert (str(twin), vars(twin)) == (str(error), vars(error))


@pytest.mark.parametrize("error", CLASSES, ids=lambda each: each.__name__)
def test_every_error_is_documented_and_drawn_in_the_tree(error: type[BaseException]) -> None:
    assert inspect.getdoc(error)
    assert re.search(rf"── {error.__name__}\b", errors.__doc__ or "")


def test_every_sqlstate_is_of_our_class_and_leads_to_one_error() -> None:
    declared = [each.sqlstate for each in CLASSES if issubclass(each, ConductorError) and "sqlstate" in vars(each)]

    assert sorted(filter(None, declared)) == sorted(filter(None, BY_SQLSTATE))
    assert all(re.fullmatch(r"PC\d{3}", code or "") for code in BY_SQLSTATE)


def test_engine_report_becomes_its_class_with_its_facts() -> None:
    error = engine_error("PC010", "step 'a' is there already", f'{{"step": "a", "execution_id": "{ID}"}}')

    assert isinstance(error, DuplicateStep)
    assert (str(error), error.step) == ("step 'a' is there already", "a")
    assert vars(error)["execution_id"] == ID


@pytest.mark.parametrize("detail", [None, "", "plain text", "[1]"])
def test_engine_report_without_facts_is_still_an_error(detail: str | None) -> None:
    error = engine_error("PC999", "odd", detail)

    assert isinstance(error, EngineError)
    assert (str(error), error.code, error.facts) == ("odd", "PC999", {})


def test_error_type_is_bare_for_builtins_and_qualified_otherwise() -> None:
    assert error_type_of(ValueError()) == "ValueError"
    assert error_type_of(Fail()) == "pgconductor.errors.Fail"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Fail("no"), True),
        (ChildFailed("no"), True),
        (ChildCancelled(), True),
        (DuplicateStep("a"), True),
        (ChildTimeout("1s"), False),
        (WaitTimeout("paid", "1s"), False),
        (ValueError(), False),
        (Retry(1), False),
        (ExceptionGroup("", [ChildFailed("a"), ExceptionGroup("", [ChildCancelled()])]), True),
        (ExceptionGroup("", [ChildFailed("a"), ChildTimeout("1s")]), False),
    ],
    ids=repr,
)
def test_permanent_errors_leave_no_further_attempt(error: Exception, expected: bool) -> None:
    assert is_permanent(error) is expected


def test_retry_keeps_its_delay() -> None:
    assert Retry("5m").after == timedelta(minutes=5)
    assert str(Retry("5m")) == "retry after 5m"
    with pytest.raises(ValueError, match="Retry: after"):
        Retry(-1)


def test_errors_file_names_no_duplicate_code() -> None:
    codes = re.findall(r'sqlstate = "(PC\d+)"', Path(errors.__file__).read_text())

    assert len(codes) == len(set(codes)) == len(BY_SQLSTATE)
