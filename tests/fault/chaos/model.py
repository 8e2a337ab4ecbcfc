"""What must come of a program, computed without the engine, and held against what the database says at the end.

The model knows how many executions a program makes, how each of them ends and in which attempt, and which steps and
transactions are recorded. What a program cancels, or stops waiting for, is *uncertain*: it ends as it would, or
cancelled, or was never begun.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from psycopg.rows import DictRow

from tests.fault.chaos.plan import VICTIM, Offer
from tests.fault.ledger import Ask
from tests.fault.programs import ATTEMPTS, Operation, Program

MADE = """
select id, state, attempt, task, crashes, payload -> 'operations' -> 0 ->> 1 as tag, parent_id
from executions where task like '%%program'"""
ENDED = ("completed", "failed", "cancelled")
RECORDED = "select execution_id, name, count(*) from steps where kind in ('step', 'transaction') group by 1, 2"


@dataclass
class Expected:
    """One program's execution."""

    tag: str
    is_certain: bool
    outcome: str = "completed"
    attempt: int = 1
    recorded: set[str] = field(default_factory=set[str])


def expect(program: Program, *, is_certain: bool) -> Iterator[Expected]:
    """Return what must come of a program, itself first and then all that it starts."""
    me = Expected(program[0][1], is_certain)
    rest: list[Expected] = []
    seen: set[str] = set()
    while not _run(me, program, rest, seen) and me.outcome == "completed":
        if me.attempt == ATTEMPTS:
            me.outcome = "failed"
            break
        me.attempt += 1
    yield me
    yield from rest


def _run(me: Expected, program: Program, rest: list[Expected], seen: set[str]) -> bool:
    """Go through one attempt; tell whether it came to the end. `seen` has the operations that were done before."""
    return all(_do(me, operation, rest, seen) for operation in program)


def _do(me: Expected, operation: Operation, rest: list[Expected], seen: set[str]) -> bool:
    verb, name, argument = operation
    if verb == "fail":
        return me.attempt > int(argument)
    if verb == "together":
        return all(_do(me, each, rest, seen) for each in argument)
    if verb in ("step", "transaction", "big"):
        me.recorded.add(name)
    is_first = name not in seen
    seen.add(name)
    return _await(me, operation, rest if is_first else [])


def _await(me: Expected, operation: Operation, rest: list[Expected]) -> bool:
    """Begin the programs of an operation; a failed one that nobody catches fails this for good."""
    verb = operation[0]
    is_caught = verb == "caught"
    failed = False
    for program, is_sure, is_raised in _programs_of(operation[2] if is_caught else operation):
        expected = list(expect(program, is_certain=me.is_certain and is_sure))
        failed = failed or (is_raised and expected[0].outcome == "failed")
        rest += expected
    if failed and not is_caught:
        me.outcome = "failed"
        return False
    return True


def _programs_of(operation: Operation) -> Iterator[tuple[Program, bool, bool]]:
    """Return the programs that an operation starts, whether they surely run to their end, whether a failure raises."""
    verb, _, argument = operation
    if verb in ("child", "limited"):
        yield argument, True, True
    elif verb == "detached":
        yield argument, True, False
    elif verb == "timed":
        yield argument[2], argument[1] == "keep", True
    elif verb == "children":
        yield from ((program, True, True) for program in argument)
    elif verb == "windowed":
        yield from ((program, True, True) for program in argument[1])
    elif verb == "started":
        count, programs = argument
        yield from ((program, count == len(programs), False) for program in programs)


def expected_of(offers: Iterable[Offer]) -> dict[str, tuple[Offer, Expected]]:
    """Return what must come of all offers, by tag."""
    offers = list(offers)
    victims = {
        operation[2].removeprefix(VICTIM) for offer in offers for operation in offer.program if operation[0] == "cancel"
    }
    return {
        expected.tag: (offer, expected)
        for offer in offers
        for expected in expect(offer.program, is_certain=offer.tag not in victims)
    }


# ---------------------------------------------------------------- against the database


def check(offers: Sequence[Offer], accepted: dict[str, str], ask: Ask) -> tuple[int, list[str]]:
    """Hold what was offered against what is there.

    Args:
        offers: All that were sent.
        accepted: The ids that were acknowledged, by tag.
        ask: Asks the database.

    Returns:
        How many accepted executions are lost (gone, or without an end), and everything that is not as it must be.
    """
    expected = expected_of(offers)
    made: dict[str, list[DictRow]] = defaultdict(list)
    for row in ask(MADE):
        made[str(row["tag"])].append(row)
    recorded: dict[Any, set[str]] = defaultdict(set)
    for row in ask(RECORDED):
        recorded[row["execution_id"]].add(row["name"])
    problems = [f"{name} was never offered" for name in made.keys() - expected.keys()]
    lost = 0
    for name, id in accepted.items():
        kept = [
            row for row in made[name] if str(row["id"]) == id and row["state"] in ("completed", "failed", "cancelled")
        ]
        if not kept:
            lost += 1
            problems.append(f"{name} was accepted as {id} and is lost: {made[name]}")
    for name, (offer, one) in expected.items():
        problems += _judge(one, made[name], recorded, is_accepted=offer.tag in accepted)
    return lost, problems


def _judge(one: Expected, rows: list[DictRow], recorded: dict[Any, set[str]], *, is_accepted: bool) -> Iterator[str]:
    if len(rows) > 1:
        yield f"{one.tag} was made {len(rows)} times"
    if not rows:
        if one.is_certain and is_accepted:
            yield f"{one.tag} was never made"
        return
    row = rows[0]
    seen = f"{row['state']} in attempt {row['attempt']}"
    told = f"{one.tag} ({row['id']}) is {seen}, expected {one.outcome} in {one.attempt}"
    if one.is_certain or row["state"] == one.outcome:
        names = recorded[row["id"]]
        if (row["state"], row["attempt"]) != (one.outcome, one.attempt):
            yield told
        elif names != one.recorded:
            yield f"{one.tag} ({row['id']}) recorded {sorted(names)}, expected {sorted(one.recorded)}"
    elif row["state"] != "cancelled":
        yield told


def check_reactions(ask: Ask) -> Iterator[str]:
    """Each event has started one execution for its subscription, each row one, each tick of the schedule one."""
    events = Counter({row["name"]: row["count"] for row in ask(_EVENTS)})
    heard = Counter({row["name"]: row["count"] for row in ask(_HEARD)})
    if events != heard:
        yield f"events and what they started differ: {events - heard}, {heard - events}"
    effects = Counter({row["name"]: row["count"] for row in ask(_EFFECTS)})
    changed = Counter({row["name"]: row["count"] for row in ask(_CHANGED)})
    if effects != changed:
        yield f"rows and what they started differ: {effects - changed}, {changed - effects}"
    yield from (f"tick {dict(row)}" for row in ask(_TICKS_TWICE))
    yield from (f"no tick at {row['slot']}" for row in ask(_TICKS_MISSED))


_EVENTS = "select payload ->> 'to' as name, count(*) from event group by 1"
_HEARD = """
select trigger_data -> 'payload' ->> 'to' as name, count(*) from execution where trigger_kind = 'event' group by 1"""
_EFFECTS = "select concat(execution_id, ' ', name) as name, count(*) from public.effect group by 1"
_CHANGED = """
select concat(trigger_data -> 'new' ->> 'execution_id', ' ', trigger_data -> 'new' ->> 'name') as name, count(*)
from execution where trigger_kind = 'change' group by 1"""
_TICKS_TWICE = """
select trigger_data ->> 'scheduled_at' as slot, count(*) from execution where trigger_kind = 'schedule'
group by 1 having count(*) > 1"""
_TICKS_MISSED = """
select slot from (
  select slot_at as slot, lag(slot_at) over (order by slot_at) as before from tick) t
where slot - before <> interval '1 second'"""
