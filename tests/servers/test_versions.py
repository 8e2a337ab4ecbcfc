"""The engine on the Postgres releases that are here, and in databases that are not as most are."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor import Conductor, Context, Orchestrator, schema
from pgconductor.embedded import EmbeddedServer
from pgconductor.errors import ServerError

ROOT = Path(__file__).parents[2]
RELEASES = {
    "15 of Debian": Path("/usr/lib/postgresql/15/bin"),
    **{str(major): ROOT / f".postgres/node_modules/postgres-{major}/native/bin" for major in range(15, 19)},
}


@contextmanager
def made(server: str, options: str) -> Generator[str]:
    """Make a database; give its address."""
    name = f"pgconductor_other_{uuid4().hex[:16]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f'create database "{name}" {options}'.encode())
        yield make_conninfo(server, dbname=name)
        admin.execute(f'drop database "{name}" with (force)'.encode())


async def work_through(dsn: str, word: str = "word") -> list[Any]:
    """Install the engine, run a parent with children, a transaction and a sleep, and return what it gave."""
    async with Conductor(dsn) as app:

        @app.task
        async def leaf(ctx: Context, text: str) -> str:
            return await ctx.step("turn", lambda: text[::-1])

        @app.task
        async def tree(ctx: Context, text: str) -> list[str]:
            await ctx.sleep("nap", 0.01)
            turned = await ctx.invoke_all("leaves", [leaf.bind(text), leaf.bind("ab")])
            return [*turned, await ctx.transaction("ask", ask)]

        await app.migrate()
        async with Orchestrator(app):
            return await (await tree.invoke(word)).result(30)


async def ask(conn: psycopg.AsyncConnection[Any]) -> str:
    row = await (await conn.execute("select current_setting('server_encoding')")).fetchone()
    return str(row and row[0])


@pytest.mark.covers("F42")
@pytest.mark.parametrize("release", RELEASES)
def test_the_engine_installs_and_works_on_each_release(release: str) -> None:
    if not (RELEASES[release] / "initdb").exists():
        pytest.skip(f"Postgres {release} is not here; `make test-postgres` fetches the releases")
    with EmbeddedServer(bin_dir=RELEASES[release], settings={"fsync": "off"}) as server:
        assert asyncio.run(work_through(server.dsn)) == ["drow", "ba", "UTF8"]


@pytest.mark.covers("F42")
async def test_a_database_with_the_c_locale_works(server: str) -> None:
    with made(server, "encoding 'UTF8' locale 'C' template template0") as dsn:
        assert await work_through(dsn, "né") == ["én", "ba", "UTF8"]


@pytest.mark.covers("F42")
@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_of_another_encoding_is_refused_with_the_reason(server: str, encoding: str) -> None:
    with (
        made(server, f"encoding '{encoding}' locale 'C' template template0") as dsn,
        pytest.raises(ServerError, match=encoding),
    ):
        schema.migrate(dsn)


@pytest.mark.covers("F42")
async def test_an_owner_without_any_other_right_installs_and_works(server: str) -> None:
    role = f"plain_{uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create role {role} login password 'plain' nosuperuser nocreaterole nocreatedb".encode())
        with made(server, f"owner {role}") as dsn:
            assert await work_through(make_conninfo(dsn, user=role, password="plain")) == ["drow", "ba", "UTF8"]
            with psycopg.connect(dsn, autocommit=True) as conn:
                assert conn.execute("select extname from pg_extension").fetchall() == [("plpgsql",)]
        admin.execute(f"drop role {role}".encode())


@pytest.mark.covers("F42")
@pytest.mark.parametrize("attrs", [None, "read-write", "primary", "any"])
async def test_a_database_that_is_read_only_by_default_works(server: str, attrs: str | None) -> None:
    with made(server, "") as dsn:
        name = conninfo_to_dict(dsn)["dbname"]
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f'alter database "{name}" set default_transaction_read_only = on'.encode())
        assert await work_through(make_conninfo(dsn, target_session_attrs=attrs)) == ["drow", "ba", "UTF8"]


def test_a_primary_is_not_called_a_standby_where_a_standby_was_asked_for(server: str) -> None:
    with pytest.raises(ServerError, match="not in hot standby mode"):
        schema.migrate(make_conninfo(server, target_session_attrs="standby"))
