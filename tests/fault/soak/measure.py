"""What is read off while the soak runs: work done, dead rows, sizes, and the processor time that it took."""

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

HOT = ("ready", "lease", "execution", "step", "timer", "wait", "wait_item", "orchestrator")
_TABLES = """
select relname::text as name, n_live_tup as live, n_dead_tup as dead, n_tup_del as deleted,
       pg_total_relation_size(relid) as bytes
from pg_stat_user_tables where schemaname = 'pgconductor' and relname::text = any(%s)"""
PROBE_STEPS = 300_000
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Sample:
    """One reading. `done` counts leases that were given up, so runs that ended, parked or were lost."""

    at: float
    done: int
    dead: dict[str, int]
    bytes: dict[str, int]
    server_cpu_seconds: float
    workers_cpu_seconds: float
    machine_cpu_seconds: float
    probe_cpu_seconds: float


def read(conn: psycopg.Connection[Any], postmaster: int, workers: Sequence[int]) -> Sample:
    """Take a reading."""
    rows = {str(name): rest for name, *rest in conn.execute(_TABLES, (list(HOT),)).fetchall()}
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(
        at=time.monotonic(),
        done=int(rows["lease"][2]),
        dead={name: int(row[1]) for name, row in rows.items()},
        bytes={name: int(row[3]) for name, row in rows.items()},
        server_cpu_seconds=_tree_cpu_seconds(postmaster),
        workers_cpu_seconds=ended.ru_utime + ended.ru_stime + sum(_cpu_seconds(pid) for pid in workers),
        machine_cpu_seconds=_machine_cpu_seconds(),
        probe_cpu_seconds=probe(),
    )


def probe() -> float:
    """Return the processor seconds of a piece of work that is always the same: how fast the machine is just now."""
    began_at = time.thread_time()
    total = 0
    for number in range(PROBE_STEPS):
        total += number
    return time.thread_time() - began_at


def _tree_cpu_seconds(pid: int) -> float:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return _cpu_seconds(pid, reaped=True) + sum(_cpu_seconds(int(child)) for child in children)


def _cpu_seconds(pid: int, *, reaped: bool = False) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(ticks) for ticks in fields[11 : 15 if reaped else 13]) / _TICK


def _machine_cpu_seconds() -> float:
    """Return how long all processors were busy, with whatever."""
    user, nice, system, _idle, _wait, irq, soft = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    return sum(map(int, (user, nice, system, irq, soft))) / _TICK
