"""A process that is given to a worker spares the garbage collector and keeps what memory it has."""

import gc
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pgconductor.cli.devote import YOUNG_OBJECTS, spare_collector


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


READS = """
import resource
from pgconductor.cli.devote import keep_freed_memory
def reads():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        values = [b"x" * 200_000 for _ in range(20)]
        del values
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(keep_freed_memory())
reads()
print(reads())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back at once")
@pytest.mark.parametrize("setting", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_the_kernel_does_not_map_the_same_pages_for_each_large_value_unless_told_to(setting: dict[str, str]) -> None:
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    answer = subprocess.run([sys.executable, "-c", READS], env=others | setting, check=True, capture_output=True)
    was_done, faults = answer.stdout.split()
    pages = 50 * 20 * 200_000 // 4096
    assert was_done.decode() == str(not setting)
    assert (int(faults) > pages / 2) == bool(setting)
