"""A worker, a service that enqueues and a person who reads, each with the role made for it and no other right."""

import asyncio
import json
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from click.testing import CliRunner

from pgconductor import Change, Conductor, Context, Event, Orchestrator, Tick, cron, event, invocable, table
from pgconductor.cli import main
from pgconductor.errors import ConfigurationError, ServerError
from tests.changes.support import CONTACT
from tests.security.support import Town, answer
from tests.waiting import until

pytestmark = pytest.mark.covers("F84", "P48")
App = Conductor[None]


def app_of(town: Town, kind: str) -> App:
    return Conductor(town.dsn(kind))


async def test_a_worker_needs_the_workers_role_alone(town: Town) -> None:
    app = app_of(town, "worker")
    paid = app.event("paid", dict[str, Any])

    @app.task
    async def leaf(ctx: Context, n: int) -> int:
        return await ctx.step("double", lambda: 2 * n)

    @app.task(concurrency=2, keep_completed=timedelta(days=1))
    async def tree(ctx: Context, n: int) -> list[int]:
        first = await ctx.invoke("first", leaf.bind(n))
        await ctx.sleep("nap", 0.02)
        others = await ctx.invoke_all("others", [leaf.bind(n + 1), leaf.bind(n + 2)])
        await ctx.emit(paid, {"n": n})
        told = await ctx.wait_for("paid", paid, where={"n": n}, timeout="20s")
        saved = await ctx.transaction("select", _select)
        await ctx.schedule("yearly", leaf.bind(1), cron="0 0 1 1 *")
        await ctx.unschedule("yearly", leaf)
        return [first, *others, told["n"], saved]

    async with app, Orchestrator(app):
        run = await app.invoke(tree.bind(1))
        assert await run.result(timeout="30s") == [2, 4, 6, 1, 7]


async def _select(conn: psycopg.AsyncConnection[Any]) -> int:
    row = await (await conn.execute("select 7")).fetchone()
    return int(row[0]) if row else 0


async def test_what_events_schedules_and_row_changes_start_runs_too(town: Town) -> None:
    with psycopg.connect(town.admin, autocommit=True) as conn:
        conn.execute(CONTACT)
        conn.execute(f"grant trigger on public.contact to {town.role('worker')}".encode())
    app = app_of(town, "worker")
    seen: set[str] = set()

    @app.task(on=[event(app.event("paid", dict[str, Any])), cron("* * * * * *"), invocable()])
    async def note(ctx: Context, tick: Tick | None = None, happened: Event[dict[str, Any]] | None = None) -> None:
        seen.add("tick" if tick else "event" if happened else "invoked")

    @app.task(on=[table("public.contact", "insert", columns=["id"], when="new.active")])
    async def sync(ctx: Context, change: Change[dict[str, Any]]) -> None:
        seen.add("change")

    async with app, Orchestrator(app):
        with psycopg.connect(town.admin, autocommit=True) as conn:
            conn.execute("insert into public.contact values (1)")
        async with app_of(town, "enqueuer") as service:
            await service.emit(service.event("paid", dict[str, Any]), {"n": 1})
        await until(lambda: {"tick", "event", "change"} <= seen)


async def test_a_worker_whose_schema_is_older_does_not_start(town: Town) -> None:
    with psycopg.connect(town.admin, autocommit=True) as conn:
        conn.execute("update pgconductor.migration set release = '0.0.0', checksum = 'older' where version = 0")
    app = app_of(town, "worker")

    @app.task
    async def work(ctx: Context) -> None: ...

    with pytest.raises(ServerError, match=r"not at this release.*may not change it.*pgconductor migrate"):
        await Orchestrator(app).start()


async def test_an_outsider_is_told_what_is_missing(town: Town) -> None:
    app = app_of(town, "outsider")
    task = app.define_task("work", dict[str, Any], int)
    async with app:
        with pytest.raises(ServerError, match="permission denied"):
            await app.invoke(task.bind({}))


async def test_a_service_enqueues_and_reads_the_result(town: Town) -> None:
    app, service = app_of(town, "worker"), app_of(town, "enqueuer")

    @app.task
    async def double(ctx: Context, n: int) -> int:
        return 2 * n

    remote = service.define_task("double", dict[str, Any], int)
    async with app, service, Orchestrator(app):
        run = await service.invoke(remote.bind({"n": 4}))
        assert await run.result(timeout="20s") == 8
        assert await run.state() == "completed"
        assert len(await service.invoke_many([remote.bind({"n": n}) for n in range(3)], dedupe_key="one")) == 3


async def test_a_service_enqueues_in_its_own_transaction(town: Town) -> None:
    async with app_of(town, "enqueuer") as service:
        async with await psycopg.AsyncConnection.connect(town.dsn("enqueuer")) as conn:
            run = await service.invoke(service.define_task("work", dict[str, Any], int).bind({}), conn=conn)
            await conn.commit()
        assert await run.state() == "ready"


@pytest.mark.parametrize("what", ["cancel", "retry", "pause", "resume"])
async def test_a_service_may_not_do_what_operators_do(town: Town, what: str) -> None:
    async with app_of(town, "enqueuer") as service:
        run = await service.invoke(service.define_task("work", dict[str, Any], int).bind({}))
        with pytest.raises(ServerError, match=r"role '\w+_enqueuer_login' may not do that: permission denied.*42501"):
            await getattr(service, what)(run.id if what in ("cancel", "retry") else "default")


async def test_a_grant_lets_a_service_cancel(town: Town) -> None:
    with psycopg.connect(town.admin, autocommit=True) as conn:
        conn.execute(f"grant execute on function pgconductor.cancel to {town.role('enqueuer')}".encode())
    async with app_of(town, "enqueuer") as service:
        run = await service.invoke(service.define_task("work", dict[str, Any], int).bind({}))
        assert await service.cancel(run.id)


def cli(dsn: str, *arguments: str) -> Any:
    done = CliRunner().invoke(main, ["--dsn", dsn, *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_a_reader_sees_everything_and_changes_nothing(town: Town) -> None:
    with town.session("enqueuer") as conn:
        id = str(answer(conn, "select pgconductor.invoke('work')"))
    dsn = town.dsn("reader")

    assert [run["id"] for run in cli(dsn, "runs", "list")] == [id]
    assert cli(dsn, "runs", "show", id)["run"]["task"] == "work"
    assert cli(dsn, "runs", "why", id)["reasons"][0]["code"] == "unknown_task"
    assert cli(dsn, "status")["ready"] == 1
    for listed in ("queues", "tasks", "schedules", "workers", "events"):
        cli(dsn, listed, "list")
    examined = json.loads(CliRunner().invoke(main, ["--dsn", dsn, "doctor", "--json"]).output)
    assert {check["name"]: check["verdict"] for check in examined}["schema"] == "ok"
    for command in (["runs", "cancel", id], ["queues", "pause", "default"], ["tasks", "limit", "work", "1"]):
        refused = CliRunner().invoke(main, ["--dsn", dsn, *command])
        assert refused.exit_code == 1
        assert "permission denied" in refused.output


def test_an_operator_needs_the_workers_role(town: Town) -> None:
    dsn = town.dsn("worker")
    with town.session("enqueuer") as conn:
        id = str(answer(conn, "select pgconductor.invoke('work')"))

    cli(dsn, "queues", "pause", "default")
    cli(dsn, "queues", "resume", "default")
    cli(dsn, "tasks", "limit", "work", "1")
    cli(dsn, "runs", "cancel", id)
    cli(dsn, "runs", "retry", id)

    with town.session("reader") as conn:
        assert answer(conn, "select state from pgconductor.executions where id = %s", UUID(id)) == "ready"


async def test_a_worker_without_the_right_to_make_a_trigger_is_told_the_grant(town: Town) -> None:
    with psycopg.connect(town.admin, autocommit=True) as conn:
        conn.execute(CONTACT)
    app = app_of(town, "worker")

    @app.task(on=[table("public.contact", "insert", columns=["id"])])
    async def sync(ctx: Context, change: Change[dict[str, Any]]) -> None: ...

    with pytest.raises(ConfigurationError, match=f"grant trigger on table public.contact to {town.login('worker')}"):
        await asyncio.wait_for(Orchestrator(app).start(), 20)
