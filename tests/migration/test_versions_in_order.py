"""Which of two releases is the later one, and whose functions stay."""

from itertools import combinations

import pytest

from pgconductor import schema
from pgconductor.versions import is_newer
from tests.sql.support import Db

FUNCTIONS = [step.title for step in schema.pending(None) if step.name == "functions"]
IN_ORDER = [
    "unknown",
    *("0.9", "0.10.0.dev3", "0.10.0a1.dev2", "0.10.0a1", "0.10.0a2", "0.10.0a10", "0.10.0b1", "0.10.0rc1.dev1"),
    *("0.10.0rc1", "0.10.0rc1.post1", "0.10.0", "0.10.0+ours.1", "0.10.0+ours.2", "0.10.0.post1.dev1", "0.10.0.post1"),
    *("0.10.1.dev0", "0.10.1", "0.11a1", "1.0", "1.0.1", "2", "1!0.1"),
]


def test_pre_releases_come_before_their_release_and_others_after() -> None:
    wrong = [pair for pair in combinations(IN_ORDER, 2) if is_newer(*pair) or not is_newer(*reversed(pair))]
    assert wrong == []


@pytest.mark.parametrize(("one", "other"), [("1.0", "1.0.0"), ("1.0rc1", "1rc1"), ("0", "0.0"), ("1.0+a", "1+b")])
def test_releases_that_are_written_in_two_ways_are_none_newer(one: str, other: str) -> None:
    assert not is_newer(one, other)
    assert not is_newer(other, one)


def record(db: Db, suffix: str) -> None:
    """Say that the functions came from a neighbour of this release, and were others."""
    db.execute("update migration set checksum = 'other', release = %s where version = 0", (schema._release() + suffix,))


@pytest.mark.parametrize("suffix", [".dev3", "a2", "rc1"])
def test_a_release_replaces_the_functions_of_its_pre_releases(database: str, db: Db, suffix: str) -> None:
    record(db, suffix)
    assert schema.migrate(database) == FUNCTIONS


def test_a_release_leaves_the_functions_of_its_post_release(database: str, db: Db) -> None:
    record(db, ".post1")
    assert schema.migrate(database) == []


def test_a_pre_release_leaves_the_functions_of_its_release(
    database: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(db, "")
    candidate = schema._release() + "rc1"
    monkeypatch.setattr(schema, "_release", lambda: candidate)
    assert schema.migrate(database) == []
