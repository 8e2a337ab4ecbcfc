"""Errors as they are stored: JSON that any language can read, never a pickle.

Storing an error must never fail, since it happens where nothing is left to report a failure to: the error's own `str`
may raise, its text may be megabytes or hold what Postgres refuses, its causes may form a circle. So every text is
cleaned and cut (marked `… (cut)`), every list is bounded, and what still goes wrong is stored as such.

    {"type": "ValueError", "message": "…", "traceback": [{"file": "…", "line": 7, "function": "…", "text": "…"}],
     "cause": {…}, "is_context": false, "group": [{…}], "notes": ["…"]}

`cause` is what the error was raised from, or, with `is_context`, what was being handled when it was raised. Members
that say nothing are left out.
"""

import linecache
from collections.abc import Iterator
from types import TracebackType
from typing import Any, cast

import msgspec

from pgconductor.codec import VALUE_BYTES_MAX, Raw
from pgconductor.errors import error_type_of, errors_in
from pgconductor.logs import below_engine

TEXT_BYTES_MAX = 32 * 1024
"""The most bytes of UTF-8 that one error's message may have; what is beyond is cut."""
NESTED_TEXT_BYTES_MAX = 4 * 1024
"""The same for its causes, the members of a group, and notes."""
ERRORS_MAX = 32
"""The most errors that are stored of one: itself, its causes and the members of its groups."""
FRAMES_FIRST = 10
FRAMES_LAST = 40
CUT = "… (cut)"

_LINE_BYTES_MAX = 500


class Frame(msgspec.Struct, frozen=True):
    """One line of a traceback."""

    file: str
    line: int
    function: str
    text: str = ""


class StoredError(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as the database keeps it.

    Attributes:
        type: The error's class: the bare name for builtins, `module.Class` otherwise.
        message: Its text, at most `TEXT_BYTES_MAX` bytes.
        traceback: Its frames, outermost first, from where the engine called the user's code; plain text where another
            language stored it.
        cause: What it was raised from, or what was being handled.
        is_context: Whether `cause` was only being handled.
        group: The members of an exception group.
        notes: Its notes.
    """

    type: str
    message: str = ""
    traceback: tuple[Frame, ...] | str = ()
    cause: "StoredError | None" = None
    is_context: bool = False
    group: "tuple[StoredError, ...]" = ()
    notes: tuple[str, ...] = ()

    def render(self) -> str:
        """Write the error as Python prints a traceback."""
        return "\n".join(_lines(self))


def error_to_json(error: BaseException) -> str:
    """Write an error as JSON. Never fails.

    Args:
        error: Any exception.

    Returns:
        JSON of a `StoredError`, at most `VALUE_BYTES_MAX` bytes; causes, members and notes go first.
    """
    try:
        stored = _store(error, _Budget())
        raw = msgspec.json.encode(stored)
        return (raw if len(raw) <= VALUE_BYTES_MAX else msgspec.json.encode(_alone(stored))).decode()
    except BaseException as failure:  # noqa: BLE001  (the error's own code may raise anything, even SystemExit)
        message = f"an error that could not be stored ({type(failure).__name__})"
        return msgspec.json.encode(StoredError(_clean(type(error).__name__, _LINE_BYTES_MAX), message)).decode()


def error_from_json(raw: Raw) -> StoredError:
    """Read a stored error. Never fails: what is not one becomes the message of an `unknown` error."""
    try:
        return msgspec.json.decode(raw, type=StoredError)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = raw if isinstance(raw, str) else bytes(raw).decode("utf-8", "backslashreplace")
        return StoredError("unknown", _clean(text, TEXT_BYTES_MAX))


def _alone(stored: StoredError) -> StoredError:
    """Leave out what came with an error; its own text and frames always fit."""
    return msgspec.structs.replace(stored, cause=None, group=(), notes=(CUT,))


class _Budget:
    """Counts the errors stored for one, and remembers them, so that a circle of causes ends."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def admit(self, error: BaseException) -> bool:
        """Tell whether there is room for one more error, and count it."""
        if id(error) in self._seen or len(self._seen) >= ERRORS_MAX:
            return False
        self._seen.add(id(error))
        return True

    @property
    def text_bytes_max(self) -> int:
        """Return how long the current error's message may be."""
        return TEXT_BYTES_MAX if len(self._seen) <= 1 else NESTED_TEXT_BYTES_MAX


def _store(error: BaseException, budget: _Budget) -> StoredError:
    budget.admit(error)
    message = _message(error, budget.text_bytes_max)
    cause, is_context = _cause_of(error)
    return StoredError(
        type=_clean(error_type_of(error), _LINE_BYTES_MAX),
        message=message,
        traceback=tuple(_frames(below_engine(error.__traceback__))),
        cause=_store(cause, budget) if cause is not None and budget.admit(cause) else None,
        is_context=is_context,
        group=tuple(_store(member, budget) for member in errors_in(error) if budget.admit(member)),
        notes=tuple(_notes(error)),
    )


def headline(error: BaseException, bytes_max: int = 200) -> str:
    """Say in a line what an error is."""
    message = _message(error, bytes_max).strip().partition("\n")[0]
    return _clean(f"{type(error).__name__}: {message}" if message else type(error).__name__, bytes_max)


def _message(error: BaseException, bytes_max: int) -> str:
    try:
        text = str(error)
    except BaseException as failure:  # noqa: BLE001  (the error's own code may raise anything, even SystemExit)
        text = f"(its text cannot be shown: str() raised {type(failure).__name__})"
    return _clean(text, bytes_max)


def _clean(text: str, bytes_max: int) -> str:
    """Escape what Postgres or JSON cannot hold, and cut to so many bytes, mark included."""
    head = str.__getitem__(text, slice(bytes_max + 1))
    raw = str.encode(str.replace(head, "\0", "\\x00"), "utf-8", "backslashreplace")
    if len(raw) <= bytes_max:
        return raw.decode()
    return raw[: bytes_max - len(CUT.encode())].decode("utf-8", "ignore") + CUT


def _cause_of(error: BaseException) -> tuple[BaseException | None, bool]:
    if error.__cause__ is not None:
        return error.__cause__, False
    if error.__context__ is not None and not error.__suppress_context__:
        return error.__context__, True
    return None, False


def _notes(error: BaseException) -> list[str]:
    notes: Any = getattr(error, "__notes__", ())
    found = cast("list[object]", notes[:10]) if isinstance(notes, (list, tuple)) else []
    return [_clean(note, NESTED_TEXT_BYTES_MAX) for note in found if isinstance(note, str)]


def _frames(traceback: TracebackType | None) -> Iterator[Frame]:
    """Yield the first and the last frames; a line in between says how many were left out."""
    entries: list[TracebackType] = []
    while traceback is not None:
        entries.append(traceback)
        traceback = traceback.tb_next
    left_out = len(entries) - FRAMES_FIRST - FRAMES_LAST
    for entry in entries if left_out <= 0 else entries[:FRAMES_FIRST]:
        yield _frame(entry)
    if left_out > 0:
        yield Frame("…", 0, f"{left_out} frames {CUT}")
        for entry in entries[-FRAMES_LAST:]:
            yield _frame(entry)


def _frame(entry: TracebackType) -> Frame:
    code = entry.tb_frame.f_code
    try:
        text = linecache.getline(code.co_filename, entry.tb_lineno, entry.tb_frame.f_globals).strip()
    except Exception:  # noqa: BLE001  (a loader's own code may raise anything)
        text = ""
    function = getattr(code, "co_qualname", code.co_name)
    return Frame(
        _clean(code.co_filename, _LINE_BYTES_MAX),
        entry.tb_lineno or 0,
        _clean(function, _LINE_BYTES_MAX),
        _clean(text, _LINE_BYTES_MAX),
    )


def _lines(error: StoredError) -> Iterator[str]:
    if error.cause is not None:
        yield from _lines(error.cause)
        yield ""
        yield (
            "During handling of the above exception, another exception occurred:"
            if error.is_context
            else "The above exception was the direct cause of the following exception:"
        )
        yield ""
    yield from _traceback_lines(error.traceback)
    yield f"{error.type}: {error.message}" if error.message else error.type
    yield from error.notes
    for number, member in enumerate(error.group, 1):
        yield f"  ---------------- {number} ----------------"
        for line in _lines(member):
            yield f"  {line}"


def _traceback_lines(traceback: tuple[Frame, ...] | str) -> Iterator[str]:
    if isinstance(traceback, str):
        yield from traceback.splitlines()
    elif traceback:
        yield "Traceback (most recent call last):"
        for frame in traceback:
            yield f'  File "{frame.file}", line {frame.line}, in {frame.function}'
            if frame.text:
                yield f"    {frame.text}"
