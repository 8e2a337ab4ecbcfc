"""How things look: times, states, and text from elsewhere made harmless for a terminal."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo
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
SECRETS: Final = frozenset(
    {option.keyword.decode() for option in Conninfo.get_defaults() if option.dispchar == b"*"}
    | {"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}
)
"""The parts of an address that are nobody's to see: those that libpq marks so, and those that it leaves unmarked."""
_PLACE: Final = ("service", "user", "password", "host", "hostaddr", "port", "dbname")
_SECRET: Final = re.compile(
    rf"(://[^:/@\s]*:)\S*(@)|(\b(?:pgpassword|{'|'.join(sorted(SECRETS))})\s*=\s*)('(?:[^'\\]|\\.)*'|\S+)",
    re.IGNORECASE,
)
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "m"))


def console() -> Console:
    """Return what prints to the standard output as it stands now; into a file or pipe, on wide lines.

    It reads neither `[bold]` nor `:smile:` in a text: names and values come from elsewhere, and are shown as they are.
    """
    out = Console(markup=False, emoji=False, highlight=False)
    return out if out.is_terminal else Console(markup=False, emoji=False, highlight=False, width=WIDTH_OF_FILES)


def marked(mark: str, style: str, text: str) -> Text:
    """Write a line that opens with a coloured mark."""
    return Text.assemble((mark, style), f" {text}")


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


def place_of(process: Mapping[str, Any]) -> str:
    """Write where a process runs, as the server tells of it."""
    return line(f"{process['host']}:{process['pid']}")


def _escaped(char: str) -> str:
    if char == "\t":
        return "    "
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


def redacted(text: str) -> str:
    """Take passwords and other secrets out of text that may quote an address."""
    return _SECRET.sub(lambda m: f"{m[1]}***{m[2]}" if m[1] else f"{m[3]}***", text)


def redacted_dsn(dsn: str) -> str:
    """Write where an address leads, as whom, and that it has a password; nothing else of it."""
    given = conninfo_to_dict(dsn)
    shown = {key: str(given[key]) for key in _PLACE if given.get(key) is not None}
    return make_conninfo("", **(shown | {"password": "***"} if "password" in shown else shown))


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


def counted(number: int, what: str) -> str:
    """Write a number of things: `1 time`, `2 times`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def span(start: str | None, end: str | None) -> str:
    """Write how long something took, or has taken until now."""
    first, last = instant(start), instant(end)
    if first is None:
        return ""
    return elapsed(max(0.0, ((last or datetime.now(UTC)) - first).total_seconds()))
