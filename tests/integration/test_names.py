"""Two services of one schema: what each has declared, and what the start of one takes from the other."""

import logging
from collections.abc import AsyncGenerator
from typing import Any

import psycopg
import pytest

from pgconductor import Change, Conductor, Context, Event, Orchestrator, Tick, cron, event, table


@pytest.fixture
async def declaring(database: str, db: psycopg.Connection[Any]) -> AsyncGenerator[Conductor[None]]:
    """Return a service with a schedule, a subscription and a row trigger, which has been started."""
    db.execute("create table public.customer (id int primary key)")
    async with Conductor(database) as app:

        @app.task(on=cron("0 3 * * *", name="nightly"))
        async def report(ctx: Context, tick: Tick) -> None: ...

        @app.task(on=event(app.event("order.paid", dict)))
        async def bill(ctx: Context, paid: Event[dict[str, Any]]) -> None: ...

        @app.task(on=table("public.customer", "insert", columns=["id"]))
        async def welcome(ctx: Context, change: Change[dict[str, Any]]) -> None: ...

        async with Orchestrator(app):
            pass
        yield app


def declared(db: psycopg.Connection[Any]) -> tuple[int, ...]:
    row = db.execute(
        "select (select count(*) from schedule) as schedules, (select count(*) from subscription) as subscriptions,"
        " (select count(*) from pg_trigger where tgrelid = 'public.customer'::regclass) as triggers"
    ).fetchone()
    assert row is not None
    return row["schedules"], row["subscriptions"], row["triggers"]


async def start_another(database: str, name: str) -> None:
    async with Conductor(database, name=name) as other:

        @other.task
        async def work(ctx: Context) -> None: ...

        async with Orchestrator(other):
            pass


@pytest.mark.usefixtures("declaring")
async def test_a_service_without_a_name_of_its_own_says_what_its_start_takes_from_another(
    database: str, db: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert declared(db) == (1, 1, 1)
    caplog.set_level(logging.WARNING, "pgconductor")
    await start_another(database, "default")
    said = [record.getMessage() for record in caplog.records if "are removed" in record.getMessage()]
    assert declared(db) == (0, 0, 0)
    assert len(said) == 3
    for what in ("'nightly' of task 'report'", "task 'bill' to 'order.paid'", "public.customer for task 'welcome'"):
        assert sum(what in each and "Conductor(name=...)" in each for each in said) == 1


@pytest.mark.usefixtures("declaring")
async def test_a_service_with_a_name_of_its_own_takes_nothing_from_another(
    database: str, db: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "pgconductor")
    await start_another(database, "other")
    assert declared(db) == (1, 1, 1)
    assert not [record for record in caplog.records if "are removed" in record.getMessage()]


async def test_a_start_of_the_same_code_warns_of_nothing(
    declaring: Conductor[None], db: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "pgconductor")
    async with Orchestrator(declaring):
        pass
    assert declared(db) == (1, 1, 1)
    assert not [record for record in caplog.records if "are removed" in record.getMessage()]
