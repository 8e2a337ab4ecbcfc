"""What the Python scripts of the peers share: a peer is a subclass of `Peer`, run by `main`.

SCRIPT about | setup | enqueue KIND COUNT BYTES one|many | latency COUNT GAP | produce COUNT RATE |
       worker DIRECTORY NUMBER COUNT

The database and the settings come in BENCH_DSN and BENCH_SETTINGS; each answer is one line of JSON. A worker says that
it is connected with the file `ready.NUMBER`, and begins once there is a file `go`.
"""

import asyncio
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.marks import Marks
from benchmarks.pace import produce

BATCH = 5_000
BATCH_BYTES = 5_000_000
FAILING_OF_TEN = 3


class Peer:
    """One peer; what it has no word for is left out of `done`.

    Attributes:
        package: Its distribution.
        table: What a worker has to read before it can run anything; locked until all are connected.
        done: Of each kind of job that it knows, the query that counts the finished ones; `{count}` is that of all.
        fill: The statement that enqueues the no-op jobs from `{first}` to `{last}`; for a million at a time.
        delayed: The same with a start tomorrow.
        bulk: Whether it has a word for many at once.
    """

    package: ClassVar[str]
    table: ClassVar[str]
    done: ClassVar[dict[str, str]]
    fill: ClassVar[str | None] = None
    delayed: ClassVar[str | None] = None
    bulk: ClassVar[bool] = True

    def __init__(self, dsn: str, settings: dict[str, Any]) -> None:
        self.dsn = dsn
        self.settings = settings

    async def open(self) -> None:
        """Connect, as a client."""

    async def close(self) -> None:
        """Disconnect."""

    async def setup(self) -> None:
        """Install the schema and what else is declared once."""
        raise NotImplementedError

    async def enqueue(self, kind: str, number: int, padding: str) -> None:
        """Enqueue one job."""
        raise NotImplementedError

    async def enqueue_many(self, kind: str, numbers: range, padding: str) -> None:
        """Enqueue jobs at once; one by one where there is no word for that."""
        for number in numbers:
            await self.enqueue(kind, number, padding)

    async def work(self, number: int, hit: Callable[[int], None], begin: Callable[[], None]) -> None:
        """Be a worker process: connect, call `begin`, then run jobs for ever; each calls `hit` with its number."""
        raise NotImplementedError


def fails(number: int, attempt: int) -> bool:
    """Tell whether a job of the kind `fail` is to fail now: three of ten, at their first attempt."""
    return number % 10 < FAILING_OF_TEN and attempt == 1


def main(kind: type[Peer], run: Callable[[Any], Any] = asyncio.run) -> None:
    """Do what the arguments ask for."""
    role, *arguments = sys.argv[1:]
    if role == "about":
        version = importlib.metadata.version(kind.package)
        fields = ("table", "done", "fill", "delayed", "bulk")
        print(json.dumps({"version": version} | {name: getattr(kind, name) for name in fields}))
        return
    peer = kind(os.environ["BENCH_DSN"], json.loads(os.environ["BENCH_SETTINGS"]))
    answer = run(_ROLES[role](peer, *arguments))
    if role != "worker":
        print(json.dumps(answer), flush=True)
    os._exit(0)  # threads of a peer's client must not keep the process


async def _setup(peer: Peer) -> None:
    await peer.setup()


async def _enqueue(peer: Peer, kind: str, count: str, size: str, how: str) -> float:
    """Return the seconds it took."""
    padding = "x" * int(size)
    batch = min(BATCH, BATCH_BYTES // max(1, int(size)))
    await peer.open()
    began_at = time.perf_counter()
    if how == "one":
        for number in range(int(count)):
            await peer.enqueue(kind, number, padding)
    else:
        for first in range(0, int(count), batch):
            await peer.enqueue_many(kind, range(first, min(int(count), first + batch)), padding)
    seconds = time.perf_counter() - began_at
    await peer.close()
    return seconds


async def _latency(peer: Peer, count: str, gap: str) -> list[float]:
    """Return when each job was begun to be enqueued."""
    await peer.open()
    sent_at = []
    for number in range(int(count)):
        sent_at.append(time.time())
        await peer.enqueue("noop", number, "")
        await asyncio.sleep(float(gap))
    await peer.close()
    return sent_at


async def _produce(peer: Peer, count: str, rate: str) -> list[float]:
    """Return when each job was begun to be enqueued."""
    await peer.open()
    sent_at = await produce(int(count), float(rate), lambda numbers: peer.enqueue_many("noop", numbers, ""))
    await peer.close()
    return sent_at


async def _worker(peer: Peer, directory: str, number: str, count: str) -> None:
    marks = Marks(Path(directory) / f"marks.{number}", int(count))

    def begin() -> None:
        Path(directory, f"ready.{number}").touch()
        while not Path(directory, "go").exists():
            time.sleep(0.002)

    await peer.work(int(number), marks.hit, begin)


_ROLES: dict[str, Callable[..., Any]] = {
    "setup": _setup,
    "enqueue": _enqueue,
    "latency": _latency,
    "produce": _produce,
    "worker": _worker,
}
