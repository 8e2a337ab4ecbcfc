"""`pgconductor queues`: what waits where, and stopping the starts."""

import click
from rich import box
from rich.table import Table
from rich.text import Text

from pgconductor.cli.session import Settings, json_option, pass_settings, print_json
from pgconductor.cli.text import ago, console, line


@click.group()
def queues() -> None:
    """List, pause and resume queues."""


@queues.command("list")
@json_option
@pass_settings
def list_(settings: Settings, as_json: bool) -> None:
    """List the queues with their counts."""
    found = settings.ask(lambda client, engine: client.run(engine.list_queues()))
    if as_json:
        return print_json(found)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, collapse_padding=True)
    table.add_column("queue")
    table.add_column("ready", justify="right")
    table.add_column("running", justify="right")
    table.add_column("")
    for queue in found:
        paused = Text(f"paused {ago(queue['paused_at'])}", style="yellow") if queue["paused_at"] else ""
        table.add_row(line(queue["name"]), str(queue["ready_count"]), str(queue["running_count"]), paused)
    console().print(table if found else "no queues yet")
    return None


@queues.command()
@click.argument("queue")
@json_option
@pass_settings
def pause(settings: Settings, queue: str, as_json: bool) -> None:
    """Stop the starts of a queue on all workers. What runs goes on."""
    is_known = _is_known(settings, queue)
    settings.conduct(lambda app: app.pause(queue))
    _done(queue, "paused", is_known=is_known, as_json=as_json)


@queues.command()
@click.argument("queue")
@json_option
@pass_settings
def resume(settings: Settings, queue: str, as_json: bool) -> None:
    """Let a paused queue start executions again."""
    is_known = _is_known(settings, queue)
    settings.conduct(lambda app: app.resume(queue))
    _done(queue, "resumed", is_known=is_known, as_json=as_json)


def _is_known(settings: Settings, queue: str) -> bool:
    found = settings.ask(lambda client, engine: client.run(engine.list_queues()))
    return any(each["name"] == queue for each in found)


def _done(queue: str, what: str, *, is_known: bool, as_json: bool) -> None:
    if as_json:
        print_json({"queue": queue, what: True})
    else:
        note = "" if is_known else "; nothing has used a queue of this name yet"
        console().print(f"{line(queue)} {what}{note}")
