"""`pgconductor doctor` where something is wrong: it names what, and says all else that it found."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor.embedded import EmbeddedServer
from tests.cli.test_cli import run


def findings(dsn: str) -> dict[str, dict[str, Any]]:
    result = run(dsn, "doctor", "--json")
    assert result.exit_code == 1, result.output
    assert "→" in run(dsn, "doctor").stdout
    return {check["name"]: check for check in json.loads(result.stdout)}


@pytest.fixture
def latin(server: str) -> Iterator[str]:
    """A database of an encoding that does not hold every text."""
    name = f"pgconductor_latin_{uuid4().hex[:16]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create database {name} encoding 'LATIN1' locale 'C' template template0".encode())
        try:
            yield make_conninfo(server, dbname=name)
        finally:
            admin.execute(f"drop database {name} with (force)".encode())


@pytest.fixture
def stranger(database: str) -> Iterator[str]:
    """The address of a login that has no rights in the engine's schema."""
    name = f"stranger_{uuid4().hex[:16]}"
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"create role {name} login password 'secret'".encode())
        try:
            yield make_conninfo(database, user=name, password="secret")
        finally:
            admin.execute(f"drop owned by {name}; drop role {name}".encode())


@pytest.fixture
def standby() -> Iterator[str]:
    """A server that takes no writes."""
    with EmbeddedServer() as server:
        server.stop()
        (server.data_dir / "standby.signal").touch()
        yield server.start().dsn


def test_an_encoding_that_cannot_hold_every_text_is_named(latin: str) -> None:
    found = findings(latin)

    assert found["connection"]["verdict"] == found["server"]["verdict"] == "ok"
    assert (found["encoding"]["verdict"], found["encoding"]["found"]) == ("failure", "LATIN1")
    assert found["schema"]["verdict"] == "failure"


def test_a_role_that_the_schema_is_not_open_to_is_named(stranger: str) -> None:
    found = findings(stranger)

    assert found["server"]["verdict"] == found["encoding"]["verdict"] == "ok"
    assert found["schema"]["verdict"] == "failure"
    assert "permission denied" in found["schema"]["found"]
    assert "pgconductor roles --sql" in found["schema"]["remedy"]


def test_a_role_that_may_not_ask_the_engine_is_named(database: str, stranger: str) -> None:
    role = conninfo_to_dict(stranger)["user"]
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"grant usage on schema pgconductor to {role}".encode())
        admin.execute(f"grant select on pgconductor.migration to {role}".encode())
    found = findings(stranger)

    assert found["schema"]["verdict"] == "ok"
    assert found["engine"]["verdict"] == "failure"
    assert "permission denied" in found["engine"]["found"]


def test_a_standby_is_named(standby: str) -> None:
    found = findings(standby)

    assert found["connection"]["verdict"] == found["server"]["verdict"] == "ok"
    assert (found["role"]["verdict"], found["role"]["found"]) == ("failure", "the server is a read-only standby")
    assert found["schema"]["verdict"] == "failure"
