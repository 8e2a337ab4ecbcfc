"""register, beat, pause, watch_result: what is no transition of an execution."""

from functools import partial
from uuid import UUID, uuid4

import pytest

from tests.sql.support import (
    WORKER,
    Background,
    Db,
    at,
    call,
    cancel,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    register,
    row,
    session,
    state,
    wait_until_blocked,
)


def task(name: str, **options: object) -> dict[str, object]:
    return {"name": name, "queue": "default", "max_attempts": 3, "max_crashes": 5} | options


def test_tasks_get_ids_and_keep_them(db: Db) -> None:
    first = call(db, "register_tasks", "d", [task("a"), task("b")])
    again = call(db, "register_tasks", "d", [task("b"), task("a")])
    assert {(t["name"], t["id"]) for t in first} == {(t["name"], t["id"]) for t in again}


def test_the_last_code_to_register_wins(db: Db) -> None:
    call(db, "register_tasks", "d", [task("a")])
    call(db, "register_tasks", "d", [task("a", max_attempts=9, queue="mail")])
    found = db.execute("select max_attempts, q.name from task t join queue q on q.id = t.queue_id").fetchone()
    assert found == {"max_attempts": 9, "name": "mail"}


def test_registering_the_same_again_writes_nothing(db: Db) -> None:
    call(db, "register_tasks", "d", [task("a")], at(0))
    call(db, "register_tasks", "d", [task("a")], at(9))
    found = db.execute("select registered_at from task").fetchone()
    assert found == {"registered_at": at(0)}


def test_what_was_enqueued_before_the_task_was_known_moves_to_its_queue(db: Db) -> None:
    id = enqueue(db, "late")
    register(db)
    call(db, "register_tasks", "d", [task("late", queue="mail")])
    assert claim_one(db, queue="mail") == id


def test_what_was_sent_to_a_queue_by_name_stays_there(db: Db) -> None:
    named, own = enqueue(db, "late", queue="other"), enqueue(db, "late")
    register(db)
    call(db, "register_tasks", "d", [task("late", queue="mail")])
    assert (claim_one(db, queue="other"), claim_one(db, queue="mail", token=2)) == (named, own)


def test_a_task_that_moves_leaves_its_old_work_where_it_is(db: Db) -> None:
    register(db, "work")
    old = enqueue(db)
    call(db, "register_tasks", "d", [task("work", queue="mail")])
    new = enqueue(db)
    assert (claim_one(db), claim_one(db, queue="mail", token=2)) == (old, new)


@pytest.mark.covers("F77")
def test_ten_processes_register_at_once(db: Db, database: str) -> None:
    def start(n: int) -> None:
        with session(database) as mine:
            tasks = [task(f"t{k}", queue=f"q{k % 3}") for k in range(20)]
            call(mine, "register_tasks", "d", tasks[n:] + tasks[:n])
            enqueue(mine, f"t{n}")

    for each in [Background(partial(start, n)) for n in range(10)]:
        each.result()
    assert (count(db, "task"), count(db, "queue")) == (20, 3)


def test_queues_are_made_once(db: Db) -> None:
    first = call(db, "register_queues", "{a,b}")
    assert {q["name"] for q in first} == {"a", "b"}
    call(db, "register_queues", "{b,a}")
    assert count(db, "queue") == 2


def test_a_process_registers_once(db: Db) -> None:
    register(db)
    register(db)
    assert count(db, "orchestrator") == 1


# ---------------------------------------------------------------- beat


def test_a_beat_tells_of_a_request_until_its_execution_is_settled(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    cancel(db, id)
    assert call(db, "beat", WORKER) == {"alive": True, "cancel": [id], "stop": False}
    assert call(db, "beat", WORKER) == {"alive": True, "cancel": [id], "stop": False}
    complete(db, id)
    assert call(db, "beat", WORKER) == {"alive": True, "cancel": [], "stop": False}


def test_a_beat_of_the_unknown_is_dead_and_registers_nobody(db: Db) -> None:
    assert call(db, "beat", uuid4()) == {"alive": False, "cancel": [], "stop": False}
    assert count(db, "orchestrator") == 0


def test_a_beat_says_since_when_its_process_is_stopping(db: Db) -> None:
    register(db)
    call(db, "beat", WORKER, True, at(5))
    call(db, "beat", WORKER, True, at(10))
    assert db.execute("select stopping_at from workers").fetchone() == {"stopping_at": at(5)}


# ---------------------------------------------------------------- pause


@pytest.mark.covers("F75")
def test_a_paused_queue_is_not_claimed_and_loses_nothing(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    call(db, "pause_queue", "default")
    assert claim(db) == []
    call(db, "resume_queue", "default")
    assert claim_one(db) == id


@pytest.mark.covers("F75")
def test_what_runs_in_a_paused_queue_goes_on(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    call(db, "pause_queue", "default")
    assert complete(db, id)["lost"] == []


def test_a_second_pause_keeps_the_first_instant_and_an_unknown_queue_can_be_paused(db: Db) -> None:
    call(db, "pause_queue", "mail", at(1))
    call(db, "pause_queue", "mail", at(2))
    assert db.execute("select paused_at from queues").fetchone() == {"paused_at": at(1)}


# ---------------------------------------------------------------- watch_result


def test_a_live_execution_is_watched_once(db: Db) -> None:
    id = enqueue(db)
    for _ in range(2):
        assert call(db, "watch_result", UUID(id), "me")["outcome"] is None
    assert count(db, "watch") == 1


def test_an_ended_execution_answers_and_is_not_watched(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    complete(db, id, {"a": 0})
    answer = call(db, "watch_result", UUID(id), "me")
    assert (answer["outcome"], answer["result"], answer["task"]) == ("completed", {"a": 0}, "work")
    assert count(db, "watch") == 0


@pytest.mark.parametrize("watcher", [None, "me"])
def test_an_unknown_id_answers_nothing(db: Db, watcher: str | None) -> None:
    assert call(db, "watch_result", uuid4(), watcher) is None
    assert count(db, "watch") == 0


def test_a_watcher_that_comes_while_the_end_is_written_sees_it(db: Db, database: str) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    with session(database) as settler, session(database) as watcher:
        settler.execute("begin")
        complete(settler, id)
        answer = Background(lambda: call(watcher, "watch_result", UUID(id), "me"))
        wait_until_blocked(db, watcher)
        settler.execute("commit")
        assert answer.result()["outcome"] == "completed"
    assert (count(db, "watch"), state(db, id), row(db, id)["failures"]) == (0, "completed", 0)


def test_what_is_being_enqueued_for_the_first_time_while_its_task_is_registered_moves_too(
    db: Db, database: str
) -> None:
    register(db)
    with session(database) as caller, session(database) as worker:
        caller.execute("begin")
        id = enqueue(caller, "late")
        registering = Background(lambda: call(worker, "register_tasks", "d", [task("late", queue="mail")]))
        wait_until_blocked(db, worker)
        caller.execute("commit")
        registering.result()
    assert claim_one(db, queue="mail") == id
