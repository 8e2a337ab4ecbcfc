"""`pgconductor workers`: the processes, what they work on, and whether they live."""

from typing import Any

import click
from rich import box
from rich.table import Table
from rich.text import Text

from pgconductor.cli.session import Settings, json_option, pass_settings, print_json
from pgconductor.cli.text import ago, console, line, place_of


@click.group()
def workers() -> None:
    """List the processes that run executions."""


@workers.command("list")
@json_option
@pass_settings
def list_(settings: Settings, as_json: bool) -> None:
    """List the processes with their queues, tasks and running executions."""
    found = settings.ask(lambda client, engine: client.run(engine.list_workers()))
    if as_json:
        return print_json(found)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, collapse_padding=True)
    for name in ("worker", "version", "queues", "tasks", "running", "since", "last beat"):
        table.add_column(name, justify="right" if name == "running" else "left")
    for each in found:
        tasks = "not told" if each["tasks"] is None else line(", ".join(each["tasks"]), 60)
        table.add_row(
            place_of(each), line(each["version"]), line(", ".join(each["queues"]), 60),
            tasks, str(each["running_count"]), ago(each["started_at"]),
            sign_of_life(each, each["stop_requested_at"] or each["stopping_at"]),
        )  # fmt: skip
    console().print(table if found else "no workers; start one with `pgconductor worker module:app`")
    return None


def sign_of_life(worker: dict[str, Any], stops_at: str | None) -> Text:
    """Say when a process was last heard of, or that it is stopping, or that its event loop is blocked."""
    if not worker["live"]:
        return Text(ago(worker["beat_at"]), style="red")
    if worker["blocked_seconds"] is not None:
        return Text(f"blocked for {worker['blocked_seconds']:.0f}s", style="yellow")
    return Text("stopping", style="yellow") if stops_at else Text(ago(worker["beat_at"]))
