"""Tasks that run in processes of their own; imported by the tests and by those processes.

`python -m tests.integration.isolated_app` is a worker for them.
"""

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from pgconductor import Conductor, Context, Orchestrator, RetryPolicy, SyncContext
from pgconductor.membership import Timing
from tests.waiting import until

BROKEN = "PGCONDUCTOR_TEST_BROKEN"
"""How processes that start now cannot come to serve: they `raise` or `exit`."""
TIMING = Timing(beat=0.2, expiry=2.0, sweep=0.2)


@asynccontextmanager
async def lifespan() -> AsyncGenerator[None]:
    """Need something that is not always there."""
    match os.environ.get(BROKEN):
        case "raise":
            raise ConnectionError("what the lifespan needs is not there")
        case "exit":
            os._exit(3)
        case _:
            yield


app = Conductor(os.environ.get("PGCONDUCTOR_URL"), name="isolated", lifespan=lifespan)


@app.task(executor="process")
def where(ctx: SyncContext, n: int) -> list[int]:
    pid = ctx.step("pid", os.getpid)
    doubled = ctx.invoke("double", double.bind(n))
    return [pid, doubled]


@app.task
async def double(ctx: Context, n: int) -> int:
    return n * 2


@app.task(executor="process")
def as_it_is(ctx: SyncContext, value: dict[str, str]) -> msgspec.Raw:
    return msgspec.Raw(json.dumps(value, indent=2).encode())


@app.task(executor="process")
async def on_its_loop(ctx: Context, n: int) -> int:
    return await ctx.step("double", lambda: n * 2)


@app.task(executor="process", max_crashes=3)
def deadly(ctx: SyncContext) -> None:
    os._exit(7)


@app.task(executor="process", timeout=0.2, max_attempts=1)
def endless(ctx: SyncContext) -> None:
    while True:
        time.sleep(0.01)


@app.task(executor="process", timeout=0.2, max_attempts=2, retry=RetryPolicy(first=0.01, max=0.01))
async def blocks_its_loop_too_long(ctx: Context, directory: str) -> None:
    hang(directory)


@app.task(executor="process")
async def blocks_its_loop(ctx: Context, directory: str) -> None:
    hang(directory)


def hang(directory: str) -> None:
    """Say in the directory which process this is, and never return."""
    Path(directory, f"{os.getpid()}.pid").touch()
    while True:
        time.sleep(0.01)


@app.task(executor="process", timeout=0.2, max_attempts=1)
async def leaves_at_its_timeout(ctx: Context) -> None:
    await asyncio.Event().wait()


@app.task(executor="process", timeout=30, max_attempts=1)
async def leaves_a_step_behind(ctx: Context, directory: str) -> int:
    begun = asyncio.Event()
    late = asyncio.create_task(ctx.step("late", wait_at_gate, Path(directory, "open"), begun))
    await begun.wait()
    assert not late.done()
    return os.getpid()


async def wait_at_gate(gate: Path, begun: asyncio.Event) -> int:
    begun.set()
    await until(gate.exists)
    return 1


@app.task(executor="process")
async def process_id(ctx: Context) -> int:
    return os.getpid()


@app.task(executor="process")
async def log_handler_count(ctx: Context) -> int:
    return len(logging.getLogger().handlers)


@app.task(executor="process")
def length_of(ctx: SyncContext, text: str) -> int:
    return len(text)


@app.task(executor="process", max_attempts=1)
def gated(ctx: SyncContext, directory: str) -> int:
    """Say in the directory which process runs this, and stay until somebody opens the gate there."""
    Path(directory, f"{os.getpid()}.pid").touch()
    while not Path(directory, "open").exists():
        time.sleep(0.01)
    return os.getpid()


@app.task(executor="process", max_attempts=1)
def master(ctx: SyncContext) -> list[int | None]:
    """Terminate a program and a copy of the process; return how they ended."""
    program = subprocess.Popen(["sleep", "1000"])
    program.terminate()
    forking = multiprocessing.get_context("fork")
    ours, theirs = forking.Pipe()
    copy = forking.Process(target=stand_by, args=[theirs])
    copy.start()
    ours.recv()
    copy.terminate()
    copy.join()
    return [program.wait(), copy.exitcode]


def stand_by(ready: Connection) -> None:
    ready.send(True)
    while True:
        signal.pause()


async def work() -> None:
    """Run until a signal stops it."""
    orchestrator = Orchestrator(app, _timing=TIMING)
    await orchestrator.start()
    await orchestrator.stopped


if __name__ == "__main__":
    from tests.integration import isolated_app  # so that its tasks are those of the module

    asyncio.run(isolated_app.work())
