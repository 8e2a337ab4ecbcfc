"""The tasks that are measured. They do nothing, so that what remains is the engine's."""

from collections.abc import Callable
from dataclasses import dataclass

from pgconductor import Call, Conductor, Context, Task

QUEUE = "bench"


@dataclass(frozen=True)
class Tasks:
    """The registered tasks."""

    noop: Task[[int], None]
    parent: Task[[int], int]
    steps: Task[[int, int], int]
    sequential: Task[[int], int]
    fan_out: Task[[int], int]


def register(app: Conductor[None], hit: Callable[[int], None]) -> Tasks:
    """Register the tasks; `hit` is told the number of each run that begins."""

    @app.task(queue=QUEUE)
    async def noop(_ctx: Context, i: int) -> None:
        hit(i)

    @app.task(queue=QUEUE)
    async def child(_ctx: Context, i: int) -> int:
        hit(i)
        return i

    @app.task(queue=QUEUE)
    async def parent(ctx: Context, i: int) -> int:
        return await ctx.invoke("child", child.bind(i))

    @app.task(queue=QUEUE)
    async def steps(ctx: Context, i: int, count: int) -> int:
        hit(i)
        return sum([await ctx.step(f"step {number}", plain, number) for number in range(count)])

    @app.task(queue=QUEUE)
    async def sequential(ctx: Context, count: int) -> int:
        return sum([await ctx.invoke(f"child {number}", child.bind(number)) for number in range(count)])

    @app.task(queue=QUEUE)
    async def fan_out(ctx: Context, count: int) -> int:
        hit(count)
        calls: list[Call[int]] = [child.bind(number) for number in range(count)]
        return sum(await ctx.invoke_all("children", calls))

    return Tasks(noop, parent, steps, sequential, fan_out)


def plain(number: int) -> int:
    """Be a step."""
    return number
