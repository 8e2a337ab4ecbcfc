"""A running process holds autovacuum off tables whose dead rows it could not remove."""

from typing import Any

import psycopg
from psycopg.rows import DictRow

from pgconductor import Conductor, Context, Orchestrator
from pgconductor.membership import Timing
from tests.waiting import until, until_row

Db = psycopg.Connection[DictRow]
FAST = Timing(beat=0.2, expiry=3.0, sweep=0.2)
HELD = """
select from pg_locks l where l.mode = 'ShareUpdateExclusiveLock' and l.granted and l.relation = 'ready'::regclass"""
HOLDER = "select backend_xmin, backend_xid from pg_stat_activity where application_name = 'pgconductor vacuum'"


def bury(db: Db, count: int) -> None:
    db.execute("alter table ready set (autovacuum_enabled = off)")  # an analyze meanwhile would count anew
    db.execute("set session_replication_role = replica")  # the audit of the tests would take a minute
    db.execute(
        "insert into ready (lane_id, priority, ord, execution_id)"
        " select 1000000, 0, n, gen_random_uuid() from generate_series(1, %s) n",
        (count,),
    )
    db.execute("delete from ready where lane_id = 1000000")
    db.execute("reset session_replication_role")
    db.execute("select pg_stat_force_next_flush()")


async def test_it_is_held_off_while_a_snapshot_is_held_and_work_goes_on(
    app: Conductor[Any], db: Db, database: str
) -> None:
    @app.task
    async def double(ctx: Context, number: int) -> int:
        return 2 * number

    async with Orchestrator(app, _timing=FAST):
        with psycopg.connect(database) as reader:
            reader.execute("begin isolation level repeatable read")
            reader.execute("select 1")
            bury(db, 300_000)
            await until_row(db, "select from vacuum_mark where name = 'ready'")
            db.execute("vacuum ready")

            await until_row(db, HELD)
            assert db.execute(HOLDER).fetchall() == [{"backend_xmin": None, "backend_xid": None}]
            assert await (await double.invoke(21)).result() == 42
    await until(lambda: not db.execute(HOLDER).fetchall())  # the session ends a moment later
    db.execute("vacuum ready")
