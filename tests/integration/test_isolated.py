"""`executor="process"`: handlers in processes of their own."""

import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from pgconductor import Conductor, ExecutionFailed, Orchestrator, isolated
from tests.integration import isolated_app
from tests.waiting import until_row


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


async def test_more_than_the_process_reads_fails_the_execution_and_nothing_else(
    working: Conductor[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "LINE_BYTES_MAX", 200_000)
    with pytest.raises(ExecutionFailed, match="bytes, at most 200000 go to a process of its own"):
        await (await isolated_app.length_of.invoke("x" * 300_000)).result(30)
    assert await (await isolated_app.length_of.invoke("x" * 100_000)).result(30) == 100_000


@pytest.mark.covers("F64", "P4")
async def test_a_handler_that_kills_its_process_uses_up_the_crash_budget_alone(
    working: Conductor[None], db: psycopg.Connection[dict[str, Any]]
) -> None:
    with pytest.raises(ExecutionFailed) as caught:
        await (await isolated_app.deadly.invoke()).result(60)
    assert caught.value.error_type == "pgconductor.errors.WorkerLost"
    row = db.execute("select crashes, attempt from executions").fetchone()
    assert row == {"crashes": 3, "attempt": 1}


@pytest.mark.covers("F27")
async def test_a_handler_that_outlives_its_timeout_is_replaced_with_its_process(working: Conductor[None]) -> None:
    with pytest.raises(ExecutionFailed) as caught:
        await (await isolated_app.endless.invoke()).result(30)
    assert caught.value.error_type == "pgconductor.errors.AttemptTimeout"
    assert await (await isolated_app.on_its_loop.invoke(1)).result(30) == 2


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
    row = db.execute("select crashes, attempt, finished_at, error::text from executions").fetchone()
    assert row is not None
    assert why in row.pop("error")
    assert row == {"crashes": 0, "attempt": 1, "finished_at": None}
    monkeypatch.delenv(isolated_app.BROKEN)
    assert await run.result(30) == 8


async def test_what_a_handler_starts_can_be_terminated(working: Conductor[None]) -> None:
    assert await (await isolated_app.master.invoke()).result(30) == [-signal.SIGTERM, -signal.SIGTERM]
