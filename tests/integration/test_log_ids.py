"""The ids of a run are on every line that is written in it, by whatever logger, on a loop or in a thread."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from pgconductor import Conductor, Context, SyncContext
from pgconductor.logs import JsonFormatter
from tests.integration.conftest import Working

App = Conductor[None]
shop = logging.getLogger("shop")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a handler with the JSON formatter has written of `shop` and of tasks."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    loggers = [shop, logging.getLogger("pgconductor.task"), logging.getLogger("pgconductor.attempt")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield stream
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def lines(stream: io.StringIO) -> dict[str, dict[str, Any]]:
    return {line["message"]: line for line in map(json.loads, stream.getvalue().splitlines())}


async def test_lines_of_other_loggers_carry_the_ids(app: App, working: Working, written: io.StringIO) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        shop.info("in the handler")
        await ctx.step("first", lambda: shop.info("in the step"))
        await ctx.step_options(timeout=20).step("timed", lambda: shop.info("in a thread of a step"))
        ctx.logger.info("by ctx", extra={"order": 7})

    async with working():
        run = await work.invoke()
        await run.result(20)
    found = lines(written)
    steps = {message: line.get("step") for message, line in found.items()}
    assert steps == {
        "in the handler": None,
        "in the step": "first",
        "in a thread of a step": "timed",
        "by ctx": None,
    }
    assert {line["execution_id"] for line in found.values()} == {str(run.id)}
    assert found["by ctx"]["order"] == 7


async def test_a_child_and_a_plain_handler_tell_where_they_stand(
    app: App, working: Working, written: io.StringIO
) -> None:
    @app.task
    def child(ctx: SyncContext) -> None:
        ctx.step("inside", lambda: shop.info("in the child"))

    @app.task
    async def parent(ctx: Context) -> None:
        await ctx.invoke("child", child.bind())

    async with working():
        run = await parent.invoke()
        await run.result(20)
    line = lines(written)["in the child"]
    assert (line["root_id"], line["parent_id"], line["task"]) == (str(run.id), str(run.id), "child")
    assert (line["queue"], line["attempt"], line["step"]) == ("default", 1, "inside")


async def test_the_engines_own_lines_on_a_run_carry_its_ids(app: App, working: Working, written: io.StringIO) -> None:
    @app.task(max_attempts=1)
    async def broken(ctx: Context) -> None:
        raise ValueError("no")

    async with working():
        run = await broken.invoke()
        with pytest.raises(Exception, match="no"):
            await run.result(20)
    (line,) = lines(written).values()
    assert (line["execution_id"], line["error"]["message"]) == (str(run.id), "no")
