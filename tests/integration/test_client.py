"""What a conductor sends and what is then there: one execution a call, with its options, whatever happens."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from msgspec.structs import replace
from psycopg.conninfo import make_conninfo

from pgconductor import (
    Batch,
    BatchContext,
    Call,
    Conductor,
    Context,
    Orchestrator,
    SyncContext,
    Tick,
    cron,
    invocable,
    pool,
)
from pgconductor.calls import CallPlan
from pgconductor.errors import (
    ConfigurationError,
    EncodeError,
    ExecutionNotFound,
    NotInvocable,
    ServerError,
)
from pgconductor.wire import Wire
from pgconductor.written import NewExecution
from tests.integration.conftest import Working, client_of
from tests.sql.support import Db
from tests.waiting import until


@dataclass
class Doc:
    id: int


async def add(ctx: Context, a: int, b: int = 1) -> int:
    return a + b


def measure(ctx: SyncContext, doc: Doc) -> int:
    return doc.id


def executions(db: Db) -> list[dict[str, Any]]:
    return db.execute("select * from executions order by id").fetchall()


# ---------------------------------------------------------------- one call


async def test_an_invoked_call_exists_when_invoke_returns(app: Conductor, db: Db) -> None:
    run = await app.create_task(add).invoke(2, b=3)

    (row,) = executions(db)
    assert (row["id"], row["task"], row["queue"], row["state"]) == (run.id, "add", "default", "ready")
    assert row["payload"] == {"a": 2, "b": 3}
    assert run.id.version == 7


async def test_options_of_the_task_arrive(app: Conductor, db: Db) -> None:
    later = datetime(2100, 1, 1, tzinfo=UTC)
    task = app.create_task(add).with_options(priority=7, run_at=later, queue="slow", dedupe_key="k")

    run = await task.invoke(1)

    (row,) = executions(db)
    assert (row["priority"], row["run_at"], row["queue"], row["dedupe_key"]) == (7, later, "slow", "k")
    assert await run.state() == "scheduled"


async def test_delay_runs_on_the_database_clock(app: Conductor, db: Db) -> None:
    await app.create_task(add).with_options(delay="1h").invoke(1)

    (row,) = executions(db)
    assert timedelta(minutes=59) < row["run_at"] - row["created_at"] <= timedelta(hours=1)


async def test_a_call_wins_over_the_options_of_invoke(app: Conductor, db: Db) -> None:
    call = app.create_task(add).with_options(priority=1).bind(1)

    await app.invoke(call, priority=9, queue="other")

    (row,) = executions(db)
    assert (row["priority"], row["queue"]) == (1, "other")


def test_invoke_sync_works_without_an_event_loop(database: str, db: Db) -> None:
    app = Conductor(database)

    run = app.create_task(measure).invoke_sync(Doc(4))

    assert [row["payload"] for row in executions(db)] == [{"id": 4}]
    assert asyncio.run(_state_and_close(app, run.id)) == "ready"


async def _state_and_close(app: Conductor, id: UUID) -> str:
    async with app:
        return await (await app.run(id)).state()


def test_invoke_sync_works_from_many_threads_and_beside_a_loop(database: str, db: Db) -> None:
    app = Conductor(database)
    task = app.create_task(add)

    async def main() -> None:
        await asyncio.gather(*(asyncio.to_thread(task.invoke_sync, n) for n in range(20)))
        task.invoke_sync(20)
        await app.close()

    asyncio.run(main())
    assert sorted(row["payload"]["a"] for row in executions(db)) == list(range(21))


def test_a_conductor_serves_one_event_loop_after_the_other(database: str, db: Db) -> None:
    app = Conductor(database)
    task = app.create_task(add)

    first = asyncio.run(task.invoke(1))
    second = asyncio.run(task.invoke(2))
    asyncio.run(app.close())

    assert {row["id"] for row in executions(db)} == {first.id, second.id}


# ---------------------------------------------------------------- refusals


async def test_wrong_arguments_reach_no_database(app: Conductor, db: Db) -> None:
    task = app.create_task(add)

    with pytest.raises(TypeError, match="missing"):
        await task.invoke()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    with pytest.raises(EncodeError):
        await task.invoke(float("nan"))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

    assert executions(db) == []


async def test_a_task_that_only_its_triggers_start_is_not_invocable(app: Conductor, db: Db) -> None:
    async def nightly(ctx: Context, tick: Tick) -> None: ...

    task = app.create_task(nightly, on=cron("@daily"))

    with pytest.raises(NotInvocable):
        await task.invoke()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    with pytest.raises(NotInvocable):
        await app.invoke_many([task.bind()])  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    assert executions(db) == []


def test_a_name_is_registered_once() -> None:
    app = Conductor()
    app.create_task(add)

    with pytest.raises(ConfigurationError, match="the name is taken"):
        app.create_task(add)
    assert list(app.tasks) == ["add"]


def test_a_required_trigger_parameter_needs_its_trigger() -> None:
    app = Conductor()

    async def report(ctx: Context, tick: Tick) -> None: ...
    async def rebuild(ctx: Context, full: bool) -> None: ...

    with pytest.raises(ConfigurationError, match="an invocation does not bring"):
        app.create_task(report, on=[invocable(), cron("@daily")])
    with pytest.raises(ConfigurationError, match="a schedule brings no payload"):
        app.create_task(rebuild, on=[invocable(), cron("@daily")])
    assert app.tasks == {}


def test_a_decorated_batch_task_takes_one_element() -> None:
    app = Conductor()

    @app.task(batch=Batch(size=10, timeout="1s"))
    async def index(ctx: BatchContext, docs: list[Doc]) -> list[bool]:
        return [True for _ in docs]

    assert index.bind(Doc(3)).payload == '{"id":3}'


async def test_a_conductor_gives_its_deps() -> None:
    app = Conductor(context=Doc(7))

    async with app.lifespan_context() as deps:
        assert deps == Doc(7)


# ---------------------------------------------------------------- one execution a key


async def test_a_dedupe_key_keeps_the_earlier_execution(app: Conductor, db: Db) -> None:
    task = app.create_task(add).with_options(dedupe_key="order-7")

    first, second = await task.invoke(1), await task.invoke(2)

    assert first == second
    assert [row["payload"] for row in executions(db)] == [{"a": 1}]


async def test_replace_updates_what_has_not_started(app: Conductor, db: Db) -> None:
    task = app.create_task(add).with_options(dedupe_key="order-7")

    first = await task.invoke(1)
    second = await task.with_options(on_duplicate="replace", priority=3).invoke(2)

    assert first == second
    assert [(row["payload"], row["priority"]) for row in executions(db)] == [({"a": 2}, 3)]


@pytest.mark.covers("P36")
async def test_racing_callers_of_a_key_get_one_execution(app: Conductor, db: Db) -> None:
    task = app.create_task(add).with_options(dedupe_key="k")

    runs = await asyncio.gather(*(task.invoke(n) for n in range(50)))

    assert len(set(runs)) == len(executions(db)) == 1


# ---------------------------------------------------------------- many calls


async def test_calls_in_bulk_are_one_statement(app: Conductor, db: Db) -> None:
    task = app.create_task(add)
    await task.invoke(0)
    before = client_of(app).pool.query_count

    runs = await app.invoke_many([task.bind(n) for n in range(1, 501)], priority=2)

    rows = {row["id"]: row for row in executions(db)}
    assert [rows[run.id]["payload"]["a"] for run in runs] == list(range(1, 501))
    assert {rows[run.id]["priority"] for run in runs} == {2}
    assert client_of(app).pool.query_count - before <= 2  # the statement, and a hint that may follow


async def test_no_calls_are_no_statement(app: Conductor) -> None:
    assert await app.invoke_many([]) == []
    assert client_of(app).pool.query_count == 0


async def test_bulk_keeps_and_replaces_within_itself(app: Conductor, db: Db) -> None:
    task = app.create_task(add)
    keep = task.with_options(dedupe_key="keep")
    replace = task.with_options(dedupe_key="replace", on_duplicate="replace")

    runs = await app.invoke_many([keep.bind(1), replace.bind(2), task.bind(3), keep.bind(4), replace.bind(5)])

    payload_of = {row["id"]: row["payload"]["a"] for row in executions(db)}
    assert [payload_of[run.id] for run in runs] == [1, 5, 3, 1, 5]


async def test_calls_at_the_same_time_share_statements(app: Conductor, db: Db) -> None:
    task = app.create_task(add)

    runs = await asyncio.gather(*(task.invoke(n) for n in range(300)))

    payload_of = {row["id"]: row["payload"]["a"] for row in executions(db)}
    assert [payload_of[run.id] for run in runs] == list(range(300))
    assert client_of(app).pool.query_count < 30


async def test_one_refused_call_fails_alone(app: Conductor, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    good, poison = app.create_task(add), app.define_task("poison", dict, int)
    row_of = CallPlan.row

    def poisoned(plan: CallPlan, call: Call[Any]) -> NewExecution:
        row = row_of(plan, call)
        return replace(row, task="") if row.task == "poison" else row

    monkeypatch.setattr(CallPlan, "row", poisoned)
    calls = [good.invoke(1), poison.invoke({}), good.invoke(2), good.invoke(3)]

    outcomes = await asyncio.gather(*calls, return_exceptions=True)

    assert [isinstance(each, ServerError) for each in outcomes] == [False, True, False, False]
    assert sorted(row["payload"]["a"] for row in executions(db)) == [1, 2, 3]


# ---------------------------------------------------------------- lost replies


class _Cutter:
    """Cuts the connection after the server has committed and before the client reads the reply."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cuts: int, function: str = "enqueue") -> None:
        self.cuts = cuts
        self._function = function
        self._ask = Wire.ask
        monkeypatch.setattr(Wire, "ask", self._cutting())

    def _cutting(self) -> Callable[[Wire, Any], Awaitable[Any]]:
        async def ask(wire: Wire, query: Any) -> Any:
            answer = await self._ask(wire, query)
            if self.cuts and self._function in query.statement:
                self.cuts -= 1
                wire.close()
                raise psycopg.OperationalError("server closed the connection unexpectedly")
            return answer

        return ask


async def test_gathered_calls_of_which_nothing_is_known_say_so_and_are_not_sent_again_one_by_one(
    app: Conductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = app.create_task(add)
    await task.invoke(0)
    monkeypatch.setattr(pool, "PATIENCE_SECONDS", 0.0)
    cutter = _Cutter(monkeypatch, cuts=1_000)

    outcomes = await asyncio.gather(*(task.invoke(n) for n in range(1, 201)), return_exceptions=True)

    assert all(isinstance(each, ServerError) and "is unknown" in str(each) for each in outcomes)
    assert 1_000 - cutter.cuts <= 4


@pytest.mark.covers("F45")
@pytest.mark.fault
async def test_a_lost_reply_makes_no_second_execution(app: Conductor, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    cutter = _Cutter(monkeypatch, cuts=2)

    run = await app.create_task(add).invoke(1)

    assert cutter.cuts == 0
    assert [row["id"] for row in executions(db)] == [run.id]


@pytest.mark.fault
async def test_a_lost_reply_in_bulk_makes_each_execution_once(
    app: Conductor, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Cutter(monkeypatch, cuts=1)
    task = app.create_task(add)
    calls = [task.bind(1), task.with_options(dedupe_key="k").bind(2), task.with_options(dedupe_key="k").bind(3)]

    runs = await app.invoke_many(calls)

    assert {row["id"] for row in executions(db)} == {run.id for run in runs}
    assert runs[1] == runs[2]


@pytest.mark.fault
async def test_a_lost_reply_of_calls_of_one_kind_makes_each_execution_once(
    app: Conductor, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutter = _Cutter(monkeypatch, cuts=1)
    task = app.create_task(add)

    runs = await app.invoke_many([task.bind(n) for n in range(3)], priority=2)

    assert cutter.cuts == 0
    assert [row["id"] for row in executions(db)] == [run.id for run in runs]
    assert [row["payload"]["a"] for row in executions(db)] == [0, 1, 2]


@pytest.mark.fault
async def test_a_retry_whose_reply_was_lost_says_so_and_is_not_repeated(
    app: Conductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await app.create_task(add).invoke(1)
    await run.cancel()
    cutter = _Cutter(monkeypatch, cuts=2, function="redrive")

    with pytest.raises(ServerError, match=r"was carried out is unknown .*; look before you repeat it"):
        await app.retry(run.id)

    assert cutter.cuts == 1
    assert await run.state() == "ready"


@pytest.mark.fault
async def test_a_cancel_whose_reply_was_lost_is_repeated(
    app: Conductor, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await app.create_task(add).invoke(1)
    cutter = _Cutter(monkeypatch, cuts=1, function="cancel")

    assert not await run.cancel("too late")  # it had ended when the second try came to it

    assert cutter.cuts == 0
    assert [(row["state"], row["cancel_reason"]) for row in executions(db)] == [("cancelled", "too late")]


async def test_a_repetition_that_is_refused_does_not_hide_that_the_first_try_may_have_been_carried_out(
    app: Conductor, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = app.create_task(add)
    ask, count = Wire.ask, 0

    async def lose_and_refuse(wire: Wire, query: Any) -> Any:
        nonlocal count
        count += 1
        if count > 1:
            raise psycopg.errors.DiskFull("no space left on device")
        await ask(wire, query)
        wire.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(Wire, "ask", lose_and_refuse)
    with pytest.raises(ServerError, match=r"whether the call was carried out is unknown .*no space left"):
        await task.invoke(1)
    assert len(executions(db)) == 1


@pytest.mark.fault
async def test_connections_that_the_server_ended_are_replaced(app: Conductor, db: Db) -> None:
    task = app.create_task(add)
    await asyncio.gather(*(task.invoke(n) for n in range(8)))

    db.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and application_name like 'pgconductor%'"
    )
    await task.invoke(8)

    assert len(executions(db)) == 9


async def test_a_server_that_is_not_there_is_reported_at_once() -> None:
    app = Conductor("host=127.0.0.1 port=1 user=nobody password=hunter2")

    with pytest.raises(ServerError, match="cannot connect to Postgres") as caught:
        await app.create_task(add).invoke(1)
    assert "hunter2" not in str(caught.value)


async def test_a_process_cannot_start_with_a_wrong_password(database: str) -> None:
    app = Conductor(make_conninfo(database, host="127.0.0.1", password="wrong"))
    app.create_task(add)

    with pytest.raises(ServerError, match=r"cannot connect to Postgres: .* password authentication failed"):
        await Orchestrator(app).start()


async def test_a_database_without_the_engine_is_reported(database: str) -> None:
    app = Conductor(database, schema="elsewhere")

    with pytest.raises(ServerError, match=r"pgconductor migrate.*await app\.migrate\(\)"):
        await app.create_task(add).invoke(1)
    await app.migrate()
    await app.create_task(add, name="again").invoke(1)
    await app.close()


async def test_a_development_server_is_migrated_by_the_first_call(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGCONDUCTOR_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)

    def ensure(**_: object) -> SimpleNamespace:
        return SimpleNamespace(dsn=database)

    monkeypatch.setattr("pgconductor.embedded.ensure", ensure)

    async with Conductor(schema="fresh") as app:
        run = await app.create_task(add).invoke(1)
        assert await run.state() == "ready"


# ---------------------------------------------------------------- what people do to executions


async def test_cancel_by_id_and_by_key(app: Conductor, db: Db) -> None:
    task = app.create_task(add)
    first, second = await task.invoke(1), await task.with_options(dedupe_key="k").invoke(2)

    assert await first.cancel("wrong order")
    assert await app.cancel(task, "k")
    assert [await run.state() for run in (first, second)] == ["cancelled", "cancelled"]
    assert not await app.cancel(first.id)
    assert not await app.cancel(uuid4())
    assert [row["cancel_reason"] for row in executions(db)] == ["wrong order", "Cancelled by user"]


async def test_cancel_wants_an_id_or_a_task_with_a_key(app: Conductor) -> None:
    task = app.create_task(add)

    with pytest.raises(ConfigurationError, match="give dedupe_key="):
        await app.cancel(task)
    with pytest.raises(ConfigurationError, match="give the task"):
        await app.cancel(uuid4(), "k")


async def test_retry_opens_a_cancelled_execution_again(app: Conductor) -> None:
    run = await app.create_task(add).invoke(1)

    assert not await app.retry(run.id)
    await run.cancel()
    assert await app.retry(run.id)
    assert await run.state() == "ready"


async def test_an_unknown_execution_is_not_found(app: Conductor) -> None:
    with pytest.raises(ExecutionNotFound):
        await app.run(uuid4())


async def test_pause_and_resume_a_queue(app: Conductor, db: Db) -> None:
    await app.pause("mail")
    assert [row["paused_at"] is None for row in db.execute("select paused_at from queues")] == [False]

    await app.resume("mail")
    assert [row["paused_at"] is None for row in db.execute("select paused_at from queues")] == [True]


async def test_close_is_idempotent_and_the_conductor_works_again(app: Conductor, db: Db) -> None:
    task = app.create_task(add)
    await task.invoke(1)

    await app.close()
    await app.close()
    query = "select count(*) as n from pg_stat_activity where datname = %s and application_name like 'pgconductor cl%%'"
    await until(lambda: db.execute(query, (db.info.dbname,)).fetchone() == {"n": 0})  # sessions end a moment later

    await task.invoke(2)
    assert len(executions(db)) == 2


async def test_a_handler_that_enqueues_outside_a_step_is_warned_of_once(
    app: Conductor, working: Working, caplog: pytest.LogCaptureFixture
) -> None:
    orders: asyncio.Queue[Call[int]] = asyncio.Queue()
    services: list[asyncio.Task[None]] = []

    @app.task
    async def called(ctx: Context, n: int) -> int:
        return n

    @app.task
    async def careless(ctx: Context) -> None:
        await called.invoke(1)
        await app.invoke_many([called.bind(2), called.bind(3)])

    @app.task
    async def half_careful(ctx: Context) -> None:
        await app.invoke_many([called.bind(2), called.with_options(dedupe_key="three").bind(3)])

    @app.task
    async def careful(ctx: Context) -> None:
        async def enqueue() -> None:
            await called.invoke(4)

        await ctx.step("enqueue", enqueue)
        await app.invoke(called.bind(5), dedupe_key="five")
        await ctx.start("six", called.bind(6))

    @app.task
    async def starting(ctx: Context) -> None:
        async def serve() -> None:
            await app.invoke(await orders.get())

        services.append(asyncio.ensure_future(serve()))

    async with working():
        for task in (careful, careless, careless, half_careful, starting):
            await (await task.invoke()).result("10s")
        orders.put_nowait(called.bind(7))
        await services[0]

    told = [record.getMessage() for record in caplog.records if record.name == "pgconductor.calls"]
    assert [line.partition(":")[0] for line in told] == [
        "the handler of task 'careless' enqueues 'called' outside a step",
        "the handler of task 'half_careful' enqueues 'called' outside a step",
    ]
