"""Hints of a client: which go with a call, which behind it, and what becomes of a call that is not confirmed yet."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from pgconductor import Conductor, Context, hints
from pgconductor.client import CARRYING_CALLS_MAX
from pgconductor.engine import Carried, Enqueued, Query
from pgconductor.errors import ServerError
from pgconductor.task import Task
from pgconductor.written import AlikeExecutions
from tests.integration.conftest import client_of
from tests.sql.support import Db, row


async def add(ctx: Context, a: int, b: int = 1) -> int:
    return a + b


@pytest.fixture(autouse=True)
def no_silence_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "SILENCE_SECONDS", 600.0)


async def silence(app: Conductor) -> None:
    await app.close()  # all hints have gone out
    its_hints = client_of(app)._hints
    its_hints._called_at -= 1_200
    its_hints._quiet_until = 0.0


async def silent(app: Conductor) -> Task[..., int]:
    """Return a task that has a lane, after a silence."""
    task = app.create_task(add)
    await task.invoke(0)
    await silence(app)
    return task


@asynccontextmanager
async def listening(database: str) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as listener:
        await listener.execute("listen pgconductor")
        yield listener


def task_id(db: Db) -> int:
    found = db.execute("select id from task").fetchone()
    assert found is not None
    return int(found["id"])


async def test_a_call_after_a_silence_is_hinted_by_its_commit_and_those_right_behind_it_together(
    app: Conductor, db: Db, database: str
) -> None:
    task = await silent(app)
    async with listening(database) as listener:
        before = client_of(app).pool.query_count

        run = await task.invoke(1)

        (hint,) = [hint.payload async for hint in listener.notifies(timeout=30, stop_after=1)]
        assert hint == f"named 1 {task_id(db)} {run.id}"
        assert client_of(app).pool.query_count - before == 2  # it is confirmed by another
        for number in range(2, 6):
            await task.invoke(number)
        await app.close()  # what is on its way arrives
        assert {hint.payload async for hint in listener.notifies(timeout=30, stop_after=1)} == {"ready 1"}


async def test_calls_that_take_longer_than_the_pause_bring_their_hints_along(
    app: Conductor, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "PAUSE_SECONDS", 0.0)
    task = await silent(app)
    async with listening(database) as listener:
        before = client_of(app).pool.query_count

        for number in range(20):
            await task.invoke(number)
        await app.close()

        assert client_of(app).pool.query_count - before == 21  # the first comes after a silence
        first, *others = [hint.payload async for hint in listener.notifies(timeout=30, stop_after=20)]
        assert first.startswith("named 1 ")
        assert others == ["ready 1"] * 19


async def test_other_hints_go_out_beside_one_call_after_the_other(app: Conductor, database: str) -> None:
    task = app.create_task(add)
    await task.invoke(0)
    is_over = False

    async def keep_calling() -> None:
        while not is_over:
            await task.invoke(1)

    async with listening(database) as listener:
        calling = asyncio.create_task(keep_calling())
        await asyncio.sleep(0.05)
        client_of(app).hint(watchers=["somebody"])
        async for hint in listener.notifies(timeout=30):
            if hint.payload == "told somebody":
                break
        else:
            pytest.fail("the hint did not go out while calls went on")
        is_over = True
        await calling


async def test_calls_that_are_sent_together_bring_their_hint_along(app: Conductor, database: str) -> None:
    task = await silent(app)
    keyed = task.with_options(dedupe_key="k")
    async with listening(database) as listener:
        before = client_of(app).pool.query_count
        await app.invoke_many([task.bind(1), keyed.bind(2)])
        assert [hint.payload async for hint in listener.notifies(timeout=30, stop_after=1)] == ["ready 1"]
        assert client_of(app).pool.query_count - before == 1


async def test_plain_calls_of_a_task_that_are_sent_together_after_a_silence_are_named(
    app: Conductor, db: Db, database: str
) -> None:
    task = await silent(app)
    await app.invoke_many([task.bind(number) for number in range(CARRYING_CALLS_MAX + 1)])  # too many to name
    await silence(app)
    async with listening(database) as listener:
        before = client_of(app).pool.query_count
        runs = await app.invoke_many([task.bind(number) for number in range(CARRYING_CALLS_MAX)])
        (hint,) = [hint.payload async for hint in listener.notifies(timeout=30, stop_after=1)]
        assert hint == " ".join(["named 1", str(task_id(db)), *(str(run.id) for run in runs)])
        assert client_of(app).pool.query_count - before == 2


async def test_plain_calls_of_a_task_that_gather_go_as_one_array(
    app: Conductor, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await silent(app)
    sent: list[int] = []
    engine = client_of(app)._engine
    enqueue_alike = engine.enqueue_alike

    def noted(calls: AlikeExecutions, hint: Carried | None = None) -> Query[Enqueued]:
        sent.append(len(calls.ids))
        return enqueue_alike(calls, hint)

    monkeypatch.setattr(engine, "enqueue_alike", noted)
    runs = await asyncio.gather(*(task.invoke(number) for number in range(20)))
    assert sent == [19]  # the first goes at once
    for number, run in enumerate(runs):
        assert row(db, str(run.id))["payload"]["a"] == number


async def test_what_was_gathered_while_a_call_carried_its_hint_is_hinted_still(app: Conductor) -> None:
    await silent(app)
    client = client_of(app)
    before = client.pool.query_count
    with client._hints.carry(may_name=True) as hint:
        assert hint == "named"
        client.hint([1])  # of a call that was committed after the one that carries, and answered before it
        client._hints.went_along([1])
    await client.close()
    assert client.pool.query_count - before == 1


async def test_a_hint_does_not_name_one_call_alone_while_others_are_gathered(app: Conductor) -> None:
    await silent(app)
    client = client_of(app)
    client._hints._queues.add(1)
    with client._hints.carry(may_name=True) as hint:
        assert hint == "queue"
    await client.close()


async def test_calls_that_follow_each_other_are_not_confirmed_however_long_that_takes(
    app: Conductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await silent(app)
    client = client_of(app)
    confirmed: list[str] = []
    confirm = client._confirm

    async def slowly(execution_id: str) -> bool:
        confirmed.append(execution_id)
        await asyncio.sleep(2.2)
        return await confirm(execution_id)

    monkeypatch.setattr(client, "_confirm", slowly)
    monkeypatch.setattr(hints, "SILENCE_SECONDS", 2.0)
    for number in range(3):
        await task.invoke(number)
    assert len(confirmed) == 1


async def test_a_call_whose_commit_has_waited_for_the_disk_is_not_confirmed(app: Conductor) -> None:
    task = app.create_task(add)
    client = client_of(app)
    before = client.pool.query_count
    await task.invoke(0)  # its lane is made by a longer way, which tells no hint
    await app.close()
    assert client.pool.query_count - before == 2  # the call, and its hint behind it


async def test_a_call_of_which_it_is_not_known_whether_the_server_kept_it_says_so(
    app: Conductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await silent(app)
    engine = client_of(app)._engine

    def fail(execution_id: str) -> Query[bool]:
        return Query("select 1 / 0", (), bool)

    monkeypatch.setattr(engine, "confirm", fail)
    with pytest.raises(ServerError, match=r"whether the server has kept it is unknown.*look before you repeat it"):
        await task.invoke(1)


async def test_a_call_that_the_server_lost_before_its_disk_had_it_is_made_again(
    app: Conductor, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await silent(app)
    client = client_of(app)
    confirm = client._engine.confirm

    def lose(execution_id: str) -> Query[bool]:
        db.execute("delete from ready where execution_id = %s", (execution_id,))
        db.execute("delete from execution where id = %s", (execution_id,))
        db.execute("delete from audit.history where execution_id = %s", (execution_id,))
        return confirm(execution_id)

    monkeypatch.setattr(client._engine, "confirm", lose)
    run = await task.invoke(1)
    assert db.execute("select from execution where id = %s", (run.id,)).rowcount == 1


async def test_calls_at_the_same_time_are_hinted_by_one_commit_or_behind_them(app: Conductor, database: str) -> None:
    task = await silent(app)
    async with listening(database) as listener:
        await asyncio.gather(*(task.invoke(number) for number in range(200)))
        await app.close()
        heard = [hint.payload async for hint in listener.notifies(timeout=0.5)]
    assert {hint for hint in heard if not hint.startswith("named ")} <= {"ready 1"}
    assert len(heard) < 100  # one after the other, while the pool's other connections go on
