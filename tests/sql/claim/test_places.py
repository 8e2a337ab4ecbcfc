"""claim: the places it came to, and the ranges it is told to look through."""

import json
from collections.abc import Callable
from uuid import UUID

import pytest
from msgspec import structs

from pgconductor.scan import Range, ranges_behind
from tests.sql.support import (
    WORKER,
    Db,
    Json,
    array,
    at,
    blank,
    call,
    cancel,
    claim,
    count,
    enqueue,
    enqueue_many,
    fail,
    fan_out,
    finish,
    op,
    park,
    register,
    release,
    retry,
    session,
    state,
)

Way = Callable[[Db, str, int], object]
SECTION = 2**46


@pytest.fixture(autouse=True)
def worker(db: Db) -> None:
    register(db, "work", "child")


def answer_of(db: Db, ranges: list[Range] | None, *, limit: int = 10, token: int = 9, now: float = 5) -> Json:
    known = [each["id"] for each in db.execute("select id from task")]
    wants = [{"queue": each["id"], "limit": limit} for each in db.execute("select id from queue")]
    told = None if ranges is None else [structs.asdict(each) for each in ranges]
    answer: Json = call(db, "claim", WORKER, token, wants, array(known), True, at(now), told)
    return answer


def behind(answer: Json) -> list[Range]:
    """Return the ranges behind the places that a claim came to."""
    return ranges_behind({(lane, place // SECTION): place for lane, place in answer["last"]})


def ids(answer: Json) -> list[str]:
    rows: list[list[str]] = answer["claimed"] or []
    return [each[0] for each in rows]


def test_a_claim_tells_the_last_place_of_each_section_that_it_took_from(db: Db) -> None:
    enqueue_many(db, *({"task": task, "priority": priority} for priority in (3, 0) for task in ("work", "child") * 2))
    query = "select lane_id, place_of(priority, max(ord)) as place from ready group by lane_id, priority"
    last = {(each["lane_id"], each["place"]) for each in db.execute(query)}
    assert {(lane, place) for lane, place in answer_of(db, None)["last"]} == last
    assert len(last) == 4


def test_only_what_stands_behind_a_place_is_taken_and_other_lanes_are_taken_from_their_heads(
    db: Db, database: str
) -> None:
    with session(database) as slow, slow.transaction():
        passed = enqueue(slow)
        enqueue(db)
        first = answer_of(db, None)
    new = enqueue_many(db, {}, {"task": "child"}, {"priority": 1}, {"priority": -1})
    assert ids(answer_of(db, behind(first))) == [new[n] for n in (2, 0, 1, 3)]
    assert ids(answer_of(db, None)) == [passed]


def test_a_claim_of_more_than_a_range_holds_goes_on_in_the_next(db: Db) -> None:
    enqueue(db)
    ranges = behind(answer_of(db, None))
    new = enqueue_many(db, {"priority": 1}, {}, {}, {"priority": -1})
    assert ids(answer_of(db, ranges, limit=3)) == new[:3]
    assert ids(answer_of(db, ranges, limit=3)) == new[3:]


def released(db: Db, id: str, token: int) -> object:
    return release(db, id, token=token)


def retried(db: Db, id: str, token: int) -> object:
    return retry(db, id, token=token)


def due_again(db: Db, id: str, token: int) -> object:
    return retry(db, id, token=token, delay=1)


def woken(db: Db, id: str, token: int) -> object:
    return park(db, id, op(id, "nap", "sleep", due_in=1), token=token)


def redriven(db: Db, id: str, token: int) -> object:
    fail(db, id, token=token)
    return call(db, "redrive", UUID(id))


def given_back(db: Db, id: str, token: int) -> object:
    return call(db, "reconcile", WORKER, array([n for n in (1, 2, 9) if n != token]), at(0))


def swept(db: Db, id: str, token: int) -> object:
    register(db, worker=UUID(int=7))
    db.execute(
        "update lease set orchestrator_id = o.id, orchestrator_number = o.number from orchestrator o"
        " where o.id = %s and execution_id = %s",
        (UUID(int=7), id),
    )
    call(db, "beat", WORKER, False, at(100))
    return call(db, "sweep", "20 seconds", at(100))


WAYS = [released, retried, due_again, woken, redriven, given_back, swept]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_becomes_ready_again_stands_behind_what_became_so_before(db: Db, way: Way) -> None:
    older, younger = enqueue_many(db, *blank(2))
    for token in (1, 2):
        claim(db, limit=1, token=token)
    way(db, younger, 2)
    first = answer_of(db, None)
    assert ids(first) == [younger]
    way(db, older, 1)
    assert ids(answer_of(db, behind(first), now=10)) == [older]


def test_what_was_delayed_stands_behind_what_became_due_before(db: Db) -> None:
    older, younger = enqueue_many(db, {"delay": 7}, {"delay": 1})
    first = answer_of(db, None)
    assert ids(first) == [younger]
    assert ids(answer_of(db, behind(first), now=10)) == [older]


def test_the_next_child_of_a_bounded_fan_out_stands_behind_the_last(db: Db) -> None:
    _, children = fan_out(db, 3, window=1)
    enqueue_many(db, {"task": "child"})
    first = answer_of(db, None)
    finish(db, children[0], token=9)
    assert ids(answer_of(db, behind(first))) == [children[1]]


@pytest.mark.parametrize("way", [released, retried, due_again, woken, given_back], ids=lambda way: way.__name__)
def test_what_became_ready_late_is_found_by_a_cancel(db: Db, way: Way) -> None:
    (id,) = enqueue_many(db, {})
    others = enqueue_many(db, *blank(3))
    for token in (1, 2):
        claim(db, limit=1 if token == 1 else 3, token=token)
    way(db, id, 1)
    for other in others:
        release(db, other, token=2)
    call(db, "fire_timers", at(5))
    assert cancel(db, id) == "cancelled"
    assert (state(db, id), count(db, "ready")) == ("cancelled", 3)


def test_a_claim_reads_what_it_takes_by_the_index_and_in_its_order(db: Db) -> None:
    db.execute("set enable_seqscan = off; set enable_bitmapscan = off")  # as claim does; ready may be known to be empty
    plan = db.execute(
        "explain select * from ready where lane_id = 1 and place_of(priority, ord) > 5 and place_of(priority, ord) < 9"
        " order by place_of(priority, ord) limit 3"
    ).fetchall()
    told = "\n".join(each["QUERY PLAN"] for each in plan)
    assert "Index Scan using ready_order" in told
    assert "Sort" not in told
    assert "Filter" not in told


def tell(db: Db, worker: int, places: Json | None, now: float) -> None:
    register(db, worker=UUID(int=worker))
    call(db, "beat", UUID(int=worker), False, at(now), None if places is None else json.dumps(places))


def told(db: Db, now: float) -> Json:
    answer: Json = call(db, "register_orchestrator", UUID(int=99), "test", "1", "host", 1, "{default}", at(now))
    return answer


def test_a_process_that_starts_is_told_the_last_place_of_each_section(db: Db) -> None:
    assert told(db, 0) is None
    tell(db, 7, {"head_in": 30, "last": [[1, 20], [1, -9], [2, 4]]}, 10)
    tell(db, 8, {"head_in": 5, "last": [[1, 25], [1, -11], [3, -5 * SECTION]]}, 12)
    answer = told(db, 15)
    assert answer["head_in"] == 25  # by the word of the first, five seconds old
    assert {tuple(each) for each in answer["last"]} == {(1, 25), (1, -9), (2, 4), (3, -5 * SECTION)}


def test_a_process_tells_places_until_it_finds_heads_cheap_or_is_swept(db: Db) -> None:
    for worker in (7, 8):
        tell(db, worker, {"head_in": 30, "last": [[1, worker]]}, 10)
    tell(db, 8, None, 11)
    assert told(db, 12)["last"] == [[1, 7]]
    call(db, "beat", WORKER, False, at(100))
    call(db, "sweep", "20 seconds", at(100))
    assert told(db, 100) is None


def test_a_process_that_starts_is_told_how_far_passes_have_come(db: Db) -> None:
    tell(db, 7, {"head_in": 30, "last": [[1, 20]], "looked": None}, 10)
    assert told(db, 11)["looked"] is None
    tell(db, 8, {"head_in": 30, "last": [[1, 20]], "looked": []}, 10)
    assert told(db, 11)["looked"] == []  # a pass that begins is no whole look
    tell(db, 7, {"head_in": 30, "last": [[1, 20]], "looked": [[1, 12], [1, -SECTION]]}, 10)
    tell(db, 8, {"head_in": 30, "last": [[1, 20]], "looked": [[1, 5]]}, 10)
    assert {tuple(each) for each in told(db, 11)["looked"]} == {(1, 12), (1, -SECTION)}
