"""Hundreds of strings through every entry: stored and given back as they are, or refused; never executed."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from pgconductor import Conductor, Context, Orchestrator, cron, event
from pgconductor.cli import main
from pgconductor.errors import ConductorError, ConfigurationError, EncodeError
from pgconductor.model import Trigger
from tests.changes.support import follow, on
from tests.security.hostile import HOSTILE, is_storable
from tests.sql.support import Db

pytestmark = pytest.mark.covers("F81", "F61", "P40", "P43")
App = Conductor[None]
STORABLE = [text for text in HOSTILE if is_storable(text)]


@pytest.fixture(autouse=True)
def canary(db: Db) -> Iterator[None]:
    """A table that strings try to drop, and the superusers that there were."""
    db.execute("create table public.canary (id int); insert into public.canary values (1)")
    roles = db.execute("select rolname from pg_roles where rolsuper").fetchall()
    yield
    assert db.execute("select id from public.canary").fetchall() == [{"id": 1}]
    assert db.execute("select rolname from pg_roles where rolsuper").fetchall() == roles


@pytest.fixture
async def app(database: str) -> AsyncIterator[App]:
    async with Conductor(database) as app:
        yield app


def accepted(make: Callable[[str], object]) -> dict[str, Any]:
    """Return what was made of each string that was not refused; a refusal names the place and is one of ours."""
    made: dict[str, Any] = {}
    for text in HOSTILE:
        try:
            made[text] = make(text)
        except ConfigurationError as refused:
            assert refused.place  # noqa: PT017 (each is refused or not)
    return made


def column(db: Db, query: str) -> list[Any]:
    return [next(iter(row.values())) for row in db.execute(query.encode()).fetchall()]


def test_there_are_hundreds_of_them() -> None:
    assert len(HOSTILE) > 300


@pytest.mark.covers("F56", "F63")
async def test_payloads(app: App, db: Db) -> None:
    task = app.define_task("work", dict[str, Any], int)
    await app.invoke_many([task.bind({text: [text, {"in": text}]}) for text in STORABLE])

    kept = db.execute("select payload::text from executions").fetchall()
    texts = sorted(json.loads(row["payload"]).popitem() for row in kept)
    assert texts == sorted((text, [text, {"in": text}]) for text in STORABLE)
    for text in set(HOSTILE) - set(STORABLE):
        for payload in ({text: 1}, {"x": text}, {"x": [{"y": text}]}):
            with pytest.raises(EncodeError):
                await app.invoke(task.bind(payload))


async def test_task_names(app: App, db: Db) -> None:
    tasks = accepted(lambda name: app.define_task(name, dict[str, Any], int))
    await app.invoke_many([task.bind({"name": name}) for name, task in tasks.items()])

    kept = db.execute("select task, payload ->> 'name' as name from executions").fetchall()
    assert sorted(row["task"] for row in kept) == sorted(tasks)
    assert all(row["task"] == row["name"] for row in kept)
    assert {"a-b", "a_b", "a b", "'; drop table public.canary; --", "x" * 200} <= tasks.keys()
    assert not {"", " ", "\0", "a\nb", "x" * 201, "\x1b[2J"} & tasks.keys()


@pytest.mark.covers("F88")
async def test_nothing_is_imported_or_built_from_text(app: App, db: Db) -> None:
    value = {
        "__reduce__": ["os", "system"],
        "py/object": "antigravity.x",
        "$type": "System.X",
        "y": "!!python/name:eval",
    }

    @app.task
    async def echo(ctx: Context, value: dict[str, Any]) -> dict[str, Any]:
        return value

    for name in ("antigravity:geohash", "antigravity.geohash", "os:system", "__main__"):
        await app.invoke(app.define_task(name, dict[str, Any], int).bind({}))
    run = await app.invoke(echo.bind(value))
    await Orchestrator(app).drain()

    assert await run.result(timeout="20s") == value
    assert "antigravity" not in sys.modules
    assert column(db, "select distinct state from executions where task <> 'echo'") == ["ready"]


async def test_queue_names(app: App, db: Db) -> None:
    tasks = accepted(lambda name: app.define_task("work", dict[str, Any], int).with_options(queue=name))
    await app.invoke_many([task.bind({"name": name}) for name, task in tasks.items()])

    kept = db.execute("select queue, payload ->> 'name' as name from executions").fetchall()
    assert all(row["queue"] == row["name"] for row in kept)
    assert set(column(db, "select name from queues where name <> 'default'")) == tasks.keys() - {"default"}


async def test_dedupe_keys(app: App, db: Db) -> None:
    task = app.define_task("work", dict[str, Any], int)
    tasks = accepted(lambda key: task.with_options(dedupe_key=key))
    first = await app.invoke_many([each.bind({}) for each in tasks.values()])
    again = await app.invoke_many([each.bind({}) for each in tasks.values()])

    assert first == again
    assert len({run.id for run in first}) == len(tasks)
    assert sorted(column(db, "select dedupe_key from executions")) == sorted(tasks)


async def test_event_names(app: App, db: Db) -> None:
    events = accepted(lambda name: app.event(name, dict[str, Any]))
    await asyncio.gather(*(app.emit(each, {"name": name}) for name, each in events.items()))

    kept = db.execute("select name, payload ->> 'name' as told from events").fetchall()
    assert sorted(row["name"] for row in kept) == sorted(events)
    assert all(row["name"] == row["told"] for row in kept)


async def test_step_names_and_values(app: App, db: Db) -> None:
    refused: set[str] = set()

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        for text in HOSTILE:
            try:
                assert await ctx.step(text, str, text) == text
            except (ConfigurationError, EncodeError):
                refused.add(text)

    run = await app.invoke(work.bind())
    await Orchestrator(app).drain()
    await run.result(timeout="30s")

    kept = db.execute("select name, value #>> '{}' as value from steps").fetchall()
    assert sorted(row["name"] for row in kept) == sorted(set(HOSTILE) - refused)
    assert all(row["name"] == row["value"] for row in kept)


def test_cron_texts_and_zones() -> None:
    async def work(ctx: Context) -> None: ...

    def register(trigger: Trigger) -> object:
        return Conductor("host=nowhere").create_task(work, on=[trigger])

    assert accepted(lambda text: register(cron(text))) == {}
    assert accepted(lambda text: register(cron("0 0 * * *", tz=text))) == {}
    names = accepted(lambda text: register(cron("0 0 * * *", name=text)))
    assert "a-b" in names
    assert "a\nb" not in names


@pytest.mark.parametrize("text", [text for text in STORABLE if text.strip() and len(text) < 150][::12])
def test_tables_columns_and_conditions(database: str, db: Db, text: str) -> None:
    for row in (on("insert", table=text), on("insert", text, table="public.canary")):
        with pytest.raises(ConductorError):
            follow(database, row)
    try:
        follow(database, on("insert", table="public.canary", when=text))
    except ConductorError as refused:
        assert "task 'sync'" in str(refused)  # noqa: PT017 (a condition may also be a valid one)
    follow(database)


def test_a_column_may_be_called_as_it_likes(database: str, db: Db) -> None:
    names = [text for text in STORABLE if text and len(text.encode()) < 60]
    for start in range(0, len(names), 100):
        some = names[start : start + 100]
        columns = ", ".join('"' + name.replace('"', '""') + '" text' for name in some)
        db.execute(f'create table public."odd {start}" ({columns})'.encode())
        follow(database, on("insert", *some, table=f'public."odd {start}"'))
        marks = ", ".join(["%s"] * len(some))
        db.execute(f'insert into public."odd {start}" values ({marks})'.encode(), some)  # noqa: S608
        told = db.execute("select trigger_data -> 'new' as row from execution order by ord desc limit 1").fetchone()
        assert told == {"row": {name: name for name in some}}
        db.execute(f'drop table public."odd {start}"'.encode())


async def test_where_and_fields_of_events(app: App, db: Db) -> None:
    paid = app.event("paid", dict[str, Any])
    accepted(lambda text: event(paid, fields=[text]))
    accepted(lambda text: event(paid, where=text))
    for text in STORABLE:
        query = "select register_subscriptions('d', %s::json)"
        wanted = json.dumps([{"task": "work", "event": "paid", "fields": [text], "where": text}])
        try:
            db.execute(query, (wanted,))
        except psycopg.Error as refused:
            assert refused.sqlstate in ("PC003", "23514")  # noqa: PT017 (some are jsonpath)
        await app.emit(paid, {"text": text})


CALLS = [
    "select invoke(%s)",
    "select invoke('work', queue => %s)",
    "select invoke('work', dedupe_key => %s)",
    "select emit(%s)",
    "select cancel_by_key(%s, 'k', 'r')",
    "select list_runs(null, %s, null, 1)",
    "select schedule('work', 'a', %s)",
    "select set_limit(%s, 1)",
]


def test_what_sql_is_given(db: Db) -> None:
    made: set[str] = set()
    for text in STORABLE:
        for query in CALLS:
            try:
                db.execute(query.encode(), (text,))
            except psycopg.Error as refused:
                assert refused.sqlstate in ("PC003", "23514", "PC001", "PC002"), (query, text)  # noqa: PT017
            else:
                made.add(text)
    assert set(column(db, "select task from executions")) <= {*STORABLE, "work"}
    assert {"a-b", "a_b"} <= made


@pytest.mark.parametrize("text", STORABLE[::15])
def test_arguments_of_the_command_line(database: str, text: str) -> None:
    for arguments in (
        ["runs", "list", f"--task={text}", f"--queue={text}"],
        ["runs", "show", "--", text],
        ["runs", "why", "--", text],
        ["queues", "pause", "--", text],
        ["events", "list", f"--name={text}"],
        ["tasks", "limit", "--", text, "1"],
        [f"--schema={text}", "status"],
    ):
        done = CliRunner().invoke(main, ["--dsn", database, *arguments])
        assert done.exit_code in (0, 1, 2), (arguments, done.output)
        assert done.exception is None or isinstance(done.exception, SystemExit), (arguments, done.exception)
        assert "\x1b" not in done.output
        assert "\x9b" not in done.output
