"""Holding autovacuum off tables whose dead rows it may not remove.

A snapshot that is held open for long, by a report, a replication slot or a forgotten transaction, keeps every row alive
that was deleted since. Autovacuum still comes once a minute and reads them all. So while that would be in vain, one
process of all takes the lock that vacuum needs, for a moment at a time: see 62_vacuum.sql, which also says when. The
transaction reads nothing that it keeps and writes nothing, so it holds no snapshot itself. Whoever dies lets go.
"""

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

import psycopg

from pgconductor.route import Route

if TYPE_CHECKING:
    from pgconductor.engine import Engine, Query

log = logging.getLogger("pgconductor.vacuum")
HOLD_SECONDS: Final = 0.2  # less than half of what a migration waits for a lock, so that it gets one after the other


async def hold_off_vacuum(dsn: str, engine: "Engine") -> bool:
    """Keep autovacuum off tables while it could remove nothing; returns when that is over, or another process does it.

    A connection that cannot be had, or breaks, is logged; the next sweep says whether to try again.

    Args:
        dsn: Where to; a connection of its own is opened.
        engine: Builds the query.

    Returns:
        Whether it can be done at all: behind a pooler it would keep one of the pooler's connections to itself.
    """
    route = Route(dsn, "pgconductor vacuum")
    try:
        async with await route.connect(psycopg.AsyncConnection) as connection:
            if not route.is_pooled:
                await _hold_off(connection, engine.hold_off_vacuum())
    except psycopg.Error as error:
        log.warning("autovacuum could not be held off: %s", error)
    return not route.is_pooled


async def _hold_off(connection: psycopg.AsyncConnection[Any], query: "Query[list[str] | None]") -> None:
    known: list[str] | None = None
    while True:
        async with connection.transaction():
            # by the simple protocol: a portal of the other stays open, and its snapshot with it
            row = await (await connection.execute(query.statement.encode(), prepare=False)).fetchone()
            names = query.read(row[0] if row else None)
            if not names:
                return
            if names != known:
                _report(names)
                known = names
            await asyncio.sleep(HOLD_SECONDS)


def _report(names: list[str]) -> None:
    log.warning(
        "very many dead rows of %s stayed after the latest vacuum: something holds an old snapshot (see `pgconductor "
        "doctor`); autovacuum is held off for now, since it would only read them again",
        ", ".join(names),
    )
