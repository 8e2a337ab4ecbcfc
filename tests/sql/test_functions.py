"""All functions as a whole: checked statically, closed to the public, bound to their schema."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pgconductor import schema
from pgconductor.embedded import EmbeddedServer
from tests.sql.support import Db

CHECKER = Path("/usr/share/postgresql/15/extension/plpgsql_check.control")  # Debian: postgresql-15-plpgsql-check


@pytest.fixture(scope="module")
def checker() -> Iterator[psycopg.Connection]:
    if not CHECKER.exists():
        pytest.skip("plpgsql_check is not installed for Postgres 15")
    fifteen = EmbeddedServer(bin_dir=Path("/usr/lib/postgresql/15/bin"), settings={"fsync": "off"})
    with fifteen, psycopg.connect(fifteen.dsn, autocommit=True) as conn:
        schema.migrate(conn)
        conn.execute("create extension plpgsql_check schema public")
        yield conn


def test_plpgsql_check_finds_no_fault(checker: psycopg.Connection) -> None:
    faults = checker.execute("""
        select p.proname, c.lineno, c.level, c.message from pg_proc p
        join pg_namespace n on n.oid = p.pronamespace join pg_language l on l.oid = p.prolang
        cross join lateral plpgsql_check_function_tb(
          p.oid, case when p.prorettype = 'trigger'::regtype then 'pgconductor.queue'::regclass else 0 end,
          performance_warnings => false, extra_warnings => true) c
        where n.nspname = 'pgconductor' and l.lanname = 'plpgsql'""").fetchall()
    assert faults == []


@pytest.mark.covers("F42")
def test_the_engine_installs_on_the_oldest_postgres(checker: psycopg.Connection) -> None:
    assert schema.is_current(checker)
    assert checker.execute("select invoke from pgconductor.invoke('work')").rowcount == 1


def test_the_public_may_use_nothing(db: Db) -> None:
    open_to_all = db.execute("""
        select p.oid::regprocedure::text as name from pg_proc p join pg_namespace n on n.oid = p.pronamespace
        where n.nspname = 'pgconductor' and has_function_privilege('public', p.oid, 'execute')
        union all
        select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where n.nspname = 'pgconductor' and c.relkind in ('r', 'v') and has_table_privilege('public', c.oid, 'select')
        union all
        select t.typname from pg_type t join pg_namespace n on n.oid = t.typnamespace
        where n.nspname = 'pgconductor' and t.typelem = 0 and has_type_privilege('public', t.oid, 'usage')""")
    assert open_to_all.fetchall() == []


def test_every_function_resolves_names_in_its_own_schema(db: Db) -> None:
    loose = db.execute("""
        select p.proname from pg_proc p join pg_namespace n on n.oid = p.pronamespace
        where n.nspname = 'pgconductor' and p.prosqlbody is null
          and not coalesce('search_path=pgconductor, pg_temp' = any(p.proconfig), false)""")
    assert loose.fetchall() == []


def test_only_what_others_may_call_runs_with_its_owners_rights(db: Db) -> None:
    found = db.execute("""
        select proname::text as name, prosecdef from pg_proc where pronamespace = 'pgconductor'::regnamespace""")
    listed = db.execute("select unnest(names) as name from rights() where object = 'function' and runs_as = 'owner'")
    granted = {row["name"] for row in listed}
    assert [row["name"] for row in found if row["prosecdef"] is not (row["name"] in granted)] == []
