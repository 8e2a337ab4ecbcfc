"""Claimer: which queues a claim asks for, and in which order."""

from types import SimpleNamespace
from typing import Any

from pgconductor.claimed import NULL, Claimed
from pgconductor.claimer import Claimer
from pgconductor.engine import Claim, Engine
from pgconductor.membership import Membership, Timing
from pgconductor.scan import Start
from pgconductor.written import Names, Want


def ten(_task_id: int | None = None) -> int:
    return 10


def none(_task_id: int | None = None) -> int:
    return 0


def claimer_of(*queue_ids: int) -> Claimer:
    workers = [
        SimpleNamespace(queue_id=id, poll_seconds=1.0, buffer=[], low_water=0, wanted=ten, free=ten, limited_room=ten)
        for id in queue_ids
    ]
    crew: Any = SimpleNamespace(workers=workers, tasks={7: None}, by_queue={each.queue_id: each for each in workers})
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
    rows = [Claimed("id", 1, queue, NULL, 0, None, None, 0, 0, None, None, None) for queue in claimed]
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


def taken(claimer: Claimer, *, is_alone: bool = True) -> tuple[list[str] | None, set[int]]:
    """Return what is claimed by itself, and which queues are looked at instead."""
    names = claimer._take_named(is_alone=is_alone)
    return None if names is None else names.ids, claimer._expected


def test_a_named_execution_is_claimed_by_itself_where_there_is_nothing_else_to_look_for() -> None:
    claimer = claimer_of(1, 2)
    claimer.expect_named(Names(1, 7, ["it"]))
    assert taken(claimer) == (["it"], set())
    assert taken(claimer) == (None, set())


def test_beside_other_reasons_its_queue_is_looked_at() -> None:
    claimer = claimer_of(1, 2)
    claimer.expect_named(Names(1, 7, ["it"]))
    assert taken(claimer, is_alone=False) == (None, {1})

    claimer = claimer_of(1, 2)
    claimer.expect([2])
    claimer.expect_named(Names(1, 7, ["it"]))
    assert taken(claimer) == (None, {1, 2})

    claimer = claimer_of(1, 2)
    claimer.expect_named(Names(1, 7, ["it"]))
    claimer.expect_named(Names(1, 7, ["another"]))
    assert taken(claimer) == (None, {1})


def test_more_than_there_are_slots_for_are_looked_for_in_their_queue() -> None:
    claimer = claimer_of(1)
    claimer.expect_named(Names(1, 7, ["it"] * 10))
    assert taken(claimer) == (["it"] * 10, set())
    claimer.expect_named(Names(1, 7, ["it"] * 11))
    assert taken(claimer) == (None, {1})


def test_without_a_free_slot_it_is_left_to_others_until_there_is_one() -> None:
    claimer = claimer_of(1)
    worker: Any = claimer._crew.by_queue[1]
    claimer.expect_named(Names(1, 7, ["it"]))
    worker.free = none  # a claim that was on its way has taken it
    assert taken(claimer) == (None, {1})

    claimer = claimer_of(1)
    worker = claimer._crew.by_queue[1]
    worker.free = none
    claimer.expect_named(Names(1, 7, ["it"]))
    assert taken(claimer) == (None, {1})


def test_what_others_serve_is_left_to_them() -> None:
    claimer = claimer_of(1)
    claimer.expect_named(Names(2, 7, ["of another queue"]))
    claimer.expect_named(Names(1, 8, ["of a task that is not known here"]))
    assert taken(claimer) == (None, set())


def test_a_slot_that_becomes_free_wakes_a_claimer_that_was_told_of_one() -> None:
    claimer = claimer_of(1)
    claimer.expect_named(Names(1, 7, ["it"]))
    claimer._wake.clear()
    claimer.on_slot_free(claimer._crew.by_queue[1])
    assert claimer._wake.is_set()
