"""Ids of executions: UUID version 7, so that rows created together lie together.

Since the client knows the id before it sends a call, a call whose reply was lost is repeated under the same id and
cannot make a second execution. Ids of one process rise, whatever its threads; those of several only roughly, since
clocks differ. Nothing relies on their order.

Layout: 48 bits of milliseconds, 12 bits of their fraction, 62 random bits. Source: RFC 9562, section 5.7, with the
fraction of method 3 of section 6.2.
"""

import os
import time
from threading import Lock

_VARIANTS = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))  # two bits say the variant, two stay random


class IdMaker:
    """Makes rising ids; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._last = 0

    def make(self, number: int) -> list[str]:
        """Return so many new ids, in rising order, as canonical text."""
        first = self._reserve(number)
        noise = os.urandom(8 * number).hex()
        return [_text(f"{first + i:015x}", noise[16 * i : 16 * i + 16]) for i in range(number)]

    def _reserve(self, number: int) -> int:
        """Take the next so many instants, counted in 1/4096 of a millisecond."""
        now = time.time_ns() * 4096 // 1_000_000
        with self._lock:
            first = max(now, self._last + 1)
            self._last = first + number - 1
        return first


def _text(instant: str, noise: str) -> str:
    """Write 15 hexadecimal digits of time and 16 random ones as an id."""
    return f"{instant[:8]}-{instant[8:12]}-7{instant[12:]}-{_VARIANTS[noise[0]]}{noise[1:4]}-{noise[4:]}"


new_ids = IdMaker().make
"""Return so many new ids of this process, in rising order, as canonical text."""


def new_id() -> str:
    """Return one new id as text."""
    return new_ids(1)[0]
