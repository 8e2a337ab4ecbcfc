"""What worker processes ran, in shared memory: watched without asking the database, and complete after a kill.

One file a process: `u64 runs | n bytes, how often each job ran | n doubles, when each first began`.
"""

import mmap
import struct
import time
from pathlib import Path

_HEAD = 8


class Marks:
    """Written by one process."""

    def __init__(self, path: Path, count: int) -> None:
        with path.open("wb") as file:
            file.truncate(_HEAD + 9 * count)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _HEAD + 9 * count)
        self._count = count
        self._runs = 0

    def hit(self, job: int) -> None:
        """Note that a job has begun."""
        memory = self._memory
        if not memory[_HEAD + job]:
            struct.pack_into("<d", memory, _HEAD + self._count + 8 * job, time.time())
        memory[_HEAD + job] = min(255, memory[_HEAD + job] + 1)
        self._runs += 1
        struct.pack_into("<Q", memory, 0, self._runs)


class Seen:
    """What several processes wrote."""

    def __init__(self, paths: list[Path], count: int) -> None:
        self._paths = paths
        self._count = count

    def runs(self) -> int:
        """Return how many runs have begun."""
        total = 0
        for path in self._paths:
            with path.open("rb") as file:
                total += struct.unpack("<Q", file.read(_HEAD))[0]
        return total

    def runs_of_each(self) -> list[int]:
        """Return how often each job has begun."""
        each = [path.read_bytes()[_HEAD : _HEAD + self._count] for path in self._paths]
        return [sum(runs) for runs in zip(*each, strict=True)]

    def began_at(self) -> list[float]:
        """Return when each job first began, as `time.time()` tells; 0 for those that have not."""
        whole = [struct.unpack_from(f"<{self._count}d", path.read_bytes(), _HEAD + self._count) for path in self._paths]
        return [min((at for at in times if at), default=0.0) for times in zip(*whole, strict=True)]
