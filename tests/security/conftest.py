"""An engine with its roles: one for all the tests of a process that leave it as it is, one a test for the others."""

from collections.abc import Iterator

import pytest

from tests.databases import Databases
from tests.security.support import Town, build, demolish


@pytest.fixture(scope="session")
def shared_town(databases: Databases) -> Iterator[Town]:
    """For tests that only look, or whose traces disturb nobody."""
    name = databases.take()
    town = build(databases.address(name))
    yield town
    demolish(town)
    databases.give_back(name)


@pytest.fixture
def town(database: str) -> Iterator[Town]:
    """For tests that leave something behind; the invariants are checked at the end."""
    town = build(database)
    yield town
    demolish(town)
