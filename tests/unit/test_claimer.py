"""Claimer: which queues a claim asks for, and in which order."""

from types import SimpleNamespace
from typing import Any

from pgconductor.claimer import Claimer
from pgconductor.engine import NULL, Claim, Claimed, Engine, Want
from pgconductor.membership import Membership, Timing
from pgconductor.scan import Start


def claimer_of(*queue_ids: int) -> Claimer:
    workers = [
        SimpleNamespace(queue_id=id, poll_seconds=1.0, buffer=[], low_water=0, wanted=lambda: 10, free=lambda: 10)
        for id in queue_ids
    ]
    crew: Any = SimpleNamespace(workers=workers, tasks={}, by_queue={each.queue_id: each for each in workers})
    session: Any = None
    return Claimer(
        session,
        Engine("pgconductor"),
        Membership(Timing()),
        crew,
        unsettled_tokens=set,
        is_listening=lambda: True,
        on_declared_dead=lambda _id: None,
        on_schedules=lambda _schedules: None,
    )


def asked(claimer: Claimer, *, everything: bool = True) -> list[Want]:
    return claimer._collect_wants(everything=everything)


def answered(claimer: Claimer, wants: list[Want], *, more: list[int], claimed: tuple[int, ...] = ()) -> None:
    claimer._token += 1
    rows = [Claimed("id", 1, queue, NULL, 0, 0, 0, None, None, None, None, None) for queue in claimed]
    claimer._expect_more(Claim(claimed=rows, more=more), wants, Start.HEAD)


def queues(wants: list[Want]) -> list[int]:
    return [want.queue for want in wants]


def test_queues_that_a_claim_did_not_come_to_are_asked_for_first_by_the_next() -> None:
    claimer = claimer_of(1, 2, 3, 4)
    first = asked(claimer)
    assert queues(first) == [1, 2, 3, 4]
    answered(claimer, first, more=[3, 4])
    second = asked(claimer)
    assert queues(second) == [3, 4, 1, 2]
    answered(claimer, second, more=[1, 2])
    assert queues(asked(claimer)) == [1, 2, 3, 4]


def test_queues_that_a_claim_did_not_come_to_are_asked_for_at_once() -> None:
    claimer = claimer_of(1, 2, 3)
    answered(claimer, asked(claimer), more=[3])
    assert queues(asked(claimer, everything=False)) == [3]


def test_a_queue_in_which_limits_left_work_has_had_its_turn() -> None:
    claimer = claimer_of(1, 2, 3)
    answered(claimer, asked(claimer), more=[1, 2, 3], claimed=(1,))
    assert queues(asked(claimer)) == [2, 3, 1]
