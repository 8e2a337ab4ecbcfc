"""An order desk: typed tasks, steps, children, events, schedules, row changes and batches in one file."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
from pydantic import BaseModel, EmailStr

from pgconductor import (
    Batch,
    BatchContext,
    Change,
    ChildTimeout,
    Conductor,
    Context,
    Event,
    Fail,
    RetryPolicy,
    SyncContext,
    Tick,
    cron,
    event,
    invocable,
    table,
)


@dataclass
class Deps:
    http: httpx.AsyncClient


@asynccontextmanager
async def lifespan() -> AsyncGenerator[Deps]:
    async with httpx.AsyncClient() as http:
        yield Deps(http)


app = Conductor(lifespan=lifespan)


class Order(BaseModel):
    id: int
    email: EmailStr
    cents: int


@dataclass
class Receipt:
    charge_id: str


order_paid = app.event("order.paid", Order)


@app.task(max_attempts=5, retry=RetryPolicy(first="10s", max="5m"), timeout="30s")
async def charge(ctx: Context[Deps], order_id: int, *, cents: int) -> Receipt:
    r = await ctx.deps.http.post("https://pay.example/charges", json={"order": order_id, "cents": cents})
    if r.status_code == 402:
        raise Fail("card declined")
    return Receipt(r.json()["id"])


async def load(order_id: int) -> Order:
    raise NotImplementedError


async def mark_paid(conn: Any, order_id: int, charge_id: str) -> None: ...


@app.task
async def checkout(ctx: Context[Deps], order_id: int) -> str:
    order = await ctx.step("load", load, order_id)
    try:
        receipt = await ctx.invoke("charge", charge.bind(order.id, cents=order.cents), timeout="5m")
    except ChildTimeout:
        raise Fail("payment took too long") from None
    await ctx.transaction("mark-paid", mark_paid, order.id, receipt.charge_id)
    await ctx.emit(order_paid, order)
    await ctx.sleep("cool-off", timedelta(days=1))
    return receipt.charge_id


@app.task(on=cron("0 9 * * MON-FRI", tz="Europe/Berlin"))
async def morning_report(ctx: Context[Deps], tick: Tick) -> None: ...


class Customer(BaseModel):
    id: int
    email: EmailStr


@app.task(on=event(order_paid, fields=["id", "email"]))
async def thank_you(ctx: Context[Deps], paid: Event[Customer]) -> None: ...


@dataclass
class Contact:
    id: int
    email: str


@app.task(on=table("public.contact", "insert", columns=["id", "email"], when="new.email is not null"))
async def sync_crm(ctx: Context[Deps], change: Change[Contact]) -> None: ...


@app.task(on=[invocable(), cron("@daily", name="nightly")], window=("22:00", "06:00", "Europe/Berlin"), concurrency=1)
def rebuild_index(ctx: SyncContext[Deps], full: bool = False) -> int:  # plain def: runs in a thread
    return ctx.step("scan", lambda: 42 if full else 7)


@app.task(batch=Batch(size=100, timeout="5s"))
async def index_docs(ctx: BatchContext[Deps], docs: list[Order]) -> list[bool]:
    ctx.logger.info("indexing %d documents", len(docs))
    return [True for _ in docs]


async def main() -> None:
    run = await checkout.with_options(dedupe_key="order-7", delay="1h").invoke(7)
    charge_id: str = await run.result(timeout=30)
    await app.invoke_many([charge.bind(i, cents=100) for i in range(3)], priority=5)
    n: int = (rebuild_index.with_options(debounce="10s").invoke_sync(full=True)).result_sync()
    done: bool = await (await index_docs.invoke(Order(id=1, email="a@b.example", cents=5))).result()
    print(charge_id, n, done)
    await checkout.invoke("7")  # refused: wrong type
    await charge.invoke(7)  # refused: missing cents
    await app.emit(order_paid, Receipt("x"))  # refused: wrong payload
