"""What a comparison leaves: tables on the terminal, a page, JSON and a picture."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.peers.environments import Package
from benchmarks.peers.results import Cell, Results, best
from benchmarks.peers.rows import FLOORS, MISSING, OURS, OURS_REMOVED, ROWS, Row
from benchmarks.peers.targets import ORIGINAL, TARGETS
from benchmarks.report import figure

COLOURS = {"pass": "green", "miss": "red", "not measured": "dim"}


class Comparison:
    """The results of a run, with the conditions they belong to.

    Args:
        results: What was found.
        conditions: Machine, server and the form of the run.
        packages: The peers, with their settings.
    """

    def __init__(self, results: Results, conditions: Mapping[str, Any], packages: Sequence[Package]) -> None:
        self.results = results
        self.conditions = conditions
        self.packages = packages

    @property
    def contenders(self) -> list[str]:
        """Ours first, then the peers."""
        return [OURS, OURS_REMOVED, *(package.name for package in self.packages)]

    def rows(self) -> Iterator[Row]:
        """Yield the rows that anybody was tried in."""
        return (row for row in ROWS if self.results.was_tried(row.measure))

    def print(self, console: Console) -> None:
        """Print the tables."""
        for title, lines in self.tables():
            table = Table(*lines[0], title=title, title_justify="left")
            for line in lines[1:]:
                table.add_row(*(escape(text) for text in line), style=COLOURS.get(line[-1]))
            console.print(table)
        for fault in self.results.faults:
            console.print(f"[red]not correct[/] {escape(fault)}")

    def tables(self) -> Iterator[tuple[str, list[list[str]]]]:
        """Yield every table with its title; the first line of each is its head."""
        yield (
            "Beside the best peer and the floor",
            [
                [
                    "workload",
                    "unit",
                    "pgconductor",
                    "best peer",
                    "",
                    "ours / best",
                    "ours / floor",
                    "the original¹ / floor",
                ],
                *map(self._ratios, self.rows()),
            ],
        )
        yield "Targets", [["target", "bound", "measured", "verdict"], *self._targets()]
        yield "Everybody", [["workload", "unit", *self.contenders], *map(self._everybody, self.rows())]
        yield "Floors", [["floor", "rows/s"], *([name, self._text(Row("", "", name), name)] for name in FLOORS)]

    def _ratios(self, row: Row) -> list[str]:
        ours = self.results.figure(row.measure, OURS, row.detail)
        leader = best(self.results.peers(row.measure, detail=row.detail), lower=row.lower)
        floor = row.floor and self.results.figure(row.floor, row.floor)
        return [
            row.title,
            row.unit,
            self._text(row, OURS),
            self._text(row, leader[0]) if leader else "n/a",
            leader[0] if leader else "",
            f"{ours / leader[1]:.2f}" if ours is not None and leader and leader[1] else "",
            f"{ours / floor:.3f}" if ours is not None and floor else "",
            f"{ORIGINAL[row.measure][1]:.3f}" if row.measure in ORIGINAL else "",
        ]

    def _targets(self) -> Iterator[list[str]]:
        for target in TARGETS:
            measured = target.value(self.results)
            bound = f"{'≤' if target.most else '≥'} {target.bound:,g}"
            shown = "" if measured is None else figure(measured)
            yield [target.title, bound, shown, target.verdict(measured)]

    def _everybody(self, row: Row) -> list[str]:
        return [row.title, row.unit, *(self._text(row, name) for name in self.contenders)]

    def _text(self, row: Row, contender: str) -> str:
        """Return the median, with its tail, and the spread of the rounds."""
        cell = self.results.cells.get(row.measure, {}).get(contender, Cell(missing=""))
        values = cell.values(row.detail)
        if not values:
            return "too fast for it" if cell.samples else cell.missing
        median = self.results.figure(row.measure, contender, row.detail)
        text = figure(median or 0.0)
        if row.tail:
            text += f" / {figure(self.results.figure(row.measure, contender, row.tail) or 0.0)}"
        text += f" ({figure(min(values))} … {figure(max(values))})" if len(values) > 1 else ""
        faults = [fault for sample in cell.samples for fault in sample.faults]
        return "; ".join([text, *(f"failed once: {reason}" for reason in cell.failures), *faults])

    # ---------------------------------------------------------------- files

    def write_json(self, path: Path) -> None:
        """Write every sample."""
        measures = {
            measure: {name: cell.to_json() for name, cell in row.items()} for measure, row in self.results.cells.items()
        }
        targets = [dict(zip(("target", "bound", "measured", "verdict"), line, strict=True)) for line in self._targets()]
        content = {"at": _now(), **self.conditions, "versions": self.results.versions, "measures": measures}
        _write(path, json.dumps(content | {"targets": targets}, indent=2) + "\n")

    def write_page(self, path: Path, picture: str) -> None:
        """Write the page of the documentation."""
        parts = ["# Benchmarks", _INTRODUCTION, self._conditions(), f"![The peers side by side]({picture})"]
        for title, lines in self.tables():
            parts += [f"## {title}", _markdown(lines)]
        parts += [_NOTES, "## Settings", self._settings()]
        _write(path, "\n\n".join(parts) + "\n")

    def _conditions(self) -> str:
        machine, server, form = self.conditions["machine"], self.conditions["server"], self.conditions["form"]
        settings = ", ".join(f"`{name}` {value}" for name, value in server.items() if name != "server_version")
        return (
            f"Measured {_now()} on {machine['cpu']}, {machine['cores']} cores, {machine['memory_mib']:,} MiB, "
            f"{machine['kernel']}. Postgres {server['server_version']} on the same machine, over loopback: {settings}. "
            f"Ours on {machine['python']}, psycopg {machine['psycopg']}, uvloop {machine['uvloop']}. {form}."
        )

    def _settings(self) -> str:
        lines = [["peer", "version", "settings", "share of the jobs"]]
        for package in self.packages:
            settings = ", ".join(f"{name} {value}" for name, value in package.settings.items())
            version = self.results.versions.get(package.name, "not measured")
            lines.append([package.name, version, settings, f"{package.share:g}"])
        return _markdown(lines)


_INTRODUCTION = """\
This page is written by `make bench-peers`; [performance](performance.md) says what is measured and how to repeat it.
A figure is the median of the rounds, with their span in parentheses; the contenders took turns within each round."""

_NOTES = (
    """\
"n/a": the peer has no word for it. "not in this run": see performance. Ours with finished work removed is measured in
the drains alone; elsewhere history is kept. """
    + "; ".join(f"{title}: n/a, {reason}" for title, reason in MISSING.items())
    + """.

¹ Postgres Conductor 0.1.0, in no package registry: once measured, elsewhere, and shown as a ratio to the floor of that
run."""
)


def _markdown(lines: list[list[str]]) -> str:
    head, *rest = [[text.replace("|", "\\|") for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
