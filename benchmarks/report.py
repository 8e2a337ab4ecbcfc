"""What a run of the benchmarks prints and keeps."""

import json
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.budgets import Verdict, judge
from benchmarks.measure import Sample, Workload

DETAILS = {
    "round_trips_per_job": "round trips/job {:.3f}",
    "jobs_per_claim": "{:.0f}/claim",
    "jobs_per_settle": "{:.0f}/settle",
    "statements_per_step": "statements/step {:.3f}",
    "steps_per_save": "{:.0f} steps/save",
    "round_trips_per_step": "round trips/step {:.2f}",
    "of_bare_insert": "{:.2f} of a bare insert and commit",
    "of_copy": "{:.2f} of COPY into the same table",
    "bare_commit_ms": "bare insert and commit {:.2f} ms",
    "wal_bytes_per_job": "WAL {:.0f} B/job",
    "index_inserts_per_job": "index inserts/job {:.2f}",
    "worker_us_per_job": "CPU a job: worker {:,.0f} µs",
    "server_us_per_job": "server {:,.0f} µs",
    "p95_ms": "p95 {:.1f}",
    "p99_ms": "p99 {:.1f}",
    "last_to_first": "last 100 / first 100 = {:.2f}",
    "parent_runs": "parent ran {:.0f}x",
    "worker_cpu_percent": "worker CPU {:.1f} %",
    "connections": "{:.0f} connections",
    "rows_of_each_kind": "{:,.0f} rows of each kind",
}


class Report:
    """Gathers samples, workload by workload."""

    def __init__(self, machine: dict[str, Any], server: dict[str, str]) -> None:
        self.machine = machine
        self.server = server
        self.samples: dict[str, list[Sample]] = {}
        self.workloads: dict[str, Workload] = {}

    def add(self, workload: Workload, samples: list[Sample]) -> None:
        """Take the rounds of a workload."""
        self.workloads[workload.name] = workload
        self.samples[workload.name] = samples

    @property
    def faults(self) -> list[str]:
        """What was not correct."""
        return [
            f"{name}: {fault}" for name, samples in self.samples.items() for each in samples for fault in each.faults
        ]

    def medians(self) -> dict[str, dict[str, float]]:
        """Return the median of every figure, by workload; a workload's own figure is `value`."""
        return {name: _medians(samples) for name, samples in self.samples.items() if samples}

    def verdicts(self) -> list[Verdict]:
        """Return the budgets with what was measured."""
        return judge(self.medians())

    def print(self, console: Console) -> None:
        """Print the tables."""
        console.print(self._figures(), self._budgets())
        for fault in self.faults:
            console.print(f"[red]not correct[/] {fault}")

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": self.machine,
            "server": self.server,
            "workloads": {
                name: {
                    "title": self.workloads[name].title,
                    "unit": self.workloads[name].unit,
                    "median": _medians(samples),
                    "rounds": [{"value": s.value, **s.details, "faults": s.faults} for s in samples],
                }
                for name, samples in self.samples.items()
            },
            "budgets": [
                {"budget": v.budget.title, "bound": v.budget.bound, "measured": v.measured, "verdict": v.word}
                for v in self.verdicts()
            ],
        }
        path.write_text(json.dumps(content, indent=2) + "\n")

    def _figures(self) -> Table:
        table = Table(title="measured", title_justify="left", caption=self._caption(), caption_justify="left")
        for name in ("workload", "median", "unit", "range", "besides"):
            table.add_column(name, justify="right" if name in ("median", "range") else "left")
        for name, samples in self.samples.items():
            workload, values = self.workloads[name], [each.value for each in samples]
            span = f"{figure(min(values))} … {figure(max(values))}" if len(values) > 1 else ""
            besides = ", ".join(f.format(_medians(samples)[d]) for d, f in DETAILS.items() if d in samples[0].details)
            table.add_row(workload.title, figure(median(values)), workload.unit, span, besides)
        return table

    def _budgets(self) -> Table:
        table = Table(title="budgets", title_justify="left")
        for name in ("budget", "bound", "measured", ""):
            table.add_column(name, justify="right" if name in ("bound", "measured") else "left")
        for verdict in self.verdicts():
            sign, colour = (">=" if verdict.budget.least else "<="), "green" if verdict.word == "pass" else "red"
            bound, word = f"{sign} {figure(verdict.budget.bound)}", f"[{colour}]{verdict.word}[/]"
            table.add_row(verdict.budget.title, bound, figure(verdict.measured), word)
        return table

    def _caption(self) -> str:
        m, s = self.machine, self.server
        return (
            f"{m['cpu']}, {m['cores']} cores, {m['memory_mib']:,} MiB, {m['kernel']}, {m['python']}; Postgres "
            f"{s['server_version']}, shared_buffers {s['shared_buffers']}, fsync {s['fsync']}, "
            f"synchronous_commit {s['synchronous_commit']}; server, client and workers share the machine"
        )


def figure(value: float) -> str:
    """Format a number with about three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _medians(samples: list[Sample]) -> dict[str, float]:
    names = samples[0].details
    return {"value": median(s.value for s in samples)} | {n: median(s.details[n] for s in samples) for n in names}
