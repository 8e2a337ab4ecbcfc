"""`conn=`: the execution exists when the caller's transaction commits, and never existed when it rolls back."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import asyncpg
import django
import django.conf
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.ext.asyncio
import sqlalchemy.orm
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row

from pgconductor import Conductor, Context
from pgconductor.errors import ConfigurationError
from tests.sql.support import Db


class Undo(Exception):
    """Rolls a test's transaction back."""


SyncOpener: TypeAlias = Callable[[str], AbstractContextManager[Any]]
AsyncOpener: TypeAlias = Callable[[str], AbstractAsyncContextManager[Any]]


async def add(ctx: Context, a: int) -> int:
    return a


def url(dsn: str, driver: str) -> sqlalchemy.URL:
    given = {key: str(value) for key, value in conninfo_to_dict(dsn).items()}
    options: dict[str, str] = {key: value for key, value in given.items() if key in ("host", "port")}
    return sqlalchemy.URL.create(
        f"postgresql+{driver}", given.get("user"), given.get("password"), database=given["dbname"], query=options
    )


# ---------------------------------------------------------------- the transactions of each library


@contextmanager
def psycopg_sync(dsn: str) -> Generator[Any]:
    with psycopg.connect(dsn) as conn, conn.transaction():
        yield conn


@contextmanager
def psycopg_with_factories(dsn: str) -> Generator[Any]:
    conn = psycopg.Connection[DictRow].connect(dsn, row_factory=dict_row, cursor_factory=psycopg.ClientCursor[DictRow])
    with conn, conn.transaction():
        yield conn


@contextmanager
def sqlalchemy_connection(dsn: str) -> Generator[Any]:
    engine = sqlalchemy.create_engine(url(dsn, "psycopg"))
    try:
        with engine.begin() as conn:
            yield conn
    finally:
        engine.dispose()


@contextmanager
def sqlalchemy_session(dsn: str) -> Generator[Any]:
    engine = sqlalchemy.create_engine(url(dsn, "psycopg"))
    try:
        with sqlalchemy.orm.Session(engine) as session, session.begin():
            yield session
    finally:
        engine.dispose()


@contextmanager
def django_connection(dsn: str) -> Generator[Any]:
    from django.db.utils import ConnectionHandler

    if not django.conf.settings.configured:
        django.conf.settings.configure()
        django.setup()
    given = {key: str(value) for key, value in conninfo_to_dict(dsn).items()}
    names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    settings = {name: given.get(key, "") for name, key in names.items()}
    handler = ConnectionHandler({"default": {"ENGINE": "django.db.backends.postgresql", **settings}})
    connection = handler["default"]
    try:
        with _atomic(connection):
            yield connection
    finally:
        connection.close()


@contextmanager
def _atomic(connection: Any) -> Generator[None]:
    connection.set_autocommit(False)
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.commit()


@asynccontextmanager
async def psycopg_async(dsn: str) -> AsyncGenerator[Any]:
    async with await psycopg.AsyncConnection.connect(dsn) as conn, conn.transaction():
        yield conn


@asynccontextmanager
async def asyncpg_connection(dsn: str) -> AsyncGenerator[Any]:
    conn = await asyncpg.connect(**_asyncpg_options(dsn))
    try:
        async with conn.transaction():
            yield conn
    finally:
        await conn.close()


@asynccontextmanager
async def asyncpg_with_codec(dsn: str) -> AsyncGenerator[Any]:
    async with asyncpg_connection(dsn) as conn:
        await conn.set_type_codec("json", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
        yield conn


@asynccontextmanager
async def asyncpg_from_pool(dsn: str) -> AsyncGenerator[Any]:
    async with (
        asyncpg.create_pool(min_size=1, max_size=1, **_asyncpg_options(dsn)) as pool,
        pool.acquire() as conn,
        conn.transaction(),
    ):
        yield conn


def _asyncpg_options(dsn: str) -> dict[str, Any]:
    given = {key: str(value) for key, value in conninfo_to_dict(dsn).items()}
    names = {"host": "host", "port": "port", "user": "user", "password": "password", "dbname": "database"}
    return {name: given[key] for key, name in names.items() if key in given}


@asynccontextmanager
async def _sqlalchemy_async(dsn: str, driver: str, *, is_session: bool) -> AsyncGenerator[Any]:
    engine = sqlalchemy.ext.asyncio.create_async_engine(url(dsn, driver))
    try:
        if is_session:
            async with sqlalchemy.ext.asyncio.AsyncSession(engine) as session, session.begin():
                yield session
        else:
            async with engine.begin() as conn:
                yield conn
    finally:
        await engine.dispose()


def sqlalchemy_async_connection(dsn: str) -> AbstractAsyncContextManager[Any]:
    return _sqlalchemy_async(dsn, "psycopg", is_session=False)


def sqlalchemy_async_session(dsn: str) -> AbstractAsyncContextManager[Any]:
    return _sqlalchemy_async(dsn, "psycopg", is_session=True)


def sqlalchemy_over_asyncpg(dsn: str) -> AbstractAsyncContextManager[Any]:
    return _sqlalchemy_async(dsn, "asyncpg", is_session=False)


SYNC: list[SyncOpener] = [
    psycopg_sync,
    psycopg_with_factories,
    sqlalchemy_connection,
    sqlalchemy_session,
    django_connection,
]
ASYNC: list[AsyncOpener] = [
    psycopg_async,
    asyncpg_connection,
    asyncpg_with_codec,
    asyncpg_from_pool,
    sqlalchemy_async_connection,
    sqlalchemy_async_session,
    sqlalchemy_over_asyncpg,
]


def payloads(db: Db) -> list[Any]:
    return [row["payload"] for row in db.execute("select payload from executions order by id")]


# ---------------------------------------------------------------- what holds for all of them


@pytest.mark.parametrize("opened", SYNC)
def test_a_committed_transaction_enqueues(database: str, db: Db, opened: SyncOpener) -> None:
    task = Conductor(database).create_task(add)

    with opened(database) as conn:
        run = task.with_options(conn=conn).invoke_sync(1)
        assert payloads(db) == []

    assert payloads(db) == [{"a": 1}]
    assert [row["id"] for row in db.execute("select id from executions")] == [run.id]


@pytest.mark.parametrize("opened", SYNC)
def test_a_transaction_that_rolls_back_never_enqueued(database: str, db: Db, opened: SyncOpener) -> None:
    task = Conductor(database).create_task(add)

    with pytest.raises(Undo), opened(database) as conn:  # noqa: PT012
        task.with_options(conn=conn).invoke_sync(1)
        raise Undo

    assert payloads(db) == []


@pytest.mark.parametrize("opened", ASYNC)
async def test_a_committed_async_transaction_enqueues(
    app: Conductor, database: str, db: Db, opened: AsyncOpener
) -> None:
    task = app.create_task(add)

    async with opened(database) as conn:
        run = await task.with_options(conn=conn).invoke(1)
        runs = await app.invoke_many([task.bind(2), task.with_options(dedupe_key="k").bind(3)], conn=conn)
        assert payloads(db) == []

    assert payloads(db) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [row["id"] for row in db.execute("select id from executions order by id")] == [
        each.id for each in [run, *runs]
    ]


@pytest.mark.parametrize("opened", ASYNC)
async def test_an_async_transaction_that_rolls_back_never_enqueued(
    app: Conductor, database: str, db: Db, opened: AsyncOpener
) -> None:
    task = app.create_task(add)

    with pytest.raises(Undo):  # noqa: PT012
        async with opened(database) as conn:
            await task.with_options(conn=conn).invoke(1)
            raise Undo

    assert payloads(db) == []


@pytest.mark.parametrize("opened", SYNC)
def test_a_synchronous_connection_is_for_invoke_sync(database: str, db: Db, opened: SyncOpener) -> None:
    task = Conductor(database).create_task(add)

    with opened(database) as conn, pytest.raises(TypeError, match=r"is synchronous; use `invoke_sync\(\.\.\.\)`"):
        asyncio.run(task.with_options(conn=conn).invoke(1))

    assert payloads(db) == []


@pytest.mark.parametrize("opened", ASYNC)
async def test_an_asynchronous_connection_is_for_invoke(
    app: Conductor, database: str, db: Db, opened: AsyncOpener
) -> None:
    async with opened(database) as conn:
        with pytest.raises(TypeError, match=r"is asynchronous; use `await invoke\(\.\.\.\)`"):
            app.create_task(add).with_options(conn=conn).invoke_sync(1)
    assert payloads(db) == []


async def test_anything_else_is_not_a_connection(app: Conductor) -> None:
    with pytest.raises(TypeError, match=r"conn= is a builtins\.dict; it must be a psycopg, asyncpg, SQLAlchemy"):
        await app.create_task(add).with_options(conn={}).invoke(1)


async def test_calls_with_two_connections_are_not_one_statement(app: Conductor, database: str, db: Db) -> None:
    task = app.create_task(add)

    async with psycopg_async(database) as first, psycopg_async(database) as second:
        with pytest.raises(ConfigurationError, match="different connections"):
            await app.invoke_many([task.with_options(conn=conn).bind(1) for conn in (first, second)])
    assert payloads(db) == []


@pytest.mark.covers("F61", "P40")
@pytest.mark.parametrize("schema", ['we"ird', "100%", "%s", "a:b", "$1"])
async def test_a_schema_of_any_name_works(database: str, schema: str) -> None:
    openers: list[AsyncOpener] = [psycopg_async, asyncpg_connection, sqlalchemy_async_connection]

    async with Conductor(database, schema=schema) as app:
        await app.migrate()
        task = app.create_task(add)
        await task.invoke(0)
        for opened in openers:
            async with opened(database) as conn:
                run = await task.with_options(conn=conn).invoke(1)
            assert await run.state() == "ready"


async def test_the_hint_goes_out_with_the_commit(app: Conductor, database: str) -> None:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as listener:
        await listener.execute("listen pgconductor")

        async with psycopg_async(database) as conn:
            await app.create_task(add).with_options(conn=conn).invoke(1)

        hints = [hint.payload async for hint in listener.notifies(timeout=30, stop_after=1)]
    assert hints[0].startswith("ready ")
