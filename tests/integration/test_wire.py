"""Calls go over a connection one by one, whatever their size, and whatever becomes of the connection."""

import asyncio
import gc
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor import Conductor
from pgconductor.id_array import IdArray
from pgconductor.queries import Query, as_is
from pgconductor.route import Route, Timeline
from pgconductor.session import ConnectionLost, Session
from pgconductor.wire import Wire
from tests.sql.support import Db
from tests.waiting import until

ID = "01a22860-2663-7f71-a8d0-1970913a884f"
OURS = "from pg_stat_activity where datname = current_database() and application_name = 'wire'"
ACTIVE = f"select {OURS} and state = 'active'"
KILL = f"select pg_terminate_backend(pid, 10000) {OURS}"


def query(statement: str, *parameters: object, is_table: bool = False) -> Query[Any]:
    return Query(statement, parameters, as_is, is_table=is_table)


@pytest.fixture
async def wire(database: str) -> AsyncGenerator[Wire]:
    connection = await Route(database, "wire").connect(psycopg.AsyncConnection[Any])
    wire = Wire(connection, is_pooled=False)
    yield wire
    wire.close()


@pytest.mark.parametrize(
    ("cast", "value", "text"),
    [
        ("text", "100 % of 'ü'", "100 % of 'ü'"),
        ("text", None, None),
        ("text", "", ""),
        ("int", -1, "-1"),
        ("smallint", 5, "5"),
        ("bigint", 2**40, "1099511627776"),
        ("boolean", True, "true"),
        ("float8", 0.25, "0.25"),
        ("timestamptz", datetime(2026, 2, 1, 12, tzinfo=UTC), "2026-02-01 12:00:00+00"),
        ("int[]", [1, 2], "{1,2}"),
        ("int[]", [], "{}"),
        ("text[]", ['a "b"', "c,d"], '{"a \\"b\\"","c,d"}'),
        ("uuid", ID, ID),
        ("uuid[]", IdArray([ID]), f"{{{ID}}}"),
        ("uuid[]", IdArray(), "{}"),
    ],
)
async def test_a_value_arrives_as_it_was_given(wire: Wire, cast: str, value: object, text: str | None) -> None:
    await wire.ask(query("select set_config('TimeZone', 'UTC', false)"))
    assert await wire.ask(query(f"select cast(cast(%s as {cast}) as text)", value)) == text


async def test_a_statement_is_prepared_once_for_all_its_values(wire: Wire) -> None:
    doubled = "select cast(cast(%s as int) * 2 %% 7 as text)"
    assert [await wire.ask(query(doubled, number)) for number in (1, 40_000, None)] == ["2", "4", None]
    prepared = await wire.ask(query("select name, statement from pg_prepared_statements order by 1", is_table=True))
    assert list(prepared[0]) == [b"pgconductor_1", b"select cast(cast($1 as int) * 2 % 7 as text)"]
    assert len(prepared) == 2


async def test_an_answer_of_no_row_is_none_and_a_table_is_all_rows(wire: Wire) -> None:
    assert await wire.ask(query("select 'x' where false")) is None
    assert await wire.ask(query("select g, null from generate_series(1, 2) g", is_table=True)) == [
        [b"1", None],
        [b"2", None],
    ]


async def test_more_than_the_sockets_hold_goes_both_ways(wire: Wire) -> None:
    text = "0123456789abcdef" * 2**21
    assert await wire.ask(query("select cast(%s as text) || 'x'", text)) == text + "x"


async def test_what_the_server_refuses_leaves_the_connection_to_others(wire: Wire) -> None:
    with pytest.raises(psycopg.errors.UndefinedFunction):  # where it is prepared
        await wire.ask(query("select missing(%s)", "x"))
    for _ in range(2):
        with pytest.raises(psycopg.errors.DivisionByZero) as caught:
            await wire.ask(query("select cast(1 / cast(%s as int) as text)", 0))
        assert caught.value.diag.message_primary == "division by zero"
    with pytest.raises(psycopg.DataError, match="NUL"):  # where it is sent
        await wire.ask(query("select cast(%s as text)", "\0"))
    assert wire.is_idle
    assert await wire.ask(query("select cast(1 / cast(%s as int) as text)", 1)) == "1"


async def test_a_call_that_is_cancelled_is_ended_on_the_server(wire: Wire, db: Db) -> None:
    call = asyncio.create_task(wire.ask(query("select cast(pg_sleep(60) as text)")))
    await until(lambda: bool(db.execute(ACTIVE).fetchall()))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not db.execute(ACTIVE).fetchall()
    assert wire.is_idle
    assert await wire.ask(query("select 'next'")) == "next"


async def test_a_statement_whose_preparation_is_cancelled_can_be_prepared_again(
    wire: Wire, database: str, db: Db
) -> None:
    with psycopg.connect(database) as other:
        other.execute("lock table pgconductor.task")
        call = asyncio.create_task(wire.ask(query("select cast(count(*) as text) from pgconductor.task")))
        await until(lambda: bool(db.execute(ACTIVE + " and wait_event_type = 'Lock'").fetchall()))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert wire.is_idle
    assert await wire.ask(query("select cast(count(*) as text) from pgconductor.task")) == "0"


async def test_a_call_on_a_connection_that_is_closed_meanwhile_fails_as_lost(wire: Wire, db: Db) -> None:
    call = asyncio.create_task(wire.ask(query("select cast(pg_sleep(60) as text)")))
    await until(lambda: bool(db.execute(ACTIVE).fetchall()))
    wire.close()
    with pytest.raises(psycopg.OperationalError):
        await call
    with pytest.raises(psycopg.OperationalError):
        await wire.ask(query("select 'next'"))
    wire.close()


class Relay:
    """Stands between a client and the server, and at a word takes no more from the client and closes its side."""

    def __init__(self, database: str) -> None:
        self._info = conninfo_to_dict(database)
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[str]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            yield make_conninfo("", **{**self._info, "host": "127.0.0.1", "port": port})
            for writer in self._writers:
                writer.close()

    def end(self) -> None:
        """Close the side of the client, and read no more from it."""
        for pump in self._pumps:
            pump.cancel()
        self._writers[0].write_eof()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = f"{self._info['host']}/.s.PGSQL.{self._info['port']}"
        to_server = await asyncio.open_unix_connection(path)
        self._writers = [writer, to_server[1]]
        self._pumps = [
            asyncio.create_task(_pump(reader, to_server[1])),
            asyncio.create_task(_pump(to_server[0], writer)),
        ]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        if len(data) == 2**16:  # it is the large one: that is enough of it
            return
        writer.write(data)
        await writer.drain()


async def test_a_call_ends_whose_connection_is_closed_while_it_is_being_sent(database: str) -> None:
    relay = Relay(database)
    async with relay.listening() as address:
        wire = Wire(await Route(address, "wire").connect(psycopg.AsyncConnection[Any]), is_pooled=False)
        assert await wire.ask(query("select cast(%s as text)", "x")) == "x"
        call = asyncio.create_task(wire.ask(query("select cast(%s as text)", "x" * 2**26)))
        await until(lambda: any(pump.done() for pump in relay._pumps))
        await asyncio.sleep(0.1)  # not to synchronise: what the sockets hold fills up
        relay.end()
        with pytest.raises(psycopg.OperationalError):
            await call
        assert wire.is_closed


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the kernel knows of an event loop's sockets")
async def test_the_loop_forgets_a_connection_that_is_closed_while_a_forked_child_has_it_too(wire: Wire, db: Db) -> None:
    watched = sockets_of_loop()
    child_ends, parent_ends = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(parent_ends)
        os.read(child_ends, 1)
        os._exit(0)
    try:
        assert db.execute(KILL).rowcount == 1
        await until(lambda: wire.is_closed)
        assert sockets_of_loop() == watched - 1
    finally:
        os.close(parent_ends)
        os.close(child_ends)
        await asyncio.to_thread(os.waitpid, child, 0)


def sockets_of_loop() -> int:
    """Return how many sockets the kernel watches for the running event loop."""
    number = cast("Any", asyncio.get_running_loop())._selector.fileno()
    return Path(f"/proc/self/fdinfo/{number}").read_text().count("tfd:")


async def test_connections_go_with_a_conductor_that_nobody_has_any_more(database: str, db: Db) -> None:
    query = OURS.replace("wire", "pgconductor client")
    app = Conductor[Any](database)
    await app.pause("q")
    assert db.execute(f"select {query}".encode()).rowcount == 1
    del app
    gc.collect()
    await until(lambda: db.execute(f"select {query}".encode()).rowcount == 0)


async def test_a_call_whose_session_is_terminated_says_so(wire: Wire, db: Db) -> None:
    call = asyncio.create_task(wire.ask(query("select cast(pg_sleep(60) as text)")))
    await until(lambda: bool(db.execute(ACTIVE).fetchall()))
    db.execute(KILL)
    with pytest.raises((psycopg.errors.AdminShutdown, psycopg.OperationalError)):
        await call
    await until(lambda: wire.is_closed)


async def test_a_connection_that_the_server_closes_while_it_is_idle_costs_no_call(
    app: Conductor[Any], database: str, db: Db
) -> None:
    session = Session(database, "wire")
    nothing = app.engine.claim("00000000-0000-0000-0000-000000000000", 1, [], [])  # lost, nothing would be known of it
    assert await session.run(nothing) is None
    first = session._wire
    assert first is not None
    assert db.execute(KILL).rowcount == 1
    await until(lambda: first.is_closed)
    assert await session.run(nothing) is None
    assert session._wire is not first
    await session.close()


class Deaf(Timeline):
    """Hears of a failover from another session only."""

    def note(self, found: str | None) -> None:
        """Leave it to others."""


async def test_a_call_that_a_failover_has_interrupted_is_not_made_again(
    app: Conductor[Any], database: str, db: Db
) -> None:
    timeline = Deaf(lambda: None)
    session = Session(database, "wire", timeline, voids=True)
    nothing = app.engine.settle("00000000-0000-0000-0000-000000000000", [], [])  # harmless: it may be made again
    assert await session.run(nothing) is None
    with psycopg.connect(database) as blocker:
        blocker.execute("lock table pgconductor.orchestrator in access exclusive mode")
        call = asyncio.create_task(session.run(nothing))
        await until(lambda: bool(db.execute(f"{ACTIVE} and wait_event_type = 'Lock'").fetchall()))
        timeline.change_count += 1
        db.execute(KILL)
        with pytest.raises(ConnectionLost, match="has failed over since the call was made"):
            await call
    with pytest.raises(ConnectionLost):  # nobody has heard yet what is void
        await session.run(nothing)
    timeline.heard_count = timeline.change_count
    assert await session.run(nothing) is None
    await session.close()
