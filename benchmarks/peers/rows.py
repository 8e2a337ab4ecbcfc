"""What a comparison shows, and when each of it is measured."""

from dataclasses import dataclass, replace

OURS = "pgconductor"
OURS_REMOVED = "pgconductor, finished work removed"

# Ours with finished work removed, as graphile-worker does; by the measure with history kept.
REMOVED = {"drain-1": "drain-removed-1", "drain-2": "drain-removed-2", "drain-long-1": "drain-long-removed-1"}

FLOORS = ("floor-queue", "floor-engine", "floor-pgbench", "floor-psycopg", "floor-copy", "floor-executions")


@dataclass(frozen=True)
class Plan:
    """When a measure is taken.

    Attributes:
        measure: Its name, of ours and of the peers.
        seconds: What it takes a contender on two cores, on average; for the estimate.
        seconds_max: What it may take one, before it counts as hung.
        every_round: Or once, after the rounds.
        ours_again: Whether more is taken of ours, for which there is a bound: see `Form.again`.
        slow_too: Whether peers that get a share of the jobs are measured without `--full`.
        quick: Whether it is part of a `--quick` run.
        huge: Whether it runs only with `--huge`.
    """

    measure: str
    seconds: float
    seconds_max: float = 120.0
    every_round: bool = True
    ours_again: bool = False
    slow_too: bool = True
    quick: bool = True
    huge: bool = False


def _once(measure: str, seconds: float, seconds_max: float = 120.0, *, slow_too: bool = True) -> Plan:
    return Plan(measure, seconds, seconds_max, every_round=False, slow_too=slow_too, quick=False)


PLANS = [
    Plan("enqueue", 1.5),
    Plan("enqueue-bulk", 1),
    Plan("drain-1", 3.5),
    Plan("drain-2", 3.5),
    Plan("latency", 8),
    Plan("parents", 2.5),
    Plan("steps", 3),
    Plan("in-a-row", 5, ours_again=True),
    Plan("invoke-all", 1),
    Plan("beside-finished", 6, quick=False),
    Plan("beside-queues", 4, ours_again=True, quick=False),
    replace(_once("snapshot", 45, 330), ours_again=True),
    _once("idle", 24),
    replace(_once("drain-long-1", 9, slow_too=False), ours_again=True),
    replace(_once("drain-long-2", 7, slow_too=False), ours_again=True),
    _once("failing", 2.5),
    _once("payload-1k", 2),
    _once("payload-100k", 2),
    _once("fan-out", 6),
    _once("steady", 19),
    replace(_once("beside-ready", 25, 240, slow_too=False), ours_again=True),
    replace(_once("beside-delayed", 25, 240, slow_too=False), ours_again=True),
    replace(_once("beside-10m-ready", 160, 1_200), ours_again=True, huge=True),
    replace(_once("beside-10m-finished", 60, 1_200), ours_again=True, huge=True),
]
FLOOR_SECONDS_MAX = 60.0


@dataclass(frozen=True)
class Row:
    """A line of the table: a detail of a measure.

    Attributes:
        title: What is shown.
        unit: Of the figure.
        measure: Where it is from.
        detail: Which figure of that; `value` is the one that it is known by.
        tail: A second figure that is shown behind it, such as p99.
        floor: The floor that it is compared with.
        lower: Whether less is better.
    """

    title: str
    unit: str
    measure: str
    detail: str = "value"
    tail: str | None = None
    floor: str | None = None
    lower: bool = False


ROWS = [
    Row("enqueue one by one, awaited", "/s", "enqueue", floor="floor-pgbench"),
    Row("enqueue in bulk", "/s", "enqueue-bulk", floor="floor-executions"),
    Row("drain 20,000 no-op jobs, 1 process", "/s", "drain-1", floor="floor-queue"),
    Row("drain 20,000 no-op jobs, 2 processes", "/s", "drain-2", floor="floor-queue"),
    Row("drain 200,000, 1 process", "/s", "drain-long-1", floor="floor-queue"),
    Row("drain 200,000, 2 processes", "/s", "drain-long-2", floor="floor-queue"),
    Row("idle: enqueue to start, p50 / p99", "ms", "latency", "p50_ms", "p99_ms", lower=True),
    Row("enqueue and run at once, the peak", "/s", "steady", floor="floor-queue"),
    Row("at 50 % of the peak: enqueue to start, p50 / p99", "ms", "steady", "p50_ms_at_50", "p99_ms_at_50", lower=True),
    Row("at 80 % of the peak: enqueue to start, p50 / p99", "ms", "steady", "p50_ms_at_80", "p99_ms_at_80", lower=True),
    Row(
        "1,000 a second, the same for all: enqueue to start, p50 / p99",
        "ms",
        "steady",
        "p50_ms_at_common",
        "p99_ms_at_common",
        lower=True,
    ),
    Row("parents with one child", "/s", "parents", floor="floor-queue"),
    Row("fan-out 1 to 1,000, children", "/s", "fan-out", floor="floor-queue"),
    Row("memoized steps, 10 each", "/s", "steps", floor="floor-queue"),
    Row("30 % failing once", "/s", "failing", floor="floor-queue"),
    Row("payloads of 1 KB", "/s", "payload-1k", floor="floor-queue"),
    Row("payloads of 100 KB", "/s", "payload-100k"),
    Row("drain beside 1 million more that are ready", "of empty", "beside-ready"),
    Row("drain beside 10 million more that are ready", "of empty", "beside-10m-ready"),
    Row("drain beside 1 million delayed", "of empty", "beside-delayed"),
    Row("drain beside 1 million finished", "of empty", "beside-finished"),
    Row("drain beside 10 million finished", "of empty", "beside-10m-finished"),
    Row("drain of 1,000 queues", "of empty", "beside-queues"),
    Row("500,000 beside a held snapshot: last 50,000", "of first", "snapshot"),
    Row("1,000 children in a row: last 100", "of first", "in-a-row", "last_to_first", lower=True),
    Row("one parent's invoke_all of 10,000, children", "/s", "invoke-all", floor="floor-queue"),
    Row("idle: queries of a worker process", "/s", "idle", lower=True),
]

# What the engine has no word for yet; shown, so that nobody takes a missing line for a good one.
MISSING = {"with OpenTelemetry on": "the engine has no tracing"}
