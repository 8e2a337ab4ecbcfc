"""What a run found: samples by measure and contender, and the figures that tables and targets are made of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.measure import Sample
from benchmarks.peers.rows import OURS, OURS_REMOVED


@dataclass
class Cell:
    """The samples of one contender; without any, why not.

    Attributes:
        samples: One a round.
        seconds: What each took, with all that belongs to it.
        missing: Why there is none.
        failures: What went wrong in rounds that have no sample.
    """

    samples: list[Sample] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    missing: str = "not in this run"
    failures: list[str] = field(default_factory=list)

    def add(self, sample: Sample, seconds: float) -> None:
        """Take a round."""
        self.samples.append(sample)
        self.seconds.append(round(seconds, 1))

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        rounds = [{"value": s.value, **s.details, "faults": s.faults} for s in self.samples]
        if rounds:
            return {"rounds": rounds, "seconds": self.seconds, "failures": self.failures}
        return {"missing": self.missing, "failures": self.failures}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Cell":
        """Return a cell of an earlier run. What failed or was left out there is tried again."""
        cell = cls()
        for entry, seconds in zip(content.get("rounds", ()), content.get("seconds", ()), strict=True):
            details = dict(entry)
            value, faults = details.pop("value"), details.pop("faults")
            cell.add(Sample(value, details, faults), seconds)
        return cell

    def values(self, detail: str) -> list[float]:
        """Return a figure of every round that has it."""
        figures = [{"value": sample.value, **sample.details} for sample in self.samples]
        return [each[detail] for each in figures if detail in each]


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

    def was_tried(self, measure: str) -> bool:
        """Tell whether a measure was taken of anybody, with whatever success."""
        return any(cell.samples or cell.failures for cell in self.cells.get(measure, {}).values())

    def take_over(self, measures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Take the samples of an earlier run."""
        for measure, row in measures.items():
            self.cells[measure] = {name: Cell.from_json(content) for name, content in row.items()}

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
