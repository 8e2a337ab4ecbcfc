"""What a session sets changes neither time nor owner nor state."""

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Final
from uuid import uuid4

import psycopg
import pytest
from psycopg import errors
from psycopg.rows import DictRow

from tests.security.support import Town, answer
from tests.sql.support import at

pytestmark = pytest.mark.covers("F87", "P47")

HOSTILE: Final = {
    "timezone": "Pacific/Kiritimati",
    "datestyle": "SQL, DMY",
    "intervalstyle": "sql_standard",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "transform_null_equals": "on",
    "array_nulls": "off",
    "standard_conforming_strings": "off",
    "backslash_quote": "on",
    "quote_all_identifiers": "on",
    "row_security": "off",
    "default_transaction_isolation": "serializable",
    "plan_cache_mode": "force_custom_plan",
    "enable_indexscan": "off",
    "client_encoding": "UTF8",
    "pgconductor.now": "2000-01-01",
    "pgconductor.fake_now": "2000-01-01",
    "app.current_user": "pgconductor_owner",
}


@pytest.fixture
def enqueuer(town: Town) -> Iterator[psycopg.Connection[DictRow]]:
    with town.session("enqueuer") as conn:
        for name, value in HOSTILE.items():
            conn.execute("select set_config(%s, %s, false)", (name, value))
        yield conn


def test_settings_change_nothing_of_what_is_stored(town: Town, enqueuer: psycopg.Connection[DictRow]) -> None:
    query = "select pgconductor.invoke('work', %s::jsonb, run_at => '2040-03-01T12:00:00Z', dedupe_key => 'k')"
    payload = {"at": "2040-03-01", "x": 0.1, "null": None, "list": [None, 1], "back": "\\'"}
    id = answer(enqueuer, query, json.dumps(payload))
    delayed = answer(enqueuer, "select pgconductor.invoke('work', delay => '90 minutes')")

    with town.session("reader") as conn:
        look = (
            "select payload, run_at - created_at as wait, now() - created_at as age, state from pgconductor.executions"
        )
        kept, later = (conn.execute(f"{look} where id = %s".encode(), (each,)).fetchone() for each in (id, delayed))
        assert answer(conn, "select run_at = '2040-03-01T12:00:00Z' from pgconductor.executions where id = %s", id)
    assert kept is not None
    assert later is not None
    assert kept["payload"] == payload
    assert later["wait"] == timedelta(minutes=90)
    assert abs(kept["age"]) < timedelta(minutes=1)
    assert (kept["state"], later["state"]) == ("scheduled", "scheduled")


def test_settings_change_nobody(town: Town, enqueuer: psycopg.Connection[DictRow]) -> None:
    for attempt in (f"set role {town.role('owner')}", f"set session authorization {town.role('owner')}"):
        with pytest.raises(errors.InsufficientPrivilege):
            enqueuer.execute(attempt.encode())
    with pytest.raises(errors.InsufficientPrivilege):
        enqueuer.execute("set session_replication_role = replica")


MOVED: Final = [
    ("enqueuer", "enqueue('[]', p_now => %s)"),
    ("enqueuer", "enqueue_one(gen_random_uuid(), 'work', null, 0::smallint, '{}', p_now => %s)"),
    ("enqueuer", "enqueue_alike('{}', 'work', null, 0::smallint, '[]', p_now => %s)"),
    ("enqueuer", "emit_events('[]', p_now => %s)"),
    ("worker", "claim(gen_random_uuid(), 1, '[]', '{}', p_now => %s)"),
    ("worker", "fire_timers(p_now => %s)"),
    ("worker", "sweep(p_now => %s)"),
    ("worker", "prune(p_now => %s)"),
    ("worker", "settle(gen_random_uuid(), '{}', '{}', '[]', '[]', p_now => %s)"),
    ("worker", "cancel(gen_random_uuid(), '', p_now => %s)"),
    ("worker", "register_orchestrator(gen_random_uuid(), 'a', '1', 'h', 1, '{}', p_now => %s)"),
]


@pytest.mark.parametrize(("kind", "call"), MOVED)
def test_only_the_owner_may_say_what_time_it_is(shared_town: Town, kind: str, call: str) -> None:
    with shared_town.session(kind) as conn, pytest.raises(errors.InsufficientPrivilege, match="what time it is"):
        conn.execute(f"select pgconductor.{call}".encode(), (at(0),))


def test_a_clock_that_is_not_moved_is_the_databases(town: Town) -> None:
    with town.session("worker") as conn:
        id = uuid4()
        conn.execute("select pgconductor.register_orchestrator(%s, 'a', '1', 'h', 1, '{}', null)", (id,))
        assert answer(conn, "select now() - started_at < '1 minute' from pgconductor.workers")


def test_every_function_that_takes_an_instant_from_a_caller_is_guarded_or_only_reads(shared_town: Town) -> None:
    query = """
        select p.proname::text as name from pg_proc p cross join lateral unnest(p.proargnames) a
        where p.pronamespace = 'pgconductor'::regnamespace and a = 'p_now' and p.prosecdef
          and p.prosrc !~ 'instant\\(p_now\\)|, p_now\\)'"""
    with shared_town.session("reader") as conn:
        assert [row["name"] for row in conn.execute(query.encode())] == ["why_not_running"]
