"""From the results of many seeds to a page, and to a file for programs."""

import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Found = Sequence[dict[str, Any]]
_HEAD = """\
# Chaos

Written by `make chaos`, not by hand. Each seed draws programs (steps, transactions, sleeps, children, fan-outs, waits
for events, failures, cancels) and faults (workers killed, stopped and restarted; Postgres killed, stopped in each of
its ways and restarted; sessions terminated, killed and frozen; links reset, silenced, left half open and slowed down;
replies swallowed; fault points inside the workers), runs them on real processes, and holds what is left to the
invariants, to ledgers outside the database, and to a model that knows what each program must have done.
`make chaos SEED=7` draws the seventh again.
"""


def read(path: Path) -> list[dict[str, Any]]:
    """Return the newest result of each seed, in order."""
    lines = path.read_text().splitlines() if path.exists() else []
    newest = {each["seed"]: each for each in map(json.loads, lines)}
    return [newest[seed] for seed in sorted(newest)]


def aggregate(found: Found) -> dict[str, Any]:
    """Return the sums over all seeds."""
    faults: Counter[str] = Counter()
    for each in found:
        faults.update(each["faults"])
    seconds = sum(each["seconds"] for each in found)
    summed = (
        *("offered", "accepted", "executions", "steps", "effects", "crashes", "snapshots"),
        *("lost", "settled_twice", "effects_doubled"),
    )
    return {
        "seeds": len(found),
        "seeds_failed": [each["seed"] for each in found if each["problems"]],
        **{name: sum(each[name] for each in found) for name in summed},
        "armed_and_never_fired": sum(len(each["never_fired"]) for each in found),
        "faults": sum(faults.values()),
        "faults_by_kind": dict(sorted(faults.items())),
        "seconds": round(seconds),
        "executions_per_second": round(sum(each["executions"] for each in found) / seconds, 1) if seconds else 0.0,
        "takeover_seconds": _spread([x for each in found for x in each["takeover_seconds"]]),
        "resume_seconds": _spread([x for each in found for x in each["resume_seconds"]]),
        "converge_seconds": _spread([each["converge_seconds"] for each in found if not each["problems"]]),
    }


def _spread(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"count": len(values)}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"count": len(values), "p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "max": round(max(values), 2)}


def summary(found: Found) -> str:
    """Return the figures in one line."""
    sums = aggregate(found)
    return (
        f"{sums['seeds']} seeds, {len(sums['seeds_failed'])} failed;"
        f" {sums['faults']} faults, {sums['executions']} executions;"
        f" lost {sums['lost']}, settled twice {sums['settled_twice']}, effects doubled {sums['effects_doubled']},"
        f" never fired {sums['armed_and_never_fired']}; recovery p99 {sums['takeover_seconds'].get('p99', 0)} s"
    )


def write(found: Found, folder: Path) -> None:
    """Write `chaos.md` and `chaos.json`."""
    sums = aggregate(found)
    about = {"python": platform.python_version(), "cores": os.cpu_count(), "system": platform.system()}
    (folder / "chaos.json").write_text(json.dumps(about | sums, indent=2) + "\n")
    (folder / "chaos.md").write_text(_page(sums, found))


def _page(sums: dict[str, Any], found: Found) -> str:
    seeds = [each["seed"] for each in found]
    failed = ", ".join(map(str, sums["seeds_failed"])) or "none"
    rows = [
        ("seeds", f"{sums['seeds']} (from {min(seeds, default=0)} to {max(seeds, default=0)})"),
        ("seeds that failed", failed),
        ("faults that struck", f"{sums['faults']:,}"),
        ("armed faults that never fired", str(sums["armed_and_never_fired"])),
        ("calls accepted", f"{sums['accepted']:,} of {sums['offered']:,}; the outcome of the others was unknown"),
        ("executions", f"{sums['executions']:,}, {sums['executions_per_second']} a second over everything"),
        ("steps, effects of transactions", f"{sums['steps']:,}, {sums['effects']:,}"),
        ("runs lost with their process", f"{sums['crashes']:,}"),
        ("accepted and lost", str(sums["lost"])),
        ("settled twice", str(sums["settled_twice"])),
        ("effects of a transaction doubled", str(sums["effects_doubled"])),
        ("snapshots in which all invariants held", f"{sums['snapshots']:,}"),
        ("a dead worker's execution claimable again", _told(sums["takeover_seconds"])),
        ("first move after the server's return", _told(sums["resume_seconds"])),
        ("all work ended after the last fault", _told(sums["converge_seconds"])),
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    kinds = ["| fault | struck |", "|---|---|", *(f"| {k} | {n:,} |" for k, n in sums["faults_by_kind"].items())]
    notes = (
        "A lease lasts 2 s here and the sweep comes every 0.2 s, a tenth of the defaults and less. Further faults\n"
        "delay a takeover: no lease ends before the server has been up for as long as a lease lasts."
    )
    return "\n".join([_HEAD, *table, "", notes, "", "## Faults", "", *kinds, ""])


def _told(spread: dict[str, float]) -> str:
    if "p50" not in spread:
        return "not measured"
    return f"p50 {spread['p50']} s, p99 {spread['p99']} s, most {spread['max']} s ({spread['count']:,.0f} times)"
