"""Names and values that look like Rich's markup, or like its emoji, are shown as they are; our own styles stay."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from pgconductor import Conductor, Context
from pgconductor.cli import serve
from pgconductor.cli.loop import run as run_loop
from tests.cli.test_cli import answer, command, run
from tests.sql.support import Db, at, call, claim, enqueue, fail, op, park, register, save

NAMES = ["[/x]", "sync[prod]:package:7", "[link=http://evil]click[/link]"]
VALUES: list[dict[str, Any]] = [{"s": "[/b]"}, {"flags": [True]}]
LISTS = ["runs", "queues", "tasks", "schedules", "events", "workers"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, db: Db) -> str:
    """A name that a task, a step, a child, a queue, a schedule, an event and a worker's host have."""
    name = str(request.param)
    call(db, "register_orchestrator", UUID(int=2), "test", name, name, 1, f'{{"{name}"}}', at(0))
    parent = enqueue(db, name, payload={"id": name}, dedupe_key=name)
    register(db, name)
    claim(db)
    save(db, parent, name)
    park(db, parent, op(parent, f"{name} again", "invoke", {"task": name}))
    enqueue(db, name, queue=name)
    db.execute("select emit(%s, %s::jsonb)", (name, json.dumps({"id": name})))
    db.execute("select schedule(%s, %s, '0 0 1 1 *')", (name, name))
    return name


def test_lists_show_names_as_they_are(database: str, db: Db, name: str) -> None:
    for each in LISTS:
        shown = run(database, each, "list").stdout
        assert name in shown, each


def test_a_page_shows_names_as_they_are(database: str, db: Db, name: str) -> None:
    ids = [row["id"] for row in db.execute("select id::text from executions").fetchall()]
    pages = {id: run(database, "runs", "show", id).stdout for id in ids}

    assert all(name in page for page in pages.values())
    (parent,) = [page for page in pages.values() if "waterfall" in page]
    assert parent.count(name) >= 7  # title, key, payload, twice in the tree, and the bars of run, step and child
    assert f'{{"id":"{name}"}}' in parent
    assert all(name in run(database, "runs", "why", id).stdout for id in ids)


def test_what_a_command_has_done_is_told_with_the_name_as_it_is(database: str, db: Db, name: str) -> None:
    for arguments in (
        ["queues", "pause", name], ["status"], ["doctor"], ["events", "emit", name],
        ["schedules", "pause", name], ["tasks", "limit", name, "5"],
    ):  # fmt: skip
        assert name in run(database, *arguments).stdout, arguments


def test_a_terminal_gets_styles_and_no_link(database: str, db: Db, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for each in LISTS:
        shown = run(database, each, "list").stdout
        assert "\x1b[1m" in shown
        assert "\x1b]8" not in shown


@pytest.mark.parametrize("value", VALUES)
def test_a_payload_is_shown_as_it_is(database: str, db: Db, value: dict[str, Any]) -> None:
    id = enqueue(db, payload=value)

    assert json.dumps(value, separators=(",", ":")) in run(database, "runs", "show", id).stdout


def test_an_error_is_shown_as_it_is(database: str, db: Db) -> None:
    id = enqueue(db)
    register(db, "work")
    claim(db)
    fail(db, id, "expected [/b] or :smile:")

    for arguments in (["runs", "list"], ["runs", "show", id]):
        assert "expected [/b] or :smile:" in run(database, *arguments).stdout


# ---------------------------------------------------------------- worker

ODD = """
from pgconductor import Conductor, Context

app = Conductor()

@app.task(name="[/x]", queue="q[red]")
async def odd(ctx: Context) -> None: ...
"""


def test_a_worker_greets_with_names_as_they_are(database: str, db: Db, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(ODD)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command(database, "worker", "shop:app"), cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as worker:  # fmt: skip
        assert worker.stdout is not None
        assert worker.stdout.readline().startswith("● worker")
        assert worker.stdout.readline() == "  q[red] (10 at once)  [/x]\n"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0


async def nothing(ctx: Context) -> None: ...


def test_a_worker_that_cannot_greet_says_good_bye(database: str, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Conductor(database)
    app.task(nothing)

    def break_down(*_: object) -> None:
        raise RuntimeError("no greeting")

    monkeypatch.setattr(serve, "_greet", break_down)
    monkeypatch.setattr(serve, "devote_process", lambda: None)

    with pytest.raises(RuntimeError, match="no greeting"):
        run_loop(serve._work(app, None, 1))
    assert answer(database, "workers", "list") == []
