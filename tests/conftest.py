"""A real server for the tests, and a database of its own for each that asks.

`PGCONDUCTOR_TEST_DSN` names a server where the tests may create databases; else one is started, and thrown away at the
end. That one runs with `fsync=off`: no test here cuts its power. Tests of durability start servers of their own.
`PGCONDUCTOR_TEST_BIN` names the directory of the Postgres programs to start it with.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow, dict_row

from pgconductor import schema
from pgconductor.embedded import EmbeddedServer
from tests import invariants
from tests.databases import Databases

_HOME = "PGCONDUCTOR_TEST_HOME"  # where the tests' server lives; the processes of one run share it
BIN_DIR = Path(os.environ["PGCONDUCTOR_TEST_BIN"]) if "PGCONDUCTOR_TEST_BIN" in os.environ else None
_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "300",
    "shared_buffers": "64MB",
    "autovacuum_naptime": "10s",
    "deadlock_timeout": "100ms",
}


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ[_HOME] = f"{tempfile.gettempdir()}/pgconductor-tests-{os.getpid()}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    home = Path(os.environ[_HOME])
    if not hasattr(session.config, "workerinput") and home.exists():
        EmbeddedServer(home).stop()
        shutil.rmtree(home)


@pytest.fixture(scope="session")
def server() -> str:
    """The address of the tests' server."""
    return (
        os.environ.get("PGCONDUCTOR_TEST_DSN")
        or EmbeddedServer(Path(os.environ[_HOME]), bin_dir=BIN_DIR, settings=_SETTINGS).start().dsn
    )


@pytest.fixture(scope="session")
def template(server: str) -> str:
    """The name of a migrated database, with the audit attached, from which others are copied."""
    digest = hashlib.sha256((schema.sql() + invariants.AUDIT).encode()).hexdigest()[:16]
    name = f"pgconductor_template_{digest}"
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute("select pg_advisory_lock(hashtext(%s))", (name,))
        if not conn.execute("select from pg_database where datname = %s", (name,)).rowcount:
            conn.execute(f'drop database if exists "{name}_new"'.encode())
            conn.execute(f'create database "{name}_new"'.encode())
            with psycopg.connect(make_conninfo(server, dbname=f"{name}_new"), autocommit=True) as fresh:
                schema.migrate(fresh)
                invariants.attach_audit(fresh)
            conn.execute(f'alter database "{name}_new" rename to "{name}"'.encode())
    return name


@pytest.fixture(scope="session")
def databases(server: str, template: str) -> Iterator[Databases]:
    """The databases of this test process."""
    databases = Databases(server, template)
    yield databases
    databases.close()


@pytest.fixture
def database(databases: Databases) -> Iterator[str]:
    """The address of a database that looks new, with the engine in it; the invariants are checked at the end."""
    name = databases.take()
    try:
        yield databases.address(name)
        invariants.check_invariants(databases.keeper(name))
    finally:
        databases.give_back(name)


@pytest.fixture
def db(database: str) -> Iterator[psycopg.Connection[DictRow]]:
    """A session in the fresh database that sees the engine's tables and functions by name."""
    with connect(database) as conn:
        yield conn


def connect(dsn: str) -> psycopg.Connection[DictRow]:
    options = "-c search_path=pgconductor,pg_temp"
    return psycopg.Connection[DictRow].connect(dsn, autocommit=True, row_factory=dict_row, options=options)
