"""What the checkers infer for the public surface. Never run: `test_orders.py` and `make check` read it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, assert_type
from uuid import UUID

from pgconductor import (
    Batch,
    BatchContext,
    Call,
    Child,
    Conductor,
    Context,
    EventDef,
    Run,
    State,
    SyncContext,
    Task,
)


@dataclass
class Deps:
    region: str


@dataclass
class Paid:
    cents: int


@asynccontextmanager
async def lifespan() -> AsyncGenerator[Deps, None]:
    yield Deps("eu")


def check_conductors_know_their_deps() -> None:
    assert_type(Conductor(), Conductor[None])
    assert_type(Conductor("postgresql://"), Conductor[None])
    assert_type(Conductor(lifespan=lifespan), Conductor[Deps])
    assert_type(Conductor(context=Deps("eu")), Conductor[Deps])


plain = Conductor()
app = Conductor(lifespan=lifespan)
paid = app.event("paid", Paid)


@plain.task
async def without_deps(ctx: Context, name: str) -> int:
    assert_type(ctx.deps, None)
    return len(name)


@plain.task()
def sync_without_deps(ctx: SyncContext, name: str = "x") -> None: ...


@app.task(name="child", max_attempts=2)
async def child(ctx: Context[Deps], number: int, *, factor: float = 2) -> float:
    assert_type(ctx.deps, Deps)
    return number * factor


@app.task(batch=Batch(10, "1s"))
async def batched(ctx: BatchContext[Deps], numbers: list[int]) -> list[str]:
    return [str(number) for number in numbers]


async def load(number: int) -> Paid:
    return Paid(number)


def parse(text: str) -> int:
    return int(text)


async def write(conn: Any, paid: Paid) -> UUID:
    raise NotImplementedError


@app.task
async def parent(ctx: Context[Deps], number: int) -> None:
    assert_type(await ctx.step("load", load, number), Paid)
    assert_type(await ctx.step("parse", parse, "7"), int)
    assert_type(await ctx.step_options(timeout="5s").step("lambda", lambda: 4.0), float)
    assert_type(await ctx.transaction("write", write, Paid(7)), UUID)
    assert_type(await ctx.invoke("child", child.bind(7), timeout="5m"), float)
    assert_type(await ctx.invoke_all("all", [child.bind(i) for i in range(3)]), list[float])
    gathered = await asyncio.gather(ctx.invoke("a", child.bind(1)), ctx.invoke("b", without_deps.bind("x")))
    assert_type(gathered, tuple[float, int])
    started = await ctx.start("started", child.bind(1, factor=3))
    assert_type(started, Child[float])
    assert_type(await started.result(), float)
    done, pending = await ctx.wait("first", [started], count=1)
    assert_type(done, list[Child[float]])
    assert_type(pending, list[Child[float]])
    assert_type(await ctx.wait_for("paid", paid, where={"cents": 5}, timeout="1h"), Paid)


@app.task
def sync_parent(ctx: SyncContext[Deps], number: int) -> str:
    assert_type(ctx.step("parse", parse, "7"), int)
    assert_type(ctx.invoke("child", child.bind(7)), float)
    assert_type(ctx.start("started", child.bind(1)).result_sync(), float)
    assert_type(ctx.wait_for("paid", paid), Paid)
    return ctx.deps.region


async def check_tasks_calls_and_runs() -> None:
    assert_type(paid, EventDef[Paid])
    assert_type(child.bind(7, factor=1.5), Call[float])
    assert_type(await child.invoke(7), Run[float])
    assert_type(await child.with_options(priority=3, delay="1m").invoke(7), Run[float])
    assert_type(sync_parent.invoke_sync(7).result_sync("30s"), str)
    assert_type(batched, Task[[int], str])
    assert_type(await (await batched.invoke(7)).result(), str)
    assert_type(await app.invoke_many([child.bind(i) for i in range(3)], priority=5), list[Run[float]])
    assert_type(await (await app.invoke(child.bind(1))).state(), State)
    assert_type(app.create_task(child_without_task, name="other"), Task[[int], float])
    assert_type(await app.define_task("far", dict, Paid).invoke(cents=7), Run[Paid])
    assert_type(await app.emit(paid, Paid(7)), UUID)


async def child_without_task(ctx: Context[Deps], number: int, /) -> float:
    return float(number)
