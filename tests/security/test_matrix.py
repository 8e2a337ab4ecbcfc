"""Who may do what: every role, and the public, against everything there is in the schema.

`rights.txt` is the decision, a line an object: the sort, the name, and the kinds of role that may use it besides the
owner; `-` is nobody. A function is used by calling it, a table or view by reading all of it, nothing is written by
anybody, and no right is given on a single column. An object that is new fails the tests until it has its line.
"""

from pathlib import Path
from typing import Final

import pytest

from pgconductor.roles import KINDS
from tests.security.support import EVERYBODY, Town, answer

pytestmark = pytest.mark.covers("F84", "P48")

_WRITABLE: Final = """
    select c.relname, w.write from pg_class c
    cross join unnest('{insert,update,delete,truncate,references,trigger}'::text[]) w(write)
    where c.relnamespace = 'pgconductor'::regnamespace and c.relkind in ('r', 'v')
      and (has_table_privilege(%(role)s, c.oid, w.write) or w.write in ('insert', 'update', 'references')
           and has_any_column_privilege(%(role)s, c.oid, w.write))"""
_OBJECTS: Final = """
    select 'function' as sort, proname::text as name, oid::regprocedure::text as object from pg_proc
    where pronamespace = 'pgconductor'::regnamespace
    union all
    select case relkind when 'r' then 'table' when 'v' then 'view' else 'sequence' end, relname, oid::regclass::text
    from pg_class where relnamespace = 'pgconductor'::regnamespace and relkind in ('r', 'v', 'm', 'p', 'f', 'S')
    union all
    select 'type', t.typname, t.oid::regtype::text from pg_type t left join pg_class c on c.oid = t.typrelid
    where t.typnamespace = 'pgconductor'::regnamespace and t.typcategory <> 'A' and coalesce(c.relkind, 'c') = 'c'"""
_MAY_USE: Final = {
    "function": "select has_function_privilege(%s, %s, 'execute')",
    "table": "select has_table_privilege(%s, %s, 'select')",
    "view": "select has_table_privilege(%s, %s, 'select')",
    "sequence": "select has_sequence_privilege(%s, %s, 'usage, select, update')",
    "type": "select has_type_privilege(%s, %s, 'usage')",
}


def decided() -> dict[tuple[str, str], set[str]]:
    """Return who may use what, besides the owner."""
    lines = Path(__file__).with_name("rights.txt").read_text().splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    return {(sort, name): set(kinds) - {"-"} for sort, name, *kinds in words}


def found(town: Town) -> list[tuple[str, str, str]]:
    """Return (sort, name, how Postgres writes it) of everything in the schema."""
    with town.session("owner") as conn:
        return [(row["sort"], row["name"], row["object"]) for row in conn.execute(_OBJECTS.encode())]


def test_everything_in_the_schema_is_decided_and_nothing_else(shared_town: Town) -> None:
    assert {(sort, name) for sort, name, _ in found(shared_town)} == set(decided())


@pytest.mark.parametrize("kind", [*EVERYBODY, "public"])
def test_each_may_use_what_was_decided_and_nothing_more(shared_town: Town, kind: str) -> None:
    rights, objects = decided(), found(shared_town)
    role = "public" if kind == "public" else shared_town.login(kind)
    with shared_town.session("owner") as conn:
        may = {(sort, name) for sort, name, written in objects if answer(conn, _MAY_USE[sort], role, written)}

    assert may == {each for each, kinds in rights.items() if kind == "owner" or kind in kinds}


@pytest.mark.parametrize("kind", [*EVERYBODY, "public"])
def test_nobody_but_the_owner_may_write_a_table(shared_town: Town, kind: str) -> None:
    role = "public" if kind == "public" else shared_town.login(kind)
    with shared_town.session("owner") as conn:
        may = conn.execute(_WRITABLE.encode(), {"role": role}).fetchall()
        count = answer(conn, "select count(*) from pg_class where relnamespace = 'pgconductor'::regnamespace"
                             " and relkind in ('r', 'v')")  # fmt: skip

    assert len(may) == (count * 6 if kind == "owner" else 0), may


def test_nobody_is_granted_a_single_column(shared_town: Town) -> None:
    query = """
        select format('%s.%s', a.attrelid::regclass, a.attname) as name, a.attacl::text as rights from pg_attribute a
        join pg_class c on c.oid = a.attrelid
        where c.relnamespace = 'pgconductor'::regnamespace and cardinality(a.attacl) > 0"""
    with shared_town.session("owner") as conn:
        assert conn.execute(query.encode()).fetchall() == []


@pytest.mark.parametrize("kind", [*EVERYBODY, "public"])
def test_only_the_owner_may_create_in_the_schema(shared_town: Town, kind: str) -> None:
    role = "public" if kind == "public" else shared_town.login(kind)
    with shared_town.session("owner") as conn:
        rights = [
            right
            for right in ("usage", "create")
            if answer(conn, "select has_schema_privilege(%s, 'pgconductor', %s)", role, right)
        ]

    assert rights == {"owner": ["usage", "create"], "outsider": [], "public": []}.get(kind, ["usage"])


def test_what_runs_as_the_owner_is_owned_by_a_role_that_cannot_log_in(shared_town: Town) -> None:
    query = """
        select distinct r.rolname::text as name, r.rolcanlogin or r.rolsuper as is_strong
        from pg_proc p join pg_roles r on r.oid = p.proowner where p.pronamespace = 'pgconductor'::regnamespace"""
    with shared_town.session("reader") as conn:
        owners = conn.execute(query.encode()).fetchall()

    assert owners == [{"name": shared_town.role("owner"), "is_strong": False}]


def test_what_runs_as_the_owner_takes_built_in_types_alone(shared_town: Town) -> None:
    query = """
        select p.oid::regprocedure::text as name from pg_proc p cross join lateral unnest(p.proargtypes) t
        where p.pronamespace = 'pgconductor'::regnamespace and p.prosecdef and t >= 16384"""
    with shared_town.session("reader") as conn:
        taking = [row["name"] for row in conn.execute(query.encode())]

    assert taking == ["pgconductor.write_row_trigger(pgconductor.row_trigger,oid)"]  # it may not be made by others


@pytest.mark.parametrize("kind", [kind for kind in EVERYBODY if kind != "owner"])
def test_a_refusal_is_one_of_the_server(shared_town: Town, kind: str) -> None:
    with shared_town.session(kind) as conn:
        for statement in (
            "select * from pgconductor.lease",
            "insert into pgconductor.ready values (1, 1, 1, gen_random_uuid())",
            "update pgconductor.execution set outcome = 'completed'",
            "delete from pgconductor.step",
            "select pgconductor.finish('{}', now())",
            "create table pgconductor.mine (id int)",
            "select nextval('pgconductor.execution_ord')",
        ):
            with pytest.raises(Exception, match="permission denied"):
                conn.execute(statement.encode())


def test_a_kind_of_role_is_known_to_the_table(shared_town: Town) -> None:
    assert {kind for kinds in decided().values() for kind in kinds} == set(KINDS) - {"owner"}
