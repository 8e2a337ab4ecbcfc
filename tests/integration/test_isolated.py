"""`executor="process"`: handlers in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgconductor import Conductor, ExecutionCancelled, ExecutionFailed, Orchestrator, isolated
from pgconductor.binaries import is_alive
from tests.integration import isolated_app
from tests.waiting import until, until_row


@pytest.fixture
async def working(database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Conductor[None]]:
    monkeypatch.setenv("PGCONDUCTOR_URL", database)
    monkeypatch.setattr(isolated_app.app, "_given_dsn", database)
    monkeypatch.setattr(isolated_app.app, "_dsn", None)
    async with Orchestrator(isolated_app.app):
        yield isolated_app.app
    await isolated_app.app.close()


async def test_a_plain_handler_runs_in_another_process_and_keeps_its_steps(working: Conductor[None]) -> None:
    pid, doubled = await (await isolated_app.where.invoke(4)).result(30)
    assert pid != os.getpid()
    assert doubled == 8


async def test_a_coroutine_runs_on_the_loop_of_its_process(working: Conductor[None]) -> None:
    assert await (await isolated_app.on_its_loop.invoke(4)).result(30) == 8


async def test_a_large_payload_reaches_the_process(working: Conductor[None]) -> None:
    assert await (await isolated_app.length_of.invoke("x" * 300_000)).result(30) == 300_000


async def test_values_go_between_the_processes_as_they_are_stored_line_feeds_included(
    working: Conductor[None], db: psycopg.Connection[dict[str, Any]]
) -> None:
    run = await isolated_app.as_it_is.with_options(delay="1h").invoke({"text": "a\nb"})
    db.execute("""update execution set payload = E'{\n  "value":\n  {"text": "a\\\\nb"}\n}'""")
    db.execute("update timer set due_at = clock_timestamp()")
    assert json.loads(bytes(await run.result(30))) == {"text": "a\nb"}


async def test_more_than_the_process_reads_fails_the_execution_and_nothing_else(
    working: Conductor[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "LINE_BYTES_MAX", 200_000)
    with pytest.raises(ExecutionFailed, match="bytes, at most 200000 go to a process of its own"):
        await (await isolated_app.length_of.invoke("x" * 300_000)).result(30)
    assert await (await isolated_app.length_of.invoke("x" * 100_000)).result(30) == 100_000


@pytest.mark.covers("F64", "P4")
async def test_a_handler_that_kills_its_process_uses_up_the_crash_budget_alone(
    working: Conductor[None], db: psycopg.Connection[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ExecutionFailed) as caught:
        await (await isolated_app.deadly.invoke()).result(60)
    assert caught.value.error_type == "pgconductor.errors.WorkerLost"
    died = [line for line in caplog.messages if "its process died (exit code 7), crash " in line]
    assert [line.partition("crash ")[2] for line in died] == ["1 of 3; again in 1s", "2 of 3; again in 2s", "3 of 3"]
    row = db.execute("select crashes, attempt from executions").fetchone()
    assert row == {"crashes": 3, "attempt": 1}


@pytest.mark.covers("F27")
async def test_a_handler_that_outlives_its_timeout_is_replaced_with_its_process(working: Conductor[None]) -> None:
    with pytest.raises(ExecutionFailed) as caught:
        await (await isolated_app.endless.invoke()).result(30)
    assert caught.value.error_type == "pgconductor.errors.AttemptTimeout"
    assert await (await isolated_app.on_its_loop.invoke(1)).result(30) == 2


@pytest.mark.covers("F27")
async def test_a_handler_that_blocks_its_loop_beyond_its_timeout_loses_its_process_and_the_attempt(
    working: Conductor[None],
    db: psycopg.Connection[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(isolated, "MARGIN_SECONDS", 0.2)
    with pytest.raises(ExecutionFailed, match="ran longer than its timeout of 200ms") as caught:
        await (await isolated_app.blocks_its_loop_too_long.invoke(str(tmp_path))).result(30)
    assert caught.value.error_type == "pgconductor.errors.AttemptTimeout"
    assert db.execute("select attempt, crashes from executions").fetchone() == {"attempt": 2, "crashes": 0}
    tried = told(tmp_path)
    assert len(tried) == 2
    await until(lambda: not any(map(is_alive, tried)))


async def test_a_handler_that_blocks_its_loop_during_a_cancel_loses_its_process(
    working: Conductor[None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(isolated, "CANCEL_SECONDS", 0.2)
    run = await isolated_app.blocks_its_loop.invoke(str(tmp_path))
    await until(lambda: bool(told(tmp_path)))
    assert await run.cancel("enough")
    with pytest.raises(ExecutionCancelled, match="enough"):
        await run.result(30)
    await until(lambda: not any(map(is_alive, told(tmp_path))))


async def test_a_handler_that_leaves_at_its_timeout_keeps_its_process(working: Conductor[None]) -> None:
    before = await (await isolated_app.process_id.invoke()).result(30)
    with pytest.raises(ExecutionFailed) as caught:
        await (await isolated_app.leaves_at_its_timeout.invoke()).result(30)
    assert caught.value.error_type == "pgconductor.errors.AttemptTimeout"
    assert await (await isolated_app.process_id.invoke()).result(30) == before


async def test_steps_that_a_handler_left_behind_have_as_long_as_it_had(
    working: Conductor[None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[float] = []
    allow = isolated.IsolatedAttempt._allow

    def note(attempt: isolated.IsolatedAttempt, seconds: float, margin: float) -> None:
        given.append(seconds)
        allow(attempt, seconds, margin)

    monkeypatch.setattr(isolated.IsolatedAttempt, "_allow", note)
    run = await isolated_app.leaves_a_step_behind.invoke(str(tmp_path))
    await until(lambda: given == [30, 30])
    (tmp_path / "open").touch()
    assert await run.result(30) == await (await isolated_app.process_id.invoke()).result(30)


async def test_where_a_program_logs_as_it_likes_its_processes_are_left_alone(working: Conductor[None]) -> None:
    assert await (await isolated_app.log_handler_count.invoke()).result(30) == 0


@pytest.mark.parametrize(("how", "why"), [("raise", "what the lifespan needs is not there"), ("exit", "ended before")])
async def test_a_process_that_cannot_start_costs_nothing_and_the_reason_is_kept(
    working: Conductor[None],
    db: psycopg.Connection[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    why: str,
) -> None:
    monkeypatch.setattr(isolated, "START_RETRY_SECONDS", 0.01)
    monkeypatch.setenv(isolated_app.BROKEN, how)
    run = await isolated_app.on_its_loop.invoke(4)
    await until_row(db, "select from executions where error is not null")
    row = db.execute("select crashes, attempt, started_at, finished_at, error::text from executions").fetchone()
    assert row is not None
    assert why in row.pop("error")
    assert row == {"crashes": 0, "attempt": 1, "started_at": None, "finished_at": None}
    monkeypatch.delenv(isolated_app.BROKEN)
    assert await run.result(30) == 8


async def test_what_a_handler_starts_can_be_terminated(working: Conductor[None]) -> None:
    assert await (await isolated_app.master.invoke()).result(30) == [-signal.SIGTERM, -signal.SIGTERM]


def told(directory: Path) -> list[int]:
    """Return the processes that have said in a directory that they are there."""
    return [int(path.stem) for path in directory.glob("*.pid")]


# ---------------------------------------------------------------- under the command line

APPLICATION = """
import logging

from pgconductor import Conductor, Context

app = Conductor("host=127.0.0.1 port=1 dbname=nowhere")

@app.task
async def double(ctx: Context, n: int) -> int:
    return 2 * n

@app.task(executor="process", max_attempts=1)
async def ask(ctx: Context, n: int) -> int:
    ctx.logger.info("asking")
    logging.getLogger("shop").warning("by itself")
    return await (await double.invoke(n)).result(30)
"""


@pytest.fixture
async def worker(database: str, tmp_path: Path) -> AsyncIterator["subprocess.Popen[bytes]"]:
    """A worker on the command line; what it writes to stderr is in `stderr`."""
    (tmp_path / "shop.py").write_text(APPLICATION)
    options = ["--log-format", "json", "--log-level", "info"]
    command = [sys.executable, "-m", "pgconductor", "--dsn", database, "worker", "shop:app", *options]
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=stderr)  # noqa: ASYNC220
    yield process
    process.kill()
    process.wait()


async def test_a_process_calls_the_database_of_its_worker_and_logs_as_that_does(
    database: str, worker: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    async with Conductor(database) as app:
        run = await app.define_task("ask", dict[str, int], int).invoke({"n": 21})
        assert await run.result(60) == 42
    worker.send_signal(signal.SIGTERM)
    await until(lambda: worker.poll() is not None)
    lines = [json.loads(line) for line in (tmp_path / "stderr").read_text().splitlines()]
    said = {line["message"]: line.get("execution_id") for line in lines}
    assert (said["asking"], said["by itself"]) == (str(run.id), str(run.id))
