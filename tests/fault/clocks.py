"""Wall clocks that are wrong, each for one process: libfaketime stands between it and the kernel's.

Everything in the process is told the wrong time, C code too. The monotonic clock is right: it is one of the kernel's
own, and no administrator or time server moves it.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
needs_faketime = pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not installed (Debian: faketime)")

FAST, SLOW, STOOD_STILL = "+3600", "-3600", "2020-02-29 12:00:00"


def wrong_clock(time: str) -> Mapping[str, str]:
    """Return what to add to a process' environment: seconds fast (+) or slow (-), or the instant where it stands."""
    return {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME": time,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",  # or Python would take compiled modules for outdated
    }


class JumpingClock:
    """The clock of a process that jumps while it runs.

    Args:
        file: Where the process reads how wrong its clock is.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(FAST)
        environment = {name: value for name, value in wrong_clock("").items() if name != "FAKETIME"}
        self.environment = environment | {"FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_NO_CACHE": "1"}

    def jump(self, time: str) -> None:
        """Move it, as `wrong_clock` says."""
        new = self._file.with_suffix(".new")
        new.write_text(time)
        new.replace(self._file)
