"""JsonFormatter and RunFilter: one line a record, whatever it contains."""

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from pgconductor.logs import ID_FIELDS, JsonFormatter, RunFilter, current_run

IDS = {
    "execution_id": "e",
    "root_id": "r",
    "parent_id": None,
    "task": "charge",
    "queue": "default",
    "attempt": 2,
    "step": "card",
}


class Run:
    closed = False

    def log_ids(self) -> Mapping[str, Any]:
        return IDS


def record(message: object = "hello", *args: object, **extra: object) -> logging.LogRecord:
    return logging.getLogger("shop").makeRecord(
        "shop", logging.INFO, __file__, 1, message, args, None, extra=dict(extra)
    )


def line(made: logging.LogRecord, **options: Any) -> dict[str, Any]:
    text = JsonFormatter(**options).format(made)
    assert text.isascii()
    assert text.isprintable()
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_line_outside_a_run_has_no_ids() -> None:
    found = line(record("paid %d", 7, order=9))
    assert found.pop("time").endswith("Z")
    assert found == {"level": "INFO", "logger": "shop", "message": "paid 7", "order": 9}


def test_a_line_of_any_logger_inside_a_run_has_its_ids() -> None:
    token = current_run.set(Run())
    try:
        found = line(record())
    finally:
        current_run.reset(token)
    assert {name: found.get(name) for name in ID_FIELDS} == IDS


def test_the_filter_lets_any_format_name_the_ids() -> None:
    made = record()
    assert RunFilter().filter(made)
    assert made.__dict__["execution_id"] is None
    token = current_run.set(Run())
    try:
        inside = record()
        RunFilter().filter(inside)
    finally:
        current_run.reset(token)
    assert logging.Formatter("%(execution_id)s/%(step)s %(message)s").format(inside) == "e/card hello"


@pytest.mark.parametrize(
    "evil",
    ["a\nINFO forged", "\x1b[2J", "\r", "\0", "\x7f", "\x9b31m", "\u2028", "\u202e", "\ud800", '"}, {"', "\\u000a"],
)
def test_no_text_forges_a_line_or_commands_a_terminal(evil: str) -> None:
    found = line(record(evil, note=evil, **{evil: 1}))
    assert (found["message"], found["note"], found[evil]) == (evil, evil, 1)


class Unprintable:
    def __str__(self) -> str:
        raise ValueError("no")

    __repr__ = __str__


def test_values_without_a_json_form_are_written_as_text() -> None:
    cyclic: list[object] = []
    cyclic.append(cyclic)
    found = line(record("x", a=float("nan"), b={1, 2}, c=Unprintable(), d=cyclic, e={(1, 2): object}, f=10**5000))
    assert (found["a"], found["b"]) == ("nan", [1, 2])
    assert found["c"] == "<Unprintable: str() raised ValueError>"
    assert found["e"] == {"(1, 2)": "<class 'object'>"}


def test_a_message_that_does_not_fit_its_arguments_is_a_line_all_the_same() -> None:
    assert "does not fit" in line(record("%d", "seven"))["message"]
    assert line(record(Unprintable()))["level"] == "INFO"


def test_an_error_is_told_with_its_traceback() -> None:
    try:
        raise LookupError("no\nsuch order")
    except LookupError:
        made = record()
        made.exc_info = sys.exc_info()
    found = line(made)["error"]
    assert (found["type"], found["message"]) == ("builtins.LookupError", "no\nsuch order")
    assert "test_logs.py" in found["traceback"]


def test_secrets_are_taken_out() -> None:
    def redact(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | {"card": "***"}

    found = line(record("paid", card="4111"), redact=redact)
    assert found["card"] == "***"


def test_a_line_whose_redaction_fails_is_dropped_with_its_contents() -> None:
    def broken(entry: dict[str, Any]) -> dict[str, Any]:
        raise KeyError(entry["card"])

    found = line(record("paid with 4111", card="4111"), redact=broken)
    assert "4111" not in json.dumps(found)
    assert found["message"] == "a line was dropped: redact raised KeyError"
