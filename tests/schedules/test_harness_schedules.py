"""Schedules on a clock that the test moves, with the testing kit."""

from datetime import datetime

from pgconductor import Conductor, Context, Tick, cron, invocable
from pgconductor.testing import ConductorTest


async def test_advance_runs_each_tick_at_its_own_instant(conductor_test: ConductorTest) -> None:
    app = Conductor[None]("postgresql://nowhere")
    seen: list[datetime] = []

    @app.task(on=cron("0 * * * *"))
    async def report(ctx: Context, tick: Tick) -> None:
        seen.append(tick.scheduled_at)

    t = await conductor_test(app)
    await t.drain()
    start = t.now
    await t.advance(hours=24)
    assert len(seen) == len({*seen}) == 24
    assert all(start < at <= t.now and (at.minute, at.second) == (0, 0) for at in seen)


async def test_a_handler_schedules_on_the_clock_of_the_test(conductor_test: ConductorTest) -> None:
    app = Conductor[None]("postgresql://nowhere")
    seen: list[str] = []

    @app.task
    async def greet(ctx: Context, name: str, tick: Tick | None = None) -> None:
        seen.append(name)

    @app.task(on=invocable())
    async def begin(ctx: Context) -> None:
        await ctx.schedule("hello", greet.bind("Ada"), cron="@daily", tz="Asia/Tokyo")

    t = await conductor_test(app)
    await begin.invoke()
    await t.advance(days=3)
    assert seen == ["Ada"] * 3
