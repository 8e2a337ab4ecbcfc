"""From the readings of a soak to a page, and to a file for programs."""

import itertools
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fault.soak.measure import HOT, Sample

WINDOW_SECONDS = 300.0
GOAL = 0.9
ALIKE = 0.1
"""How far the speed of the machine may differ where two stretches are compared."""
STEADY = 0.15
"""How far it may change within a stretch."""
_MIB = 1024 * 1024


@dataclass
class Found:
    """What a soak has shown."""

    has_snapshot: bool
    samples: list[Sample] = field(default_factory=list[Sample])
    after: Sample | None = None
    kills: int = 0
    recovery_seconds: list[float] = field(default_factory=list[float])
    problems: list[str] = field(default_factory=list[str])


def rate(samples: Sequence[Sample]) -> float:
    """Return the runs a second from the first to the last of some readings."""
    first, last = samples[0], samples[-1]
    return (last.done - first.done) / max(0.001, last.at - first.at)


def windows(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return the readings of the first and of the last five minutes; of a short soak, of its first and last third."""
    span = samples[-1].at - samples[0].at
    length = min(WINDOW_SECONDS, span / 3)
    begun = samples[1].at  # the first reading is from before the load
    first = [each for each in samples if begun <= each.at <= begun + length]
    return first, [each for each in samples if each.at >= samples[-1].at - length]


def line(samples: Sequence[Sample]) -> str:
    """Say what the newest reading shows."""
    last = samples[-1]
    dead = ", ".join(f"{name} {last.dead[name]:,}" for name in ("ready", "lease", "execution"))
    return f"{last.at - samples[0].at:6.0f} s  {rate(samples[-2:]):8,.0f} runs/s  dead: {dead}"


def figures(found: Found) -> dict[str, Any]:
    """Return the sums."""
    first, last = windows(found.samples)
    begin, end = found.samples[0], found.samples[-1]
    seconds = end.at - begin.at
    done = end.done - begin.done
    ours = [
        end.server_cpu_seconds - begin.server_cpu_seconds, end.workers_cpu_seconds - begin.workers_cpu_seconds,
    ]  # fmt: skip
    recovery = sorted(found.recovery_seconds)
    ratio, speed = rate(last) / rate(first), _probe(first) / _probe(last)
    pairs = at_like_speed(first, last)
    return {
        "minutes": round(seconds / 60, 1),
        "snapshot_held": found.has_snapshot,
        "runs": done,
        "runs_per_second_first": round(rate(first)),
        "runs_per_second_last": round(rate(last)),
        "last_over_first": round(ratio, 3),
        "runs_per_cpu_second_first": round(_per_cpu(first), 1),
        "runs_per_cpu_second_last": round(_per_cpu(last), 1),
        "machine_speed_last_over_first": round(speed, 3),
        "last_over_first_at_like_speed": None if not pairs else round(statistics.median(pairs), 3),
        "pairs_at_like_speed": len(pairs),
        "kills": found.kills,
        "recovery_seconds_p50": statistics.median(recovery) if recovery else None,
        "recovery_seconds_p99": recovery[int(0.99 * (len(recovery) - 1))] if recovery else None,
        "dead_at_end": end.dead,
        "dead_per_run": {name: round(end.dead[name] / max(1, done), 2) for name in HOT},
        "dead_after_vacuum": found.after.dead if found.after else None,
        "server_cpu_seconds": round(ours[0]),
        "workers_cpu_seconds": round(ours[1]),
        "machine_cpu_seconds": round(end.machine_cpu_seconds - begin.machine_cpu_seconds),
        "cores": os.cpu_count(),
        "problems": found.problems,
    }


def at_like_speed(first: Sequence[Sample], last: Sequence[Sample]) -> list[float]:
    """Compare stretches between readings of the last window with such of the first at which the machine was as fast.

    What divides all by a mean speed says little where the speed changes twofold within minutes.
    """
    return [
        late_rate / early_rate
        for early_rate, early_probe in _stretches(first)
        for late_rate, late_probe in _stretches(last)
        if abs(late_probe / early_probe - 1) < ALIKE
    ]


def _stretches(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Return the rates between readings, and what the probe took there; without those at which its speed changed."""
    return [
        (rate([begin, end]), (begin.probe_cpu_seconds + end.probe_cpu_seconds) / 2)
        for begin, end in itertools.pairwise(samples)
        if abs(begin.probe_cpu_seconds / end.probe_cpu_seconds - 1) < STEADY
    ]


def _probe(samples: Sequence[Sample]) -> float:
    """Return what the same piece of work took of a processor, in the middle of the readings."""
    return statistics.median(each.probe_cpu_seconds for each in samples)


def _per_cpu(samples: Sequence[Sample]) -> float:
    """Return the runs a second of processor time of server and workers: what noise of the machine does not change."""
    first, last = samples[0], samples[-1]
    spent = (last.server_cpu_seconds + last.workers_cpu_seconds) - (
        first.server_cpu_seconds + first.workers_cpu_seconds
    )
    return (last.done - first.done) / max(0.001, spent)


def summary(found: Found) -> str:
    """Return the figures in one line."""
    sums = figures(found)
    return (
        f"{sums['minutes']} minutes, {sums['runs']:,} runs, {sums['kills']} kills:"
        f" {sums['runs_per_second_first']:,} runs/s at first, {sums['runs_per_second_last']:,} at last"
        f" ({sums['last_over_first']}; at like speed of the machine {sums['last_over_first_at_like_speed']},"
        f" {sums['pairs_at_like_speed']} pairs;"
        f" a processor second {sums['runs_per_cpu_second_first']}"
        f" and {sums['runs_per_cpu_second_last']}); recovery p99 {sums['recovery_seconds_p99']} s"
    )


def write(found: Found, folder: Path) -> None:
    """Write `soak.md` and `soak.json`."""
    sums = figures(found)
    readings = [asdict(each) for each in found.samples]
    (folder / "soak.json").write_text(json.dumps(sums | {"readings": readings}, indent=1) + "\n")
    (folder / "soak.md").write_text(_page(sums, found))


def _page(sums: dict[str, Any], found: Found) -> str:
    held = "A snapshot was held open throughout" if found.has_snapshot else "No snapshot was held"
    head = f"""\
# Soak

Written by `make soak`, not by hand. Load at saturation (tasks that do nothing, and one in fifty that does a step and
waits for two children) on {sums["cores"]} cores with everything on them, {sums["minutes"]} minutes; one of two worker
processes killed every few seconds. {held}. The speed of the machine is that of a loop of additions,
timed on its own processor clock with each reading: the machine is a guest, and what is beside it slows it. Compared are
the stretches between readings of both windows at which that loop took as long, within a tenth.
"""
    rows = [
        (
            "runs a second, first and last window",
            f"{sums['runs_per_second_first']:,}, {sums['runs_per_second_last']:,}",
        ),
        (
            "last over first as they came, and the speed of the machine, last over first",
            f"{sums['last_over_first']}, {sums['machine_speed_last_over_first']}",
        ),
        (
            f"last over first at like speed (goal: {GOAL}), median of pairs of readings",
            f"{sums['last_over_first_at_like_speed']}, {sums['pairs_at_like_speed']} pairs",
        ),
        (
            "runs a processor second, first and last",
            f"{sums['runs_per_cpu_second_first']}, {sums['runs_per_cpu_second_last']}",
        ),
        ("runs", f"{sums['runs']:,}"),
        ("kills", str(sums["kills"])),
        (
            "a killed worker's leases gone",
            f"p50 {sums['recovery_seconds_p50']} s, p99 {sums['recovery_seconds_p99']} s",
        ),
        (
            "processor seconds: server, workers, machine",
            f"{sums['server_cpu_seconds']:,}, {sums['workers_cpu_seconds']:,}, {sums['machine_cpu_seconds']:,}",
        ),
        ("rules broken", ", ".join(sums["problems"]) or "none"),
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    dead = ["| table | dead at the end | a run | after vacuum | MiB |", "|---|---|---|---|---|", *_dead(sums, found)]
    course = ["| minute | runs/s | dead rows | MiB |", "|---|---|---|---|", *_course(found.samples)]
    return "\n".join([head, *table, "", "## Dead rows", "", *dead, "", "## Course", "", *course, ""])


def _dead(sums: dict[str, Any], found: Found) -> list[str]:
    end = found.samples[-1]
    after = found.after.dead if found.after else dict.fromkeys(HOT, 0)
    a_run = sums["dead_per_run"]
    return [
        f"| {name} | {end.dead[name]:,} | {a_run[name]} | {after[name]:,} | {end.bytes[name] / _MIB:.1f} |"
        for name in HOT
    ]


def _course(samples: Sequence[Sample]) -> list[str]:
    minutes = int((samples[-1].at - samples[0].at) // 60)
    lines: list[str] = []
    for minute in range(minutes):
        within = [each for each in samples if 60 * minute <= each.at - samples[0].at <= 60 * (minute + 1) + 1]
        last = within[-1]
        size = sum(last.bytes.values()) / _MIB
        lines.append(f"| {minute + 1} | {rate(within):,.0f} | {sum(last.dead.values()):,} | {size:,.0f} |")
    return lines
