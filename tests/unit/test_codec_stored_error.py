"""Storing an error never fails, keeps what explains it, and is bounded."""

import json
import sys
from typing import Any

import pytest

from pgconductor.codec import VALUE_BYTES_MAX, codec_for
from pgconductor.errors import ChildFailed
from pgconductor.stored_error import CUT, TEXT_BYTES_MAX, StoredError, error_from_json, error_to_json


class Rude(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class RudeText(str):
    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        raise ValueError


class Base(BaseException):
    pass


def _caught(raiser: Any) -> Exception:
    try:
        raiser()
    except Exception as error:  # noqa: BLE001
        return error
    raise AssertionError


def _chain() -> None:
    try:
        raise KeyError("first")
    except KeyError as error:
        raise ValueError("second") from error


def _while_handling() -> None:
    try:
        raise KeyError("first")
    except KeyError:
        raise ValueError("second")  # noqa: B904


def _recurse(levels: int) -> None:
    if levels == 0:
        raise ValueError("deep")
    _recurse(levels - 1)


def _stored(error: BaseException) -> StoredError:
    return error_from_json(error_to_json(error))


def test_type_message_and_frames_are_kept() -> None:
    stored = _stored(_caught(_chain))

    assert (stored.type, stored.message) == ("ValueError", "second")
    assert isinstance(stored.traceback, tuple)
    assert stored.traceback[-1].function == "_chain"
    assert stored.traceback[-1].text == 'raise ValueError("second") from error'


def test_class_outside_builtins_is_named_with_its_module() -> None:
    assert _stored(ChildFailed("x")).type == "pgconductor.errors.ChildFailed"
    assert _stored(ChildFailed("x")).message == "Child execution failed: x"


def test_cause_is_told_from_context() -> None:
    cause, context = _stored(_caught(_chain)), _stored(_caught(_while_handling))

    assert cause.cause is not None
    assert cause.cause.type == "KeyError"
    assert not cause.is_context
    assert context.is_context
    assert "direct cause" in cause.render()
    assert "During handling" in context.render()


def test_traceback_reads_like_pythons() -> None:
    lines = _stored(_caught(_chain)).render().splitlines()

    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].startswith('  File "')
    assert lines[-1] == "ValueError: second"


def test_group_keeps_each_member_and_its_notes() -> None:
    group = ExceptionGroup("all", [ValueError("a"), ExceptionGroup("some", [KeyError("b")])])
    group.add_note("at night")

    stored = _stored(group)

    assert [member.type for member in stored.group] == ["ValueError", "ExceptionGroup"]
    assert stored.group[1].group[0].message == "'b'"
    assert "at night" in stored.render()
    assert "  KeyError: 'b'" in stored.render()


@pytest.mark.covers("F60")
@pytest.mark.parametrize(
    "error", [Rude(), ValueError(), ValueError(RudeText("x")), Base("x"), KeyboardInterrupt(), ValueError("a\0\ud800")]
)
def test_any_error_can_be_stored(error: BaseException) -> None:
    text = error_to_json(error)

    assert text.encode()
    assert "\\u0000" not in text
    assert error_from_json(text).type.endswith(type(error).__qualname__)


@pytest.mark.covers("F56")
def test_what_postgres_refuses_is_escaped() -> None:
    assert _stored(ValueError("a\0b\ud800")).message == r"a\x00b\ud800"


@pytest.mark.parametrize("letter", ["a", "é", "🚀", "\0", "\ud800"])
def test_long_text_is_cut_and_marked(letter: str) -> None:
    message = _stored(ValueError(letter * 1_000_000)).message

    assert message.endswith(CUT)
    assert TEXT_BYTES_MAX - 8 <= len(message.encode()) <= TEXT_BYTES_MAX


def test_text_of_exactly_the_limit_is_whole() -> None:
    assert _stored(ValueError("a" * TEXT_BYTES_MAX)).message == "a" * TEXT_BYTES_MAX


def test_circle_of_causes_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first

    stored = _stored(first)

    assert stored.cause is not None
    assert stored.cause.cause is None


def test_everything_at_its_worst_fits_into_one_value() -> None:
    text = "\x01" * 10**5
    error: Exception = ValueError(text)
    for _ in range(50):
        group = ExceptionGroup(text, [ValueError(text) for _ in range(20)])
        group.__cause__ = error
        for _ in range(20):
            group.add_note(text)
        error = group

    assert len(error_to_json(error).encode()) <= VALUE_BYTES_MAX


def test_long_traceback_keeps_both_ends() -> None:
    stored = _stored(_caught(lambda: _recurse(sys.getrecursionlimit() // 2)))

    assert len(stored.traceback) == 51
    assert "frames … (cut)" in stored.render()


def test_error_stored_by_another_language_is_read() -> None:
    stored = error_from_json('{"type": "Error", "message": "x", "traceback": "at main.ts:3", "code": 7}')

    assert stored.render() == "at main.ts:3\nError: x"


@pytest.mark.parametrize("raw", ["nonsense", b"\xff", memoryview(b"[]"), '{"message": 3}', "[" * 10**5])
def test_what_is_no_stored_error_is_shown_as_it_is(raw: Any) -> None:
    assert error_from_json(raw).type == "unknown"
    assert codec_for(str).encode(error_from_json(raw).message)


def test_members_that_say_nothing_are_left_out() -> None:
    assert json.loads(error_to_json(ValueError("x"))) == {"type": "ValueError", "message": "x"}
