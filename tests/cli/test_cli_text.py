"""How things look: times, and text from elsewhere made harmless."""

import pytest

from pgconductor.cli.text import elapsed, line, redacted, redacted_dsn, safe


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0124, "12ms"), (3.44, "3.4s"), (59.9, "59.9s"), (125, "2m 05s"), (11_400, "3h 10m"),
     (352_800, "4d 2h"), (-5, "-5.0s"), (0.9996, "1.0s"), (59.97, "1m 00s"), (1379.7, "22m 59s"), (7199.9, "1h 59m")],
)  # fmt: skip
def test_lengths_of_time_have_two_units(seconds: float, text: str) -> None:
    assert elapsed(seconds) == text


def test_text_is_escaped_and_cut() -> None:
    assert safe("a\x1b[1mb\u202ec\n\td") == "a\\x1b[1mb\\u202ec\n    d"
    assert safe("abcdef", 3) == "abc…"
    assert line("a\n b\r\nc") == "a b c"


@pytest.mark.parametrize(
    "dsn",
    ["postgresql://user:hunter2@host/db", "host=h password=hunter2 dbname=d", "host=h password='hunter2 x' dbname=d"],
)
def test_passwords_are_taken_out(dsn: str) -> None:
    assert "hunter2" not in redacted(f"cannot use {dsn} now")
    assert "hunter2" not in redacted_dsn(dsn)
    assert "***" in redacted_dsn(dsn)
