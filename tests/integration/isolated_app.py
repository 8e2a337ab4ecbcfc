"""Tasks that run in processes of their own; imported by the tests and by those processes."""

import os
import time

from pgconductor import Conductor, Context, SyncContext

app = Conductor(os.environ.get("PGCONDUCTOR_URL"), name="isolated")


@app.task(executor="process")
def where(ctx: SyncContext, n: int) -> list[int]:
    pid = ctx.step("pid", os.getpid)
    doubled = ctx.invoke("double", double.bind(n))
    return [pid, doubled]


@app.task
async def double(ctx: Context, n: int) -> int:
    return n * 2


@app.task(executor="process")
async def on_its_loop(ctx: Context, n: int) -> int:
    return await ctx.step("double", lambda: n * 2)


@app.task(executor="process", max_crashes=3)
def deadly(ctx: SyncContext) -> None:
    os._exit(7)


@app.task(executor="process", timeout=0.2, max_attempts=1)
def endless(ctx: SyncContext) -> None:
    while True:
        time.sleep(0.01)


@app.task(executor="process")
def length_of(ctx: SyncContext, text: str) -> int:
    return len(text)
