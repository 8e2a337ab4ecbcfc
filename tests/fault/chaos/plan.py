"""What happens in one seed: the programs that are offered and the faults that strike, all drawn before anything runs.

The same seed draws the same plan, whatever the machine does with it; how load and faults fall against each other is the
machine's. A program's first operation is its tag, by which the model finds its execution.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.fault.programs import (
    Operation,
    Program,
    big,
    cancel,
    caught,
    child,
    children,
    detached,
    emit,
    fail,
    limited,
    sleep,
    started,
    step,
    tag,
    timed,
    together,
    transaction,
    wait_for,
    windowed,
)

LOAD_SECONDS = 5.0
OFFERS = 34
STRIKES = (7, 11)
DEPTH_MAX = 2
VICTIM = "execution of "
"""What stands in a drawn program for the id of an execution that is not there yet, before its tag."""

SESSIONS = ("claim", "settle", "save", "worker", "heartbeat", "transaction", "listener", "client")
CALLS = ("claim", "settle", "save", "beat", "sweep", "enqueue", "save_transaction", "commit")
POINTS = (
    *("before_claim", "after_claim_reply", "before_handler", "handler_returned", "before_settle", "after_settle_reply"),
    *("before_step", "inside_step", "before_step_save", "after_step_save", "before_save", "after_save_reply"),
    *("inside_transaction", "before_transaction_commit", "after_transaction_commit", "before_fire", "after_fire"),
)


@dataclass(frozen=True)
class Offer:
    """A program to enqueue; `after` is the tag of one that must have been accepted before."""

    at: float
    tag: str
    task: str
    program: Program
    is_keyed: bool
    delay: float
    after: str | None = None


@dataclass(frozen=True)
class Strike:
    """A fault: its kind is the name of a function of `strikes`."""

    at: float
    kind: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Plan:
    """All that one seed draws."""

    seed: int
    workers: int
    offers: list[Offer]
    strikes: list[Strike]


def draw(seed: int) -> Plan:
    """Draw the plan of a seed."""
    chance = random.Random(seed)  # noqa: S311
    author = _Author(chance)
    offers = sorted((offer for _ in range(OFFERS) for offer in author.offers()), key=lambda offer: offer.at)
    strikes = sorted((_draw_strike(chance) for _ in range(chance.randint(*STRIKES))), key=lambda strike: strike.at)
    return Plan(seed, chance.choice([2, 2, 3]), offers, strikes)


# ---------------------------------------------------------------- programs


class _Author:
    """Writes programs, each with a tag of its own."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._tags = 0
        self._targets: list[str] = []

    def offers(self) -> list[Offer]:
        """Write one program to offer, and with it the one that it needs."""
        if self._chance.random() < 0.12:
            return self._waiter_and_emitter()
        task = "program" if self._chance.random() < 0.75 else "plain_program"
        made = self._offer(self._plain() if task == "plain_program" else self._program(0), task)
        if self._chance.random() < 0.1:
            killer: Program = [tag(self._tag()), step("s"), cancel("cancel", VICTIM + made.tag), step("t")]
            return [made, self._offer(killer, "program", after=made)]
        return [made]

    def _waiter_and_emitter(self) -> list[Offer]:
        to = self._tag()
        waiter = self._offer([tag(self._tag()), step("s"), wait_for("w", to), step("t")], "program")
        task = self._chance.choice(["program", "plain_program"])
        return [waiter, self._offer([tag(self._tag()), emit("e", to), step("s")], task, after=waiter)]

    def _offer(self, program: Program, task: str, after: Offer | None = None) -> Offer:
        at = self._chance.uniform(0, LOAD_SECONDS) if after is None else min(after.at + 0.3, LOAD_SECONDS)
        delay = self._chance.choice([0.0, 0.0, self._chance.uniform(0, 2)])
        return Offer(at, program[0][1], task, program, self._chance.random() < 0.7, delay, after.tag if after else None)

    def _tag(self) -> str:
        self._tags += 1
        return f"p{self._tags}"

    def _program(self, depth: int) -> Program:
        count = self._chance.randint(1, 5 - depth)
        return [tag(self._tag()), *(self._operation(f"{depth}.{number}", depth) for number in range(count))]

    def _plain(self, depth: int = 0) -> Program:
        verbs: list[Callable[[str], Operation]] = [step, transaction, self._nap, self._failure]
        if depth < DEPTH_MAX:
            verbs += self._plain_verbs_with_children(depth)
        count = self._chance.randint(1, 4 - depth)
        return [tag(self._tag()), *(self._chance.choice(verbs)(f"{depth}.{number}") for number in range(count))]

    def _plain_verbs_with_children(self, depth: int) -> list[Callable[[str], Operation]]:
        return [
            lambda name: child(name, *self._plain(depth + 1)),
            lambda name: children(name, *(self._plain(depth + 1) for _ in range(self._chance.randint(1, 3)))),
        ]

    def _operation(self, name: str, depth: int) -> Operation:
        simple: list[Callable[[str], Operation]] = [step, step, transaction, transaction, self._nap, self._failure]
        simple += [self._big, self._crowd]
        if depth >= DEPTH_MAX:
            return self._chance.choice(simple)(name)
        return self._chance.choice([*simple, *self._verbs_with_children(depth)])(name)

    def _verbs_with_children(self, depth: int) -> list[Callable[[str], Operation]]:
        def one() -> Program:
            return self._program(depth + 1)

        def some(least: int = 1, most: int = 3) -> list[Program]:
            return [one() for _ in range(self._chance.randint(least, most))]

        return [
            lambda name: child(name, *one()),
            lambda name: limited(name, *one()),
            lambda name: detached(name, *one()),
            lambda name: children(name, *some()),
            lambda name: windowed(name, self._chance.randint(1, 2), *some(2, 6)),
            lambda name: started(name, 1, *some(2, 3)),
            lambda name: started(name, 2, *some(2, 2)),
            lambda name: caught(child(name, *one())),
            lambda name: caught(children(name, *some())),
            lambda name: caught(child(name, tag(self._tag()), fail("f", 4))),
            lambda name: caught(
                timed(name, self._chance.uniform(0.1, 3), self._chance.choice(["cancel", "keep"]), *one())
            ),
            self._conversation,
        ]

    def _conversation(self, name: str) -> Operation:
        """Let one child wait for what another one emits."""
        to = self._tag()
        return children(name, [tag(self._tag()), wait_for("w", to)], [tag(self._tag()), step("s"), emit("e", to)])

    def _crowd(self, name: str) -> Operation:
        kinds: list[Callable[[str], Operation]] = [step, step, transaction, self._nap]
        kinds.append(lambda name: child(name, tag(self._tag()), step("s"), self._nap("n")))
        members = (self._chance.choice(kinds)(f"{name}.{n}") for n in range(self._chance.randint(2, 4)))
        return together(name, *members)

    def _then(self) -> str:
        return self._chance.choice(["cancel", "keep"])

    def _big(self, name: str) -> Operation:
        return big(name, 32 * self._chance.randint(1, 4000))

    def _nap(self, name: str) -> Operation:
        return sleep(name, self._chance.uniform(0.01, 1.5))

    def _failure(self, name: str) -> Operation:
        return fail(name, self._chance.choice([0, 1, 1, 2, 2, 3, 4]))


# ---------------------------------------------------------------- faults


def _draw_strike(chance: random.Random) -> Strike:
    kind, draw_options = chance.choice(_KINDS)
    return Strike(chance.uniform(0.3, LOAD_SECONDS), kind, draw_options(chance))


def _nothing(chance: random.Random) -> dict[str, Any]:
    return {}


def _a_span(*choices: float) -> Callable[[random.Random], dict[str, Any]]:
    return lambda chance: {"seconds": chance.choice(choices)}


def _sessions_for(*choices: float) -> Callable[[random.Random], dict[str, Any]]:
    return lambda chance: {"session": chance.choice(SESSIONS), "seconds": chance.choice(choices)}


def _a_rule(chance: random.Random) -> dict[str, Any]:
    return {
        "action": chance.choice(["swallow", "swallow", "hold", "refuse"]),
        "call": chance.choice(CALLS),
        "nth": chance.randint(1, 3),
    }


def _a_point(chance: random.Random) -> dict[str, Any]:
    action = chance.choice(["kill", "kill", "stop", "exit"])
    point = chance.choice(POINTS)
    return {"point": point, "action": action, "nth": 1 if point.endswith("_fire") else chance.randint(1, 3)}


_KINDS: list[tuple[str, Callable[[random.Random], dict[str, Any]]]] = [
    ("kill_worker", _nothing),
    ("kill_worker", _nothing),
    ("stop_worker", _a_span(0.3, 1.0, 3.5)),
    ("restart_worker", _nothing),
    ("arm_worker", _a_point),
    ("arm_worker", _a_point),
    ("arm_worker", _a_point),
    ("kill_server", _nothing),
    ("kill_postmaster", _nothing),
    ("stop_server_fast", _nothing),
    ("stop_server_smart", _nothing),
    ("stop_server_at_once", _nothing),
    ("kill_backend", _nothing),
    ("terminate_backends", lambda chance: {"session": chance.choice(SESSIONS)}),
    ("terminate_backends", lambda chance: {"session": chance.choice(SESSIONS)}),
    ("freeze_backend", _a_span(0.3, 1.5)),
    ("reset_links", lambda chance: {"session": chance.choice(SESSIONS)}),
    ("black_hole", _sessions_for(0.5, 3.0)),
    ("half_open", lambda chance: {"session": chance.choice(SESSIONS)}),
    ("latency", lambda chance: {"delay": chance.choice([0.05, 0.2, 0.5]), "seconds": chance.choice([0.5, 2.0])}),
    ("refuse_connections", _a_span(0.3, 1.5)),
    ("arm_proxy", _a_rule),
    ("arm_proxy", _a_rule),
    ("arm_proxy", _a_rule),
]
KINDS = sorted({kind for kind, _ in _KINDS})
"""All that can strike."""
