"""Group commit, kept memos, threads and sessions: the parts of a worker, each by itself."""

import asyncio
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from msgspec import Raw
from psycopg.rows import DictRow

from pgconductor import Conductor, Context, Orchestrator, batcher
from pgconductor.batcher import Batcher
from pgconductor.claimed import Recorded
from pgconductor.crew import KeptMemos
from pgconductor.memos import Memos
from pgconductor.queries import Query, as_is
from pgconductor.route import Route
from pgconductor.session import ConnectionLost, Session
from pgconductor.threads import Threads
from tests.waiting import until

Db = psycopg.Connection[DictRow]


class Sink:
    """Receives batches; refuses those that hold a negative number, as a database does."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.refused: list[int] = []
        self.open = asyncio.Event()
        self.batcher = Batcher("numbers", self.send, self.refuse, lambda _: 1, items_max=100)

    async def send(self, batch: Sequence[int]) -> None:
        await self.open.wait()
        if any(item < 0 for item in batch):
            raise psycopg.errors.UntranslatableCharacter("negative")
        self.batches.append(list(batch))

    def refuse(self, item: int, error: Exception) -> None:
        self.refused.append(item)


async def test_what_gathers_during_a_flush_goes_with_the_next_one() -> None:
    sink = Sink()
    sink.batcher.add(0)
    await asyncio.sleep(0)
    for number in range(1, 150):
        sink.batcher.add(number)
    sink.open.set()
    await sink.batcher.flush()
    assert [len(batch) for batch in sink.batches] == [1, 100, 49]
    assert [item for batch in sink.batches for item in batch] == list(range(150))


@pytest.mark.parametrize(
    ("a_pass", "seconds", "sizes"),
    [(40, 30.0, [80]), (31, 30.0, [31, 31]), (40, 0.0, [40, 40])],
    ids=["a burst", "less than one", "its time is over"],
)
async def test_what_comes_with_each_pass_of_the_loop_goes_together(
    a_pass: int, seconds: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher, "BURST_SECONDS", seconds)
    sink = Sink()
    sink.open.set()
    for number in range(2 * a_pass):
        sink.batcher.add(number)
        if number % a_pass == a_pass - 1:
            await asyncio.sleep(0)
    await sink.batcher.flush()
    assert [len(batch) for batch in sink.batches] == sizes


@pytest.mark.covers("P9")
async def test_one_refused_item_fails_alone() -> None:
    sink = Sink()
    sink.open.set()
    for number in [*range(40), -1, *range(40, 80)]:
        sink.batcher.add(number)
    await sink.batcher.flush()
    assert sink.refused == [-1]
    assert [item for batch in sink.batches for item in batch] == list(range(80))


async def test_what_is_left_at_the_end_or_comes_later_is_rejected() -> None:
    sink = Sink()
    for number in range(150):
        sink.batcher.add(number)
    await asyncio.sleep(0)
    await sink.batcher.close()
    sink.batcher.add(150)
    assert (sink.refused, sink.batches) == (list(range(151)), [])
    assert len(sink.batcher) == 0


def memos_of(size: int) -> Memos:
    value = Raw(b'"' + b"x" * size + b'"')
    return Memos.of([Recorded("step", 0, 0, "step", "completed", value, Raw(b"null"), None, None, False)])


def test_kept_memos_are_bounded_by_bytes_and_count() -> None:
    kept = KeptMemos(bytes_max=5_000, count_max=3)

    def keep(id: str, size: int) -> None:
        kept.keep(id, 1, memos_of(size))
        kept.confirm(id, 1)

    keep("large", 4_500)
    keep("a", 10)
    keep("b", 1_000)
    assert kept.take("large") is None
    keep("c", 10)
    keep("d", 10)
    assert kept.take("a") is None
    assert kept.take("d") is not None
    assert kept.take("d") is None


def test_kept_memos_count_only_once_their_own_park_is_stored() -> None:
    kept = KeptMemos()
    kept.keep("a", 1, memos_of(10))
    assert kept.take("a") is None
    kept.keep("a", 2, memos_of(10))
    kept.confirm("a", 1)
    assert kept.take("a") is None
    kept.keep("a", 3, memos_of(10))
    kept.confirm("a", 3)
    assert kept.take("a") is not None


def test_threads_are_reused_and_never_more_than_the_limit() -> None:
    threads = Threads(3, "test")
    gate = threading.Event()
    names = [threads.submit(lambda: (gate.wait(30), threading.current_thread().name)[1]) for _ in range(20)]
    gate.set()
    assert len({name.result(30) for name in names}) <= 3
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result(30)
    threads.close()


@pytest.mark.covers("F36")
async def test_work_runs_whatever_the_isolation_that_the_role_has_by_default(database: str, db: Db) -> None:
    name = db.info.dbname
    db.execute(f'alter database "{name}" set default_transaction_isolation = serializable'.encode())
    async with Conductor(database) as app:

        @app.task
        async def work(ctx: Context, number: int) -> int:
            return await ctx.step("step", lambda: number)

        await app.invoke_many([work.bind(i) for i in range(300)])
        await asyncio.gather(*(Orchestrator(app).drain() for _ in range(2)))
    rows = db.execute("select state, attempt, crashes, count(*) from executions group by 1, 2, 3").fetchall()
    assert [tuple(row.values()) for row in rows] == [("completed", 1, 0, 300)]


@pytest.mark.parametrize("with_options", [True, False])
async def test_a_session_reads_committed_with_start_up_options_and_without(
    with_options: bool, database: str, db: Db
) -> None:
    name = db.info.dbname
    db.execute(f'alter database "{name}" set default_transaction_isolation = serializable'.encode())
    async with Conductor(database) as app:
        session = Session(database)
        session.route._takes_options = with_options
        query = app.engine.register_queues(["a", "b"])
        queues = await session.run(query)
        assert sorted(queue.name for queue in queues or ()) == ["a", "b"]
        assert session._wire is not None
        isolation = await session._wire.ask(Query("select current_setting('transaction_isolation')", (), as_is))
        assert isolation == "read committed"
        await session.close()


async def test_a_session_repeats_what_is_harmless_and_tells_of_what_is_not(database: str, db: Db) -> None:
    async with Conductor(database) as app:
        session = Session(database, "victim")
        kill = "select pg_terminate_backend(pid, 10000) from pg_stat_activity where application_name = 'victim'"
        await session.run(app.engine.register_queues(["a"]))
        assert db.execute(kill).rowcount == 1
        assert await session.run(app.engine.register_queues(["a"]))
        assert db.execute(kill).rowcount == 1
        with pytest.raises(ConnectionLost):
            await session.run(app.engine.claim("00000000-0000-0000-0000-000000000000", 1, [], []))
        assert await session.run(app.engine.claim("00000000-0000-0000-0000-000000000000", 1, [], [])) is None
        await session.close()


async def test_a_connection_without_an_answer_in_time_is_closed_and_nothing_more_is_asked_of_it(
    database: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancels: list[object] = []

    async def cancel(connection: object, *, timeout: float) -> None:
        cancels.append(connection)

    monkeypatch.setattr(psycopg.AsyncConnection, "cancel_safe", cancel)
    async with Conductor(database) as app:
        session = Session(database, "silent")
        query = app.engine.register_queues(["a"])
        await session.run(query)
        found = db.execute("select pid from pg_stat_activity where application_name = 'silent'").fetchone()
        assert found is not None
        os.kill(found["pid"], signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError):
                await session.run(query, answer_timeout=0.2)
            assert await session.run(query, answer_timeout=30)  # on another connection
        finally:
            os.kill(found["pid"], signal.SIGCONT)
        await session.close()
    assert cancels == []


async def test_a_session_that_is_closed_while_it_connects_leaves_no_connection(
    database: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Conductor(database) as app:
        session, connect = Session(database, "late"), Route.connect

        async def close_meanwhile(route: Route, kind: Any) -> Any:
            connection = await connect(route, kind)
            await session.close()
            return connection

        monkeypatch.setattr(Route, "connect", close_meanwhile)
        with pytest.raises(ConnectionLost):
            await session.run(app.engine.register_queues(["a"]))
        await until(lambda: not db.execute("select from pg_stat_activity where application_name = 'late'").fetchall())
