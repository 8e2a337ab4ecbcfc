"""Holding autovacuum off tables whose dead rows it may not remove.

A snapshot that is held open for long, by a report, a replication slot or a forgotten transaction, keeps every row alive
that was deleted since. Autovacuum still comes once a minute and reads them all. So while that would be in vain, one
process of all takes the lock that vacuum needs, for a second at a time: see 62_vacuum.sql, which also says when. The
transaction reads nothing that it keeps and writes nothing, so it holds no snapshot itself, and whoever dies lets go.
"""

import asyncio
import logging
from typing import TYPE_CHECKING, Final

import psycopg

from pgconductor.route import Route

if TYPE_CHECKING:
    from pgconductor.engine import Engine

log = logging.getLogger("pgconductor.vacuum")
HOLD_SECONDS: Final = 1.0


async def hold_off_vacuum(dsn: str, engine: "Engine") -> None:
    """Keep autovacuum off tables while it could remove nothing; returns when that is over, or another process does it.

    Behind a pooler it returns at once: it would keep one of the pooler's connections to itself.

    Args:
        dsn: Where to; a connection of its own is opened.
        engine: Builds the query.

    Raises:
        psycopg.Error: The connection could not be opened, or broke. Nothing is held.
    """
    route = Route(dsn, "pgconductor vacuum", options="-c idle_in_transaction_session_timeout=0")
    query = engine.hold_off_vacuum()
    async with await route.connect(psycopg.AsyncConnection) as connection:
        known: list[str] | None = None
        while not route.is_pooled:
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
        "dead rows of %s cannot be removed: something holds an old snapshot (a long transaction, a replication slot, a "
        "prepared transaction); autovacuum is held off for now, since it would only read them",
        ", ".join(names),
    )
