"""Checks of what users write: each returns the value it accepts, or refuses it with the place and the remedy."""

import inspect
import re
from collections.abc import Container, Mapping, Sequence
from datetime import datetime, time, timedelta
from typing import Any, TypeVar, cast, get_args
from uuid import UUID
from zoneinfo import ZoneInfo

from pgconductor.durations import Duration, parse_duration
from pgconductor.errors import ConfigurationError

SMALLINT_MAX = 32_767
INT_MAX = 2_147_483_647
NAME_BYTES_MAX = 200
TEXT_LENGTH_MAX = 4_000

_Word = TypeVar("_Word", bound=str)
_PATH = re.compile(r"[^\s.]+(?:\.[^\s.]+)*")
_TIME = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d)?", re.ASCII)


def check_integer(value: object, place: str, lowest: int, highest: int) -> int:
    """Accept a whole number within bounds; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(place, f"{value!r} is not a whole number", f"give {lowest} to {highest}")
    if not lowest <= value <= highest:
        raise ConfigurationError(place, f"{_shown(value)} is out of bounds", f"give {lowest} to {highest}")
    return value


def check_number(value: object, place: str, lowest: float, highest: float) -> float:
    """Accept a number within bounds; neither a bool nor NaN is one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not lowest <= cast(float, value) <= highest:
        raise ConfigurationError(place, f"{_shown(value)} is out of bounds", f"give {lowest} to {highest}")
    return cast(float, value)


def check_flag(value: object, place: str) -> bool:
    """Accept True or False only."""
    if not isinstance(value, bool):
        raise ConfigurationError(place, f"{_shown(value)} is not a bool", "give True or False")
    return value


def check_duration(value: Duration, place: str, *, positive: bool = False) -> timedelta:
    """Accept what `parse_duration` accepts."""
    try:
        return parse_duration(value, place, positive=positive)
    except ValueError as error:
        reason, _, remedy = str(error).removeprefix(f"{place}: ").partition("; ")
        raise ConfigurationError(place, reason, remedy) from None


def check_text(value: object, place: str, length_max: int = TEXT_LENGTH_MAX) -> str:
    """Accept a text that Postgres can store, neither empty nor too long."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(place, f"{_shown(value)} is not a text", f"give 1 to {length_max} characters")
    if len(value) > length_max:
        raise ConfigurationError(place, f"{len(value)} characters are too many", f"give 1 to {length_max}")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigurationError(place, "has a NUL or a lone surrogate, which Postgres cannot store", "remove it")
    return value


def check_optional_text(value: str | None, place: str) -> str | None:
    """Accept None or a text."""
    return None if value is None else check_text(value, place)


def check_name(value: object, place: str) -> str:
    """Accept a name: 1 to 200 bytes of printable UTF-8, without spaces at its ends."""
    name = check_text(value, place, NAME_BYTES_MAX)
    if not name.isprintable():
        raise ConfigurationError(place, f"{_shown(name)} has a character that is not printable", "remove it")
    if len(name.encode()) > NAME_BYTES_MAX:
        raise ConfigurationError(place, f"{len(name.encode())} bytes are too many", f"give 1 to {NAME_BYTES_MAX}")
    if name != name.strip():
        raise ConfigurationError(place, f"{name!r} begins or ends with a space", "remove it")
    return name


def check_names(values: object, place: str) -> tuple[str, ...]:
    """Accept a non-empty sequence of different names; one string is none."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ConfigurationError(place, f"{_shown(values)} is not a sequence of names", 'give a list such as ["id"]')
    names = tuple(check_name(value, place) for value in cast(Sequence[object], values))
    if not names:
        raise ConfigurationError(place, "is empty", "give at least one name")
    if len(set(names)) < len(names):
        raise ConfigurationError(place, f"{list(names)} repeats a name", "give each once")
    return names


def check_word(value: _Word, place: str, words: object) -> _Word:
    """Accept a word of a `Literal` type."""
    known = get_args(words)
    if value not in known:
        raise ConfigurationError(place, f"{_shown(value)} is not known", "give one of " + ", ".join(map(repr, known)))
    return value


def check_payload_path(value: str | None, place: str) -> str | None:
    """Accept None or a dotted path into the payload."""
    if value is not None and not _PATH.fullmatch(check_name(value, place)):
        raise ConfigurationError(place, f"{value!r} is not a payload path", 'write names with dots, as "tenant.id"')
    return value


def check_zone(value: str, place: str) -> str:
    """Accept an IANA time zone that this machine knows."""
    try:
        ZoneInfo(check_name(value, place))
    except (OSError, ValueError, KeyError):
        remedy = 'give an IANA name such as "Europe/Berlin"; where the system has no zones, install tzdata'
        raise ConfigurationError(place, f"{value!r} is not a known time zone", remedy) from None
    return value


def check_time(value: object, place: str) -> time:
    """Accept a local time of day."""
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise ConfigurationError(place, f"{_shown(value)} is not a time of day", 'write it as "22:00"')
    return time.fromisoformat(value)


def check_instant(value: object, place: str) -> datetime:
    """Accept an aware datetime: a naive one would mean another instant on another machine."""
    if not isinstance(value, datetime):
        raise ConfigurationError(place, f"{_shown(value)} is not a datetime", "give an aware datetime")
    if value.utcoffset() is None:
        raise ConfigurationError(place, f"{value!r} has no time zone", "give an aware one: datetime.now(UTC)")
    return value


def check_execution_id(value: object, place: str) -> str:
    """Accept the id of an execution, also as text."""
    try:
        return str(value if isinstance(value, UUID) else UUID(cast("str", value)))
    except (ValueError, AttributeError, TypeError):
        raise ConfigurationError(place, f"{_shown(value)} is not an execution's id", "give a UUID: run.id") from None


def check_function(value: object, place: str, *, is_plain: bool = False) -> None:
    """Accept something to call; a coroutine is what a call has made already.

    Args:
        value: What is to be called.
        place: Opens the message.
        is_plain: Whether nothing is there to await it, so that an `async def` is refused too.
    """
    if not callable(value):
        if inspect.iscoroutine(value):
            value.close()
        raise ConfigurationError(
            place, f"{_shown(value)} is not a function", "give the function, and its arguments after it"
        )
    if is_plain and inspect.iscoroutinefunction(value):
        raise ConfigurationError(
            place, "an async def cannot be awaited in a plain def handler", "give a plain function, or make both async"
        )


def check_sequence(value: object, place: str, what: str) -> Sequence[object]:
    """Accept a list or a tuple of things; a text is none."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ConfigurationError(place, f"{_shown(value)} is not a sequence of {what}", "give a list")
    return cast(Sequence[object], value)


def check_known(given: Mapping[str, object], known: Container[str], place: str) -> None:
    """Refuse an option that does not exist, as a misspelt one."""
    for name in given:
        if name not in known:
            raise ConfigurationError(place, f"unknown option {name!r}", "check its spelling")


def _shown(value: Any) -> str:
    return "that integer" if isinstance(value, int) and abs(value) > 10**30 else repr(value)[:80]
