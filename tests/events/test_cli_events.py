"""`pgconductor events` on a real database."""

import json
from typing import Any

from click.testing import CliRunner, Result

from pgconductor.cli import main
from tests.events.support import emit, waiting
from tests.sql.support import Db


def run(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--dsn", dsn, "events", *arguments], catch_exceptions=False)


def answer(dsn: str, *arguments: str) -> Any:
    return json.loads(run(dsn, *arguments, "--json").stdout)


def test_emit_stores_the_event(database: str, db: Db) -> None:
    found = answer(database, "emit", "order.paid", '{"cents": 5}')
    assert db.execute("select id::text, name, payload from events").fetchall() == [
        {"id": found["id"], "name": "order.paid", "payload": {"cents": 5}}
    ]


def test_emit_refuses_what_is_no_json(database: str, db: Db) -> None:
    assert run(database, "emit", "order.paid", "{").exit_code == 2
    assert db.execute("select from event").fetchall() == []


def test_list_shows_the_newest_first(database: str, db: Db) -> None:
    for n in range(3):
        emit(db, {"n": n})
    emit(db, {}, event="another")
    assert [each["payload"] for each in answer(database, "list", "order.paid", "--limit", "2")] == [
        {"n": 2},
        {"n": 1},
    ]
    assert "another" in run(database, "list").stdout


def test_a_hostile_payload_is_harmless_on_a_terminal(database: str, db: Db) -> None:
    emit(db, {"x": "\x1b[2J[bold]"})
    shown = run(database, "list").stdout
    assert "\x1b[2J" not in shown
    assert "[bold]" in shown


def test_listeners_shows_who_is_started_and_who_waits(database: str, db: Db) -> None:
    waiting(db)
    subscriptions = '[{"task": "work", "event": "order.paid", "where": "$.cents > 1"}]'
    db.execute("select register_subscriptions('test', %s)", (subscriptions,))
    (found,) = answer(database, "listeners")
    assert (found["event"], found["waiting_count"], [each["task"] for each in found["tasks"]]) == (
        "order.paid",
        1,
        ["work"],
    )
    assert "$.cents > 1" in run(database, "listeners").stdout


def test_nothing_yet_is_said_in_words(database: str) -> None:
    assert "no events yet" in run(database, "list").stdout
    assert "nobody listens" in run(database, "listeners").stdout


def test_an_event_that_nobody_listens_to_is_emitted_with_a_word_about_it(database: str, db: Db) -> None:
    waiting(db)

    missed = run(database, "emit", "order.payed")
    assert (missed.exit_code, missed.stderr) == (
        0, "no task is started by order.payed, and no execution waits for it now\n",
    )  # fmt: skip
    assert run(database, "emit", "order.paid").stderr == ""
    assert "no events named order.lost" in run(database, "list", "order.lost").stdout
    assert len(db.execute("select from event").fetchall()) == 2
