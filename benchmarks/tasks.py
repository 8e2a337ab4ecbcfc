"""The tasks that are measured. All but one do nothing, so that what remains is the engine's."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from pgconductor import Call, Conductor, Context, Retry, Task

QUEUE = "bench"
FAILING_OF_TEN = 3
BUSY_SECONDS = 0.0001


def queue_names(count: int) -> list[str]:
    """Return the names of queues; the tasks are registered on the first."""
    return [QUEUE, *(f"{QUEUE} {number}" for number in range(1, count))]


@dataclass(frozen=True)
class Tasks:
    """The registered tasks."""

    noop: Task[[int], None]
    brief: Task[[int], None]
    busy: Task[[int], None]
    padded: Task[[int, str], None]
    failing: Task[[int], None]
    steps: Task[[int, int], int]
    parent: Task[[int], int]
    sequential: Task[[int], int]
    fan_out: Task[[int], int]
    fan: Task[[int, int], int]


def register(app: Conductor[None], hit: Callable[[int], None]) -> Tasks:
    """Register the tasks; `hit` is told the number of each run that begins."""
    return Tasks(*_alone(app, hit), *_parents(app, hit))


def _alone(
    app: Conductor[None], hit: Callable[[int], None]
) -> tuple[
    Task[[int], None],
    Task[[int], None],
    Task[[int], None],
    Task[[int, str], None],
    Task[[int], None],
    Task[[int, int], int],
]:
    @app.task(queue=QUEUE)
    async def noop(_ctx: Context, i: int) -> None:
        hit(i)

    @app.task(queue=QUEUE, keep_completed=False)
    async def brief(_ctx: Context, i: int) -> None:
        hit(i)

    @app.task(queue=QUEUE)
    async def busy(_ctx: Context, i: int) -> None:
        hit(i)
        until = time.thread_time() + BUSY_SECONDS
        while time.thread_time() < until:
            pass

    @app.task(queue=QUEUE)
    async def padded(_ctx: Context, i: int, padding: str) -> None:
        assert padding
        hit(i)

    @app.task(queue=QUEUE)
    async def failing(ctx: Context, i: int) -> None:
        if i % 10 < FAILING_OF_TEN and ctx.attempt == 1:
            raise Retry(after=0)
        hit(i)

    @app.task(queue=QUEUE)
    async def steps(ctx: Context, i: int, count: int) -> int:
        hit(i)
        return sum([await ctx.step(f"step {number}", plain, number) for number in range(count)])

    return noop, brief, busy, padded, failing, steps


def _parents(
    app: Conductor[None], hit: Callable[[int], None]
) -> tuple[Task[[int], int], Task[[int], int], Task[[int], int], Task[[int, int], int]]:
    @app.task(queue=QUEUE)
    async def child(_ctx: Context, i: int) -> int:
        hit(i)
        return i

    @app.task(queue=QUEUE)
    async def parent(ctx: Context, i: int) -> int:
        return await ctx.invoke("child", child.bind(i))

    @app.task(queue=QUEUE)
    async def sequential(ctx: Context, count: int) -> int:
        return sum([await ctx.invoke(f"child {number}", child.bind(number)) for number in range(count)])

    @app.task(queue=QUEUE)
    async def fan_out(ctx: Context, count: int) -> int:
        hit(count)
        calls: list[Call[int]] = [child.bind(number) for number in range(count)]
        return sum(await ctx.invoke_all("children", calls))

    @app.task(queue=QUEUE)
    async def fan(ctx: Context, i: int, count: int) -> int:
        return sum(await ctx.invoke_all("children", [child.bind(i * count + each) for each in range(count)]))

    return parent, sequential, fan_out, fan


def plain(number: int) -> int:
    """Be a step."""
    return number
