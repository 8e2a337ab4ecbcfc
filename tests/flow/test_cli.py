"""`pgconductor tasks`."""

import json

from click.testing import CliRunner

from pgconductor.cli import main
from tests.flow.support import concurrency, limited, rate
from tests.sql.support import Db, blank, claim, enqueue_many


def run(dsn: str, *arguments: str) -> str:
    result = CliRunner().invoke(main, ["--dsn", dsn, "tasks", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_list_shows_limits_and_counts(database: str, db: Db) -> None:
    limited(db, concurrency(1, "tenant"), rate(5, 60), expires=30)
    enqueue_many(db, *blank(3))
    claim(db)
    (task,) = json.loads(run(database, "list", "--json"))

    assert (task["ready_count"], task["running_count"]) == (2, 1)
    assert "1 at once per tenant; 5 in 60 s; expires after 30 s" in " ".join(run(database, "list").split())


def test_a_limit_is_changed_and_given_back(database: str, db: Db) -> None:
    limited(db, concurrency(1))
    enqueue_many(db, *blank(3))
    claim(db)

    assert "the concurrency limit of work is 3" in run(database, "limit", "work", "3")
    assert "the concurrency limit of work per tenant is 2" in run(database, "limit", "work", "2", "--key", "tenant")
    run(database, "limit", "work", "--reset", "--key", "tenant")
    assert len(claim(db, token=2)) == 2
    db.execute("create table audit.lowered ()")
    assert "is the code's again" in run(database, "limit", "work", "--reset")


def test_a_limit_of_an_unknown_task_is_refused(database: str) -> None:
    result = CliRunner().invoke(main, ["--dsn", database, "tasks", "limit", "nobody", "3"])

    assert result.exit_code == 1
    assert "there is no task 'nobody'" in result.output
