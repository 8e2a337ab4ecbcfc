"""An application as a user would write it; the tests beside it test it as a user would."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from pgconductor import ChildTimeout, Conductor, Context, Fail, RetryPolicy, SyncContext


@dataclass
class Bank:
    """What the application talks to."""

    charged: list[int] = field(default_factory=list[int])
    failures_left: int = 0

    async def charge(self, cents: int) -> str:
        if self.failures_left:
            self.failures_left -= 1
            raise ConnectionError("the bank does not answer")
        self.charged.append(cents)
        return f"charge-{len(self.charged)}"


@dataclass
class Deps:
    bank: Bank


@asynccontextmanager
async def lifespan() -> AsyncGenerator[Deps]:
    yield Deps(Bank())


app = Conductor(lifespan=lifespan, name="shop")


@dataclass
class Receipt:
    charge_id: str
    cents: int


@app.task(max_attempts=3, retry=RetryPolicy(first="10s"))
async def charge(ctx: Context[Deps], cents: int) -> Receipt:
    if cents <= 0:
        raise Fail("nothing to charge")
    return Receipt(await ctx.step("bank", ctx.deps.bank.charge, cents), cents)


async def price_of(order_id: int) -> int:
    return order_id * 100


@app.task
async def checkout(ctx: Context[Deps], order_id: int) -> str:
    cents = await ctx.step("price", price_of, order_id)
    receipt = await ctx.invoke("charge", charge.bind(cents))
    await ctx.sleep("cool-off", timedelta(days=1))
    return receipt.charge_id


@app.task(queue="slow")
async def ship(ctx: Context[Deps], order_id: int) -> str:
    await ctx.sleep("packing", "2h")
    return f"parcel-{order_id}"


@app.task
async def ship_soon(ctx: Context[Deps], order_id: int) -> str:
    try:
        return await ctx.invoke("ship", ship.bind(order_id), timeout="1h")
    except ChildTimeout:
        return "sent an apology"


@app.task
async def close_day(ctx: Context[Deps], orders: list[int]) -> list[str]:
    receipts = await ctx.invoke_all("charges", [charge.bind(order_id * 100) for order_id in orders])
    return [receipt.charge_id for receipt in receipts]


@app.task
def archive(ctx: SyncContext[Deps], order_id: int) -> int:
    pages = ctx.step("print", lambda: order_id + 1)
    ctx.sleep("dry", "1m")
    return ctx.step("bind", lambda: pages * 2)


async def insert_order(conn: Any, order_id: int) -> int:
    await conn.execute("create table if not exists placed (id int)")
    await conn.execute("insert into placed values (%s)", (order_id,))
    return order_id


@app.task
async def place(ctx: Context[Deps], order_id: int) -> int:
    return await ctx.transaction("insert", insert_order, order_id)
