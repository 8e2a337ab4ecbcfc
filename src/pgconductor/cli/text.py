"""How things look: times, states, and text from elsewhere made harmless for a terminal."""

import re
from datetime import UTC, datetime
from typing import Final

from psycopg.conninfo import conninfo_to_dict, make_conninfo
from rich.console import Console
from rich.text import Text

STYLES: Final = {
    "scheduled": "magenta", "ready": "cyan", "running": "blue", "waiting": "yellow",
    "completed": "green", "failed": "red", "cancelled": "dim", "timed_out": "red", "pending": "yellow",
}  # fmt: skip
MARKS: Final = {
    "scheduled": "◷", "ready": "○", "running": "●", "waiting": "◌", "completed": "✓", "failed": "✗",
    "cancelled": "⊘", "timed_out": "✗", "pending": "◌",
}  # fmt: skip
WIDTH_OF_FILES: Final = 140
_PASSWORD: Final = re.compile(
    r"(://[^:/@\s]*:)\S*(@)|(\b(?:ssl|pg)?password\s*=\s*)('(?:[^'\\]|\\.)*'|\S+)", re.IGNORECASE
)
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "m"))


def console() -> Console:
    """Return what prints to the standard output as it stands now; into a file or pipe, on wide lines."""
    out = Console(highlight=False, soft_wrap=False)
    return out if out.is_terminal else Console(highlight=False, soft_wrap=False, width=WIDTH_OF_FILES)


def safe(text: object, length_max: int = 0) -> str:
    """Write text so that a terminal shows it and obeys nothing in it: no escapes, no controls, no direction marks.

    Args:
        text: From anywhere.
        length_max: Characters after which it is cut; 0 keeps all.
    """
    whole = str(text)
    cut = whole[:length_max] + "…" if 0 < length_max < len(whole) else whole
    return "".join(char if char.isprintable() or char == "\n" else _escaped(char) for char in cut)


def line(text: object, length_max: int = 0) -> str:
    """Write text as `safe` does, on one line."""
    return safe(" ".join(str(text).split()), length_max)


def _escaped(char: str) -> str:
    if char == "\t":
        return "    "
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


def redacted(text: str) -> str:
    """Take passwords out of text that may quote an address."""
    return _PASSWORD.sub(lambda m: f"{m[1]}***{m[2]}" if m[1] else f"{m[3]}***", text)


def redacted_dsn(dsn: str) -> str:
    """Write an address without its password."""
    given = {key: str(value) for key, value in conninfo_to_dict(dsn).items() if value is not None}
    return make_conninfo("", **{key: "***" if "password" in key else value for key, value in given.items()})


def state(name: str) -> Text:
    """Write a state with its mark and colour."""
    return Text(f"{MARKS.get(name, '·')} {name}", style=STYLES.get(name, ""))


def instant(text: str | None) -> datetime | None:
    """Read an instant as the database writes it in JSON."""
    return None if text is None else datetime.fromisoformat(text)


def elapsed(seconds: float) -> str:
    """Write a length of time in at most two units: `12ms`, `3.4s`, `2m 05s`, `4d 2h`."""
    if seconds < 0:
        return f"-{elapsed(-seconds)}"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    seconds = max(60, int(seconds))
    for size, unit in _UNITS:
        if seconds >= size:
            rest = {"d": f"{seconds % size // 3600}h", "h": f"{seconds % size // 60:02}m"}
            return f"{seconds // size}{unit} {rest.get(unit, f'{seconds % size:02}s')}"
    raise AssertionError("a minute and more has a unit")


def ago(text: str | None) -> str:
    """Write how long ago an instant was; `in …` for the future, nothing for none."""
    at = instant(text)
    if at is None:
        return ""
    seconds = (datetime.now(UTC) - at).total_seconds()
    return f"{elapsed(seconds)} ago" if seconds >= 0 else f"in {elapsed(-seconds)}"


def span(start: str | None, end: str | None) -> str:
    """Write how long something took, or has taken until now."""
    first, last = instant(start), instant(end)
    if first is None:
        return ""
    return elapsed(max(0.0, ((last or datetime.now(UTC)) - first).total_seconds()))
