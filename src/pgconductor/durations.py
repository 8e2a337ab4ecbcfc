"""Durations as people write them: seconds, `"15m"`, `"1h30m"` or a `timedelta`; parsed strictly, rendered shortly."""

import math
import re
from datetime import timedelta

Duration = float | str | timedelta
"""Seconds, a text such as `"250ms"`, `"30s"`, `"15m"`, `"1h30m"`, `"2d"`, or a `timedelta`."""

DURATION_MAX = timedelta(days=365_000)
"""About 1,000 years: an instant this far from now still fits a `datetime` (year 9999) and a Postgres `interval`."""

_REMEDY = 'write seconds (30), a text such as "250ms", "30s", "15m", "1h30m" or "2d", or a timedelta'
_NUMBER = r"(\d+(?:\.\d+)?)"
_TEXT = re.compile(
    rf"\s*(?:{_NUMBER}\s*w)?\s*(?:{_NUMBER}\s*d)?\s*(?:{_NUMBER}\s*h)?\s*(?:{_NUMBER}\s*m)?"
    rf"\s*(?:{_NUMBER}\s*s)?\s*(?:{_NUMBER}\s*ms)?\s*",
    re.ASCII,
)
_UNITS_SECONDS = (604_800.0, 86_400.0, 3_600.0, 60.0, 1.0, 0.001)


def parse_duration(value: Duration, place: str = "duration", *, positive: bool = False) -> timedelta:
    """Turn a duration as a user writes it into a `timedelta`, or refuse it.

    Args:
        value: Seconds as int or float, a text of parts from weeks down to milliseconds (`w d h m s ms`), or a
            `timedelta`; from 0 to `DURATION_MAX`, resolved to the microsecond.
        place: What the duration is for, such as `task 'charge': timeout=`; opens the error message.
        positive: Whether zero is refused too.

    Returns:
        The duration, never negative.

    Raises:
        ValueError: The value is negative, not finite, over `DURATION_MAX`, a bool, or unreadable. Nothing changed.
    """
    number = value.total_seconds() if isinstance(value, timedelta) else _read_seconds(value, place)
    if not math.isfinite(number):
        raise _refusal(place, value, "is not a finite number")
    if number < 0:
        raise _refusal(place, value, "is negative")
    if number > DURATION_MAX.total_seconds():
        raise _refusal(place, value, f"is over the maximum of {DURATION_MAX.days} days")
    duration = value if isinstance(value, timedelta) else timedelta(seconds=number)
    if positive and not duration:
        raise _refusal(place, value, "must be more than zero")
    return duration


def seconds(value: Duration, place: str = "duration", *, positive: bool = False) -> float:
    """Return a duration in seconds, refusing what `parse_duration` refuses.

    Args:
        value: As for `parse_duration`.
        place: As for `parse_duration`.
        positive: Whether zero is refused too.

    Returns:
        Seconds, never negative, resolved to the microsecond.

    Raises:
        ValueError: As for `parse_duration`.
    """
    return parse_duration(value, place, positive=positive).total_seconds()


def format_duration(value: Duration) -> str:
    """Render a duration as briefly as `parse_duration` reads it: `30s`, `5m`, `1.5s`, `2h`, `1d12h`, `250ms`.

    Args:
        value: As for `parse_duration`.

    Returns:
        The text; parsing it gives the same duration.

    Raises:
        ValueError: As for `parse_duration`.
    """
    microseconds = parse_duration(value) // timedelta(microseconds=1)
    if microseconds < 1_000_000:
        return _decimal(microseconds, 1_000) + "ms" if microseconds else "0s"
    minutes, rest = divmod(microseconds, 60_000_000)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{count}{unit}" for count, unit in ((days, "d"), (hours, "h"), (minutes, "m")) if count]
    return "".join([*parts, _decimal(rest, 1_000_000) + "s"] if rest else parts)


def _read_seconds(value: object, place: str) -> float:
    if isinstance(value, str):
        return _read_text(value, place)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(place, value, f"is a {type(value).__name__}, not a duration")
    try:
        return float(value)
    except OverflowError:
        raise _refusal(place, value, "is too large") from None


def _read_text(text: str, place: str) -> float:
    found = _TEXT.fullmatch(text)
    if found is None or not any(found.groups()):
        raise _refusal(place, text, "is not a duration")
    return sum(float(part) * unit for part, unit in zip(found.groups(), _UNITS_SECONDS, strict=True) if part)


def _decimal(count: int, scale: int) -> str:
    whole, part = divmod(count, scale)
    return f"{whole}.{part:0{len(str(scale)) - 1}d}".rstrip("0").rstrip(".") if part else str(whole)


def _refusal(place: str, value: object, problem: str) -> ValueError:
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "that integer"
    return ValueError(f"{place}: {shown[:80]} {problem}; {_REMEDY}")
