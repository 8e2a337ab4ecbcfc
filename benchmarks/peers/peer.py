"""One peer: its script, its template database, its workers."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.fleet import Fleet
from benchmarks.gate import Gate, closed
from benchmarks.measure import NotAvailableError
from benchmarks.peers.environments import ROOT, Package, ensure
from benchmarks.server import Database, Server

CALL_SECONDS_MAX = 120
LEAVE_SECONDS_MAX = 1.0  # then they are killed: their database goes anyway


class Peer:
    """A peer whose environment stands, on a server."""

    def __init__(self, package: Package, server: Server) -> None:
        self.package = package
        self.name = package.name
        self.share = package.share
        self._server = server
        self._template = f"peer_{package.name.replace('-', '_')}"
        self.about: Mapping[str, Any] = {}

    async def prepare(self) -> None:
        """Make the environment and the template of its databases.

        Raises:
            SetupError: The environment cannot be made.
            RuntimeError: Its script failed.
        """
        await asyncio.to_thread(ensure, self.package)
        self.about = await self._call("", "about")
        async with await psycopg.AsyncConnection.connect(self._server.dsn, autocommit=True) as admin:
            await admin.execute(f'create database "{self._template}"')
        await self._call(self._server.url(self._template), "setup")

    @property
    def version(self) -> str:
        """The version that was measured."""
        return str(self.about["version"])

    def done(self, kind: str, count: int) -> str:
        """Return the query that tells whether all jobs of a kind are done.

        Raises:
            NotAvailableError: The peer has no word for such jobs.
        """
        if kind not in self.about["done"]:
            raise NotAvailableError("n/a")
        return f"select ({self.about['done'][kind].format(count=count)}) >= {count}"

    @asynccontextmanager
    async def database(self) -> AsyncIterator[Database]:
        """Yield a fresh database with its schema."""
        async with self._server.database(self._template) as database:
            yield database

    async def enqueue(self, database: Database, kind: str, count: int, *, size: int = 0, how: str = "many") -> float:
        """Enqueue by its own API; return the seconds."""
        return float(await self._call(database.url, "enqueue", kind, count, size, how))

    async def latency(self, database: Database, count: int, gap_seconds: float) -> list[float]:
        """Enqueue one by one; return when each was."""
        sent_at: list[float] = await self._call(database.url, "latency", count, gap_seconds)
        return sent_at

    async def produce(self, database: Database, count: int, rate: float) -> list[float]:
        """Enqueue at a rate; return when each was."""
        sent_at: list[float] = await self._call(database.url, "produce", count, rate)
        return sent_at

    async def fill(self, database: Database, field: str, first: int, count: int, chunk: int) -> None:
        """Enqueue by its `fill` or `delayed` statement.

        Raises:
            NotAvailableError: It has none.
        """
        statement = self.about[field]
        if statement is None:
            raise NotAvailableError("n/a")
        for start in range(first, first + count, chunk):
            await database.execute(statement.format(first=start, last=min(first + count, start + chunk) - 1))

    def gate(self, database: Database) -> AbstractAsyncContextManager[Gate]:
        """Return a gate before its jobs."""
        return closed(database.dsn, self.about["table"])

    def workers(self, database: Database, size: int, count: int) -> Fleet:
        """Return worker processes that wait for `go`."""

        def command(directory: Path, number: int) -> Sequence[str]:
            return [*self.package.command, "worker", str(directory), str(number), str(count)]

        env = self._environment(database.url)
        return Fleet(command, size, count, env=env, stop_seconds_max=LEAVE_SECONDS_MAX)

    async def _call(self, dsn: str, *arguments: object) -> Any:
        process = await asyncio.create_subprocess_exec(
            *self.package.command,
            *map(str, arguments),
            env=self._environment(dsn),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=2**26,
        )
        try:
            output, errors = await asyncio.wait_for(process.communicate(), CALL_SECONDS_MAX)
        except TimeoutError:
            raise TimeoutError(f"{arguments[0]} took more than {CALL_SECONDS_MAX} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise RuntimeError(f"{arguments[0]} left with {process.returncode}: {errors.decode()[-1500:]}")
        return json.loads(output.decode().strip().splitlines()[-1])

    def _environment(self, dsn: str) -> dict[str, str]:
        return os.environ | {
            "BENCH_DSN": dsn,
            "BENCH_SETTINGS": json.dumps(self.package.settings),
            "BENCH_HOME": str(self.package.home),
            "PYTHONPATH": str(ROOT),
        }
