"""`pgconductor schedules` on a real database: what it prints, as text and as JSON, and how it exits."""

import json
from typing import Any

from click.testing import CliRunner, Result

from pgconductor.cli import main
from tests.sql.support import Db


def run(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--dsn", dsn, "schedules", *arguments], catch_exceptions=False)


def answer(dsn: str, *arguments: str) -> Any:
    result = run(dsn, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def paused(db: Db) -> list[bool]:
    return [row["paused_at"] is not None for row in db.execute("select paused_at from schedules order by name")]


def test_schedules_are_listed(database: str, db: Db) -> None:
    assert "no schedules yet" in run(database, "list").output
    db.execute("select schedule('report', 'nightly', '30 2 * * *', '{}', 'Europe/Berlin')")
    shown = run(database, "list").output
    assert all(word in shown for word in ("report", "nightly", "30 2 * * *", "Europe/Berlin"))
    (listed,) = answer(database, "list")
    assert (listed["task"], listed["cron"], listed["tz"], listed["catch_up"]) == (
        "report", "30 2 * * *", "Europe/Berlin", "latest",
    )  # fmt: skip


def test_one_schedule_or_all_of_a_task_are_paused_and_resumed(database: str, db: Db) -> None:
    for name in ("a", "b"):
        db.execute("select schedule('report', %s, '@daily')", (name,))
    assert answer(database, "pause", "report", "a") == {"task": "report", "paused": 1}
    assert paused(db) == [True, False]
    assert run(database, "pause", "report").output == "1 schedule of report paused\n"
    assert paused(db) == [True, True]
    assert answer(database, "resume", "report") == {"task": "report", "resumed": 2}
    assert paused(db) == [False, False]


def test_a_schedule_is_fired_by_hand(database: str, db: Db) -> None:
    db.execute("""select schedule('report', 'nightly', '@daily', '{"n": 1}')""")
    (id,) = answer(database, "fire", "report", "nightly")["ids"]
    (row,) = db.execute("select id::text, task, state, payload, trigger from executions").fetchall()
    assert row == {"id": id, "task": "report", "state": "ready", "payload": {"n": 1}, "trigger": "nightly"}


def test_a_schedule_that_is_not_there_is_an_error(database: str, db: Db) -> None:
    db.execute("select schedule('report', 'nightly', '@daily')")
    for arguments in (("pause", "report", "weekly"), ("resume", "unknown"), ("fire", "report", "weekly")):
        result = run(database, *arguments)
        assert result.exit_code == 1
        assert "has no schedule" in result.output


def test_what_cannot_be_read_shows_as_an_error(database: str, db: Db) -> None:
    db.execute("select schedule('report', 'bad', 'soon')")
    db.execute("update schedule set error = E'cron(\\'soon\\'): \\x1b[31mno'")
    shown = run(database, "list").output
    assert "cron('soon')" in shown
    assert "\x1b[31m" not in shown
