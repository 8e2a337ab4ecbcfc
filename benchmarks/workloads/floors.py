"""What this Postgres does with no engine on top, through asyncpg: the ceiling for everything else."""

import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import asyncpg
from psycopg.conninfo import conninfo_to_dict

from benchmarks.measure import Sample, Workload
from benchmarks.server import Server

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
ROWS = 100_000
BATCH = 200


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
    Workload("floor-copy", "floor: COPY in batches of 5,000", "rows/s", _floor(copy)),
]
