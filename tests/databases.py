"""Databases for tests, used again: a `create database` takes longer than most tests.

What a test leaves behind is removed: rows, sequences, sessions, and all of schema public. Then the database is compared
with what it was when it was new; where a test has changed more than that, it is dropped and another one made.

Each has a session that looks after it and stays from test to test: a new one would read the catalog anew, which takes
as long as all that it does.
"""

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psycopg
from psycopg.conninfo import make_conninfo

_RESET = """
do $$
declare
  v_table record;
  v_used boolean;
begin
  perform pg_terminate_backend(pid, 10000) from pg_stat_activity
  where datname = current_database() and pid <> pg_backend_pid();
  if exists (select from pg_depend d join pg_namespace n on n.oid = d.refobjid
             where n.nspname = 'public' and d.refclassid = 'pg_namespace'::regclass) then
    drop schema public cascade;
    create schema public authorization pg_database_owner;
    grant usage on schema public to public;
  end if;
  for v_table in
    select c.oid::regclass as name from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname in ('pgconductor', 'audit') and c.relkind = 'r' and c.relname <> 'migration'
  loop
    execute format('select exists (select from %s)', v_table.name) into v_used;
    if v_used then
      execute format('truncate %s restart identity', v_table.name);
    end if;
  end loop;
  perform setval(c.oid, 1, false) from pg_class c join pg_namespace n on n.oid = c.relnamespace
  where n.nspname in ('pgconductor', 'audit') and c.relkind = 'S';
end $$
"""
_SEEDED = """
select c.oid::regclass::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname in ('pgconductor', 'audit') and c.relkind = 'r' and c.relname <> 'migration'
"""
_PRINT = """
with ours as (select * from pg_namespace where nspname !~ '^pg_' and nspname <> 'information_schema')
select md5(concat(
  (select string_agg(concat(n.nspname, n.nspacl), ',' order by n.nspname) from ours n),
  (select string_agg(concat(c.oid::regclass, c.relkind, c.relacl, c.reloptions, c.relnatts), ','
                     order by c.oid::regclass::text)
   from pg_class c join ours n on n.oid = c.relnamespace),
  (select string_agg(concat(p.oid::regprocedure, md5(p.prosrc), p.proconfig, p.proacl), ','
                     order by p.oid::regprocedure::text)
   from pg_proc p join ours n on n.oid = p.pronamespace),
  (select string_agg(concat(k.conrelid::regclass, k.conname, pg_get_constraintdef(k.oid)), ','
                     order by k.conrelid::regclass::text, k.conname)
   from pg_constraint k join ours n on n.oid = k.connamespace),
  (select string_agg(concat(a.attrelid::regclass, a.attname, a.atttypid::regtype, a.attnotnull, a.attacl), ','
                     order by a.attrelid::regclass::text, a.attnum)
   from pg_attribute a join pg_class c on c.oid = a.attrelid join ours n on n.oid = c.relnamespace where a.attnum > 0),
  (select string_agg(concat(t.tgname, t.tgrelid::regclass, t.tgenabled), ',' order by t.tgname)
   from pg_trigger t where not t.tgisinternal),
  (select string_agg(s.setconfig::text, ',') from pg_db_role_setting s join pg_database d on d.oid = s.setdatabase
   where d.datname = current_database()),
  (select string_agg(concat(version, checksum), ',' order by version) from pgconductor.migration)))
"""


@dataclass
class _Fresh:
    """What a new database looks like: its print, and the rows that the migrations put there."""

    print: str
    seeds: dict[str, Any]


class Databases:
    """The databases of one test process.

    Args:
        server: Where to make them.
        template: What they are copies of.
    """

    def __init__(self, server: str, template: str) -> None:
        self._server = server
        self._template = template
        self._idle: list[str] = []
        self._keepers: dict[str, psycopg.Connection[Any]] = {}
        self._fresh: _Fresh | None = None

    def take(self) -> str:
        """Return the name of a database that looks new."""
        return self._idle.pop() if self._idle else self._create()

    def give_back(self, name: str) -> None:
        """Clean a database for the next test, or drop it."""
        try:
            is_clean = self._clean(self.keeper(name))
        except psycopg.Error:
            is_clean = False
        if is_clean:
            self._idle.append(name)
        else:
            self._drop(name)

    def address(self, name: str) -> str:
        """Return where a database is."""
        return make_conninfo(self._server, dbname=name)

    def keeper(self, name: str) -> psycopg.Connection[Any]:
        """Return the session that looks after a database; a test may have ended the one before."""
        try:
            self._keepers[name].execute("select 1")
        except (KeyError, psycopg.OperationalError):
            self._keepers[name] = psycopg.connect(self.address(name), autocommit=True)
        return self._keepers[name]

    def close(self) -> None:
        """Drop what is left."""
        for name in self._idle:
            self._drop(name)

    def _create(self) -> str:
        name = f"pgconductor_test_{uuid4().hex[:16]}"
        with psycopg.connect(self._server, autocommit=True) as admin:
            admin.execute(f'create database "{name}" template "{self._template}"'.encode())
        if self._fresh is None:
            self._fresh = _Fresh(_print_of(self.keeper(name)), _seeds_of(self.keeper(name)))
        return name

    def _drop(self, name: str) -> None:
        if name in self._keepers:
            self._keepers.pop(name).close()
        with psycopg.connect(self._server, autocommit=True) as admin:
            admin.execute(f'drop database if exists "{name}" with (force)'.encode())

    def _clean(self, conn: psycopg.Connection[Any]) -> bool:
        fresh = self._fresh
        conn.execute(_RESET.encode())
        if fresh is None or _print_of(conn) != fresh.print:
            return False
        for table, rows in fresh.seeds.items():
            again = f"insert into {table} select * from json_populate_recordset(null::{table}, %s)"  # noqa: S608
            conn.execute(again.encode(), (rows,))
        return True


def _print_of(conn: psycopg.Connection[Any]) -> str:
    row = conn.execute(_PRINT.encode()).fetchone()
    assert row is not None
    return str(row[0])


def _seeds_of(conn: psycopg.Connection[Any]) -> dict[str, Any]:
    seeds: dict[str, Any] = {}
    for (table,) in conn.execute(_SEEDED.encode()).fetchall():
        query = f"select cast(json_agg(t) as text) from {table} t"  # noqa: S608
        row = conn.execute(query.encode()).fetchone()
        if row and row[0]:
            seeds[str(table)] = row[0]
    return seeds
