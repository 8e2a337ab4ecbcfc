"""What the engine has to reach, as ratios within one run: to the peers, to the floors, and to itself."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.peers.results import Results, best
from benchmarks.peers.rows import OURS, OURS_REMOVED

Value = Callable[[Results], float | None]


@dataclass(frozen=True)
class Target:
    """A lower bound, or with `most` an upper one."""

    title: str
    bound: float
    value: Value
    most: bool = False

    def verdict(self, measured: float | None) -> str:
        """Pass, miss, or not measured."""
        if measured is None:
            return "not measured"
        return "pass" if (measured <= self.bound if self.most else measured >= self.bound) else "miss"


def _over(first: float | None, second: float | None) -> float | None:
    return first / second if first is not None and second else None


def _to_peer(measure: str, peer: str, contender: str = OURS) -> Value:
    return lambda it: _over(it.figure(measure, contender), it.figure(measure, peer))


def _to_best(measure: str, contender: str = OURS, *, python: bool = False) -> Value:
    def value(it: Results) -> float | None:
        leader = best(it.peers(measure, it.python_peers if python else None))
        return leader and _over(it.figure(measure, contender), leader[1])

    return value


def _to_floor(measure: str, floor: str) -> Value:
    return lambda it: _over(it.figure(measure), it.figure(floor, floor))


def _itself(measure: str, detail: str = "value") -> Value:
    return lambda it: it.figure(measure, detail=detail)


def _best_latency(it: Results) -> float | None:
    leader = best(it.peers("latency", detail="p50_ms"), lower=True)
    return leader and _over(it.figure("latency", detail="p50_ms"), leader[1])


GRAPHILE = "graphile-worker"

TARGETS = [
    Target(
        "drain, 1 process, finished work removed / graphile-worker", 1.1, _to_peer("drain-1", GRAPHILE, OURS_REMOVED)
    ),
    Target("drain, 1 process, history kept / graphile-worker", 0.9, _to_peer("drain-1", GRAPHILE)),
    Target("drain, 1 process / best Python peer", 2, _to_best("drain-1", python=True)),
    Target("drain, 1 process / bare queue", 0.5, _to_floor("drain-1", "floor-queue")),
    Target("drain, 2 processes / 1 process", 1.3, lambda it: _over(it.figure("drain-2"), it.figure("drain-1"))),
    Target(
        "drain of 200,000, 2 processes / 1 process",
        1.3,
        lambda it: _over(it.figure("drain-long-2"), it.figure("drain-long-1")),
    ),
    Target("drain, 2 processes, history kept / best peer", 1, _to_best("drain-2")),
    Target("drain, 2 processes, finished work removed / best peer", 1, _to_best("drain-2", OURS_REMOVED)),
    Target("idle latency p50 / best peer's", 0.7, _best_latency, most=True),
    Target("idle latency p99, ms", 10, _itself("latency", "p99_ms"), most=True),
    Target("parents with one child / bare queue", 0.09, _to_floor("parents", "floor-queue")),
    Target("parents with one child / dbos", 20, _to_peer("parents", "dbos")),
    Target("steps / bare queue", 0.27, _to_floor("steps", "floor-queue")),
    Target("steps / absurd", 10, _to_peer("steps", "absurd")),
    Target("bulk enqueue / COPY into the same table", 0.6, _itself("enqueue-bulk", "of_copy")),
    Target("single enqueue / bare insert and commit, same driver", 0.7, _itself("enqueue", "of_bare_insert")),
    Target("drain beside 1 million ready / empty", 0.8, _itself("beside-ready")),
    Target("drain beside 10 million ready / empty", 0.8, _itself("beside-10m-ready")),
    Target("drain beside 1 million delayed / empty", 0.8, _itself("beside-delayed")),
    Target("drain beside 1 million finished / empty", 0.8, _itself("beside-finished")),
    Target("drain beside 10 million finished / empty", 0.8, _itself("beside-10m-finished")),
    Target("drain of 1,000 queues / empty", 0.8, _itself("beside-queues")),
    Target("held snapshot: last 50,000 of 500,000 / first 50,000", 0.8, _itself("snapshot")),
    Target("1,000 children in a row: last 100 / first 100", 1.5, _itself("in-a-row", "last_to_first"), most=True),
    Target("fan-out of 10,000: runs of the parent", 2, _itself("invoke-all", "parent_runs"), most=True),
    Target("fan-out of 10,000 / drain", 0.5, lambda it: _over(it.figure("invoke-all"), it.figure("drain-1"))),
    Target("WAL bytes of a job, whole life", 1_100, _itself("drain-1", "wal_bytes_per_job"), most=True),
    Target("index inserts of a job, whole life", 4, _itself("drain-1", "index_inserts_per_job"), most=True),
    Target("round trips of a job", 0.05, _itself("drain-1", "round_trips_per_job"), most=True),
    Target("queries of an idle process a second", 1, _itself("idle"), most=True),
]

# Postgres Conductor 0.1.0 (TypeScript, on bun), which is in no package registry: measured once on a 2-core machine with
# Postgres 15, and kept as ratios to the floors of that run (bare queue 68,500/s, insert and commit 5,660/s, COPY
# 421,000/s). Not of this run. Of a span, the upper end.
ORIGINAL = {
    "drain-1": ("floor-queue", 0.137),
    "drain-2": ("floor-queue", 0.240),
    "parents": ("floor-queue", 0.030),
    "steps": ("floor-queue", 0.068),
    "enqueue": ("floor-pgbench", 0.42),
    "enqueue-bulk": ("floor-copy", 0.142),
}
