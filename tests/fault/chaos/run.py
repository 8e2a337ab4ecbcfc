"""One seed: load and faults, then calm; everything must end within the bound, and every promise hold.

The phases:
1. workers start, programs are offered, faults strike, all as the plan says. A watcher runs the invariants throughout.
2. What lasts is lifted. An armed fault point, or a rule of the proxy, that has not fired yet is given programs until it
   has: a fault that never fires fails the run.
3. Calm. Everything must end; on a machine with other work, that may take longer than `CONVERGE_SECONDS_MAX`, but only
   while executions go on ending.
4. The workers are stopped, and what is left is held to the invariants, the ledger and the model.
"""

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from pgconductor.embedded import EmbeddedServer
from pgconductor.errors import ConductorError
from tests import invariants
from tests.fault.chaos import model, strikes, tasks
from tests.fault.chaos.plan import LOAD_SECONDS, VICTIM, Offer, Plan, Strike, draw
from tests.fault.chaos.watcher import Watcher
from tests.fault.programs import Operation, Program, app, child, plain_program, program, step, tag, transaction
from tests.fault.supervisor import World
from tests.fault.worlds import open_world
from tests.waiting import until

CONVERGE_SECONDS_MAX = 20.0
"""From the last fault to the end of all work: expiry and sweep (2.2 s), 5 s to reconnect, and the work itself."""
STALL_SECONDS_MAX = 12.0
"""So long, after that, nothing may go without an end: more than a takeover, a reconnect and the longest sleep."""
SEED_SECONDS_MAX = 240.0
FIRE_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 60.0
BAIT_SECONDS = 0.3
KEEPALIVE_SECONDS = 3.0


@dataclass
class Result:
    """What a seed has shown; one line of the results file."""

    seed: int
    seconds: float = 0.0
    offered: int = 0
    accepted: int = 0
    executions: int = 0
    steps: int = 0
    effects: int = 0
    crashes: int = 0
    """Runs that were lost with their process."""
    faults: dict[str, int] = field(default_factory=dict[str, int])
    lost: int = 0
    settled_twice: int = 0
    effects_doubled: int = 0
    never_fired: list[str] = field(default_factory=list[str])
    converge_seconds: float = 0.0
    takeover_seconds: list[float] = field(default_factory=list[float])
    """From the death of a worker until each execution that it ran could be claimed again."""
    resume_seconds: list[float] = field(default_factory=list[float])
    """From the server's return to the first move of an execution."""
    snapshots: int = 0
    """How often the invariants were checked while load and faults went on."""
    problems: list[str] = field(default_factory=list[str])


async def run_seed(server: EmbeddedServer, seed: int, home: Path) -> Result:
    """Run a seed in a world of its own; what goes wrong is in the result's problems."""
    began = time.monotonic()
    result = Result(seed)
    async with open_world(server, home) as world:
        run = _Run(world, draw(seed), result)
        try:
            async with asyncio.timeout(SEED_SECONDS_MAX):
                await run.go()
        except (AssertionError, TimeoutError, psycopg.Error, ConductorError) as error:
            result.problems.append(f"{type(error).__name__}: {error}"[:6000])
        if result.problems:
            (home / "state.txt").write_text(_dump(world))
        result.seconds = round(time.monotonic() - began, 2)
    return result


class _Run:
    """The run of a plan in a world."""

    def __init__(self, world: World, plan: Plan, result: Result) -> None:
        self.world = world
        self.plan = plan
        self.result = result
        self.field = strikes.Field(world, random.Random(plan.seed))  # noqa: S311
        self.accepted: dict[str, str] = {}
        self.given_up: set[str] = set()
        self.offered: list[Offer] = []
        self._fired: Counter[str] = Counter()
        self._baits = 0

    async def go(self) -> None:
        for worker in [self.field.start_worker() for _ in range(self.plan.workers)]:
            await worker.up()
        app.use_address(self.world.proxied_dsn)
        self.world.proxy.keepalive_seconds = KEEPALIVE_SECONDS
        with Watcher(self.world.dsn) as watcher:
            tending = asyncio.create_task(self._tend())
            try:
                await asyncio.gather(self._strike_all(), *(self._offer(each) for each in self.plan.offers))
                await self.field.lift()
                await self._let_fire()
                await self.field.lift()
                self.world.proxy.heal()
                await self._converge()
            finally:
                tending.cancel()
                with suppress(asyncio.CancelledError):
                    await tending
                if watcher.violation is not None:
                    self.result.problems.append(f"in a snapshot: {watcher.violation}")
            await self._stop()
        self._judge(watcher)

    # ------------------------------------------------------------ load

    async def _offer(self, offer: Offer) -> None:
        await asyncio.sleep(offer.at)
        if offer.after is not None:
            await until(lambda: offer.after in self.accepted or offer.after in self.given_up, 60)
            if offer.after in self.given_up:
                return  # there is nobody to cancel
        self.offered.append(offer)
        call = (program if offer.task == "program" else plain_program).with_options(delay=offer.delay)
        if offer.is_keyed:
            call = call.with_options(dedupe_key=offer.tag)
        # without a key, an unknown outcome is not repeated: that is the caller's promise
        for _ in range(10 if offer.is_keyed or offer.after else 1):
            with suppress(ConductorError):
                run = await call.invoke(self._filled_in(offer.program))
                self.accepted[offer.tag] = str(run.id)
                return
        self.given_up.add(offer.tag)

    def _filled_in(self, operations: Program) -> Program:
        return [self._with_victim(each) for each in operations]

    def _with_victim(self, operation: Operation) -> Operation:
        verb, name, argument = operation
        if verb != "cancel":
            return operation
        return [verb, name, self.accepted.get(str(argument).removeprefix(VICTIM), argument)]

    # ------------------------------------------------------------ faults

    async def _strike_all(self) -> None:
        began = time.monotonic()
        for each in self.plan.strikes:
            await asyncio.sleep(max(0.0, began + each.at - time.monotonic()))
            await self._strike(each)
        await asyncio.sleep(max(0.0, began + LOAD_SECONDS - time.monotonic()))

    async def _strike(self, strike: Strike) -> None:
        act: Callable[..., Coroutine[Any, Any, bool]] = getattr(strikes, strike.kind)
        try:
            has_struck = await act(self.field, **strike.options)
        except psycopg.OperationalError:
            has_struck = False  # the server was away, and there was nothing to strike
        if has_struck and not strike.kind.startswith("arm_"):
            self._fired[strike.kind] += 1

    async def _tend(self) -> None:
        while True:
            self.field.tend()
            await asyncio.sleep(0.05)

    async def _let_fire(self) -> None:
        """Offer work until whatever is armed has fired."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRE_SECONDS_MAX):
                while self._unfired():
                    await asyncio.gather(*(self._offer(self._bait()) for _ in range(12)))
                    await asyncio.sleep(BAIT_SECONDS)
        self.result.never_fired = self._unfired()

    def _bait(self) -> Offer:
        self._baits += 1
        name = f"b{self._baits}"
        operations: Program = [tag(name), step("s"), transaction("t")]
        if self._baits % 2:
            return Offer(0, name, "plain_program", operations, is_keyed=True, delay=0)
        return Offer(0, name, "program", [*operations, child("c", tag(f"{name}c"), step("s"))], is_keyed=True, delay=0)

    def _unfired(self) -> list[str]:
        rules = [f"{rule.action} {rule.call}" for rule in self.field.rules if not rule.fired.is_set()]
        return rules + [f"{worker.pid}: {worker.armed}" for worker in self.field.armed if not worker.faults()]

    # ------------------------------------------------------------ calm

    async def _converge(self) -> None:
        began = time.monotonic()
        self.world.rows("select pause_schedules(%s, null, true)", tasks.TICKS)
        await until(self._all_ended(began), SEED_SECONDS_MAX)
        self.result.converge_seconds = round(time.monotonic() - began, 3)

    def _all_ended(self, began: float) -> Callable[[], bool]:
        """Return a question that fails when executions have stopped ending."""
        least, ended_at = sys.maxsize, began

        def ask() -> bool:
            nonlocal least, ended_at
            left: int = self.world.one("select count(*) from execution where outcome is null")
            if left < least:
                least, ended_at = left, time.monotonic()
            late = time.monotonic() - max(began + CONVERGE_SECONDS_MAX, ended_at + STALL_SECONDS_MAX)
            assert late < 0, f"{left} executions never end"
            return left == 0

        return ask

    async def _stop(self) -> None:
        for worker in self.world.workers:
            worker.go_on()
            worker.terminate()
        async with asyncio.timeout(STOP_SECONDS_MAX):
            for worker in self.world.workers:
                await worker.ended()
        await app.close()

    def _judge(self, watcher: Watcher) -> None:
        result, ask = self.result, self.world.rows
        result.snapshots = watcher.passes
        result.problems += self.field.problems + [f"never fired: {each}" for each in result.never_fired]
        self._count()
        self._measure(watcher)
        lost, problems = model.check(self.offered, self.accepted, ask)
        result.lost = lost
        result.problems += [*problems, *model.check_reactions(ask), *self._uncancelled()]
        with psycopg.connect(self.world.dsn, autocommit=True) as conn:
            invariants.check_quiescent(conn)
        self.world.ledger.check(ask)

    def _uncancelled(self) -> list[str]:
        """Whoever was told that a cancel was accepted finds the execution cancelled."""
        told = [line for line in self.world.ledger.of("saw", "cancel") if line.value is True]
        victims = {
            str(row["id"]): UUID(row["victim"])
            for row in self.world.rows(
                "select id, o ->> 2 as victim from executions, jsonb_array_elements(payload -> 'operations') o"
                " where o ->> 0 = 'cancel'"
            )
        }
        states = {victims[line.execution]: self.world.execution(victims[line.execution])["state"] for line in told}
        return [f"{victim} was cancelled and is {state}" for victim, state in states.items() if state != "cancelled"]

    def _count(self) -> None:
        result, one = self.result, self.world.one
        result.offered, result.accepted = len(self.offered), len(self.accepted)
        result.executions = one("select count(*) from execution")
        result.crashes = one("select coalesce(sum(crashes), 0)::int from execution")
        result.steps = one("select count(*) from step")
        result.effects = one("select count(*) from public.effect")
        result.effects_doubled = one(
            "select count(*) from (select from public.effect group by execution_id, name having count(*) > 1) d"
        )
        result.settled_twice = len(
            self.world.rows(invariants.ALWAYS["3 an ending is final"])
            + self.world.rows(invariants.ALWAYS["4 one ending per life"])
        )
        self._fired.update(f"{rule.action} {rule.call}" for rule in self.field.rules if rule.fired.is_set())
        self._fired.update(f"{worker.armed.rpartition(':')[0]}" for worker in self.world.workers if worker.faults())
        result.faults = dict(sorted(self._fired.items()))

    def _measure(self, watcher: Watcher) -> None:
        """Compute recovery times from the history, which is written on the clock that the deaths were noted on."""
        for died_at, pid in self.field.deaths:
            found = self.world.rows(_TAKEN_OVER, died_at, list(watcher.boot_ids[pid]), died_at, died_at)
            self.result.takeover_seconds += [round(float(row["seconds"]), 3) for row in found]
        for back_at in self.field.returns:
            found = self.world.rows(_RESUMED, back_at, back_at)
            self.result.resume_seconds += [
                round(float(row["seconds"]), 3) for row in found if row["seconds"] is not None
            ]


_TAKEN_OVER = """
select extract(epoch from n.at) - %s::float8 as seconds
from (select distinct on (execution_id) execution_id, seq, to_state, orchestrator_id from audit.history
      where op = 'move' and orchestrator_id = any(%s::text[]::uuid[]) and at <= to_timestamp(%s)
      order by execution_id, seq desc) l
cross join lateral (select at from audit.history h where h.execution_id = l.execution_id and h.seq > l.seq
                    and h.op = 'move' order by h.seq limit 1) n
where l.to_state = 'running' and n.at > to_timestamp(%s)"""
_RESUMED = """
select extract(epoch from min(at)) - %s::float8 as seconds from audit.history where at > to_timestamp(%s)"""


def _dump(world: World) -> str:
    """Return what the database holds, for whoever looks for the cause."""
    tables = ("executions", "steps", "lease", "ready", "timer", "wait", "wait_item", "workers", "audit.history", "tick")
    parts: list[str] = []
    for name in tables:
        with suppress(psycopg.Error):
            parts += [f"--- {name}", *(str(dict(row)) for row in world.rows(f"select * from {name}"))]  # noqa: S608
    return "\n".join(parts)


def as_json(result: Result) -> dict[str, Any]:
    """Return a result as one line of the results file has it."""
    return asdict(result)


def plan_as_text(plan: Plan) -> str:
    """Return a plan to read."""
    lines = [f"seed {plan.seed}: {plan.workers} workers"]
    lines += [f"{each.at:6.2f} s  {each.kind} {each.options}" for each in plan.strikes]
    lines += [f"{each.at:6.2f} s  offer {each.task} {each.program}" for each in plan.offers]
    return "\n".join(lines)
