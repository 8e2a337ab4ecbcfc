"""Databases without an engine, and one more migration."""

from collections.abc import Callable, Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgconductor import schema
from tests.migration.releases import BREAK

AddMigration = Callable[..., schema.Step]


@pytest.fixture
def empty(server: str) -> Iterator[str]:
    """The address of a database without an engine."""
    name = f"pgconductor_empty_{uuid4().hex[:16]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f'create database "{name}"'.encode())
        yield make_conninfo(server, dbname=name)
        admin.execute(f'drop database "{name}" with (force)'.encode())


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> schema.Step:
    """Make this process a later release, whose newest migration breaks workers of others."""
    step = schema.Step(
        "apply migration 0900_next, after workers of other releases have stopped",
        BREAK,
        schema.Record(900, "checksum", "99.0.0", breaking=True),
        "0900_next",
    )
    before = schema._migrations()
    monkeypatch.setattr(schema, "_migrations", lambda: (*before, step))
    monkeypatch.setattr(schema, "_release", lambda: "99.0.0")
    return step
