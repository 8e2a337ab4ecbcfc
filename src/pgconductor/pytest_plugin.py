"""The pytest plugin: the fixture `conductor_test`. See `pgconductor.testing` for what it gives.

Every pytest run on a machine with the package loads this module, so it imports nothing of the package until a test
asks for the fixture. The fixtures are plain functions, so that they work in both modes of pytest-asyncio and with any
other runner of coroutines on asyncio: what has to be awaited is awaited by the test, and closed on the test's own loop.
"""

import os
import tempfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pgconductor.testing import ConductorTest
    from pgconductor.testing.databases import Databases

_HOME = "PGCONDUCTOR_TEST_HOME"
_own_home = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Name the place of a server of this session's own. The processes of a parallel run inherit it."""
    if _HOME not in os.environ:
        os.environ[_HOME] = config.stash[_own_home] = f"{tempfile.gettempdir()}/pgconductor-tests-{os.getpid()}"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop that server, if one was started, in the process that named its place."""
    home = config.stash.get(_own_home, None)
    if home is None:
        return
    if os.environ.get(_HOME) == home:
        del os.environ[_HOME]
    if os.path.isdir(home):  # noqa: PTH112 (pathlib is not worth its import to runs without the fixture)
        from pathlib import Path

        from pgconductor.testing.databases import stop_session_server

        stop_session_server(Path(home))


@pytest.fixture(scope="session")
def _conductor_databases() -> "Databases":
    from pgconductor.testing.databases import Databases

    return Databases()


@pytest.fixture
def conductor_test(request: pytest.FixtureRequest, _conductor_databases: "Databases") -> "ConductorTest":
    """Run an application on a database of its own: `t = await conductor_test(app, deps=...)`."""
    from pgconductor.testing import ConductorTest

    # Finalizers run last first: one that is added during the test runs before the test's event loop is closed.
    return ConductorTest(_conductor_databases, request.node.addfinalizer)
