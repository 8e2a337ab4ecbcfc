"""enqueue_one and enqueue_alike: what enqueue does, for plain calls, at half the cost."""

from collections.abc import Callable
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import psycopg
import pytest

from pgconductor.id_array import IdArray
from pgconductor.ids import new_ids
from tests.flow.support import concurrency, limited, set_limit
from tests.sql.support import Db, Json, array, at, call, claim, complete, count, enqueue, register, row, session, state

Enqueue: TypeAlias = Callable[..., list[str]]


def one_by_one(db: Db, ids: list[str], payloads: tuple[str, ...], call: tuple[Any, ...], *, again: bool) -> None:
    for id, payload in zip(ids, payloads, strict=True):
        marks = "cast(%s as uuid), %s, %s, cast(%s as smallint), cast(%s as json), null, %s, %s"
        db.execute(f"select enqueue_one({marks})", (id, *call, payload, again, at(0)))


def alike(db: Db, ids: list[str], payloads: tuple[str, ...], call: tuple[Any, ...], *, again: bool) -> None:
    marks = "cast(%s as uuid[]), %s, %s, cast(%s as smallint), cast(%s as json), null, %s, %s"
    db.execute(f"select enqueue_alike({marks})", (array(ids), *call, f"[{','.join(payloads)}]", again, at(0)))


@pytest.fixture(params=[one_by_one, alike])
def plainly(request: pytest.FixtureRequest) -> Enqueue:
    def send(
        db: Db,
        *payloads: str,
        task: str | None = "work",
        queue: str | None = None,
        priority: int = 0,
        again: bool = False,
        ids: list[str] | None = None,
    ) -> list[str]:
        ids = ids or [str(uuid4()) for _ in payloads]
        request.param(db, ids, payloads, (task, queue, priority), again=again)
        return ids

    return send


def without_identity(db: Db, id: str) -> dict[str, Any]:
    mine = {"id", "ord"}
    return {name: value for name, value in row(db, id).items() if name not in mine}


@pytest.mark.parametrize("queue", [None, "mail"])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_plain_call_leaves_the_rows_that_enqueue_leaves(
    db: Db, plainly: Enqueue, queue: str | None, is_known: bool
) -> None:
    if is_known:
        register(db, "work")
        enqueue(db, queue=queue)
    usual = enqueue(db, queue=queue, priority=3, payload={"a": 1})
    (plain,) = plainly(db, '{"a": 1}', queue=queue, priority=3)
    assert without_identity(db, plain) == without_identity(db, usual)
    ready = db.execute("select lane_id, priority, cached_by, cached_seq from ready where priority = 3").fetchall()
    assert len(ready) == 2
    assert ready[0] == ready[1]


def test_plain_calls_are_claimed_in_their_order(db: Db, plainly: Enqueue) -> None:
    register(db, "work")
    ids = plainly(db, *(f'{{"n": {n}}}' for n in range(20)))
    claimed = claim(db, limit=20)
    assert [each["id"] for each in claimed] == ids
    assert [each["payload"]["n"] for each in claimed] == list(range(20))


def test_calls_of_one_statement_share_draws_and_stand_between_those_before_and_after_them(db: Db) -> None:
    register(db, "work")
    before = enqueue(db)
    ids = [str(uuid4()) for _ in range(19)]
    alike(db, ids, ("{}",) * 19, ("work", None, 0), again=False)
    after = enqueue(db)
    assert [each["id"] for each in claim(db, limit=21)] == [before, *ids, after]
    ords = [row(db, id)["ord"] for id in (before, *ids, after)]
    assert [each - ords[0] for each in ords] == [0, *range(8, 27), 32]


def test_a_payload_is_stored_as_it_was_written(db: Db, plainly: Enqueue) -> None:
    for task in ("known", "unknown"):
        register(db, *(["known"] if task == "known" else []))
        (id,) = plainly(db, '{"b":1e300,"a":-0.0,"b":2}', task=task)
        stored = db.execute("select cast(payload as text) as text from execution where id = %s", (id,)).fetchone()
        assert stored == {"text": '{"b":1e300,"a":-0.0,"b":2}'}


def test_plain_calls_of_a_limited_task_stand_in_its_backlog(db: Db, plainly: Enqueue) -> None:
    limited(db, concurrency(1))
    first, second = plainly(db, "{}", "{}")
    assert count(db, "ready") == 0
    assert [each["id"] for each in claim(db)] == [first]
    assert state(db, second) == "ready"


def test_a_limit_that_comes_later_holds_plain_calls_too(db: Db, plainly: Enqueue) -> None:
    register(db, "work")
    plainly(db, "{}")
    set_limit(db, 1)
    plainly(db, "{}", "{}")
    assert count(db, "ready") == 0
    assert len(claim(db)) == 1


def test_plain_calls_of_a_task_that_expires_expire(db: Db, plainly: Enqueue) -> None:
    register(db, "work", expires=60)
    plainly(db, "{}", "{}")
    due = db.execute("select distinct due_at from expiry").fetchall()
    assert due == [{"due_at": at(60)}]


def test_a_repeated_plain_call_makes_no_second_execution(db: Db, plainly: Enqueue) -> None:
    register(db, "work")
    known = plainly(db, "{}", "{}")
    plainly(db, "{}", "{}", ids=known, again=True)
    assert count(db, "execution") == count(db, "ready") == 2


def test_a_repetition_makes_what_is_missing_of_plain_calls(db: Db, plainly: Enqueue) -> None:
    known = plainly(db, "{}")
    missing = str(uuid4())
    plainly(db, "{}", '{"n": 1}', ids=[*known, missing], again=True)
    assert row(db, missing)["payload"] == {"n": 1}
    assert count(db, "execution") == 2


@pytest.mark.parametrize("task", [None, "", "x" * 201])
def test_a_plain_call_needs_a_task_of_at_most_200_bytes(db: Db, plainly: Enqueue, task: str | None) -> None:
    with pytest.raises(psycopg.IntegrityError):
        plainly(db, "{}", task=task)


def test_a_payload_over_its_limit_is_refused(db: Db, plainly: Enqueue) -> None:
    register(db, "work")
    fits, too_large = ('"' + "x" * size + '"' for size in (1_048_574, 1_048_575))
    plainly(db, fits, "{}")
    with pytest.raises(psycopg.Error) as refused:
        plainly(db, too_large)
    assert refused.value.sqlstate == "PC003"
    assert count(db, "execution") == 2


def test_a_rolled_back_plain_call_never_was(db: Db, plainly: Enqueue) -> None:
    register(db, "work")
    db.execute("begin")
    plainly(db, "{}")
    db.execute("rollback")
    assert count(db, "execution") == count(db, "ready") == 0


def test_a_plain_call_says_where_there_is_new_work(db: Db) -> None:
    register(db, "work")
    queue = db.execute("select id from queue where name = 'default'").fetchone()
    assert queue is not None
    marks = "cast(%s as uuid), 'work', null, cast(0 as smallint), cast('{}' as json)"
    answers = [db.execute(f"select enqueue_one({marks}) as it".encode(), (uuid4(),)).fetchone() for _ in range(2)]
    assert [answer and answer["it"]["queues"] for answer in answers] == [[queue["id"]]] * 2


HINTED = "cast(%s as uuid), 'work', null, cast(0 as smallint), cast('{}' as json), p_hint => %s, p_now => %s"


def hinted(db: Db, hint: str, id: UUID | None = None) -> Json:
    return answer_of(db, f"enqueue_one({HINTED})", id or uuid4(), hint, at(0))


def answer_of(db: Db, expression: str, *parameters: Any) -> Json:
    answer = db.execute(f"select {expression} as it".encode(), parameters).fetchone()
    assert answer is not None
    found: Json = answer["it"]
    return found


def lane(db: Db) -> tuple[int, int]:
    found = db.execute("select l.queue_id, l.task_id from lane l join task t on t.id = l.task_id where t.name = 'work'")
    (only,) = found.fetchall()
    return only["queue_id"], only["task_id"]


def heard(listener: Db) -> list[str]:
    return [hint.payload for hint in listener.notifies(timeout=30, stop_after=1)]


def setting(db: Db, name: str) -> str:
    found = db.execute("select current_setting(%s) as it", (name,)).fetchone()
    assert found is not None
    return str(found["it"])


def test_a_call_may_bring_its_hint_along_one_at_a_time(db: Db, database: str) -> None:
    register(db, "work")
    queue, _ = lane(db)
    with session(database) as other:
        other.execute("listen pgconductor")
        with db.transaction():
            assert hinted(db, "queue") == {"queues": [queue], "hinted": True}
            assert setting(db, "synchronous_commit") == "on"
            assert hinted(other, "queue") == {"queues": [queue]}
            assert hinted(other, "named") == {"queues": [queue]}
            assert [*other.notifies(timeout=0)] == []
        assert heard(other) == [f"ready {queue}"]
        assert [*other.notifies(timeout=0)] == []


MANY = (
    'enqueue(cast(\'[{{"id": "{id}", "task": "work", "payload": {{}}}}]\' as json), p_hint => {hint})',
    "enqueue_alike(array['{id}'::uuid], 'work', null, cast(0 as smallint), '[{{}}]', p_hint => {hint})",
)


@pytest.mark.parametrize("many", MANY)
def test_many_calls_may_bring_their_hint_along_one_at_a_time(db: Db, database: str, many: str) -> None:
    register(db, "work")
    queue, _ = lane(db)

    def is_hinted(session: Db, hint: str) -> bool:
        found = answer_of(session, many.format(id=uuid4(), hint=hint))
        assert found["queues"] == [queue]
        return bool(found["hinted"])

    with session(database) as other:
        other.execute("listen pgconductor")
        with db.transaction():
            assert is_hinted(db, "'queue'")
            assert not is_hinted(other, "'queue'")
            assert not is_hinted(other, "null")
        assert heard(other) == [f"ready {queue}"]
        assert [*other.notifies(timeout=0)] == []


def test_who_needs_a_hint_has_it_whoever_else_sends_one(db: Db, database: str) -> None:
    register(db, "work")
    with session(database) as other:
        other.execute("listen pgconductor")
        with db.transaction():
            hinted(db, "queue")
            calls: list[Json] = [{"id": uuid4(), "task": "work", "payload": {}}]
            assert call(other, "enqueue", calls, "always")["hinted"]
            assert len(heard(other)) == 1


def test_what_a_hint_cannot_name_concerns_everybody(db: Db, database: str) -> None:
    calls: list[Json] = [
        {"id": uuid4(), "task": "work", "queue": f"q{number}", "payload": {}} for number in range(2_000)
    ]
    with session(database) as other:
        other.execute("listen pgconductor")
        call(db, "enqueue", calls, "always")
        assert heard(other) == ["ready"]


def test_a_hint_may_name_the_call_and_go_out_before_the_disk_has_it(db: Db, database: str) -> None:
    register(db, "work")
    queue, task = lane(db)
    id = uuid4()
    with session(database) as other:
        other.execute("listen pgconductor")
        with db.transaction():
            assert hinted(db, "named", id) == {"queues": [queue], "hinted": True, "unconfirmed": True}
            assert setting(db, "synchronous_commit") == "off"
        assert heard(other) == [f"named {queue} {task} {id}"]


def hinted_alike(db: Db, hint: str | None, ids: list[str]) -> Json:
    marks = "cast(%s as uuid[]), 'work', null, cast(0 as smallint), cast(%s as json), p_hint => %s, p_now => %s"
    payloads = f"[{','.join(['{}'] * len(ids))}]"
    return answer_of(db, f"enqueue_alike({marks})", array(ids), payloads, hint, at(0))


def test_a_hint_may_name_up_to_200_calls_that_are_alike(db: Db, database: str) -> None:
    register(db, "work")
    queue, task = lane(db)
    few, many = ([str(uuid4()) for _ in range(count)] for count in (200, 201))
    with session(database) as other:
        other.execute("listen pgconductor")
        with db.transaction():
            assert hinted_alike(db, "named", few) == {"queues": [queue], "hinted": True, "unconfirmed": True}
            assert setting(db, "synchronous_commit") == "off"
        assert heard(other) == [f"named {queue} {task} {' '.join(few)}"]
        with db.transaction():
            assert hinted_alike(db, "named", many) == {"queues": [queue], "hinted": True}
            assert setting(db, "synchronous_commit") == "on"
        assert heard(other) == [f"ready {queue}"]


@pytest.mark.parametrize("is_known", [True, False])
def test_a_call_that_asks_for_no_hint_sends_none_and_waits_for_the_disk(
    db: Db, database: str, plainly: Enqueue, is_known: bool
) -> None:
    register(db, *(["work"] if is_known else []))
    with session(database) as other:
        other.execute("listen pgconductor")
        with db.transaction():
            plainly(db, "{}")
            assert setting(db, "synchronous_commit") == "on"
        db.execute("select pg_notify('pgconductor', 'next')")
        assert heard(other) == ["next"]


def test_a_call_of_a_task_with_a_window_is_hinted_by_its_queue(db: Db, database: str) -> None:
    register(db, "work", window_start="00:00", window_end="23:59", window_zone="UTC")
    queue, _ = lane(db)
    with session(database) as other:
        other.execute("listen pgconductor")
        with db.transaction():
            assert hinted(db, "named") == {"queues": [queue], "hinted": True}
            assert setting(db, "synchronous_commit") == "on"
        assert heard(other) == [f"ready {queue}"]


def test_to_confirm_a_call_waits_for_the_disk(db: Db) -> None:
    register(db, "work")
    id = uuid4()
    hinted(db, "named", id)
    with db.transaction():
        assert call(db, "confirm", id) is True
        written = db.execute("select pg_current_xact_id_if_assigned() as it").fetchone()
        assert written is not None
        assert written["it"] is not None  # the commit of nothing would wait for nothing
        assert setting(db, "synchronous_commit") == "on"


def test_a_call_that_was_lost_is_not_confirmed_and_one_that_was_removed_is(db: Db) -> None:
    assert call(db, "confirm", uuid4()) is False
    register(db, "work", keep_completed=0)
    id = uuid4()
    hinted(db, "named", id)
    claim(db)
    complete(db, str(id))
    assert count(db, "execution") == 0
    assert call(db, "confirm", id) is True


def test_a_list_of_ids_is_the_array_of_them(db: Db) -> None:
    ids = new_ids(300)
    row = db.execute("select cast(cast(%s as uuid[]) as text) as sent", (IdArray(ids),)).fetchone()
    assert row == {"sent": array(ids)}
