"""`pgconductor status`: where everything stands, on half a screen."""

from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgconductor.cli.session import Settings, json_option, pass_settings, print_json
from pgconductor.cli.text import STYLES, ago, console, line, place_of, redacted_dsn
from pgconductor.cli.workers import sign_of_life


@click.command()
@json_option
@pass_settings
def status(settings: Settings, as_json: bool) -> None:
    """Show what is ready, running and waiting, and who works on it."""
    found = settings.ask(lambda client, engine: client.run(engine.overview()))
    if as_json:
        return print_json(found)
    out = console()
    out.print(Text(f"{redacted_dsn(settings.dsn)}  schema {settings.schema}", style="dim"), soft_wrap=True)
    out.print(_counts(found))
    _print_workers(out, found["workers"])
    for name in found["paused"]:
        out.print(Text(f"! queue {line(name)} is paused", style="yellow"))
    for each in found["stranded"]:
        out.print(Text(f"! {stranded_reason(each)}", style="yellow"))
    return None


def stranded_reason(each: dict[str, Any]) -> str:
    """Say why a task's ready work does not run."""
    return f"task {line(each['task'])} has work in queue {line(each['queue'])}: {line(each['reason'], 300)}"


def _counts(found: dict[str, Any]) -> Text:
    counts = Text("\n ")
    for name in ("ready", "running", "waiting", "scheduled"):
        counts.append(f" {found[name]:,} ", style=f"bold {STYLES[name]}" if found[name] else "dim")
        counts.append(f"{name}  ", style="" if found[name] else "dim")
    if found["oldest_ready_at"]:
        counts.append(f" oldest ready from {ago(found['oldest_ready_at'])}", style="dim")
    return counts


def _print_workers(out: Console, workers: list[dict[str, Any]]) -> None:
    if not workers:
        out.print(Text("\n no workers; start one with `pgconductor worker module:app`\n", style="yellow"))
        return
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, collapse_padding=True)
    for name in ("worker", "version", "queues", "running", "since", "last beat"):
        table.add_column(name, justify="right" if name == "running" else "left")
    for each in workers:
        table.add_row(
            place_of(each), line(each["version"]), line(", ".join(each["queues"]), 60),
            str(each["running_count"]), ago(each["started_at"]), sign_of_life(each, each["stopping_at"]),
        )  # fmt: skip
    out.print(table)
