"""A worker process of whichever release is first on the path; `python worker_app.py`. Knows nothing but the package."""

import asyncio

from pgconductor import Conductor, Context, Orchestrator, RetryPolicy
from pgconductor.membership import Timing

app = Conductor()


@app.task(retry=RetryPolicy(first=0.05, max=0.05))
async def leaf(ctx: Context, n: int) -> int:
    """Take a step."""
    return await ctx.step("double", lambda: 2 * n)


@app.task
async def tree(ctx: Context, n: int) -> int:
    """Do a little of everything: steps, children, a sleep."""
    first = await ctx.invoke("first", leaf.bind(n))
    await ctx.sleep("nap", 0.02)
    others = await ctx.invoke_all("others", [leaf.bind(n + 1), leaf.bind(n + 2)])
    return first + sum(others)


async def main() -> None:
    """Run until stopped, by a signal or by a migration."""
    orchestrator = Orchestrator(app, concurrency=8, _timing=Timing(beat=0.2, sweep=0.5))
    await orchestrator.start()
    await orchestrator.stopped
    await app.close()


if __name__ == "__main__":
    asyncio.run(main())
