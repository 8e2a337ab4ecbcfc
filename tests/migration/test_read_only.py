"""Roles and databases whose transactions only read unless they say otherwise."""

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgconductor import schema

READ_ONLY = "-c default_transaction_read_only=on"
TITLES = [step.title for step in schema.pending(None)]


@pytest.fixture
def reader(empty: str) -> str:
    """The address of a database without an engine, where transactions only read unless they say otherwise."""
    return make_conninfo(empty, options=READ_ONLY)


def test_they_are_migrated_by_address(reader: str) -> None:
    assert schema.plan(reader) == TITLES
    assert schema.migrate(reader) == TITLES
    assert schema.migrate(reader) == []


def test_they_are_migrated_on_a_connection(reader: str) -> None:
    with psycopg.connect(reader, autocommit=True) as conn:
        assert schema.migrate(conn) == TITLES


def test_they_are_migrated_by_hand(reader: str) -> None:
    with psycopg.connect(reader, autocommit=True) as conn:
        conn.execute(schema.sql().encode())
        assert schema.is_current(conn)
