"""`make bench-check`: fail when the engine has lost more than a fifth against the floors of the same run.

Absolute figures drift with the machine and with who else is on it; a ratio to a floor of the same minutes does so much
less. Of workload and floor the best of the rounds counts, since a neighbour only ever takes away. What seems to have
lost is measured once more, with its floor, before it counts.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.measure import Sample
from benchmarks.report import figure
from benchmarks.server import Server, running_server
from benchmarks.workloads import ALL
from pgconductor.cli.loop import run

BASELINE = Path(__file__).parent / "baseline.json"
LOSS_MAX = 0.2
ROUNDS = 5
WORKLOADS = {workload.name: workload for workload in ALL}


@dataclass(frozen=True)
class Ratio:
    """A workload as a share of a floor. Of a latency, the floor's time for a row as a share of it: more is better."""

    workload: str
    floor: str
    is_latency: bool = False

    def of(self, values: Sequence[float], floors: Sequence[float]) -> float:
        """Return it for the rounds of both."""
        return 1000 / max(floors) / min(values) if self.is_latency else max(values) / max(floors)


RATIOS = [
    Ratio("drain-1", "floor-queue"),
    Ratio("drain-2", "floor-queue"),
    Ratio("parents", "floor-queue"),
    Ratio("steps", "floor-queue"),
    Ratio("invoke-all", "floor-queue"),
    Ratio("enqueue-bulk", "floor-executions"),
    Ratio("enqueue", "floor-pgbench"),
    Ratio("latency", "floor-pgbench", is_latency=True),
]


def measure(console: Console, server: Server, ratios: Sequence[Ratio], rounds: int) -> dict[str, float]:
    """Return each ratio; a round measures the floors and then what is compared with them."""
    names = [*dict.fromkeys(ratio.floor for ratio in ratios), *(ratio.workload for ratio in ratios)]
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append(_sample(server, name).value)
            console.print(f"[dim]{name}: {figure(found[name][-1])}[/]")
    return {ratio.workload: ratio.of(found[ratio.workload], found[ratio.floor]) for ratio in ratios}


def _sample(server: Server, name: str) -> Sample:
    sample: Sample = run(WORKLOADS[name].run(server))
    if sample.faults:
        raise RuntimeError(f"{name} is not correct: {sample.faults}")
    return sample


def losers(baseline: dict[str, float], found: dict[str, float]) -> list[Ratio]:
    """Return what has lost more than it may."""
    return [r for r in RATIOS if r.workload in found and found[r.workload] < (1 - LOSS_MAX) * baseline[r.workload]]


def _table(baseline: dict[str, float], found: dict[str, float]) -> Table:
    table = Table("workload", "floor", "baseline", "now", "change", "")
    lost = losers(baseline, found)
    for ratio in (ratio for ratio in RATIOS if ratio.workload in found):
        before, now = baseline[ratio.workload], found[ratio.workload]
        verdict = "[red]lost[/]" if ratio in lost else "[green]holds[/]"
        change = f"{now / before - 1:+.0%}"
        table.add_row(ratio.workload, ratio.floor, figure(before), figure(now), change, verdict)
    return table


@click.command()
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--only", multiple=True, metavar="NAME", help="Repeatable; a workload.")
@click.option("--write", is_flag=True, help="Write the baseline instead of comparing with it.")
def main(rounds: int, only: tuple[str, ...], write: bool) -> None:
    """Compare with the committed baseline. Leaves with 1 when something has lost more than a fifth."""
    console = Console()
    ratios = [ratio for ratio in RATIOS if not only or ratio.workload in only]
    with running_server() as server:
        found = measure(console, server, ratios, rounds)
        if write:
            _write(found, rounds)
            console.print(f"written to {BASELINE.name}")
            return
        baseline: dict[str, float] = json.loads(BASELINE.read_text())["ratios"]
        if suspects := losers(baseline, found):
            console.print(f"again, to be sure: {', '.join(ratio.workload for ratio in suspects)}")
            again = measure(console, server, suspects, rounds)
            found |= {name: max(found[name], value) for name, value in again.items()}
    console.print(_table(baseline, found))
    sys.exit(bool(losers(baseline, found)))


def _write(found: dict[str, float], rounds: int) -> None:
    kept = json.loads(BASELINE.read_text())["ratios"] if BASELINE.exists() else {}
    ratios = {name: round(value, 5) for name, value in (kept | found).items()}
    content = {"machine": machine.describe(), "rounds": rounds, "ratios": ratios}
    BASELINE.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
