"""`pgconductor tasks`: what the database knows of each task, and changing limits while everything runs."""

from datetime import timedelta
from typing import Any

import click
from rich import box
from rich.table import Table

from pgconductor.cli.session import Settings, duration_above_zero, json_option, pass_settings, print_json
from pgconductor.cli.text import console, line


@click.group()
def tasks() -> None:
    """List tasks and change their limits."""


@tasks.command("list")
@json_option
@pass_settings
def list_(settings: Settings, as_json: bool) -> None:
    """List the tasks with their limits and counts."""
    found = settings.ask(lambda client, engine: client.run(engine.list_tasks()))
    if as_json:
        return print_json(found)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, collapse_padding=True)
    table.add_column("task")
    table.add_column("queue")
    table.add_column("ready", justify="right")
    table.add_column("running", justify="right")
    table.add_column("held by")
    for task in found:
        counts = (str(task["ready_count"]), str(task["running_count"]))
        table.add_row(line(task["name"]), line(task["queue"]), *counts, line("; ".join(_held_by(task))))
    console().print(table if found else "no tasks yet")
    return None


@tasks.command()
@click.argument("task")
@click.argument("limit", type=click.IntRange(min=0), required=False)
@click.option("--key", metavar="PATH", help="The limit of each value of this payload path, such as tenant.id.")
@click.option(
    "--per", type=duration_above_zero, metavar="DURATION", help="A rate: how many start within this time, such as 1m."
)
@click.option("--reset", is_flag=True, help="Give the limit back to the code.")
@json_option
@pass_settings
def limit(
    settings: Settings,
    task: str,
    limit: int | None,
    key: str | None,
    per: timedelta | None,
    reset: bool,
    as_json: bool,
) -> None:
    """Set a limit of a task on all workers, at once; it beats the one in the code until it is reset.

    What runs goes on. 0 stops the task's starts.
    """
    if (limit is None) != reset:
        raise click.UsageError("give a limit, or --reset")
    seconds = None if per is None else per.total_seconds()
    kind = "concurrency" if per is None else "rate"
    done = settings.ask(lambda client, engine: client.run(engine.set_limit(task, limit, kind, key, seconds)))
    if not done:
        raise click.ClickException(f"there is no task {task!r}, or no such limit of it")
    if as_json:
        print_json({"task": task, "kind": kind, "key": key, "limit": limit})
    else:
        what = "is the code's again" if reset else f"is {limit}"
        whose = f" per {line(key)}" if key else ""
        console().print(f"the {kind} limit of {line(task)}{whose} {what}")


def _held_by(task: dict[str, Any]) -> list[str]:
    said = [_limit(each) for each in task["limits"]]
    if task["window"]:
        said.append(str(task["window"]))
    if task["expires"]:
        said.append(f"expires after {task['expires']:g} s")
    return said


def _limit(limit: dict[str, Any]) -> str:
    what = f"{limit['max']} at once" if limit["kind"] == "concurrency" else f"{limit['max']} in {limit['per']:g} s"
    where = f" per {limit['key']}" if limit["key"] else ""
    return what + where + (" (set by hand)" if limit["operator_max"] is not None else "")
