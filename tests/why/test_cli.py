"""`runs why` and `workers list`."""

from uuid import UUID, uuid4

from tests.cli.test_cli import answer, run
from tests.sql.support import WORKER, Db, array, call, claim, enqueue, register


def test_runs_why_says_what_stands_in_the_way(database: str, db: Db) -> None:
    id = enqueue(db, task="stranger")
    shown = run(database, "runs", "why", id)
    assert shown.exit_code == 0
    assert "no process has ever registered task 'stranger'" in shown.output
    assert answer(database, "runs", "why", id)["reasons"][0]["code"] == "unknown_task"


def test_runs_why_names_who_holds_a_full_limit(database: str, db: Db) -> None:
    call(db, "register_orchestrator", WORKER, "test", "1", "host", 1, "{default}")
    register(db, "work")
    call(db, "set_limit", "work", 1)
    first, second = enqueue(db), enqueue(db)
    db.execute("update orchestrator set beat_at = clock_timestamp()")
    claim(db)
    assert f"held by {first}" in run(database, "runs", "why", second).output


def test_runs_why_of_an_unknown_execution_is_an_error(database: str) -> None:
    assert run(database, "runs", "why", str(uuid4())).exit_code == 1


def test_runs_why_obeys_nothing_that_was_stored(database: str, db: Db) -> None:
    db.execute("alter table task drop constraint task_name_check")  # which keeps such names out
    id = enqueue(db, task="\x1b[2Jevil")
    assert "\x1b[2J" not in run(database, "runs", "why", id).output


def test_workers_list_tells_the_living_from_the_dead(database: str, db: Db) -> None:
    register(db, "work", worker=UUID(int=2))
    call(db, "register_orchestrator", WORKER, "gone", "0.0.1", "elsewhere", 7, "{a,b}")
    db.execute("update orchestrator set beat_at = now() - interval '1 minute' where name = 'gone'")
    (task,) = db.execute("select id from task").fetchall()
    call(db, "note_tasks", WORKER, array([task["id"]]))
    found = answer(database, "workers", "list")
    assert [(each["host"], each["tasks"], each["live"]) for each in found] == [
        ("elsewhere", ["work"], False),
        ("host", None, True),
    ]
    assert "elsewhere:7" in run(database, "workers", "list").output


def test_workers_list_says_what_to_do_when_there_are_none(database: str) -> None:
    assert "pgconductor worker" in run(database, "workers", "list").output
