"""The order of a run: floors and measures, round after round, contender after contender."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.markup import escape

from benchmarks.measure import NotAvailableError, Sample
from benchmarks.peers.measures import MEASURES
from benchmarks.peers.peer import Peer
from benchmarks.peers.results import Cell, Results
from benchmarks.peers.rows import FLOOR_SECONDS_MAX, FLOORS, OURS, OURS_REMOVED, PLANS, REMOVED, Plan
from benchmarks.report import figure
from benchmarks.server import Server
from benchmarks.workloads import ALL

WORKLOADS = {workload.name: workload for workload in ALL}

Take = Callable[[], Awaitable[Sample]]

GIVEN_UP_AFTER = 2  # times that a contender hung, or failures of one measure
REASON_LENGTH_MAX = 120


@dataclass(frozen=True)
class Form:
    """How a run was asked for."""

    rounds: int
    only: Sequence[str]
    quick: bool
    full: bool
    huge: bool
    minutes: float

    def plans(self) -> list[Plan]:
        """Return what is measured."""
        if self.only:
            return [plan for plan in PLANS if any(plan.measure.startswith(name) for name in self.only)]
        return [plan for plan in PLANS if (plan.quick or not self.quick) and (self.huge or not plan.huge)]

    def includes(self, plan: Plan, share: float) -> bool:
        """Tell whether a contender that gets this share of the jobs is measured."""
        return share == 1 or plan.slow_too or self.full

    def estimate(self, shares: Sequence[float]) -> float:
        """Return about how many minutes it takes with peers of these shares."""
        seconds = len(FLOORS) * 2.0 * self.rounds
        for plan in self.plans():
            peers = sum(self.includes(plan, share) for share in shares) if plan.measure in MEASURES else 0
            contenders = 1 + (plan.measure in REMOVED) + peers
            seconds += plan.seconds * contenders * (self.rounds if plan.every_round else 1)
            seconds += plan.seconds * len(self.again(plan))
        return seconds / 60

    def again(self, plan: Plan) -> range:
        """Return the numbers of the samples that are taken of ours alone, after the others.

        With them, ours is taken as often as there are rounds; of what is taken in every round, twice as often.
        """
        taken = self.rounds if plan.every_round else 1
        wanted = 2 * self.rounds if plan.every_round else self.rounds
        return range(taken, wanted if plan.ours_again else taken)

    def __str__(self) -> str:
        """Say it for the page."""
        once = [plan.measure for plan in self.plans() if not plan.every_round]
        again = [f"{len(self.again(plan))} of {plan.measure}" for plan in self.plans() if plan.ours_again]
        said = f"{self.rounds} interleaved rounds"
        said += f"; once, after them: {', '.join(once)}" if once else ""
        return said + (f"; more samples of ours alone: {', '.join(again)}" if again else "")


class Runner:
    """Takes the measures, contender after contender, and prints each figure as it comes.

    Args:
        console: Where to.
        server: The server.
        peers: Whom to measure beside ours.
        results: Filled; what is in it is not taken again.
        form: How the run was asked for.
        keep: Called when something was added.
    """

    def __init__(
        self,
        console: Console,
        server: Server,
        peers: list[Peer],
        results: Results,
        form: Form,
        keep: Callable[[], None],
    ) -> None:
        self.console = console
        self.server = server
        self.peers = peers
        self.results = results
        self.form = form
        self._keep = keep
        self._ends_at = time.monotonic() + form.minutes * 60
        self._hung: Counter[str] = Counter()

    async def run(self) -> None:
        """Take all rounds, then what is taken once."""
        plans = self.form.plans()
        repeated = [plan for plan in plans if plan.every_round]
        for number in range(self.form.rounds):
            for floor in FLOORS:
                await self._take(floor, floor, self._ours(floor), number, FLOOR_SECONDS_MAX)
            for place, plan in enumerate(repeated):
                await self._measure(plan, number, turn=number + place)
        await self._take_again(repeated)
        once = [plan for plan in plans if not plan.every_round]
        for place, plan in enumerate(once):
            await self._measure(plan, 0, turn=place)
        await self._take_again(once)

    async def _take_again(self, plans: Sequence[Plan]) -> None:
        """Take more of ours, by turns: some of these are compared with each other."""
        for number in range(2 * self.form.rounds):
            for plan in plans:
                if number in self.form.again(plan):
                    await self._take(plan.measure, OURS, self._ours(plan.measure), number, plan.seconds_max)

    async def _measure(self, plan: Plan, number: int, turn: int) -> None:
        """Take one measure of everybody; who begins changes from turn to turn."""
        takes: list[tuple[str, Take]] = [(OURS, self._ours(plan.measure))]
        if plan.measure in REMOVED:
            takes.append((OURS_REMOVED, self._ours(REMOVED[plan.measure])))
        measure = MEASURES.get(plan.measure)
        for peer in self.peers:
            if measure is None:
                self.results.cell(plan.measure, peer.name).missing = "not measured"
            elif self.form.includes(plan, peer.share):
                takes.append((peer.name, partial(measure, peer)))
        turn %= len(takes)
        for contender, take in takes[turn:] + takes[:turn]:
            await self._take(plan.measure, contender, take, number, plan.seconds_max)

    def _ours(self, name: str) -> Take:
        return partial(WORKLOADS[name].run, self.server)

    async def _take(self, measure: str, contender: str, take: Take, number: int, seconds_max: float) -> None:
        cell = self.results.cell(measure, contender)
        if len(cell.samples) > number or cell.missing == "n/a" or self._is_left_out(cell, contender):
            return
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(seconds_max):
                sample = await take()
        except NotAvailableError as reason:
            cell.missing = str(reason)
            return
        except Exception as error:  # noqa: BLE001 (a peer that fails is shown as such, and the run goes on)
            self._failed(measure, contender, cell, error, time.monotonic() - began_at)
        else:
            cell.add(sample, time.monotonic() - began_at)
            self.console.print(
                f"[dim]{measure}: {contender} {figure(cell.values('value')[-1])} ({cell.seconds[-1]:.0f} s)[/]"
            )
        self._keep()

    def _is_left_out(self, cell: Cell, contender: str) -> bool:
        """Tell whether there is no use or no time to try, so that the run ends; the cell says so."""
        if len(cell.failures) >= GIVEN_UP_AFTER:
            return True
        if self._hung[contender] >= GIVEN_UP_AFTER:
            cell.missing = f"not measured: hung {GIVEN_UP_AFTER} times before"
        elif time.monotonic() > self._ends_at:
            cell.missing = f"not measured: {self.form.minutes:g} minutes were over"
        else:
            return False
        return True

    def _failed(self, measure: str, contender: str, cell: Cell, error: Exception, seconds: float) -> None:
        is_hung = isinstance(error, TimeoutError)
        self._hung[contender] += is_hung
        reason = str(error) or (f"took more than {seconds:.0f} s" if is_hung else type(error).__name__)
        cell.failures.append(reason.strip().splitlines()[-1][-REASON_LENGTH_MAX:])
        cell.missing = f"failed: {cell.failures[-1]}"
        self.console.print(f"[red]{measure}: {contender} failed after {seconds:.0f} s[/] {escape(reason[-1000:])}")
