"""The fixture `world`: a database of its own for each test, on a server with fsync on, which the test may kill."""

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgconductor import schema
from pgconductor.embedded import EmbeddedServer
from pgconductor.engine import Engine
from tests import invariants
from tests.fault import programs
from tests.fault.proxy import Proxy
from tests.fault.supervisor import World

_SETTINGS = {"max_connections": "200", "shared_buffers": "64MB", "deadlock_timeout": "100ms"}
_FAILED = pytest.StashKey[bool]()
_TEMPLATE = "pgconductor_template"
_AUDITED = "pgconductor_template_audited"


@contextmanager
def running_server(home: Path | None = None) -> Generator[EmbeddedServer]:
    """Start a server that may be killed, with migrated databases, one with the audit, from which others are copied."""
    server = EmbeddedServer(home, settings=_SETTINGS)
    with server:
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute(f"create database {_TEMPLATE}".encode())
        with psycopg.connect(make_conninfo(server.dsn, dbname=_TEMPLATE), autocommit=True) as conn:
            schema.migrate(conn)
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute(f"create database {_AUDITED} template {_TEMPLATE}".encode())
        with psycopg.connect(make_conninfo(server.dsn, dbname=_AUDITED), autocommit=True) as conn:
            invariants.attach_audit(conn)
        yield server


@asynccontextmanager
async def open_world(server: EmbeddedServer, home: Path, *, is_audited: bool = True) -> AsyncGenerator[World]:
    """Make a world with a database of its own, which the programs lead to; at the end its processes are killed."""
    name = f"fault_{uuid4().hex[:16]}"
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        admin.execute(f"create database {name} template {_AUDITED if is_audited else _TEMPLATE}".encode())
    async with _listening(server) as proxy:
        made = World(server, name, home, proxy)
        try:
            with programs.app.bound_to(made.dsn, Engine("pgconductor")):
                yield made
                await programs.app.close()
        finally:
            made.close()
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        admin.execute(f"drop database {name} with (force)".encode())


@pytest.fixture(scope="session")
def mortal_server() -> Iterator[EmbeddedServer]:
    """A server of this test process alone."""
    with running_server() as server:
        yield server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let the fixture know whether its test failed: then nothing need converge any more."""
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


@pytest.fixture
async def world(request: pytest.FixtureRequest, mortal_server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[World]:
    """Everything must have ended when the test returns; then the invariants and the ledger are checked."""
    async with open_world(mortal_server, tmp_path) as made:
        try:
            yield made
            if not request.node.stash[_FAILED]:
                await made.converges()
        finally:
            print(made.logs())  # noqa: T201 (pytest shows it when the test fails)


def _listening(server: EmbeddedServer) -> AbstractAsyncContextManager[Proxy]:
    state = server.state
    assert state is not None
    return Proxy("127.0.0.1", state.port).listening()
