"""why_not_running: a test for each thing that can stand in the way."""

from uuid import UUID, uuid4

from tests.sql.support import (
    START,
    WORKER,
    Db,
    Json,
    array,
    at,
    await_members,
    blank,
    call,
    cancel,
    claim,
    claim_one,
    complete,
    enqueue,
    enqueue_many,
    fail,
    fan_out,
    finish,
    invoke,
    op,
    parent_and_child,
    park,
    register,
    retry,
    save,
    settle,
)

OTHER = UUID(int=2)


def why(db: Db, id: str, now: float = 0) -> Json:
    answer: Json = call(db, "why_not_running", UUID(id), "20 seconds", at(now))
    return answer


def reasons(db: Db, id: str, now: float = 0) -> list[Json]:
    return list(why(db, id, now)["reasons"])


def codes(db: Db, id: str, now: float = 0) -> list[str]:
    return [each["code"] for each in reasons(db, id, now)]


def only(db: Db, id: str, now: float = 0) -> Json:
    (reason,) = reasons(db, id, now)
    return reason


def test_nothing_is_said_of_what_is_not_known(db: Db) -> None:
    assert call(db, "why_not_running", uuid4()) is None


def test_what_has_ended(db: Db) -> None:
    register(db, "work")
    done, failed = enqueue(db), enqueue(db)
    claim(db)
    complete(db, done)
    fail(db, failed)
    assert [only(db, id)["text"] for id in (done, failed)] == [
        "it completed at 2040-01-01 00:00:00 UTC",
        "it failed at 2040-01-01 00:00:00 UTC: boom",
    ]


def test_what_runs_says_where_and_since_when(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim_one(db)
    reason = only(db, id)
    assert (reason["code"], reason["host"], reason["pid"]) == ("running", "host", 1)
    assert reason["text"] == "it runs on host:1 since 2040-01-01 00:00:00 UTC"


def test_what_runs_and_was_told_to_stop(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim_one(db)
    cancel(db, id)
    assert codes(db, id) == ["cancelling"]


def test_what_runs_on_a_process_that_is_lost(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim_one(db)
    assert codes(db, id, now=60) == ["process_lost"]


def test_what_is_not_due(db: Db) -> None:
    id = enqueue(db, run_at=at(3600).isoformat())
    assert only(db, id)["text"] == "it is due at 2040-01-01 01:00:00 UTC"
    assert why(db, id)["summary"] == "it is due at 2040-01-01 01:00:00 UTC"


def test_what_waits_between_two_attempts(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    retry(db, claim_one(db), delay=30)
    reason = only(db, id)
    assert (reason["code"], reason["failures"], reason["error"]) == ("backing_off", 1, "again")


def test_what_waits_after_its_process_died(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    settle(db, {"id": id, "outcome": "crashed", "token": 1, "delay": 2})
    reason = only(db, id)
    assert reason["code"] == "backing_off"
    assert reason["text"] == "its process died; it runs again at 2040-01-01 00:00:02 UTC"


def test_a_child_that_a_window_of_its_fan_out_holds_back(db: Db) -> None:
    _, children = fan_out(db, 3, window=1)
    assert codes(db, children[0]) == ["next"]
    assert codes(db, children[2]) == ["held_in_fan_out"]


def test_a_parent_waits_for_its_child(db: Db) -> None:
    parent, child = parent_and_child(db, due_in=60)
    reason = only(db, parent)
    assert (reason["code"], reason["child"], reason["child_state"]) == ("waiting_for_child", child, "ready")
    assert reason["text"] == (
        f"step 'call' waits until 2040-01-01 00:01:00 UTC for its child {child}, task 'child', which is ready: "
        "nothing stands in its way: the next free slot takes it"
    )


def test_a_parent_waits_for_a_child_that_nobody_runs(db: Db) -> None:
    parent, child = parent_and_child(db)
    db.execute("update orchestrator set queues = '{other}'")
    text = only(db, parent)["text"]
    assert text.startswith(f"step 'call' waits for its child {child}, task 'child', which is ready: ")
    assert text.endswith(": no live process works on queue 'default'")


def test_a_parent_waits_for_many_children(db: Db) -> None:
    parent, _ = fan_out(db, 5)
    finish(db, claim_one(db, limit=1))
    reason = only(db, parent)
    assert (reason["code"], reason["left"], reason["total"]) == ("waiting_for_children", 4, 5)


def test_of_many_children_it_says_how_many_failed_and_which_is_open(db: Db) -> None:
    parent, children = fan_out(db, 5)
    claim(db)
    for child in children[:2]:
        fail(db, child)
    reason = only(db, parent)
    assert (reason["failed"], reason["first"]) == (2, children[2])
    assert reason["text"] == (
        "step 'all' waits for 3 more of 5 children, of which 2 failed; "
        f"the first that is open is {children[2]}, which is running"
    )


def test_a_parent_waits_for_some_of_its_started_children(db: Db) -> None:
    register(db, "work", "child")
    parent = enqueue(db)
    claim_one(db)
    save(db, parent, ops=[op(parent, f"start {n}", "start", *blank(1)) for n in range(3)])
    waits = await_members("wait", *(f"start {n}" for n in range(3)), count=2)
    park(db, parent, op(parent, "wait", "wait"), awaits=waits)
    reason = only(db, parent)
    assert (reason["code"], reason["step"], reason["left"], reason["total"]) == ("waiting_for_children", "wait", 2, 3)


def test_a_sleeper(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    park(db, claim_one(db), op(id, "nap", "sleep", due_in=90))
    assert only(db, id)["text"] == "step 'nap' sleeps until 2040-01-01 00:01:30 UTC"


def test_who_waits_for_an_event(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    park(db, claim_one(db), op(id, "paid", "wait_for", event="order.paid", where={"order": 7}))
    reason = only(db, id)
    assert (reason["code"], reason["event"], reason["where"]) == ("waiting_for_event", "order.paid", {"order": 7})
    assert reason["text"] == "step 'paid' waits for event 'order.paid' where {\"order\": 7}"


def test_several_open_waits_are_all_told(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    park(db, claim_one(db), op(id, "a", "sleep", due_in=90), op(id, "b", "invoke", *blank(1)))
    assert codes(db, id) == ["sleeping", "waiting_for_child"]


def test_a_paused_queue(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    call(db, "pause_queue", "default", START)
    assert only(db, id)["text"] == "queue 'default' is paused since 2040-01-01 00:00:00 UTC"


def test_a_closed_window(db: Db) -> None:
    register(db, "work")
    db.execute("update task set window_start = '22:00', window_end = '06:00', window_zone = 'Europe/Berlin'")
    id = enqueue(db)
    assert codes(db, id, now=0) == ["next"]  # midnight UTC is one o'clock in Berlin
    register(db, worker=OTHER, now=12 * 3600)
    reason = only(db, id, now=12 * 3600)
    assert (reason["code"], reason["opens_at"]) == ("window_closed", "2040-01-01T21:00:00+00:00")


def test_a_full_limit_names_who_holds_it(db: Db) -> None:
    register(db, "work")
    call(db, "set_limit", "work", 1, "concurrency", "tenant")
    first = enqueue(db, payload={"tenant": "acme"})
    second = enqueue(db, payload={"tenant": "acme"})
    claim(db)
    reason = only(db, second)
    assert (reason["code"], reason["key"], reason["holders"]) == ("concurrency_limit", "acme", [first])
    assert reason["text"] == "the limit of 1 running at once for tenant 'acme' is full"


def test_a_rate_limit_says_when_it_lets_the_next_one_in(db: Db) -> None:
    register(db, "work")
    call(db, "set_limit", "work", 2, "rate", None, "1 minute")
    ids = [enqueue(db) for _ in range(3)]
    claim(db)
    assert codes(db, ids[0]) == ["running"]
    reason = only(db, ids[2])
    assert (reason["code"], reason["opens_at"]) == ("rate_limit", "2040-01-01T00:01:00+00:00")


def test_a_limit_of_nothing(db: Db) -> None:
    register(db, "work")
    call(db, "set_limit", "work", 0, "rate", None, "1 minute")
    id = enqueue(db)
    claim(db)
    assert "lets nothing in" in only(db, id)["text"]


def test_a_task_that_nobody_has_registered(db: Db) -> None:
    register(db, "work")
    assert codes(db, enqueue(db, task="stranger")) == ["unknown_task"]


def test_a_queue_on_which_nobody_works(db: Db) -> None:
    register(db, "work")
    id = enqueue(db, queue="elsewhere")
    assert only(db, id)["text"] == "no live process works on queue 'elsewhere'"


def test_dead_and_stopping_processes_do_not_count(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    assert codes(db, id, now=60) == ["no_worker_for_queue"]
    call(db, "beat", WORKER, True, at(60))
    assert codes(db, id, now=60) == ["no_worker_for_queue"]


def test_processes_without_the_code_of_the_task(db: Db) -> None:
    register(db, "work", "other")
    tasks = {row["name"]: row["id"] for row in db.execute("select name, id from task").fetchall()}
    call(db, "note_tasks", WORKER, array([tasks["other"]]))
    id = enqueue(db)
    assert only(db, id)["text"] == ("the one live process that works on queue 'default' lacks the code of task 'work'")
    second = uuid4()
    register(db, worker=second)
    call(db, "note_tasks", second, array([tasks["other"]]))
    assert only(db, id)["text"] == (
        "none of the 2 live processes that work on queue 'default' has the code of task 'work'"
    )
    call(db, "note_tasks", WORKER, array([tasks["work"]]))
    assert codes(db, id) == ["next"]


def test_an_ancestor_that_was_cancelled(db: Db) -> None:
    register(db, "work", "child")
    parent = enqueue(db)
    child = invoke(db, claim_one(db))
    claim_one(db)
    cancel(db, parent)
    assert codes(db, child) == ["cancelled_ancestor", "cancelling"]
    assert reasons(db, child)[0]["ancestor"] == parent


def test_what_goes_first_is_counted(db: Db) -> None:
    register(db, "work")
    ids = enqueue_many(db, {}, {}, {"priority": 1})
    assert [only(db, id)["ahead"] for id in ids] == [1, 2, 0]


def test_everything_that_stands_in_the_way_is_told(db: Db) -> None:
    register(db, "work")
    call(db, "set_limit", "work", 0)
    db.execute("update task set window_start = '01:00', window_end = '02:00', window_zone = 'UTC'")
    id = enqueue(db)
    call(db, "pause_queue", "default", START)
    assert codes(db, id, now=60) == ["no_worker_for_queue", "queue_paused", "window_closed", "concurrency_limit"]
