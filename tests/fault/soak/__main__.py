"""`make soak`, or `python -m tests.fault.soak --help`: hours in little.

Load at saturation, worker processes killed one after the other, and a snapshot held open all the while, so that no dead
row can be removed. Measured is whether it slows down.
"""

import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
import psycopg
from rich.console import Console

from pgconductor.embedded import EmbeddedServer
from tests import invariants
from tests.fault.programs import app
from tests.fault.soak import report
from tests.fault.soak.measure import Sample, read
from tests.fault.soak.tasks import nothing, tree
from tests.fault.supervisor import Worker, World
from tests.fault.worlds import open_world, running_server
from tests.waiting import until

SAMPLE_SECONDS = 10.0
KILL_SECONDS = 6.0
WORKERS = 2
CONCURRENCY = 50
BACKLOG = 3000
BATCH = 500
TREES = 10
RECOVERY_SECONDS_MAX = 60.0
END_SECONDS_MAX = 120.0
_BACKLOG = """
select count(*) as count, min(place) as first from (
  select place_of(priority, ord) as place from ready
  where lane_id = (select l.id from lane l join task t on t.id = l.task_id where t.name = 'nothing')
    and place_of(priority, ord) >= %s
  order by place_of(priority, ord) limit %s) r"""


@click.command()
@click.option("--minutes", type=click.FloatRange(1.5), default=40.0, show_default=True, help="How long.")
@click.option("--seed", default=1, show_default=True, help="Chooses whom to kill.")
@click.option("--snapshot/--no-snapshot", default=True, show_default=True, help="Hold a snapshot open all the while.")
@click.option("--output", type=Path, default=Path(".chaos"), show_default=True, help="Where soak.md and .json go.")
def main(minutes: float, seed: int, snapshot: bool, output: Path) -> None:
    """Load the engine for a long time, and see whether it slows down."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        with running_server() as server:
            found = asyncio.run(_Soak(console, random.Random(seed), snapshot).run(server, home, minutes * 60))  # noqa: S311
    finally:
        shutil.rmtree(home, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    report.write(found, output)
    console.print(report.summary(found))
    sys.exit(bool(found.problems))


class _Soak:
    """One run."""

    def __init__(self, console: Console, chance: random.Random, snapshot: bool) -> None:
        self._console = console
        self._chance = chance
        self._found = report.Found(has_snapshot=snapshot)
        self._is_over = False

    async def run(self, server: EmbeddedServer, home: Path, seconds: float) -> report.Found:
        async with open_world(server, home, is_audited=False) as world:
            for worker in [self._start(world) for _ in range(WORKERS)]:
                await worker.up()
            async with self._held_snapshot(world):
                others = [asyncio.create_task(self._feed(world)), asyncio.create_task(self._kill(world))]
                await self._sample(world, seconds)
                self._is_over = True
                await asyncio.gather(*others)
            await self._end(world)
        return self._found

    def _start(self, world: World) -> Worker:
        return world.worker(concurrency=CONCURRENCY, module="tests.fault.soak.tasks")

    @asynccontextmanager
    async def _held_snapshot(self, world: World) -> AsyncGenerator[None]:
        async with await psycopg.AsyncConnection.connect(world.dsn) as conn:
            if self._found.has_snapshot:
                await conn.execute("begin isolation level repeatable read")
                await conn.execute("select count(*) from pgconductor.task")
            yield

    async def _feed(self, world: World) -> None:
        """Keep the backlog full."""
        number = passed = 0
        while not self._is_over:
            # from where it was last: the rows before are dead, and looking through them would be the larger load
            (found,) = await asyncio.to_thread(world.rows, _BACKLOG, passed, BACKLOG)
            passed = found["first"] or passed
            if found["count"] >= BACKLOG:
                await asyncio.sleep(0.02)
                continue
            number += BATCH
            calls: list[Any] = [nothing.bind(n) for n in range(number, number + BATCH - TREES)]
            await app.invoke_many([*calls, *(tree.bind(n) for n in range(TREES))])

    async def _kill(self, world: World) -> None:
        while not self._is_over:
            await asyncio.sleep(KILL_SECONDS)
            worker = self._chance.choice([each for each in world.workers if each.process.poll() is None])
            boot_id = worker.boot_id
            worker.kill()
            killed_at = time.monotonic()
            self._start(world)
            self._found.kills += 1
            if boot_id is not None:
                await self._until_taken_over(world, boot_id)
                self._found.recovery_seconds.append(round(time.monotonic() - killed_at, 2))

    async def _until_taken_over(self, world: World, boot_id: str) -> None:
        query = "select 1 from orchestrator where id = %s"
        await until(lambda: not world.rows(query, boot_id), RECOVERY_SECONDS_MAX)

    async def _sample(self, world: World, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with psycopg.connect(world.dsn, autocommit=True) as conn:
            self._found.samples.append(self._read(world, conn))
            while time.monotonic() < deadline:
                await asyncio.sleep(min(SAMPLE_SECONDS, max(0.1, deadline - time.monotonic())))
                self._found.samples.append(self._read(world, conn))
                self._console.print(report.line(self._found.samples), highlight=False)

    def _read(self, world: World, conn: psycopg.Connection[Any]) -> Sample:
        state = world.server.state
        assert state is not None
        living = [worker.pid for worker in world.workers if worker.process.poll() is None]
        return read(conn, state.pid, living)

    async def _end(self, world: World) -> None:
        """Let everything end, remove what is dead, and look once more."""
        await until(lambda: not world.rows("select 1 from execution where outcome is null limit 1"), END_SECONDS_MAX)
        for worker in world.workers:
            worker.terminate()
        for worker in world.workers:
            await worker.ended()
        with psycopg.connect(world.dsn, autocommit=True) as conn:
            self._found.problems += _broken(conn)
            conn.execute("vacuum")
            self._found.after = self._read(world, conn)


def _broken(conn: psycopg.Connection[Any]) -> list[str]:
    """Return the invariants that do not hold, of those that need no history."""
    problems: list[str] = []
    with conn.transaction():
        conn.execute("set local search_path to pgconductor, pg_temp")
        for name, query in {**invariants.ALWAYS, **invariants.AT_REST}.items():
            if "audit." not in query and (rows := conn.execute(query.encode()).fetchmany(3)):
                problems.append(f"{name}: {rows}")
    return problems


if __name__ == "__main__":
    main()
