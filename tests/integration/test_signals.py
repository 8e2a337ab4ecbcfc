"""What a signal does to what runs beside an orchestrator, in programs of their own."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from textwrap import dedent, indent
from typing import Any

import psycopg
import pytest

Start = Callable[[str], Awaitable[asyncio.subprocess.Process]]
KILLED_AFTER = 60

PROGRAM = """
import asyncio

from pgconductor import Conductor, Context, Orchestrator

app = Conductor()


@app.task
async def work(ctx: Context) -> None:
    print("works", flush=True)
    while True:
        await ctx.checkpoint()
        await asyncio.sleep(0.02)


async def main() -> None:
    try:
        async with app:
{body}
    finally:
        print("left", flush=True)


asyncio.run(main())
"""
WAITS = """
async with Orchestrator(app):
    await (await work.invoke()).result()
"""
DRAINS = """
await work.invoke()
await Orchestrator(app).drain()
print("drained")
"""
LISTENS = """
async with Orchestrator(app) as orchestrator:
    await work.invoke()
    await orchestrator.stopped
    await asyncio.sleep(0.1)
    print("goes on")
"""
SERVES = """
import signal
ended = asyncio.Event()
loop = asyncio.get_running_loop()
signal.signal(signal.SIGTERM, lambda *_: (print("heard"), loop.call_soon_threadsafe(ended.set)))
async with Orchestrator(app):
    await work.invoke()
    await ended.wait()
"""


@pytest.fixture
async def start(database: str) -> AsyncGenerator[Start]:
    """Start a program with such a main, and return once its handler runs."""
    started: list[asyncio.subprocess.Process] = []

    async def start(body: str) -> asyncio.subprocess.Process:
        code = PROGRAM.format(body=indent(dedent(body), " " * 12))
        environment = {**os.environ, "PGCONDUCTOR_URL": database}
        pipe = asyncio.subprocess.PIPE
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=pipe, stderr=pipe, env=environment
        )
        started.append(program)
        assert program.stdout is not None
        async with asyncio.timeout(KILLED_AFTER):
            assert await program.stdout.readline() == b"works\n"
        return program

    yield start
    for program in started:
        if program.returncode is None:
            program.kill()
            await program.wait()


async def ends(program: asyncio.subprocess.Process) -> tuple[int | None, list[str], str]:
    """Return how a program ended, what it printed, and the last line of its errors."""
    async with asyncio.timeout(KILLED_AFTER):
        out, err = await program.communicate()
    return program.returncode, out.decode().split("\n")[:-1], err.decode().strip().rpartition("\n")[2]


@pytest.mark.parametrize("body", [WAITS, DRAINS], ids=["waits", "drains"])
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, -signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, 128 + signal.SIGTERM, "")],
    ids=["SIGINT", "SIGTERM"],
)
async def test_a_signal_ends_what_waits_beside_the_orchestrator_that_it_stopped(
    start: Start, body: str, number: signal.Signals, code: int, said: str
) -> None:
    program = await start(body)
    program.send_signal(number)
    assert await ends(program) == (code, ["left"], said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_what_awaits_the_end_of_its_orchestrator_goes_on_after_it(start: Start, number: signal.Signals) -> None:
    program = await start(LISTENS)
    program.send_signal(number)
    assert await ends(program) == (0, ["goes on", "left"], "")


async def test_a_signal_reaches_the_handler_that_was_there_before_once_the_orchestrator_has_stopped(
    start: Start,
) -> None:
    program = await start(SERVES)
    program.send_signal(signal.SIGTERM)
    assert await ends(program) == (0, ["heard", "left"], "")


async def test_what_runs_in_a_program_that_is_ended_so_goes_back_first(
    start: Start, db: psycopg.Connection[Any]
) -> None:
    program = await start(WAITS)
    program.send_signal(signal.SIGTERM)
    await ends(program)
    rows = db.execute("select state, attempt, crashes from executions").fetchall()
    assert [tuple(row.values()) for row in rows] == [("ready", 1, 0)]
