# ruff: noqa: E501, RUF001 - strings of all kinds, many a line
"""Strings that break what pastes, splits, escapes or measures text carelessly."""

from itertools import product
from typing import Final

_SQL: Final = [
    "'", '"', "''", '""', "\\", "\\'", "`", ";", "--", "/*", "*/", "/* */", "$$", "$1", "$body$", "%", "%s", "%(x)s", "%%",
    "?", ":x", "::text", "@", "#", "null", "NULL", "default", "true", "0", "-1", "1e309", "NaN", "{}", "{a,b}", "[]", "()",
    "'; drop table public.canary; --", '"; drop table public.canary; --', "$$; drop table public.canary; $$",
    "1; delete from public.canary", "' or '1'='1", "x') ; drop table public.canary; --", "') returning (select 1) --",
    "\\'; drop table public.canary; --", "E'\\x27; drop table public.canary'", "%s'; drop table public.canary; --",
    "pg_sleep(10)", "'||pg_sleep(10)||'", "(select current_user)", "${jndi:ldap://x}", "{{7*7}}", "{0.__class__}", "%n%n%n",
    "copy public.canary to program 'true'", "do $x$ begin drop table public.canary; end $x$", "set role postgres",
]  # fmt: skip
_PATHS: Final = [
    "../", "../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\x", "file:///etc/passwd", "a/b", "a.b", "a..b", ".", "..", "~",
    "os:system", "builtins:eval", "module:function", "__import__('os')", "!!python/object:os.system", "__class__", "a-b", "a_b",
    "a b", "a\u00a0b", "A-B", "ab", "aB", "ä", "a\u0308", "ß", "ss", "ſ", "İ", "i̇", "ﬁ", "fi",
]  # fmt: skip
_CONTROL: Final = [chr(code) for code in [*range(32), *range(127, 160)]]
_TERMINAL: Final = [
    "\x1b[31mred", "\x1b]0;title\x07", "\x1b]52;c;aGk=\x07", "\x1b[2J", "\x9b31m", "\x1bP1$r\x1b\\", "\r\noverwritten", "a\nb",
    "a\n2040-01-01 ERROR forged", "a\u2028b", "a\u2029b", "\b\b\b", "\u202eevil", "\u2066x\u2069", "\u200b", "\ufeff", "\u00ad",
]  # fmt: skip
_UNICODE: Final = [
    "😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "é", "日本語", "العربية", "עברית", "𝕏", "\U0010ffff", "\ufffe", "\uffff", "\ue000", "a" + "\u0301" * 50,
    "\ud800", "\udfff", "a\ud83d", "\udc00b", "\0", "a\0b", "a\0", "\U000e0041",
]  # fmt: skip
_LONG: Final = [
    "x" * 199,
    "x" * 200,
    "x" * 201,
    "é" * 100,
    "é" * 101,
    "😀" * 50,
    "😀" * 51,
    "x" * 5_000,
    "'" * 200,
    "\\" * 200,
]
_MARKUP: Final = [
    "<script>alert(1)</script>",
    "[red]x[/red]",
    "[/]",
    "[link=javascript:x]",
    "=1+1",
    "@SUM(A1)",
    "{'a': 1}",
    '{"a":1}',
]

HOSTILE: Final = list(dict.fromkeys(
    ["", " ", "  a", "a  ", *_SQL, *_PATHS, *_CONTROL, *_TERMINAL, *_UNICODE, *_LONG, *_MARKUP]
    + [f"{front}{middle}{back}" for front, middle, back in product(["a", "'"], _SQL[:30], ["", "b"])]
))  # fmt: skip


def is_storable(text: str) -> bool:
    """Tell whether Postgres can store a text."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)
