"""Ids of executions: UUID version 7, so that rows created together lie together.

Since the client knows the id before it sends a call, a call whose reply was lost is repeated under the same id and
cannot make a second execution. Ids of one process rise, whatever its threads; those of several only roughly, since
clocks differ. Nothing relies on their order.

Layout: 48 bits of milliseconds, 12 bits of their fraction, 62 random bits. Source: RFC 9562, section 5.7, with the
fraction of method 3 of section 6.2.
"""

import os
import time
from collections.abc import Iterator
from threading import Lock
from typing import Final

_FRACTIONS: Final = [f"{fraction:03x}" for fraction in range(4096)]
_VARIANT: Final = 0b10 << 62
_RANDOM: Final = (1 << 62) - 1
_VARIANTS: Final = bytes(0x80 | byte & 0x3F for byte in range(256))  # two bits say the variant, six stay random


class IdMaker:
    """Makes rising ids; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._last = 0

    def make(self, number: int) -> list[str]:
        """Return so many new ids, in rising order, as canonical text."""
        variants = bytearray(os.urandom(2 * number))
        variants[::2] = variants[::2].translate(_VARIANTS)
        middles, ends = _in_groups(variants, 2), _in_groups(os.urandom(6 * number), 6)
        return [
            f"{prefix}{fraction}-{middle}-{end}"
            for prefix, fractions in _instants(self._reserve(number), number)
            for fraction, middle, end in zip(fractions, middles, ends, strict=False)
        ]

    def make_one(self) -> str:
        """Do as `make` for a single id, which most calls need, in a third of the time."""
        millisecond, fraction = divmod(self._reserve(1), 4096)
        noise = int.from_bytes(os.urandom(8), "big") & _RANDOM | _VARIANT
        digits = f"{millisecond:012x}7{fraction:03x}{noise:016x}"
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"

    def _reserve(self, number: int) -> int:
        """Take the next so many instants, counted in 1/4096 of a millisecond."""
        now = time.time_ns() * 4096 // 1_000_000
        with self._lock:
            first = max(now, self._last + 1)
            self._last = first + number - 1
        return first


def _in_groups(noise: bytes | bytearray, size: int) -> Iterator[str]:
    """Yield the digits of each group of so many bytes."""
    return iter(noise.hex("-", size).split("-"))


def _instants(first: int, number: int) -> Iterator[tuple[str, list[str]]]:
    """Yield, for each millisecond that so many instants in a row touch, how its ids begin, and the fractions."""
    while number:
        millisecond, fraction = divmod(first, 4096)
        digits = f"{millisecond:012x}"
        fractions = _FRACTIONS[fraction : fraction + number]
        yield f"{digits[:8]}-{digits[8:]}-7", fractions
        first += len(fractions)
        number -= len(fractions)


_maker: Final = IdMaker()
new_ids = _maker.make
"""Return so many new ids of this process, in rising order, as canonical text."""
new_id = _maker.make_one
"""Return one new id as canonical text."""
