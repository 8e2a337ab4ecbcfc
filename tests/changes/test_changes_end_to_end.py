"""From a writer's statement to a handler that is handed a typed change, with real workers."""

import asyncio
from dataclasses import dataclass

import pytest

from pgconductor import Change, Conductor, Context, Orchestrator, invocable, table
from pgconductor.errors import ConfigurationError
from tests.changes.support import CONTACT, triggers
from tests.integration.conftest import Working
from tests.sql.support import Db

App = Conductor[None]


@dataclass
class Contact:
    id: int
    email: str | None


@pytest.fixture(autouse=True)
def contact(db: Db) -> None:
    db.execute(CONTACT)


async def test_a_handler_is_handed_the_rows_as_its_own_type(app: App, db: Db, working: Working) -> None:
    seen: asyncio.Queue[tuple[str, Change[Contact]]] = asyncio.Queue()
    columns = ["id", "email"]

    @app.task(on=[table("public.contact", op, columns=columns) for op in ("insert", "update", "delete")])
    async def sync(ctx: Context, change: Change[Contact]) -> None:
        await seen.put((ctx.trigger, change))

    async with working():
        db.execute("insert into public.contact values (1, 'a')")
        assert await asyncio.wait_for(seen.get(), 20) == (
            "public.contact.insert",
            Change("public.contact.insert", "insert", None, Contact(1, "a")),
        )
        db.execute("update public.contact set email = null")
        _, change = await asyncio.wait_for(seen.get(), 20)
        assert (change.old, change.new) == (Contact(1, "a"), Contact(1, None))
        db.execute("delete from public.contact")
        _, change = await asyncio.wait_for(seen.get(), 20)
        assert (change.op, change.old, change.new) == ("delete", Contact(1, None), None)


async def test_changes_while_no_worker_runs_are_handled_when_one_does(app: App, db: Db, working: Working) -> None:
    seen: list[int] = []

    @app.task(on=table("public.contact", "insert", columns=["id", "email"]))
    async def sync(ctx: Context, change: Change[Contact]) -> None:
        assert change.new is not None
        seen.append(change.new.id)

    async with working():
        pass
    assert len(triggers(db)) == 1
    db.execute("insert into public.contact select i from generate_series(1, 20) i")
    await Orchestrator(app).drain()

    assert sorted(seen) == list(range(1, 21))


async def test_a_task_may_be_invoked_as_well(app: App, db: Db, working: Working) -> None:
    @app.task(on=[invocable(), table("public.contact", "insert", columns=["id", "email"])])
    async def sync(ctx: Context, change: Change[Contact] | None = None) -> str:
        return "invoked" if change is None else change.name

    async with working():
        assert await (await sync.invoke()).result(20) == "invoked"


async def test_a_start_with_an_invalid_condition_leaves_nothing_running(app: App, db: Db) -> None:
    @app.task(on=table("public.contact", "insert", columns=["id", "email"], when="new.nothing"))
    async def sync(ctx: Context, change: Change[Contact]) -> None: ...

    orchestrator = Orchestrator(app)
    with pytest.raises(ConfigurationError, match=r"column new\.nothing does not exist"):
        await orchestrator.start()

    assert not orchestrator.is_running
    assert triggers(db) == []


async def test_a_limited_task_handles_its_changes(app: App, db: Db, working: Working) -> None:
    seen: asyncio.Queue[int] = asyncio.Queue()

    @app.task(on=table("public.contact", "insert", columns=["id", "email"]), concurrency=1)
    async def sync(ctx: Context, change: Change[Contact]) -> None:
        assert change.new is not None
        await seen.put(change.new.id)

    async with working():
        db.execute("insert into public.contact values (1), (2), (3)")
        found = [await asyncio.wait_for(seen.get(), 20) for _ in range(3)]
    assert sorted(found) == [1, 2, 3]


def test_columns_that_cannot_build_the_annotated_row_are_refused_at_registration(app: App) -> None:
    with pytest.raises(
        ConfigurationError, match=r"columns: parameter 'change' takes .*Change.*, which needs 'email' too"
    ):

        @app.task(on=table("public.contact", "insert", columns=["id"]))
        async def sync(ctx: Context, change: Change[Contact]) -> None: ...
