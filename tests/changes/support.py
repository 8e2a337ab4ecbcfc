"""Tables of an application, subscriptions to their changes, and roles that may do little."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor.changes import apply_changes
from pgconductor.engine import Engine
from pgconductor.relations import TriggerRow, TriggerStep
from tests.sql.support import Db, call, session

ENGINE = Engine("pgconductor")
CONTACT = "create table public.contact (id int primary key, email text, active boolean not null default true)"


def on(
    op: str,
    *columns: str,
    when: str | None = None,
    table: str = "public.contact",
    task: str = "sync",
) -> TriggerRow:
    """Return a subscription; of column `id` unless others are given."""
    return TriggerRow(task, table, op, columns or ("id",), when)


def follow(database: str, *rows: TriggerRow, deployment: str = "default") -> list[TriggerStep]:
    """Make the triggers as a worker's start does; returns what was done."""
    with session(database) as conn:
        tasks = [{"name": n, "queue": "default", "max_attempts": 3, "max_crashes": 5} for n in {r.task for r in rows}]
        if tasks:
            call(conn, "register_tasks", deployment, tasks)
    return apply_changes(database, ENGINE, deployment, rows)


def changes(db: Db, table: str = "public.contact") -> list[dict[str, Any]]:
    """Return what handlers of a table's changes would be told, in the order of the rows."""
    found = db.execute("select trigger_data from execution where trigger_kind = 'change' order by ord").fetchall()
    return [each["trigger_data"] for each in found if each["trigger_data"]["name"].rpartition(".")[0] == table]


def new_rows(db: Db, table: str = "public.contact") -> list[Any]:
    return [change["new"] for change in changes(db, table)]


def errors(db: Db) -> list[dict[str, Any]]:
    query = 'select task, "table", op, sqlstate, message from trigger_errors order by id'
    return db.execute(query).fetchall()


def triggers(db: Db, table: str = "public.contact") -> list[str]:
    """Return the definitions of the triggers on a table."""
    query = """
        select pg_get_triggerdef(oid) as text from pg_trigger
        where tgrelid = to_regclass(%s) and not tgisinternal order by tgname"""
    return [row["text"] for row in db.execute(query, (table,)).fetchall()]


def lead_to_contact(db: Db, database: str, table: str) -> None:
    """Make a foreign table over `public.contact`, which it reaches by a connection to the same database."""
    if not db.execute("select from pg_available_extensions where name = 'postgres_fdw'").rowcount:
        pytest.skip("this Postgres lacks postgres_fdw")
    given = conninfo_to_dict(database)
    place = {key: given[key] for key in ("host", "port", "dbname") if given.get(key)}
    login = {key: given[key] for key in ("user", "password") if given.get(key)}
    db.execute("create extension postgres_fdw schema public")
    db.execute(sql.SQL("create server here foreign data wrapper postgres_fdw {}").format(_options(place)))
    db.execute(sql.SQL("create user mapping for current_user server here {}").format(_options(login)))
    there = "server here options (schema_name 'public', table_name 'contact')"
    db.execute(f"create foreign table {table} (id int, email text) {there}".encode())


def _options(given: dict[str, Any]) -> sql.Composable:
    pairs = [sql.SQL("{} {}").format(sql.Identifier(key), sql.Literal(str(value))) for key, value in given.items()]
    return sql.SQL("options ({})").format(sql.SQL(", ").join(pairs)) if pairs else sql.SQL("")


@contextmanager
def role(db: Db, *grants: str) -> Generator[str]:
    """Make a role that may log in and has these rights, given as SQL with `{role}`; it goes at the end."""
    name = f"pgconductor_test_{uuid4().hex[:12]}"
    db.execute(f"create role {name} login password '{name}'".encode())
    try:
        for grant in grants:
            db.execute(grant.format(role=name).encode())
        yield name
    finally:
        db.execute(f"drop owned by {name} cascade".encode())
        db.execute(f"drop role {name}".encode())


def as_role(database: str, user: str) -> str:
    return make_conninfo(database, user=user, password=user)


@contextmanager
def session_of(database: str, user: str) -> Generator[psycopg.Connection[Any]]:
    with psycopg.connect(as_role(database, user), autocommit=True) as conn:
        yield conn
