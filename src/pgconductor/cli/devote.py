"""What is tuned in a process that is given to a worker. One that hosts an orchestrator is its owner's to tune."""

import ctypes
import gc
import os
from typing import Final

YOUNG_OBJECTS: Final = 10_000
"""How many new objects a worker makes before the garbage collector looks at them; Python's own number is 700."""

FREED_BYTES_KEPT: Final = 64 * 1024 * 1024
LARGE_BYTES: Final = 32 * 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def devote_process() -> None:
    """Tune this process for a worker."""
    spare_collector()
    keep_freed_memory()


def spare_collector() -> None:
    """Leave what a worker has loaded out of garbage collections, and have fewer: its own runs leave none behind."""
    young, *old = gc.get_threshold()
    if young:
        gc.set_threshold(max(young, YOUNG_OBJECTS), *old)
    gc.collect()
    gc.freeze()


def keep_freed_memory() -> bool:
    """Keep up to 64 MiB of freed memory for what comes next; values of more than 32 MiB go back to the system at once.

    glibc gives memory back as soon as 128 KiB are free at its end. A worker reads large payloads again and again, and
    for each of them the kernel would map, clear and unmap the same pages: most of what reading one costs. Nothing is
    changed where the environment says how (`MALLOC_..._`, `GLIBC_TUNABLES`), or where the C library is another.

    Returns:
        Whether it was done.

    Source: `mallopt(3)`.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # to set the one keeps glibc from choosing the other, so both are said
    return bool(mallopt(_M_TRIM_THRESHOLD, FREED_BYTES_KEPT) and mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES))
