"""What a run found: samples by measure and contender, and the figures that tables and targets are made of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from benchmarks.measure import Sample
from benchmarks.peers.rows import OURS, OURS_REMOVED


@dataclass
class Cell:
    """The samples of one contender; without any, why not."""

    samples: list[Sample] = field(default_factory=list)
    missing: str = "not in this run"

    def values(self, detail: str) -> list[float]:
        """Return a figure of every round. Rates of drains count from the start of the first handler."""
        name = (
            "from_first" if detail == "value" and self.samples and "from_first" in self.samples[0].details else detail
        )
        return [sample.value if name == "value" else sample.details[name] for sample in self.samples]


@dataclass
class Results:
    """All cells, in the order in which they were measured.

    Attributes:
        python_peers: Those that run on Python.
        versions: What was measured, by contender.
    """

    python_peers: set[str] = field(default_factory=set)
    versions: dict[str, str] = field(default_factory=dict)
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)

    def cell(self, measure: str, contender: str) -> Cell:
        """Return a cell, made if it is not there."""
        return self.cells.setdefault(measure, {}).setdefault(contender, Cell())

    def figure(self, measure: str, contender: str = OURS, detail: str = "value") -> float | None:
        """Return the median of the rounds; None where it was not measured."""
        values = self.cells.get(measure, {}).get(contender, Cell()).values(detail)
        return median(values) if values else None

    def peers(self, measure: str, among: Iterable[str] | None = None, detail: str = "value") -> Mapping[str, float]:
        """Return the peers' figures."""
        names = self.cells.get(measure, {}).keys() - {OURS, OURS_REMOVED}
        chosen = names if among is None else names & set(among)
        found = {name: self.figure(measure, name, detail) for name in sorted(chosen)}
        return {name: figure for name, figure in found.items() if figure is not None}

    @property
    def faults(self) -> list[str]:
        """What was not correct."""
        return [
            f"{contender}, {measure}: {fault}"
            for measure, row in self.cells.items()
            for contender, cell in row.items()
            for sample in cell.samples
            for fault in sample.faults
        ]


def best(figures: Mapping[str, float], *, lower: bool = False) -> tuple[str, float] | None:
    """Return who is first, with what."""
    if not figures:
        return None
    name = (min if lower else max)(figures, key=lambda name: figures[name])
    return name, figures[name]
