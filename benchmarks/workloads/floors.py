"""What this Postgres does with no engine on top: the ceiling for everything else.

Through asyncpg, which costs the client least; what an enqueue is compared with, through the driver that it uses too.
"""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import asyncpg
import psycopg
from psycopg.conninfo import conninfo_to_dict

from benchmarks.measure import Sample, Workload, bench
from benchmarks.server import Server
from pgconductor.ids import new_ids

TABLE = """
drop table if exists q;
create table q (id bigserial primary key, state smallint not null default 0, payload jsonb,
                locked_at timestamptz, done_at timestamptz);
create index q_ready on q (id) where state = 0;
"""
CLAIM = """
update q set state = 1, locked_at = now()
where id in (select id from q where state = 0 order by id for update skip locked limit $1)
returning id, payload"""
COMPLETE = "update q set state = 2, done_at = now() where id = any($1::bigint[])"
INSERT = "insert into q (payload) values (%s)"
COPY = "copy pgconductor.execution (id, created_at, lane_id, payload) from stdin"
ROWS = 100_000
BATCH = 200
SINGLE = 2_000
COPIED = 20_000
COPY_BATCH = 5_000

Write = Callable[[range], Awaitable[None]]


async def insert_single(connection: asyncpg.Connection) -> float:
    """Insert and commit row by row; return rows a second."""
    await connection.execute(TABLE)
    count = 5_000
    insert = await connection.prepare("insert into q (payload) values ($1)")
    await connection.execute("checkpoint")
    began_at = time.perf_counter()
    for number in range(count):
        await insert.fetch(f'{{"i": {number}}}')
    return count / (time.perf_counter() - began_at)


@asynccontextmanager
async def inserting(dsn: str) -> AsyncGenerator[Write]:
    """Give what does the same through psycopg."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=0) as connection:
        for statement in TABLE.strip().split(";\n"):
            await connection.execute(statement.encode())
        await connection.execute("checkpoint")

        async def insert(numbers: range) -> None:
            for number in numbers:
                await connection.execute(INSERT, (f'{{"i": {number}}}',))

        yield insert


@asynccontextmanager
async def copying(dsn: str) -> AsyncGenerator[Write]:
    """Give what copies executions, with their one index, into the engine's table.

    The rows are made on the way, as an enqueue makes them: an id and a payload in JSON each. Nothing can run them.
    """
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:

        async def copy(numbers: range) -> None:
            now = datetime.now(UTC)
            async with connection.cursor().copy(COPY) as rows:
                for number, id in zip(numbers, new_ids(len(numbers)), strict=True):
                    await rows.write_row((id, now, 1, f'{{"i": {number}}}'))

        yield copy


async def seconds_of(write: Write, numbers: range) -> float:
    """Return how long it takes to write rows of so many numbers."""
    began_at = time.perf_counter()
    await write(numbers)
    return time.perf_counter() - began_at


async def _insert_with_psycopg(server: Server) -> Sample:
    async with server.database() as database, inserting(database.dsn) as insert:
        return Sample(SINGLE / await seconds_of(insert, range(SINGLE)))


async def _copy_executions(server: Server) -> Sample:
    async with bench(server) as it:
        await it.database.settle_down()
        async with copying(it.database.dsn) as copy:
            parts = [range(start, start + COPY_BATCH) for start in range(0, COPIED, COPY_BATCH)]
            return Sample(COPIED / sum([await seconds_of(copy, part) for part in parts]))


async def copy(connection: asyncpg.Connection) -> float:
    """Copy rows in batches of 5,000; return rows a second."""
    await connection.execute(TABLE)
    await connection.execute("checkpoint")
    rows = [(f'{{"i": {number}}}',) for number in range(200_000)]
    began_at = time.perf_counter()
    for start in range(0, len(rows), 5_000):
        await connection.copy_records_to_table("q", records=rows[start : start + 5_000], columns=["payload"])
    return len(rows) / (time.perf_counter() - began_at)


async def claim_and_complete(connection: asyncpg.Connection) -> float:
    """Claim and complete by update, a batch at a time, with no handler; return rows a second."""
    await connection.execute(TABLE)
    await connection.execute(
        "insert into q (payload) select jsonb_build_object('i', g) from generate_series(1, $1::int) g", ROWS
    )
    await connection.execute("vacuum analyze q")
    await connection.execute("checkpoint")
    done, began_at = 0, time.perf_counter()
    while rows := await connection.fetch(CLAIM, BATCH):
        await connection.execute(COMPLETE, [row["id"] for row in rows])
        done += len(rows)
    return done / (time.perf_counter() - began_at)


def _floor(
    measure: Callable[[asyncpg.Connection], Awaitable[float]],
) -> Callable[[Server], Coroutine[Any, Any, Sample]]:
    async def run(server: Server) -> Sample:
        async with server.database() as database:
            connection = await _connect(database.dsn)
            try:
                return Sample(await measure(connection))
            finally:
                await connection.close()

    return run


async def _connect(dsn: str) -> asyncpg.Connection:
    """Connect as psycopg would; the two write addresses differently."""
    at = {key: str(value) for key, value in conninfo_to_dict(dsn).items()}
    return await asyncpg.connect(
        host=at["host"], port=int(at["port"]), user=at["user"], password=at["password"], database=at["dbname"]
    )


WORKLOADS = [
    Workload("floor-queue", "floor: bare queue, batches of 200, by update", "rows/s", _floor(claim_and_complete)),
    Workload("floor-insert", "floor: insert and commit row by row", "rows/s", _floor(insert_single)),
    Workload("floor-psycopg", "floor: the same through psycopg", "rows/s", _insert_with_psycopg),
    Workload("floor-copy", "floor: COPY in batches of 5,000", "rows/s", _floor(copy)),
    Workload("floor-executions", "floor: COPY of executions, made on the way", "rows/s", _copy_executions),
]
