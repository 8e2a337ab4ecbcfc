"""A worker process for the fault tests: `python -m tests.fault.workload DSN LEDGER`.

What handlers and steps do is noted in the ledger, a file outside the database. A handler that is to wait waits for a
file named `release` beside it.
"""

import asyncio
import os
import sys
from pathlib import Path

from pgconductor import Conductor, Context, Orchestrator
from pgconductor.membership import Timing
from tests.waiting import until

TIMING = Timing(beat=0.2, expiry=2.0, sweep=0.2, stall_limit=60.0)


def make_app(dsn: str, ledger: Path) -> Conductor[None]:
    app = Conductor(dsn)

    def note(*words: object) -> None:
        with ledger.open("a") as file:
            file.write(" ".join(map(str, (*words, os.getpid()))) + "\n")

    @app.task
    async def two_steps(ctx: Context, number: int) -> int:
        note("run", number)
        first = await ctx.step("first", body, "first", number)
        return await ctx.step("second", body, "second", first)

    def body(name: str, number: int) -> int:
        note(name, number)
        return number + 1

    @app.task
    async def held(ctx: Context) -> str:
        note("begin")
        await ctx.step("before", body, "before", 0)
        await until((ledger.parent / "release").exists)
        note("released")
        await ctx.step("after", body, "after", 0)
        note("end")
        return str(os.getpid())

    @app.task(concurrency=1)
    async def alone(ctx: Context, number: int) -> int:
        note("alone", number)
        await until((ledger.parent / "release").exists)
        return number

    return app


async def main(dsn: str, ledger: Path) -> None:
    app = make_app(dsn, ledger)
    orchestrator = Orchestrator(app, _timing=TIMING)
    await orchestrator.start()
    await orchestrator.stopped
    await app.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
