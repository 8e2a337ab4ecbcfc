"""What a session puts in the way of names is not found by the functions of the engine, whoever calls them."""

import json
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.security.support import Town, answer

pytestmark = pytest.mark.covers("F85")

# A temporary table for every table, a function or operator of the session's own for much of what the engine calls.
_TABLES: Final = """
do $$ declare v_name text; begin
  for v_name in select relname from pg_class where relnamespace = 'pgconductor'::regnamespace and relkind in ('r', 'v')
  loop
    execute format('create temp table %I (id int)', v_name);
  end loop;
end $$"""
_FUNCTIONS: Final = """
create temp table stolen_by (who text);
create function pg_temp.steal() returns text language plpgsql as
  $$ begin raise exception 'stolen as %', current_user; end $$;
create function pg_temp.coalesce_text(text, text) returns text language sql as 'select pg_temp.steal()';
create function pg_temp.lower(text) returns text language sql as 'select pg_temp.steal()';
create function pg_temp.format(text, text) returns text language sql as 'select pg_temp.steal()';
create function pg_temp.json_build_object(text, text) returns json language sql as 'select to_json(pg_temp.steal())';
create function pg_temp.json_to_recordset(json) returns setof record language sql as 'select pg_temp.steal(), 1';
create function pg_temp.clock_timestamp() returns timestamptz language sql as 'select pg_temp.steal()::timestamptz';
create function pg_temp.current_schema() returns name language sql as 'select pg_temp.steal()::name';
create function pg_temp.instant(timestamptz) returns timestamptz language sql as 'select pg_temp.steal()::timestamptz';
create function pg_temp.uuid7() returns uuid language sql as 'select pg_temp.steal()::uuid';
create function pg_temp.glue(text, text) returns text language sql as 'select pg_temp.steal()';
create function pg_temp.same(uuid, uuid) returns boolean language sql as 'select pg_temp.steal() = ''''';
create function pg_temp.same(text, text) returns boolean language sql as 'select pg_temp.steal() is null';
create operator pg_temp.|| (leftarg = text, rightarg = text, function = pg_temp.glue);
create operator pg_temp.= (leftarg = uuid, rightarg = uuid, function = pg_temp.same);
create operator pg_temp.= (leftarg = text, rightarg = text, function = pg_temp.same);
create type pg_temp.outcome as enum ('mine');
create domain pg_temp.json as text;"""
_PATHS: Final = ["pg_temp, pgconductor, pg_catalog", "pg_temp, pg_catalog", "pg_catalog, pg_temp, pgconductor"]


def shadow(conn: psycopg.Connection[Any], path: str) -> None:
    conn.execute(_TABLES.encode())
    conn.execute(_FUNCTIONS.encode())
    conn.execute(f"set search_path to {path}".encode())


@pytest.mark.parametrize("path", _PATHS)
def test_an_enqueuer_runs_nothing_of_its_own(town: Town, path: str) -> None:
    with town.session("enqueuer") as conn:
        shadow(conn, path)
        id = answer(conn, "select pgconductor.invoke('work', dedupe_key => 'k')")
        answer(conn, "select pgconductor.emit('paid', '{}'::pg_catalog.jsonb)")
        assert answer(conn, "select pgconductor.invoke('work', dedupe_key => 'k')") == id
        assert answer(conn, "select pgconductor.state_of(%s)", id) == "ready"
        assert answer(conn, "select pgconductor.watch_result(%s)", id)["task"] == "work"
        assert conn.execute("select pgconductor.watch_results(array[%s::uuid])", (id,)).fetchall() == []

    with town.session("reader") as conn:
        assert [row["id"] for row in conn.execute("select id from pgconductor.executions")] == [id]


@pytest.mark.parametrize("path", _PATHS)
def test_a_worker_runs_nothing_of_its_own(town: Town, path: str) -> None:
    process = uuid4()
    with town.session("worker") as conn:
        shadow(conn, path)
        tasks = json.dumps([{"name": "work", "queue": "default", "max_attempts": 3, "max_crashes": 5}])
        conn.execute("select pgconductor.register_orchestrator(%s, 'a', '1', 'h', 1, '{default}')", (process,))
        (task,) = answer(conn, "select pgconductor.register_tasks('d', %s::pg_catalog.json)", tasks)
        (queue,) = answer(conn, "select pgconductor.register_queues('{default}')")
        id = str(answer(conn, "select pgconductor.invoke('work')"))
        wants = json.dumps([{"queue": queue["id"], "limit": 1}])
        query = "select pgconductor.claim(%s, 1, %s::pg_catalog.json, %s, true)"
        assert answer(conn, query, process, wants, [task["id"]])["claimed"][0][0] == id
        settle = "select pgconductor.settle(%s, %s::pg_catalog.uuid[], '{1}', '[\"x\"]', '[]')"
        assert not answer(conn, settle, process, [UUID(id)])["lost"]
        for call in ("sweep()", "prune()", "fire_timers()", f"beat('{process}', false)", f"retire('{process}')"):
            conn.execute(f"select pgconductor.{call}".encode())

    with town.session("reader") as conn:
        assert answer(conn, "select result from pgconductor.executions where id = %s", UUID(id)) == "x"


@pytest.mark.parametrize("path", _PATHS)
def test_a_reader_runs_nothing_of_its_own(town: Town, path: str) -> None:
    with town.session("enqueuer") as conn:
        id = answer(conn, "select pgconductor.invoke('work')")
    with town.session("reader") as conn:
        shadow(conn, path)
        assert answer(conn, "select pgconductor.why_not_running(%s)", id)["task"] == "work"
        for report in ("list_queues", "list_tasks", "list_workers", "list_schedules", "list_subscriptions", "overview"):
            conn.execute(f"select pgconductor.{report}()".encode())
        assert answer(conn, "select pgconductor.show_run(%s, 10)", id)["run"]["state"] == "ready"
        assert answer(conn, "select task from pgconductor.executions") == "work"


def test_every_function_has_a_path_that_ends_with_the_temporary_schema_or_a_bound_body(town: Town) -> None:
    query = """
        select proname::text as name from pg_proc
        where pronamespace = 'pgconductor'::regnamespace and prosqlbody is null
          and not coalesce('search_path=pgconductor, pg_temp' = any(proconfig), false)"""
    with town.session("reader") as conn:
        assert conn.execute(query.encode()).fetchall() == []
