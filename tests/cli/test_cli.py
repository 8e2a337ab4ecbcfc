"""The command line on a real database: what it prints, as text and as JSON, and how it exits."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Json

from pgconductor.cli import loop, main
from pgconductor.embedded import EmbeddedServer
from tests.sql.support import (
    WORKER,
    Db,
    at,
    call,
    cancel,
    claim,
    enqueue,
    enqueue_many,
    fail,
    op,
    park,
    register,
    retry,
    save,
    settle,
)

APPLICATION = """
from pgconductor import Conductor, Context

app = Conductor()

@app.task
async def double(ctx: Context, n: int) -> int:
    return await ctx.step("work", lambda: 2 * n)

@app.task(max_attempts=1)
async def refuse(ctx: Context) -> None:
    raise ValueError("not today")

not_an_app = 7
"""


def run(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--dsn", dsn, *arguments], catch_exceptions=False)


def answer(dsn: str, *arguments: str) -> Any:
    result = run(dsn, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def failing(db: Db, message: str = "boom") -> str:
    id = enqueue(db)
    register(db, "work")
    claim(db)
    fail(db, id, message)
    return id


# ---------------------------------------------------------------- invoke


def test_invoke_prints_the_id(database: str, db: Db) -> None:
    found = answer(database, "invoke", "charge", '{"order_id": 7}', "--priority", "3", "--delay", "1h")

    (row,) = db.execute("select id::text, task, payload, priority, state from executions").fetchall()
    assert (row["id"], row["task"], row["payload"]) == (found["id"], "charge", {"order_id": 7})
    assert (row["priority"], row["state"], found["state"]) == (3, "scheduled", "scheduled")


@pytest.mark.parametrize("payload", ["[1]", "{", "7"])
def test_invoke_refuses_what_is_not_an_object(database: str, payload: str) -> None:
    result = run(database, "invoke", "charge", payload)

    assert result.exit_code == 2
    assert "not a JSON object" in result.stderr


def test_invoke_waits_no_longer_than_it_is_told(database: str) -> None:
    result = run(database, "invoke", "charge", "--wait", "--timeout", "10ms")

    assert result.exit_code == 1
    assert "has not ended within 10ms" in result.stderr


# ---------------------------------------------------------------- runs


def test_runs_are_listed_newest_first_and_filtered(database: str, db: Db) -> None:
    failed = failing(db)
    enqueue_many(db, {"task": "mail"}, {"task": "mail", "queue": "slow"})

    assert [each["task"] for each in answer(database, "runs", "list", "--limit", "2")] != []
    assert [each["id"] for each in answer(database, "runs", "list", "--state", "failed")] == [failed]
    assert len(answer(database, "runs", "list", "--task", "mail")) == 2
    assert len(answer(database, "runs", "list", "--queue", "slow")) == 1
    assert len(answer(database, "runs", "list", "--state", "ready", "--queue", "slow")) == 1
    assert answer(database, "runs", "list", "--state", "waiting") == []


def test_runs_list_shows_the_error(database: str, db: Db) -> None:
    failed = failing(db, "card declined")

    text = run(database, "runs", "list").stdout
    assert failed in text
    assert "✗ failed" in text
    assert "card declined" in text


def test_show_draws_tree_and_waterfall(database: str, db: Db) -> None:
    parent = enqueue(db)
    register(db, "work", "child")
    claim(db)
    save(db, parent, "load")
    park(db, parent, op(parent, "charge", "invoke", {"task": "child"}), op(parent, "nap", "sleep", due_in=3600))

    text = run(database, "runs", "show", parent).stdout

    assert re.search(r"◌ waiting {2}work", text)
    assert re.search(r"└── ○ child as charge", text)
    for line in (r"✓ load +step +━", r"◌ charge +invoke +╍", r"◌ nap +sleep +╍"):
        assert re.search(line, text), (line, text)


def test_show_and_why_tell_where_it_runs_and_in_which_steps(database: str, db: Db) -> None:
    id = enqueue(db)
    register(db, "work")
    claim(db)
    save(db, id, "load")
    told = [[id, "load", 60.0, 1], [id, "charge", 42.0, 2, 3, "ValueError: declined"],
            [id, "mail", None, 1, 5, "OSError: no route", 9.0], [str(uuid4()), "other", 7.0, 1]]  # fmt: skip
    call(db, "beat", WORKER, False, at(60), None, told)

    text = run(database, "runs", "show", id).stdout
    assert re.search(r"runs on +\S+:\d+ +since 20", text)
    assert re.search(r"● charge +step +╍.* try 2 of 3: ValueError: decl", text)
    assert re.search(r"● mail +step +╍.* again at \d\d:\d\d:\d\d", text)
    assert "other" not in text
    assert len(re.findall(r"\bload\b", text)) == 1  # it has ended since
    why = run(database, "runs", "why", id).stdout.replace("\n", " ")
    assert re.search(r"step 'charge' runs since [-0-9: ]+ UTC \(try 2 of 3, after ValueError: declined\)", why)
    assert re.search(r"step 'mail' failed \(try 1 of 5: OSError: no route\), again at ", why)


def test_a_process_whose_loop_is_blocked_is_shown_as_that_and_keeps_its_work_waiting(database: str, db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    blocked = {"seconds": 33.4, "by": "task 'slow' execution 01a2"}
    db.execute("update orchestrator set beat_at = clock_timestamp(), started_at = clock_timestamp()")
    call(db, "beat", WORKER, False, None, None, None, Json(blocked))

    assert "blocked for 33s" in run(database, "workers", "list").stdout
    assert "blocked for 33s" in run(database, "status").stdout
    doctor = run(database, "doctor").stdout
    assert re.search(
        r"! blocked worker +\S+:\d+: its event loop has been blocked for 33s by task 'slow' execution", doctor
    )
    why = run(database, "runs", "why", id).stdout
    assert "has been blocked for 33.4 s by task 'slow' execution 01a2" in why
    call(db, "beat", WORKER)
    assert "nothing stands in its way" in run(database, "runs", "why", id).stdout
    assert "blocked" not in run(database, "doctor").stdout


def test_the_doctor_tells_of_what_somebody_stopped_and_may_have_forgotten(database: str, db: Db) -> None:
    register(db, "work")
    db.execute("insert into task_limit (task_id, kind, operator_max) select id, 'concurrency', 0 from task")
    db.execute(
        """insert into schedule
             (deployment, task_id, name, expr, zone, catch_up, payload, next_at, decided_at, created_at, paused_at)
           select 'd', id, 'nightly', '0 3 * * *', 'UTC', 'skip', '{}', null, now(), now(), now()
           from task"""
    )

    text = run(database, "doctor").stdout
    assert re.search(r"! closed task +work has a limit of 0, so", text)
    assert re.search(r"! paused schedule +work nightly\n +→ `pgconductor schedules resume work nightly`", text)


def test_what_an_earlier_run_did_is_not_told_of_the_next(database: str, db: Db) -> None:
    id = enqueue(db)
    register(db, "work")
    claim(db)
    call(db, "beat", WORKER, False, at(60), None, [[id, "charge", 42.0, 1]])
    assert "charge" in run(database, "runs", "show", id).stdout
    retry(db, id, now=61)
    claim(db, token=2, now=62)

    shown = run(database, "runs", "show", id).stdout
    assert "running" in shown
    assert "charge" not in shown


def test_a_retry_says_which_failures_of_children_the_parent_sees_again(database: str, db: Db) -> None:
    parent = enqueue(db)
    register(db, "work", "child")
    claim(db)
    park(db, parent, op(parent, "charge", "invoke", {"task": "child"}))
    fail(db, claim(db, token=2)[0]["id"], token=2)
    claim(db, token=3)
    fail(db, parent, token=3)

    text = run(database, "runs", "retry", parent).stdout
    assert text.startswith("✓ retried ")
    assert "sees again that step 'charge' failed" in text


def test_show_says_until_when_a_wait_lasts_and_that_a_cancel_ended_it(database: str, db: Db) -> None:
    id = enqueue(db)
    register(db, "work")
    claim(db)
    late = {"type": "WaitTimeout", "message": "wait 'paid' timed out after 2d"}
    park(db, id, op(id, "paid", "wait_for", due_in=172_800, event="paid", timeout_error=late))

    text = run(database, "runs", "show", id).stdout
    assert re.search(r"◌ paid +wait_for +╍.* until 20", text)
    assert "timed out" not in text
    cancel(db, id)
    text = run(database, "runs", "show", id).stdout
    assert re.search(r"⊘ paid +wait_for +━", text)
    assert "timed out" not in text


def test_show_goes_to_any_depth_and_json_has_it_all(database: str, db: Db) -> None:
    ids = [enqueue(db)]
    register(db, "work")
    for depth in range(4):
        claim(db, token=1)
        child = str(uuid4())
        park(db, ids[-1], op(ids[-1], f"level {depth}", "invoke", {"id": child, "task": "work"}))
        ids.append(child)

    found = answer(database, "runs", "show", ids[0])

    assert [(node["id"], node["level"]) for node in found["tree"]] == [(id, n) for n, id in enumerate(ids)]
    assert found["run"]["payload"] == {}


def test_show_renders_the_error_of_a_failure(database: str, db: Db) -> None:
    text = run(database, "runs", "show", failing(db, "card declined")).stdout

    assert "ValueError: card declined" in text


def test_an_unknown_execution_is_an_error(database: str) -> None:
    result = run(database, "runs", "show", str(uuid4()))

    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: no execution" in result.stderr
    assert run(database, "runs", "show", "no-uuid").exit_code == 2


def test_a_cancel_says_that_the_run_has_not_ended_yet(database: str, db: Db) -> None:
    id = enqueue(db)
    register(db, "work")
    claim(db)
    db.execute("update orchestrator set beat_at = clock_timestamp()")

    text = run(database, "runs", "cancel", id).stdout
    assert text.startswith("✓ cancelled ")
    assert "it runs still, and ends at its next operation" in text


def test_cancel_and_retry_exit_by_their_success(database: str, db: Db) -> None:
    id = enqueue(db)

    assert run(database, "runs", "cancel", id, "--reason", "wrong").exit_code == 0
    again = run(database, "runs", "cancel", id)
    assert (again.exit_code, again.stderr) == (1, f"{id} was not cancelled: it is cancelled already\n")
    assert run(database, "runs", "retry", id).exit_code == 0
    again = run(database, "runs", "retry", id)
    assert (again.exit_code, again.stderr) == (1, f"{id} was not retried: it is ready\n")
    unknown = run(database, "runs", "cancel", str(uuid4()))
    assert (unknown.exit_code, unknown.stderr.endswith("was not cancelled: it is not known\n")) == (1, True)


def test_an_invoke_of_what_nobody_runs_says_so(database: str) -> None:
    result = run(database, "invoke", "nobody")

    assert result.exit_code == 0
    assert result.stderr.endswith(" is ready: no process has ever registered task 'nobody'\n")


def test_whoever_waits_is_told_what_for(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pgconductor.cli.invoke"], "TELL_SECONDS", 0.01)
    result = run(database, "invoke", "nobody", "--wait", "--timeout", "1s")

    assert result.exit_code == 1
    told, error = result.stderr.splitlines()
    assert told.endswith(" is ready: no process has ever registered task 'nobody'")
    assert "has not ended within 1s; it goes on" in error


def test_nothing_that_is_told_meanwhile_holds_up_whoever_waits(
    database: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pgconductor.cli.invoke"], "TELL_SECONDS", 0.01)
    with db.transaction():
        db.execute("lock table orchestrator in access exclusive mode")  # why_not_running reads it
        result = run(database, "invoke", "nobody", "--wait", "--timeout", "500ms")

    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "has not ended within 500ms" in result.stderr


@pytest.mark.parametrize("evil", ["\x1b[2J\x1b]0;owned\x07", "\x9b31m", "a\rb", "\u202egnp.exe", "[red]x[/red]"])
def test_a_terminal_obeys_nothing_that_was_stored(database: str, db: Db, evil: str) -> None:
    id = enqueue(db, payload={"text": evil})
    register(db, "work")
    claim(db)
    save(db, id, "step")
    settle(db, {"id": id, "outcome": "failed", "error": {"type": "E", "message": evil, "traceback": evil}})

    for arguments in (["runs", "show", id], ["runs", "list"]):
        text = run(database, *arguments).stdout
        assert all(char.isprintable() or char == "\n" for char in text)
        assert (evil in text) is evil.isprintable()
    assert "\x1b" not in run(database, "runs", "show", id, "--json").stdout


# ---------------------------------------------------------------- queues, status, doctor


def test_pausing_a_queue_that_nothing_has_used_says_so(database: str) -> None:
    assert "nothing has used a queue of this name yet" in run(database, "queues", "pause", "defualt").stdout
    assert run(database, "queues", "resume", "defualt").stdout.strip() == "defualt resumed"


def test_queues_are_listed_paused_and_resumed(database: str, db: Db) -> None:
    enqueue(db, queue="mail")

    assert run(database, "queues", "pause", "mail").exit_code == 0
    (queue,) = [each for each in answer(database, "queues", "list") if each["name"] == "mail"]
    assert (queue["ready_count"], queue["paused_at"] is None) == (1, False)
    assert "paused" in run(database, "queues", "list").stdout
    assert answer(database, "queues", "resume", "mail") == {"queue": "mail", "resumed": True}


def test_status_counts_and_names_stranded_work(database: str, db: Db) -> None:
    enqueue(db, task="orphan")

    found = answer(database, "status")
    text = run(database, "status").stdout

    assert (found["ready"], found["running"]) == (1, 0)
    assert "no workers" in text
    assert "! task orphan has work in queue default: no process has ever registered task 'orphan'" in text


def test_work_whose_code_no_live_worker_has_is_stranded(database: str, db: Db) -> None:
    call(db, "register_orchestrator", uuid4(), "deploy", "1", "host", 1, "{default}", None)  # beats now
    call(
        db, "register_tasks", "deploy", [{"name": "old", "queue": "default", "max_attempts": 3, "max_crashes": 5}], None
    )
    enqueue(db, task="old")
    assert answer(database, "status")["stranded"] == []

    db.execute("update orchestrator set task_ids = '{}'")  # the next release lacks it
    reason = "task old has work in queue default: the one live process that works on queue 'default' lacks the code of"
    assert reason in run(database, "status").stdout
    assert reason in " ".join(run(database, "doctor").stdout.split())


def test_doctor_finds_a_missing_schema(server: str) -> None:
    result = run(server, "--schema", "nothing_here", "doctor")

    assert result.exit_code == 1
    assert "run `pgconductor migrate`" in result.stdout


def test_doctor_examines_server_schema_hints_and_workers(database: str) -> None:
    result = run(database, "doctor", "--json")

    verdicts = {check["name"]: check["verdict"] for check in json.loads(result.stdout)}
    assert verdicts["schema"] == verdicts["hints"] == verdicts["encoding"] == "ok"
    assert verdicts["workers"] == "warning"
    assert result.exit_code == (1 if verdicts["durability"] == "failure" else 0)


def old_snapshots(database: str) -> list[dict[str, str]]:
    return [each for each in json.loads(run(database, "doctor", "--json").stdout) if each["name"] == "old snapshot"]


def test_doctor_names_who_keeps_dead_rows_from_vacuum(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with psycopg.connect(database, application_name="nightly report") as held:
        held.execute("set transaction isolation level repeatable read")
        held.execute("select 1")
        assert old_snapshots(database) == []
        monkeypatch.setattr(sys.modules["pgconductor.cli.doctor"], "SNAPSHOT_SECONDS_MAX", 0)
        (found,) = old_snapshots(database)
        assert found["verdict"] == "warning"
        assert f"session {held.info.backend_pid} of {held.info.user} nightly report has held one" in found["found"]


def test_a_server_that_is_not_there_is_one_line_without_the_password() -> None:
    result = run("host=127.0.0.1 port=1 password=hunter2", "status")

    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot connect to Postgres")
    assert "hunter2" not in result.output


def test_no_output_shows_the_password(database: str, db: Db) -> None:
    password = re.search(r"password=(\S+)", database)

    for arguments in (["status"], ["doctor"], ["doctor", "--json"]):
        assert password is None or password[1] not in run(database, *arguments).output


# ---------------------------------------------------------------- migrate


def test_migrate_plans_writes_sql_and_is_repeatable(database: str) -> None:
    options = ["--schema", "fresh", "migrate"]

    assert len(answer(database, *options, "--plan")["planned"]) > 1
    assert "create schema" in run(database, *options, "--sql").stdout
    assert len(answer(database, *options)["done"]) > 1
    assert answer(database, *options)["done"] == []
    assert "up to date" in run(database, *options).stdout


# ---------------------------------------------------------------- worker


@pytest.fixture
def application(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(APPLICATION)
    return tmp_path


def command(dsn: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pgconductor", "--dsn", dsn, *arguments]


def test_a_worker_runs_what_is_invoked_and_stops_on_sigterm(database: str, application: Path) -> None:
    arguments = command(database, "worker", "shop:app", "-q", "default=2")
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        arguments, cwd=application, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as worker:
        assert worker.stdout is not None
        assert "worker" in worker.stdout.readline()

        assert answer(database, "invoke", "double", '{"n": 21}', "--wait")["result"] == 42
        refused = run(database, "invoke", "refuse", "--wait", "--json")
        assert refused.exit_code == 1
        assert json.loads(refused.stdout)["error"]["message"] == "not today"

        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0


def test_a_worker_runs_on_uvloop_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def module_of_loop() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert loop.run(module_of_loop()).startswith("uvloop")
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop.run(module_of_loop()).startswith("asyncio")


def test_a_worker_waits_for_a_postgres_that_is_not_there_yet(application: Path) -> None:
    with EmbeddedServer() as server:
        dsn = server.dsn
        server.stop()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            command(dsn, "worker", "shop:app"),
            cwd=application,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as worker:
            assert worker.stdout is not None
            told = worker.stdout.readline()
            assert "no Postgres answers at" in told
            assert "No such file or directory" in told  # its socket
            server.start()
            assert server.dsn == dsn
            assert any(line.startswith("● worker") for line in worker.stdout)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(60) == 0


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("x = (", "SyntaxError: '(' was never closed"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import nosuch", "ModuleNotFoundError: No module named 'nosuch'"),
        ("open('no.toml')", "FileNotFoundError: [Errno 2] No such file or directory: 'no.toml'"),
    ],
)
def test_code_that_cannot_be_imported_is_shown_from_its_own_line_on(
    database: str, tmp_path: Path, code: str, error: str
) -> None:
    (tmp_path / "broken.py").write_text(code)
    result = subprocess.run(
        command(database, "worker", "broken:app"), cwd=tmp_path, capture_output=True, text=True, check=False
    )

    shown = result.stderr.splitlines()
    assert (result.returncode, shown[0], shown[-1]) == (1, "error: cannot import broken", error)
    (place,) = [number for number, text in enumerate(shown) if text.startswith("  File ")]
    assert "broken.py" in shown[place]
    assert shown[place + 1] == f"    {code}"


def test_a_worker_that_postgres_refuses_does_not_wait(database: str, application: Path) -> None:
    dsn = make_conninfo(database, dbname="nowhere")
    result = subprocess.run(
        command(dsn, "worker", "shop:app"), cwd=application, capture_output=True, text=True, check=False
    )

    assert result.returncode == 1
    assert "no Postgres answers" not in result.stderr
    assert 'database "nowhere" does not exist' in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["worker", "nowhere:app"], "there is no module 'nowhere'"),
        (["worker", "shop:not_an_app"], "is not a Conductor"),
        (["worker", "shop:app", "-q", "default=many"], "the concurrency is a number"),
        (["worker", "shop:app", "--log-level", "loud"], "is not a level"),
        (["--schema", "elsewhere", "worker", "shop:app"], "--schema elsewhere: shop:app is for 'pgconductor'"),
    ],
)
def test_a_worker_that_cannot_be_understood_exits_2(
    database: str, application: Path, arguments: list[str], message: str
) -> None:
    result = subprocess.run(command(database, *arguments), cwd=application, capture_output=True, text=True, check=False)

    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize("arguments", [["status", "--json"], ["runs", "list"], ["runs", "--help"]])
def test_a_reader_that_has_gone_is_no_error(database: str, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does once it has what it wants
    try:
        result = subprocess.run(
            command(database, *arguments), stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)

    assert (result.returncode, result.stderr) == (1, "")


def test_help_and_unknown_commands() -> None:
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0
    assert CliRunner().invoke(main, ["explode"]).exit_code == 2
    assert "pgconductor" in CliRunner().invoke(main, ["--version"]).output
