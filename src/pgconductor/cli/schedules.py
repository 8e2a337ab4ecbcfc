"""`pgconductor schedules`: when what starts, and stopping, resuming and starting it by hand."""

import click
from rich import box
from rich.table import Table
from rich.text import Text

from pgconductor.cli.session import Settings, json_option, pass_settings, print_json
from pgconductor.cli.text import ago, console, counted, line
from pgconductor.client import LoopClient
from pgconductor.engine import Engine
from pgconductor.schedules import FiredNow

task_argument = click.argument("task")
name_argument = click.argument("name", required=False)


@click.group()
def schedules() -> None:
    """List, pause, resume and fire schedules."""


@schedules.command("list")
@json_option
@pass_settings
def list_(settings: Settings, as_json: bool) -> None:
    """List the schedules with their next ticks."""
    found = settings.ask(lambda client, engine: client.run(engine.list_schedules()))
    if as_json:
        return print_json(found)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, collapse_padding=True)
    for column in ("task", "schedule", "cron", "zone", "last", "next", ""):
        table.add_column(column)
    for each in found:
        name = "" if each["name"] == each["cron"] else line(each["name"])
        state = _state(each["paused_at"], each["error"])
        table.add_row(line(each["task"]), name, line(each["cron"]), line(each["tz"]), ago(each["last_tick_at"]),
                      ago(each["next_at"]), state)  # fmt: skip
    console().print(table if found else "no schedules yet")
    return None


@schedules.command()
@task_argument
@name_argument
@json_option
@pass_settings
def pause(settings: Settings, task: str, name: str | None, as_json: bool) -> None:
    """Stop a task's schedule, or all of them. What has started goes on."""
    _set_paused(settings, task, name, paused=True, as_json=as_json)


@schedules.command()
@task_argument
@name_argument
@json_option
@pass_settings
def resume(settings: Settings, task: str, name: str | None, as_json: bool) -> None:
    """Let paused schedules go on. Ticks that fell meanwhile do not run."""
    _set_paused(settings, task, name, paused=False, as_json=as_json)


@schedules.command()
@task_argument
@name_argument
@json_option
@pass_settings
def fire(settings: Settings, task: str, name: str | None, as_json: bool) -> None:
    """Start what a schedule starts, now, beside its own ticks."""

    async def start(client: LoopClient, engine: Engine) -> FiredNow:
        fired = await client.run(engine.fire_now(task, name))
        client.hint(fired.queues)
        return fired

    ids = settings.ask(start).ids
    if not ids:
        raise click.ClickException(_unknown(task, name))
    if as_json:
        print_json({"task": task, "ids": ids})
    else:
        console().print("\n".join(ids))


def _set_paused(settings: Settings, task: str, name: str | None, *, paused: bool, as_json: bool) -> None:
    rows = settings.ask(lambda client, engine: client.run(engine.list_schedules()))
    if not any(row["task"] == task and name in (None, row["name"]) for row in rows):
        raise click.ClickException(_unknown(task, name))
    count = settings.ask(lambda client, engine: client.run(engine.pause_schedules(task, name, paused=paused)))
    what = "paused" if paused else "resumed"
    if as_json:
        print_json({"task": task, what: count})
    else:
        console().print(f"{counted(count, 'schedule')} of {line(task)} {what}")


def _state(paused_at: str | None, error: str | None) -> Text:
    if error is not None:
        return Text(line(error, 60), style="red")
    return Text(f"paused {ago(paused_at)}" if paused_at else "", style="yellow")


def _unknown(task: str, name: str | None) -> str:
    return line(f"task {task!r} has no schedule" + ("" if name is None else f" named {name!r}"))
