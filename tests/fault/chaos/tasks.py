"""What events, rows and a schedule start while programs run. Importing this adds the tasks to those of the programs."""

from dataclasses import dataclass

from pgconductor import Change, Context, Event, cron, event, table
from tests.fault.programs import app, told

TICKS = "tick"
"""The task that a schedule starts each second."""


@dataclass
class Effect:
    """A row that `ctx.transaction` wrote."""

    execution_id: str
    name: str


@app.task(on=event(told), max_crashes=100)
async def heard(ctx: Context, it: Event[dict[str, str]]) -> str:
    """Be started by each event, once."""
    return it.payload["to"]


@app.task(on=table("public.effect", "insert", columns=["execution_id", "name"]), max_crashes=100)
async def changed(ctx: Context, change: Change[Effect]) -> str:
    """Be started by each row, once."""
    return change.op


@app.task(on=cron("* * * * * *"), max_crashes=100)
async def tick(ctx: Context) -> None:
    """Be started by each second, once."""
