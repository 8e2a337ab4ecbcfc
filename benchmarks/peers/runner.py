"""The order of a run: floors and measures, round after round, contender after contender."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.markup import escape

from benchmarks.measure import NotAvailableError, Sample
from benchmarks.peers.measures import MEASURES
from benchmarks.peers.peer import Peer
from benchmarks.peers.results import Results
from benchmarks.peers.rows import FLOORS, OURS, OURS_REMOVED, PLANS, REMOVED, Plan
from benchmarks.report import figure
from benchmarks.server import Server
from benchmarks.workloads import ALL

WORKLOADS = {workload.name: workload for workload in ALL}

Take = Callable[[], Awaitable[Sample]]


@dataclass(frozen=True)
class Form:
    """How a run was asked for."""

    rounds: int
    only: Sequence[str]
    quick: bool
    full: bool
    huge: bool

    def plans(self) -> list[Plan]:
        """Return what is measured."""
        if self.only:
            return [plan for plan in PLANS if any(plan.measure.startswith(name) for name in self.only)]
        return [plan for plan in PLANS if (plan.quick or not self.quick) and (self.huge or not plan.huge)]

    def includes(self, plan: Plan, round_number: int, share: float = 1.0) -> bool:
        """Tell whether a contender that gets this share of the jobs is measured in a round."""
        is_slow = share < 1 and not (plan.slow_too or self.full)
        return not is_slow and (plan.every_round or round_number == 0)

    def __str__(self) -> str:
        """Say it for the page."""
        once = ", ".join(plan.measure for plan in self.plans() if not plan.every_round)
        return f"{self.rounds} interleaved rounds" + (
            f"; in the first alone: {once}" if once and self.rounds > 1 else ""
        )


class Runner:
    """Takes the measures, contender after contender, and prints each figure as it comes."""

    def __init__(self, console: Console, server: Server, peers: list[Peer], results: Results, form: Form) -> None:
        self.console = console
        self.server = server
        self.peers = peers
        self.results = results
        self.form = form

    async def run(self) -> None:
        """Take all rounds."""
        for number in range(self.form.rounds):
            for floor in FLOORS:
                await self._take(floor, floor, self._ours(floor))
            for place, plan in enumerate(self.form.plans()):
                await self._measure(plan, number, turn=number + place)

    async def _measure(self, plan: Plan, number: int, turn: int) -> None:
        """Take one measure of everybody; who begins changes from turn to turn."""
        takes: list[tuple[str, Take]] = []
        if self.form.includes(plan, number):
            takes.append((OURS, self._ours(plan.measure)))
            if plan.measure in REMOVED:
                takes.append((OURS_REMOVED, self._ours(REMOVED[plan.measure])))
        measure = MEASURES.get(plan.measure)
        for peer in self.peers:
            if measure is None:
                self.results.cell(plan.measure, peer.name).missing = "not measured"
            elif self.form.includes(plan, number, peer.share):
                takes.append((peer.name, partial(measure, peer)))
        turn %= max(1, len(takes))
        for contender, take in takes[turn:] + takes[:turn]:
            await self._take(plan.measure, contender, take)

    def _ours(self, name: str) -> Take:
        return partial(WORKLOADS[name].run, self.server)

    async def _take(self, measure: str, contender: str, take: Take) -> None:
        cell, began_at = self.results.cell(measure, contender), time.monotonic()
        if cell.missing == "n/a" or cell.missing.startswith("failed"):
            return
        try:
            sample = await take()
        except NotAvailableError as reason:
            cell.missing = str(reason)
            return
        except Exception as error:  # noqa: BLE001 (a peer that fails is shown as such, and the run goes on)
            cell.missing = f"failed: {type(error).__name__}"
            self.console.print(f"[red]{measure}: {contender} failed[/] {escape(repr(error)[:1000])}")
            return
        cell.samples.append(sample)
        seconds = time.monotonic() - began_at
        self.console.print(f"[dim]{measure}: {contender} {figure(cell.values('value')[-1])} ({seconds:.0f} s)[/]")
