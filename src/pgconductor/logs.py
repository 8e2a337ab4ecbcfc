"""Log lines that say which run wrote them, for the standard library's `logging`; nothing here is needed to log.

`ctx.logger` puts the ids on its own lines. Lines of other loggers, written inside a handler or a step by any code, get
them from `RunFilter` or `JsonFormatter`, which look up the run that is going on.

What the command line was told of logging holds for the processes of handlers, too: see `set_up`.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, TypeAlias, cast

from msgspec import Struct

Redact: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]

ID_FIELDS: Final = ("execution_id", "root_id", "parent_id", "task", "queue", "attempt", "step")
DEPTH_MAX: Final = 6
ITEMS_MAX: Final = 200

PACKAGE: Final = f"{Path(__file__).parent}{os.sep}"
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class HasIds(Protocol):
    """A run, as log lines see it."""

    closed: bool
    """Whether it is over; what it has started may go on."""

    def log_ids(self) -> Mapping[str, Any]:
        """Return a value for each of `ID_FIELDS`."""
        ...


current_run: ContextVar[HasIds | None] = ContextVar("current_run", default=None)


class LogSetup(Struct, frozen=True):
    """From which level on lines are written to stderr, and how."""

    level: int
    is_json: bool


told: LogSetup | None = None
"""What the command line told this process; None where a program sees to its logging by itself."""


def set_up(setup: LogSetup) -> None:
    """Write lines to stderr, unless something else was configured, and let this process's children do so alike."""
    global told  # noqa: PLW0603 (logging is the process')
    told = setup
    handler: logging.Handler = logging.StreamHandler()
    if setup.is_json:
        handler.setFormatter(JsonFormatter())
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler  # which takes longer to load than all that is here

        handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False)
    when = "" if sys.stderr.isatty() else "%(asctime)s "  # rich shows the time by itself
    logging.basicConfig(level=setup.level, handlers=[handler], format=f"{when}%(levelname)s %(name)s: %(message)s")


def shown(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """Return what `exc_info` takes of a handler's error: its frames begin where the engine calls the user's code."""
    return type(error), error, below_engine(error.__traceback__)


def below_engine(traceback: TracebackType | None) -> TracebackType | None:
    """Leave out the frames of the engine that a traceback begins with, unless it has no others."""
    return below(traceback, lambda file: file.startswith(PACKAGE)) or traceback


def below(traceback: TracebackType | None, is_above: Callable[[str], bool]) -> TracebackType | None:
    """Leave out the frames that a traceback begins with, as long as `is_above` says so of their files."""
    while traceback is not None and is_above(traceback.tb_frame.f_code.co_filename):
        traceback = traceback.tb_next
    return traceback


def ids_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the ids of the run that wrote a line; empty for one that was written outside a run."""
    if hasattr(record, "execution_id"):
        return {name: getattr(record, name, None) for name in ID_FIELDS}
    run = current_run.get()
    return dict(run.log_ids()) if run is not None else {}


class RunFilter(logging.Filter):
    """Give every record the attributes of `ID_FIELDS`, so that any format can name them: `%(execution_id)s`.

    Add it to a handler, not to a logger. It lets every record pass; outside a run the attributes are None.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes."""
        ids = ids_of(record)
        for name in ID_FIELDS:
            setattr(record, name, ids.get(name))
        return True


class JsonFormatter(logging.Formatter):
    """Write each record as one line of JSON: time, level, logger, message, the run's ids, what `extra` brought, error.

    Whatever a message or value contains, the line stays one line and valid JSON: all that is not printable ASCII is
    escaped, so no stored text can forge a line or command a terminal. Values without a JSON form are written as text.

    Args:
        redact: Is given each line as a dict and returns what to write; for taking secrets out. If it raises, the line
            is replaced by one that says so, without its contents.
    """

    def __init__(self, *, redact: Redact | None = None) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry = self._entry(record)
        if self._redact is not None:
            try:
                entry = self._redact(entry)
            except Exception as error:  # noqa: BLE001 (a line must neither leak nor end what logs it)
                entry = _head(record) | {"message": f"a line was dropped: redact raised {type(error).__name__}"}
        text = json.dumps(_plain(entry, 0), ensure_ascii=True, allow_nan=False)
        return text.replace("\x7f", "\\u007f")

    def _entry(self, record: logging.LogRecord) -> dict[str, Any]:
        entry = _head(record) | {"message": _message(record)}
        entry |= {name: value for name, value in ids_of(record).items() if value is not None}
        for name, value in vars(record).items():
            if name not in _STANDARD and name not in ID_FIELDS:
                entry.setdefault(name, value)
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            entry["error"] = {
                "type": f"{type(error).__module__}.{type(error).__qualname__}",
                "message": _text(error),
                "traceback": self.formatException(record.exc_info),
            }
        if record.stack_info:
            entry["stack"] = record.stack_info
        return entry


def _head(record: logging.LogRecord) -> dict[str, Any]:
    at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"time": at, "level": record.levelname, "logger": record.name}


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001 (a wrong format is the writer's mistake, and the line still tells)
        return f"{_text(record.msg)} does not fit its arguments: {type(error).__name__}"


def _plain(value: object, depth: int) -> Any:
    """Return what JSON can hold, cut where it is deep or long."""
    if value is None or isinstance(value, bool) or (isinstance(value, int) and -(2**63) <= value < 2**64):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value
    if depth < DEPTH_MAX and isinstance(value, Mapping):
        pairs = list(cast("Mapping[object, object]", value).items())[:ITEMS_MAX]
        return {_text(name): _plain(each, depth + 1) for name, each in pairs}
    if depth < DEPTH_MAX and isinstance(value, list | tuple | set | frozenset):
        return [_plain(each, depth + 1) for each in list(cast("list[object]", value))[:ITEMS_MAX]]
    return _text(value)


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 (somebody's __str__)
        return f"<{type(value).__name__}: str() raised {type(error).__name__}>"
