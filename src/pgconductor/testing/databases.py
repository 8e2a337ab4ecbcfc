"""Databases for tests: a server, a migrated template on it, and a copy of that for each test.

**The server** is the first of: `PGCONDUCTOR_TEST_DSN`, `PGCONDUCTOR_URL`, `DATABASE_URL`, the project's running
development server, one that is started for this test session and thrown away after it. The role must be allowed to
create databases; no database but our own is touched.

**The template** is made once for each version of the engine's schema and kept: its name carries a digest of all that
is in it. Whoever makes it holds a lock of the server meanwhile, so the processes of a parallel run share one. Nobody
can connect to a template, because Postgres copies a database only while it has no sessions.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from uuid import uuid4

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor import embedded, schema
from pgconductor.address import address_of_environment
from pgconductor.embedded import EmbeddedServer
from pgconductor.engine import quote
from pgconductor.errors import ServerError

HOME_VARIABLE = "PGCONDUCTOR_TEST_HOME"
"""Where a server that belongs to the test session lives; the processes of a parallel run inherit it."""

# Nothing in a test database is worth an fsync; a test of durability starts a server of its own.
_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "300",
    "shared_buffers": "64MB",
    "autovacuum_naptime": "10s",
}


def server_dsn() -> str:
    """Return the address of the server to test on; start one if there is none.

    Raises:
        ServerError: There is none and none can be started; says what to install or set.
    """
    if dsn := os.environ.get("PGCONDUCTOR_TEST_DSN") or address_of_environment():
        return dsn
    state = embedded.running() or EmbeddedServer(session_home(), settings=_SETTINGS).start()
    return state.dsn


def session_home() -> Path:
    """Return the directory of the test session's own server."""
    return Path(os.environ.get(HOME_VARIABLE) or f"{tempfile.gettempdir()}/pgconductor-tests-{os.getpid()}")


def stop_session_server(home: Path) -> None:
    """Stop the test session's own server and remove all that it kept; nothing happens if none was started."""
    if home.exists():
        EmbeddedServer(home).stop()
        shutil.rmtree(home)


class Databases:
    """Makes and drops the databases of a test process."""

    def __init__(self) -> None:
        self._server: str | None = None
        self._templates: dict[str, str] = {}

    @property
    def server(self) -> str:
        """The server's address. The first look may start it."""
        if self._server is None:
            self._server = server_dsn()
        return self._server

    def create(self, schema_name: str) -> str:
        """Make a database with the engine in a schema of that name.

        Returns:
            Its address.

        Raises:
            ServerError: The role may not create databases.
        """
        name = f"pgconductor_test_{uuid4().hex[:16]}"
        with self._administrate() as admin:
            template = self._templates.get(schema_name) or self._make_template(admin, schema_name)
            self._templates[schema_name] = template
            _run(admin, f"create database {quote(name)} template {quote(template)}")
        return make_conninfo(self.server, dbname=name)

    def drop(self, dsn: str) -> None:
        """Drop a database, whoever is still connected to it."""
        name = str(conninfo_to_dict(dsn)["dbname"])
        with self._administrate() as admin:
            _run(admin, f"drop database {quote(name)} with (force)")

    def _administrate(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self.server, autocommit=True)

    def _make_template(self, admin: psycopg.Connection[tuple[object, ...]], schema_name: str) -> str:
        digest = hashlib.sha256(schema.sql(schema_name).encode()).hexdigest()[:16]
        name, staged = f"pgconductor_template_{digest}", f"pgconductor_template_{digest}_new"
        _run(admin, "select pg_advisory_lock(hashtext(%s))", name)
        try:
            if admin.execute("select from pg_database where datname = %s", (name,)).rowcount == 0:
                _run(admin, f"drop database if exists {quote(staged)} with (force)")
                _run(admin, f"create database {quote(staged)} template template0")
                schema.migrate(make_conninfo(self.server, dbname=staged), schema_name)
                _run(admin, f"alter database {quote(staged)} allow_connections false")
                _run(admin, f"alter database {quote(staged)} rename to {quote(name)}")
        finally:
            _run(admin, "select pg_advisory_unlock(hashtext(%s))", name)
        return name


def _run(admin: psycopg.Connection[tuple[object, ...]], statement: str, *values: str) -> None:
    try:
        admin.execute(statement.encode(), values or None)
    except psycopg.errors.InsufficientPrivilege as error:
        remedy = "give it CREATEDB, or set PGCONDUCTOR_TEST_DSN to a server where it may"
        raise ServerError(f"the tests' role cannot make databases: {error}", remedy) from error
