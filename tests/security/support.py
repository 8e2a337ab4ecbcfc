"""An engine whose roles exist, and somebody of each kind who may log in."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import DictRow, dict_row, tuple_row

from pgconductor.roles import KINDS, names_for, roles_sql

EVERYBODY = (*KINDS, "outsider")


@dataclass(frozen=True)
class Town:
    """A database whose engine belongs to a role that may not log in.

    Attributes:
        admin: The address of a superuser.
        prefix: What the roles' names begin with: `<prefix>_worker`, and `<prefix>_worker_login` who is one.
    """

    admin: str
    prefix: str

    def role(self, kind: str) -> str:
        return f"{self.prefix}_{kind}"

    def login(self, kind: str) -> str:
        return f"{self.prefix}_{kind}_login"

    def dsn(self, kind: str) -> str:
        """Return the address of somebody of a kind; an outsider has no role of the engine."""
        return make_conninfo(self.admin, user=self.login(kind), password=self.login(kind))

    @contextmanager
    def session(self, kind: str) -> Generator[psycopg.Connection[DictRow]]:
        """Connect as somebody of a kind, with no path to the engine's schema."""
        with psycopg.Connection[DictRow].connect(self.dsn(kind), autocommit=True, row_factory=dict_row) as conn:
            yield conn


def build(admin: str, schema: str = "pgconductor") -> Town:
    """Make the roles, and a login for each."""
    town = Town(admin, str(conninfo_to_dict(admin)["dbname"]))
    names = names_for(schema, **{kind: town.role(kind) for kind in KINDS})
    with psycopg.connect(admin, autocommit=True) as conn:
        conn.execute(roles_sql(names, schema).encode())
        for kind in EVERYBODY:
            conn.execute(f"create role {town.login(kind)} login password '{town.login(kind)}'".encode())
        for kind in KINDS:
            conn.execute(f"grant {town.role(kind)} to {town.login(kind)}".encode())
    return town


def demolish(town: Town) -> None:
    """Give everything back to the administrator, and remove the roles."""
    with psycopg.connect(town.admin, autocommit=True) as conn:
        # a session that ends drops its temporary tables, which its role owns, a moment later
        gone = "select pg_terminate_backend(pid, 10000) from pg_stat_activity where usename = any(%s)"
        conn.execute(gone, ([town.login(kind) for kind in EVERYBODY],))
        for role in [*map(town.login, EVERYBODY), *map(town.role, KINDS)]:
            conn.execute(f"reassign owned by {role} to current_user".encode())
            conn.execute(f"drop owned by {role} cascade".encode())
        for role in [*map(town.login, EVERYBODY), *map(town.role, KINDS)]:
            conn.execute(f"drop role {role}".encode())


def answer(conn: psycopg.Connection[Any], query: str, *values: object) -> Any:
    """Return the first value of the first row."""
    with conn.cursor(row_factory=tuple_row) as cursor:
        row = cursor.execute(query.encode(), values or None).fetchone()
    return row[0] if row else None
