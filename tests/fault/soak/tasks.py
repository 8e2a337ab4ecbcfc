"""What the soak runs: mostly nothing, sometimes a small tree. Importing it adds the tasks to those of the programs."""

from pgconductor import Context
from tests.fault.programs import app


@app.task(keep_completed="20s", keep_failed="20s", max_crashes=1000)
async def nothing(ctx: Context, number: int) -> int:
    """Return the number."""
    return number


@app.task(keep_completed="20s", keep_failed="20s", max_crashes=1000)
async def tree(ctx: Context, number: int) -> list[int]:
    """Do a step, and wait for two children."""
    doubled = await ctx.step("double", _double, number)
    return await ctx.invoke_all("children", [nothing.bind(doubled), nothing.bind(doubled + 1)])


def _double(number: int) -> int:
    return 2 * number
