"""Durations are read as written, and refused when they could be misread."""

from datetime import timedelta
from typing import Any

import pytest

from pgconductor.durations import DURATION_MAX, Duration, format_duration, parse_duration, seconds

READ: list[tuple[Duration, float]] = [
    (0, 0),
    (30, 30),
    (0.25, 0.25),
    ("250ms", 0.25),
    ("30s", 30),
    ("1.5s", 1.5),
    ("15m", 900),
    ("1h30m", 5_400),
    ("1h 30m", 5_400),
    ("2d", 172_800),
    ("1w", 604_800),
    (timedelta(minutes=5), 300),
]
REFUSED: list[Any] = [
    *(
        -1,
        "-1s",
        float("nan"),
        float("inf"),
        -0.001,
        timedelta(seconds=-1),
        True,
        None,
        pytest.param(object(), id="an object"),
        b"1s",
    ),
    *("", " ", "30", "1e5", "abc", "30m1h", "1h1h", "5M", "5 minutes", "٣s", 10**400, 1e300, "999999999d"),
    DURATION_MAX + timedelta(seconds=1),
]


@pytest.mark.parametrize(("written", "expected"), READ)
def test_duration_is_read_as_written(written: Duration, expected: float) -> None:
    assert parse_duration(written) == timedelta(seconds=expected)
    assert seconds(written) == expected


@pytest.mark.parametrize("written", REFUSED, ids=lambda value: repr(value)[:30])
def test_what_is_no_duration_is_refused_with_place_and_remedy(written: Any) -> None:
    with pytest.raises(ValueError, match=r"^task 'charge': timeout: .*write seconds"):
        parse_duration(written, "task 'charge': timeout")


def test_zero_is_refused_where_it_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="must be more than zero"):
        parse_duration("0s", positive=True)


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (0.0005, "0.5ms"),
        (1.5, "1.5s"),
        (30, "30s"),
        (90, "1m30s"),
        (300, "5m"),
        (7_200, "2h"),
        (86_400, "1d"),
        (129_600, "1d12h"),
    ],
)
def test_duration_is_rendered_briefly_and_reads_back(duration: float, text: str) -> None:
    assert format_duration(duration) == text
    assert parse_duration(text) == timedelta(seconds=duration)
