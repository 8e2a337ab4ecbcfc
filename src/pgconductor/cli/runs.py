"""`pgconductor runs`: executions, one by one and in lists."""

import asyncio
from collections.abc import Awaitable
from typing import Any, Final, cast, get_args
from uuid import UUID

import click
from rich import box
from rich.table import Table
from rich.text import Text

from pgconductor.cli.run_page import print_run
from pgconductor.cli.session import ASIDE_SECONDS, Settings, json_option, pass_settings, print_json
from pgconductor.cli.text import ago, console, line, marked, span, state
from pgconductor.conductor import Conductor
from pgconductor.errors import ExecutionNotFound
from pgconductor.model import State

NODES_MAX: Final = 500
NOTES_WIDTH_MIN: Final = 110


@click.group()
def runs() -> None:
    """List, show, explain, cancel and retry executions."""


@runs.command("list")
@click.option("--state", "state_", type=click.Choice(get_args(State)), help="Only those that stand so.")
@click.option("--task", help="Only those of a task.")
@click.option("--queue", help="Only those in a queue.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000), help="The most to list.")
@json_option
@pass_settings
def list_(
    settings: Settings, state_: str | None, task: str | None, queue: str | None, limit: int, as_json: bool
) -> None:
    """List executions, the newest first."""
    found = settings.ask(lambda client, engine: client.run(engine.list_runs(state_, task, queue, limit)))
    if as_json:
        print_json(found)
    elif not found:
        console().print("no executions")
    else:
        out = console()
        out.print(_table(found, out.width))


def _table(found: list[dict[str, Any]], width: int) -> Table:
    has_notes = width >= NOTES_WIDTH_MIN
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, collapse_padding=True)
    for name, justify in (("id", "left"), ("task", "left"), ("state", "left"), ("created", "right"), ("took", "right")):
        table.add_column(name, no_wrap=True, justify=cast("Any", justify))
    table.columns[0].style = "dim"
    if has_notes:
        table.add_column("", no_wrap=True, overflow="ellipsis", max_width=width - NOTES_WIDTH_MIN + 20)
    for each in found:
        took = span(each["started_at"], each["finished_at"]) if each["started_at"] else ""
        notes = [_note(each)] if has_notes else []
        name = line(each["task"], 40 if has_notes else 14)
        table.add_row(each["id"], name, state(each["state"]), ago(each["created_at"]), took, *notes)
    return table


def _note(each: dict[str, Any]) -> Text:
    if each["error"]:
        return Text(line(each["error"], 100), style="red")
    if each["state"] == "scheduled":
        return Text(f"due {ago(each['run_at'])}", style="dim")
    return Text(f"attempt {each['attempt']}" if each["attempt"] > 1 else "", style="dim")


@runs.command()
@click.argument("execution", type=click.UUID)
@json_option
@pass_settings
def show(settings: Settings, execution: UUID, as_json: bool) -> None:
    """Show one execution: its tree of children, and when each step, wait and child ran."""
    found = settings.ask(lambda client, engine: client.run(engine.show_run(str(execution), NODES_MAX)))
    if found is None:
        raise ExecutionNotFound(execution)
    if as_json:
        print_json(found)
    else:
        print_run(console(), found, NODES_MAX)


@runs.command()
@click.argument("execution", type=click.UUID)
@json_option
@pass_settings
def why(settings: Settings, execution: UUID, as_json: bool) -> None:
    """Say what keeps an execution from running."""
    found = settings.ask(lambda client, engine: client.run(engine.why_not_running(str(execution))))
    if found is None:
        raise ExecutionNotFound(execution)
    if as_json:
        return print_json(found)
    out = console()
    out.print(state(found["state"]), Text(line(f"{found['task']} in queue {found['queue']}")), soft_wrap=True)
    for reason in found["reasons"]:
        out.print(Text(f"  {line(reason['text'])}"), soft_wrap=True)
        for holder in reason.get("holders") or ():
            out.print(Text(f"    held by {line(holder)}", style="dim"), soft_wrap=True)
    return None


@runs.command()
@click.argument("execution", type=click.UUID)
@click.option("--reason", default="Cancelled by user", show_default=True, help="Stored with the execution.")
@json_option
@pass_settings
def cancel(settings: Settings, execution: UUID, reason: str, as_json: bool) -> None:
    """Ask for the end of an execution and its children."""
    stays = settings.conduct(lambda app: _state_if_unmoved(app, execution, app.cancel(execution, reason=reason)))
    _report(execution, stays, "cancelled", as_json=as_json)
    if not as_json and asyncio.run(_is_unwinding(settings, execution)):
        _add("it runs still, and ends at its next operation")


async def _is_unwinding(settings: Settings, execution: UUID) -> bool:
    """Tell whether an execution that was cancelled has not ended; False where that cannot be learnt soon."""
    found = await settings.ask_aside(
        lambda client, engine: client.run(engine.why_not_running(str(execution))), ASIDE_SECONDS
    )
    return found is not None and any(reason["code"] == "cancelling" for reason in found["reasons"])


def _add(text: str) -> None:
    console().print(Text(f"  {text}", style="dim"), soft_wrap=True)


@runs.command()
@click.argument("execution", type=click.UUID)
@json_option
@pass_settings
def retry(settings: Settings, execution: UUID, as_json: bool) -> None:
    """Run a failed or cancelled execution again; its finished steps stay."""
    stays = settings.conduct(lambda app: _state_if_unmoved(app, execution, app.retry(execution)))
    _report(execution, stays, "retried", as_json=as_json)
    if not as_json and (failed := asyncio.run(_failed_children(settings, execution))):
        _add(f"it goes on from what it has recorded, and sees again that {', '.join(failed)} failed")


async def _failed_children(settings: Settings, execution: UUID) -> list[str]:
    """Return the steps, at most five, whose recorded answer is that a child did not complete."""
    found = await settings.ask_aside(
        lambda client, engine: client.run(engine.show_run(str(execution), NODES_MAX)), ASIDE_SECONDS
    )
    steps: list[dict[str, Any]] = found["steps"] if found else []
    failed = {line(each["name"]) for each in steps if each["child_id"] and each["status"] in ("failed", "cancelled")}
    return [f"step {name!r}" for name in sorted(failed)[:5]]


async def _state_if_unmoved(app: Conductor[None], execution: UUID, move: Awaitable[bool]) -> str | None:
    """Return where an execution stands that was not moved; None if it was."""
    if await move:
        return None
    try:
        return await app.state_of(execution)
    except ExecutionNotFound:
        return "not known"


def _report(execution: UUID, stays: str | None, what: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"id": str(execution), what: stays is None})
    elif stays is None:
        console().print(marked("✓", "green", f"{what} {execution}"), soft_wrap=True)
    else:
        already = " already" if stays == what else ""
        click.echo(f"{execution} was not {what}: it is {stays}{already}", err=True)
    if stays is not None:
        click.get_current_context().exit(1)
