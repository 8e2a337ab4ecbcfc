"""A gate before a peer's jobs, so that the clock of a drain starts for everybody when the workers are connected.

Some fetch thousands of jobs before they start the first: a clock that started with the first handler would leave that
out. A worker that waits for a table cannot have fetched anything.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg

WAIT_SECONDS_MAX = 20.0
SETTLING_SECONDS = 0.5  # from the first that waits until all connections of a worker do
WAITING = "select count(distinct pid) from pg_locks where relation = to_regclass(%s) and not granted"


class Gate:
    """Closed until `open`: no worker gets past the table."""

    def __init__(self, connection: psycopg.AsyncConnection[Any], table: str) -> None:
        self._connection = connection
        self._table = table

    async def open(self, workers: int) -> float:
        """Wait until that many wait, let them through, and return when that was, as `time.time()` tells.

        Raises:
            TimeoutError: Fewer came to it.
        """
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while await self._waiting() < workers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the workers do not read {self._table}")
            await asyncio.sleep(0.02)
        await asyncio.sleep(SETTLING_SECONDS)
        opened_at = time.time()
        await self._connection.rollback()
        return opened_at

    async def _waiting(self) -> int:
        row = await (await self._connection.execute(WAITING, (self._table,))).fetchone()
        return int(row[0]) if row else 0


@asynccontextmanager
async def closed(dsn: str, table: str) -> AsyncIterator[Gate]:
    """Yield a gate that is closed; it opens at the latest at the end."""
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        await connection.execute(f"lock table {table} in access exclusive mode".encode())
        yield Gate(connection, table)
        await connection.rollback()
