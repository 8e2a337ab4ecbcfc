"""What cannot work is refused where it is written, by a message that names the place; no database is asked."""

import functools
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from pgconductor import (
    BatchContext,
    Conductor,
    Context,
    Orchestrator,
    RetryPolicy,
    SyncContext,
    event,
)
from pgconductor.errors import ConfigurationError

conductor = Conductor("host=nowhere.invalid")
app: Any = conductor
WRONG: Any = 5


@conductor.task
async def known(ctx: Context, number: int = 0) -> int:
    return number


class Handler:
    async def __call__(self, ctx: Context, number: int) -> int:
        return number


async def part(ctx: Context, factor: int, *, number: int) -> int:
    return factor * number


@pytest.mark.parametrize("dsn", ["", "nonsense", "http://somewhere", 5])
def test_an_address_of_no_postgres_is_refused_when_the_conductor_is_made(dsn: Any) -> None:
    with pytest.raises(ConfigurationError, match="Conductor: dsn: is not the address of a Postgres"):
        Conductor(dsn)


def test_a_password_in_a_wrong_address_is_not_repeated() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        Conductor("postgres+x://me:hunter2@somewhere/db")

    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("name", ["PGCONDUCTOR_URL", "DATABASE_URL"])
def test_a_password_in_a_wrong_address_of_the_environment_is_not_repeated(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGCONDUCTOR_URL", raising=False)
    monkeypatch.setenv(name, "postgresql+psycopg://me:hunter2@somewhere/db")
    with pytest.raises(ConfigurationError, match=f"{name}: is not the address of a Postgres") as refusal:
        Conductor().dsn  # noqa: B018

    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Conductor(schema=WRONG), "schema 5: a schema's name is a text"),
        (lambda: Conductor(lifespan=WRONG), "Conductor: lifespan: 5 is not a function"),
        (lambda: RetryPolicy(delays=WRONG), "RetryPolicy: delays: 5 is not a list of waits"),
        (lambda: event(WRONG), "event(): 5 is not an event definition"),
        (lambda: app.create_worker("q", poll_interval="x"), "worker 'q': poll_interval: 'x' is not a duration"),
        (lambda: Orchestrator(WRONG), "orchestrator: 5 is not a Conductor"),
        (lambda: Orchestrator(app, queues="default"), "orchestrator: queues: 'default' is not a sequence"),
        (lambda: Orchestrator(app, queues=[]), "orchestrator: queues: is empty"),
        (lambda: Orchestrator(app, queues={}), "orchestrator: queues: is empty"),
        (lambda: Orchestrator(app, queues=["a", "a"]), "orchestrator: queues: ['a', 'a'] repeats a name"),
        (lambda: Orchestrator(app, concurrency=0), "orchestrator: concurrency: 0 is out of bounds"),
        (lambda: Orchestrator(app, workers=WRONG), "orchestrator: workers: 5 is not a sequence of workers"),
        (lambda: Orchestrator(app, workers=[WRONG]), "orchestrator: workers: 5 is not a worker"),
        (lambda: app.create_task(5), "task: handler: 5 is not a function"),
    ],
)
def test_a_wrong_value_is_refused_where_it_is_written(made: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}"):
        made()


@pytest.mark.parametrize(
    ("called", "message"),
    [
        (lambda: app.invoke(known), "invoke: <Task known queue=default> is a task; bind its arguments"),
        (lambda: app.invoke("known"), "invoke: 'known' is not a call"),
        (lambda: app.invoke_many(known.bind(1)), "is not a sequence of calls; give a list"),
        (lambda: app.invoke_many(known.bind(n) for n in range(2)), "is not a sequence of calls; give a list"),
        (lambda: app.invoke_many([None]), "invoke_many: None is not a call"),
        (lambda: app.emit("order.paid", {}), "emit: 'order.paid' is not an event definition"),
        (lambda: app.run("7"), "run: '7' is not an execution's id; give a UUID"),
        (lambda: app.retry(None), "retry: None is not an execution's id"),
        (lambda: app.cancel(5), "cancel: 5 is not an execution's id"),
        (lambda: app.cancel(known, ""), "cancel: dedupe_key: '' is not a text"),
        (lambda: Orchestrator(app).stop(grace="soon"), "stop: grace: 'soon' is not a duration"),
    ],
)
async def test_a_wrong_argument_is_refused_before_anything_is_sent(called: Callable[[], Any], message: str) -> None:
    with pytest.raises((ConfigurationError, ValueError), match=re.escape(message)):
        await called()


def test_an_async_handler_with_the_context_of_a_plain_one_is_refused() -> None:
    async def work(ctx: SyncContext) -> None: ...

    with pytest.raises(ConfigurationError, match="an async def is given a Context, no SyncContext"):
        app.create_task(work)


def test_a_plain_handler_with_the_context_of_an_async_one_is_refused() -> None:
    def work(ctx: Context) -> None: ...

    with pytest.raises(ConfigurationError, match="a plain def is given a SyncContext, no Context"):
        app.create_task(work)


def test_a_batch_context_without_a_batch_is_refused() -> None:
    async def work(ctx: BatchContext, numbers: list[int]) -> list[int]:
        return numbers

    with pytest.raises(ConfigurationError, match="an async def is given a Context, no BatchContext"):
        app.create_task(work)


def test_a_generator_is_no_handler() -> None:
    async def work(ctx: Context) -> AsyncIterator[int]:
        yield 1

    def plain(ctx: SyncContext) -> Iterator[int]:
        yield 1

    for handler in (work, plain):
        with pytest.raises(ConfigurationError, match="the handler is a generator"):
            app.create_task(handler)


def test_a_partial_and_an_object_that_is_called_are_handlers() -> None:
    partial = app.create_task(functools.partial(part, number=2), name="partial")
    called = app.create_task(Handler(), name="called")

    assert partial.bind(3, number=4).payload == '{"factor":3,"number":4}'
    assert called.bind(5).payload == '{"number":5}'
