"""sweep: running → ready, failed, cancelled when the process is gone."""

import re
from uuid import UUID

import pytest

from tests.sql.support import (
    WORKER,
    Background,
    Db,
    Json,
    at,
    blank,
    call,
    cancel,
    chain,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    enqueue_many,
    fail,
    finish,
    op,
    parent_and_child,
    register,
    row,
    save,
    session,
    state,
    states,
    step,
    wait_until_blocked,
)

OTHER = UUID(int=2)


def sweep(db: Db, now: float, expiry: str = "20 seconds") -> Json:
    answer: Json = call(db, "sweep", expiry, at(now))
    return answer


def beat(db: Db, now: float, worker: UUID = WORKER) -> Json:
    answer: Json = call(db, "beat", worker, False, at(now))
    return answer


def lose(db: Db, id: str, times: int) -> None:
    """Let a process die with the execution in its hands, so many times."""
    for n in range(times):
        worker = UUID(int=1000 + n)
        register(db, worker=worker, now=100 * n)
        assert id in [each["id"] for each in claim(db, worker=worker, token=n + 1, now=100 * n)]
        sweep(db, 100 * n + 30)


@pytest.mark.covers("P1")
def test_the_work_of_a_silent_process_is_ready_again(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    assert sweep(db, 20)["lost"] == 0
    assert sweep(db, 21)["lost"] == 1
    assert (state(db, id), row(db, id)["crashes"], row(db, id)["failures"]) == ("ready", 1, 0)
    assert count(db, "orchestrator") == 0


@pytest.mark.parametrize("table", ["ready", "step"])
def test_a_sweep_gives_up_at_a_lock_that_others_hold_on_to_and_does_nothing(db: Db, database: str, table: str) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    with session(database) as other, other.transaction():
        other.execute(f"lock table {table} in access exclusive mode".encode())
        answer = sweep(db, 21)
        assert answer["lost"] == 0
        assert "gave_up" in answer
        assert row(db, id)["crashes"] == 0
    assert "gave_up" not in sweep(db, 21)
    assert (state(db, id), row(db, id)["crashes"]) == ("ready", 1)


def test_a_sweep_that_takes_nothing_over_is_held_up_by_no_lock_on_steps(db: Db, database: str) -> None:
    register(db, "work")
    enqueue(db)
    claim(db)
    with session(database) as other, other.transaction():
        other.execute(b"lock table step, ready in access exclusive mode")
        assert "gave_up" not in sweep(db, 5)


def test_a_beat_keeps_the_work(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    assert beat(db, 15)["alive"]
    assert sweep(db, 30)["lost"] == 0
    assert state(db, id) == "running"


@pytest.mark.covers("P3")
def test_a_swept_process_is_told_at_its_next_beat_and_settles_nothing(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    sweep(db, 30)
    assert beat(db, 31) == {"alive": False, "cancel": [], "stop": False}
    assert complete(db, id) is None
    assert state(db, id) == "ready"


def test_recorded_steps_survive_the_process(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    save(db, id, "a")
    sweep(db, 30)
    register(db, worker=OTHER, now=30)
    (claimed,) = claim(db, worker=OTHER, now=30)
    assert ([s[0] for s in claimed["steps"]], claimed["crashes"]) == (["a"], 1)


@pytest.mark.covers("P4")
def test_the_crash_budget_ends_in_worker_lost(db: Db) -> None:
    register(db, "work", now=1000)
    id = enqueue(db)
    lose(db, id, 4)
    assert (state(db, id), row(db, id)["crashes"]) == ("ready", 4)
    lose_once_more = UUID(int=2000)
    register(db, worker=lose_once_more, now=500)
    claim(db, worker=lose_once_more, token=9, now=500)
    sweep(db, 530)
    assert (state(db, id), row(db, id)["error"]["type"]) == ("failed", "pgconductor.errors.WorkerLost")


@pytest.mark.covers("P16")
def test_worker_lost_answers_the_parent_and_cancels_the_children(db: Db) -> None:
    ids = chain(db, 1)
    start = op(ids[1], "s", "start", {})
    save(db, ids[1], ops=[start])
    db.execute("update task set max_crashes = 1")
    sweep(db, 30)
    assert states(db, [*ids, start["children"][0]["id"]]) == ["ready", "failed", "cancelled"]
    assert step(db, ids[0], "call")["error"]["type"] == "pgconductor.errors.WorkerLost"


@pytest.mark.covers("F70")
def test_a_cancelled_execution_ends_when_its_process_is_swept(db: Db) -> None:
    parent, child = parent_and_child(db)
    claim(db)
    cancel(db, child)
    assert sweep(db, 30)["lost"] == 1
    assert states(db, [parent, child]) == ["ready", "cancelled"]
    assert step(db, parent, "call")["status"] == "cancelled"
    assert count(db, "signal") == 0


def test_a_cancelled_running_parent_ends_with_its_running_child(db: Db) -> None:
    register(db, "work", "child")
    parent = enqueue(db)
    claim(db)
    start = op(parent, "s", "start", {})
    save(db, parent, ops=[start])
    claim(db)
    cancel(db, parent)
    sweep(db, 30)
    assert states(db, [parent, start["children"][0]["id"]]) == ["cancelled", "cancelled"]


def test_many_dead_processes_are_taken_over_at_once(db: Db) -> None:
    register(db, "work")
    ids = enqueue_many(db, *blank(6))
    for n in range(3):
        register(db, worker=UUID(int=10 + n))
        claim(db, limit=2, worker=UUID(int=10 + n))
    assert sweep(db, 30)["lost"] == 6
    assert set(states(db, ids)) == {"ready"}


def test_only_the_dead_are_swept(db: Db) -> None:
    register(db, "work")
    register(db, worker=OTHER, now=20)
    ids = enqueue_many(db, *blank(2))
    claim(db, limit=1)
    claim(db, limit=1, worker=OTHER)
    sweep(db, 30)
    assert states(db, ids) == ["ready", "running"]


def test_a_sweep_passes_over_a_process_that_is_settling(db: Db, database: str) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    with session(database) as settler, settler.transaction():
        complete(settler, id)
        assert sweep(db, 30)["lost"] == 0
    assert state(db, id) == "completed"


def test_a_settle_that_meets_a_sweep_is_refused(db: Db, database: str) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    with session(database) as sweeper, session(database) as settler:
        sweeper.execute("begin")
        sweep(sweeper, 30)
        answer = Background(lambda: complete(settler, id))
        wait_until_blocked(db, settler)
        sweeper.execute("commit")
        assert answer.result() is None
    assert state(db, id) == "ready"


def test_one_session_sweeps_at_a_time(db: Db, database: str) -> None:
    register(db, "work")
    enqueue(db)
    claim(db)
    with session(database) as other, other.transaction():
        assert sweep(other, 30)["lost"] == 1
        assert sweep(db, 30)["lost"] == 0


def test_nobody_is_swept_right_after_the_server_started(db: Db) -> None:
    register(db, "work")
    enqueue(db)
    claim(db)
    db.execute("update orchestrator set beat_at = '2001-01-01'")
    assert call(db, "sweep", "1000 years")["lost"] == 0


def test_sweeping_an_empty_engine_is_no_error(db: Db) -> None:
    nothing: Json = {"lost": 0, "first_lost": [], "dead": None, "queues": [], "watchers": []}
    assert sweep(db, 30) == nothing | {"prune": False, "futile": False}


def test_a_sweep_says_what_it_took_over_and_of_whom(db: Db) -> None:
    register(db, "work")
    made = enqueue_many(db, *blank(7))
    claim(db, limit=7)
    told = sweep(db, 30)
    assert told["lost"] == 7
    assert set(told["first_lost"]) < set(made)
    assert len(told["first_lost"]) == 5
    assert [re.fullmatch(r"\S+:\d+", place) is not None for place in told["dead"]] == [True]


@pytest.mark.parametrize("how", ["complete", "fail", "cancel"])
def test_the_watchers_of_what_a_sweep_ends_are_told(db: Db, how: str) -> None:
    register(db, "work", max_crashes=1)
    id = enqueue(db)
    claim(db)
    call(db, "watch_result", UUID(id), "me")
    if how == "cancel":
        cancel(db, id)
    told = {"complete": lambda: complete(db, id), "fail": lambda: fail(db, id)}.get(how, lambda: sweep(db, 30))()
    assert told["watchers"] == ["me"]


def test_a_child_and_its_parent_lost_together_run_again(db: Db) -> None:
    register(db, "work", "child")
    parent = enqueue(db)
    claim(db)
    start = op(parent, "s", "start", {})
    save(db, parent, ops=[start])
    child = claim_one(db)
    sweep(db, 30)
    assert states(db, [parent, child]) == ["ready", "ready"]
    register(db, worker=OTHER, now=30)
    claim(db, worker=OTHER, now=30)
    finish(db, child, worker=OTHER, now=31)
    assert step(db, parent, "s")["status"] == "completed"


@pytest.mark.covers("F41")
def test_a_clock_that_jumps_forward_ends_leases_early_and_fences_their_holders(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    sweep(db, 3600)
    assert (state(db, id), row(db, id)["crashes"]) == ("ready", 1)
    assert beat(db, 10)["alive"] is False  # the clock was put right again
    other = UUID(int=77)
    register(db, worker=other, now=11)
    claim(db, worker=other, token=7, now=11)
    assert complete(db, id, now=12) is None
    assert complete(db, id, worker=other, token=7, now=13)["lost"] == []


@pytest.mark.covers("F41")
def test_a_clock_that_jumps_back_ends_no_lease_early(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    beat(db, 5)
    sweep(db, -3600)
    assert beat(db, -3590)["alive"]
    sweep(db, -3580)
    assert state(db, id) == "running"
    sweep(db, 100)
    assert state(db, id) == "ready"
