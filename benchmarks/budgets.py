"""The engine's budgets: a number over one of them is a defect."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """An upper bound, or with `least` a lower one, on a detail of a workload; `value` names the workload's figure."""

    title: str
    workload: str
    detail: str
    bound: float
    least: bool = False

    def holds(self, value: float) -> bool:
        """Tell whether a value is within it."""
        return value >= self.bound if self.least else value <= self.bound


BUDGETS = [
    Budget("no-op executions/s, one worker process", "drain-1", "value", 15_000, least=True),
    Budget("enqueue one by one, of a bare insert and commit", "enqueue", "of_bare_insert", 0.7, least=True),
    Budget("enqueue in bulk, of COPY into the same table", "enqueue-bulk", "of_copy", 0.6, least=True),
    Budget("enqueue to start when idle, p50 ms", "latency", "p50_ms", 2.5),
    Budget("enqueue to start when idle, p99 ms", "latency", "p99_ms", 10),
    Budget("index inserts per simple job, whole life", "drain-1", "index_inserts_per_job", 4),
    Budget("WAL bytes per simple job, whole life", "drain-1", "wal_bytes_per_job", 1_100),
    Budget("round trips per job at load", "drain-1", "round_trips_per_job", 0.05),
    Budget("statements per step at load", "steps", "statements_per_step", 0.2),
    Budget("round trips that an idle step adds", "step-alone", "round_trips_per_step", 1),
    Budget("claim beside a backlog, against none", "backlog", "value", 1.3),
    Budget("claim beside a long history, against none", "retention-claims", "value", 1.3),
    Budget("unlimited work beside a full limited task, against without", "flow-drain", "value", 0.9, least=True),
    Budget("claim beside rows that may not run, against none", "flow-held", "value", 1.3),
    Budget("queries/s of an idle process", "idle", "value", 1),
    Budget("last 100 of 1,000 children in a row, against the first", "in-a-row", "last_to_first", 1.5),
]


@dataclass(frozen=True)
class Verdict:
    """A budget and what was measured."""

    budget: Budget
    measured: float

    @property
    def word(self) -> str:
        """Pass or over."""
        return "pass" if self.budget.holds(self.measured) else "over"


def judge(medians: Mapping[str, Mapping[str, float]]) -> list[Verdict]:
    """Compare what was measured with the budgets; those of workloads that were not run are left out."""
    return [
        Verdict(budget, medians[budget.workload][budget.detail])
        for budget in BUDGETS
        if budget.detail in medians.get(budget.workload, {})
    ]
