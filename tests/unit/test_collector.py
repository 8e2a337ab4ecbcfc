"""A process that is given to a worker leaves what it has loaded out of garbage collections."""

import gc
from collections.abc import Iterator

import pytest

from pgconductor.cli.serve import YOUNG_OBJECTS, spare_collector


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threshold = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)


def test_what_is_loaded_is_left_out() -> None:
    spare_collector()
    assert gc.get_freeze_count() > 10_000


@pytest.mark.parametrize(("before", "after"), [(700, YOUNG_OBJECTS), (50_000, 50_000), (0, 0)])
def test_it_collects_less_often_unless_the_application_has_said_how_often(before: int, after: int) -> None:
    gc.set_threshold(before, 10, 10)
    spare_collector()
    assert gc.get_threshold()[0] == after
