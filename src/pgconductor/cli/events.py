"""`pgconductor events`: what was emitted, who listens, and emitting by hand."""

import asyncio
from typing import Any

import click
import msgspec
from rich import box
from rich.table import Table
from rich.text import Text

from pgconductor.cli.session import ASIDE_SECONDS, Settings, json_option, pass_settings, print_json
from pgconductor.cli.text import ago, console, line


def _payload(_: click.Context, __: click.Parameter, text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise click.BadParameter(f"not JSON: {error}") from error


@click.group()
def events() -> None:
    """List and emit events."""


@events.command("list")
@click.argument("name", required=False)
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@json_option
@pass_settings
def list_(settings: Settings, name: str | None, limit: int, as_json: bool) -> None:
    """List the newest events, of one NAME or of all."""
    found = settings.ask(lambda client, engine: client.run(engine.list_events(name, limit)))
    if as_json:
        return print_json(found)
    table = _table("emitted", "event", "payload", "id")
    for each in found:
        payload = Text(line(_shown(each["payload"]))[:200])
        table.add_row(ago(each["emitted_at"]), Text(line(each["name"])), payload, each["id"])
    console().print(table if found else f"no events named {line(name)}" if name else "no events yet")
    return None


@events.command()
@json_option
@pass_settings
def listeners(settings: Settings, as_json: bool) -> None:
    """List which tasks events start, and how many executions wait for them."""
    found = settings.ask(lambda client, engine: client.run(engine.list_subscriptions()))
    if as_json:
        return print_json(found)
    table = _table("event", "starts", "where", "waiting")
    for each in found:
        tasks: list[dict[str, Any]] = each["tasks"] or [{"task": "", "where": None}]
        for number, task in enumerate(tasks):
            name, waiting = (line(each["event"]), str(each["waiting_count"])) if number == 0 else ("", "")
            table.add_row(Text(name), Text(line(task["task"])), Text(line(task["where"] or "")), waiting)
    console().print(table if found else "nobody listens to events")
    return None


@events.command()
@click.argument("name")
@click.argument("payload", default="{}", callback=_payload, metavar="[JSON]")
@json_option
@pass_settings
def emit(settings: Settings, name: str, payload: object, as_json: bool) -> None:
    """Emit the event NAME with a JSON payload.

    pgconductor events emit order.paid '{"order_id": 7, "cents": 500}'
    """
    heard = _listened_to(settings)  # asked before: whoever waits for it waits no longer then
    id = settings.conduct(lambda app: app.emit(app.event(name, object), payload))
    if as_json:
        print_json({"id": str(id), "event": name})
    else:
        console().print(f"{line(name)} emitted: {id}")
    if heard is not None and name not in heard:
        click.echo(f"no task is started by {line(name)}, and no execution waits for it now", err=True)


def _listened_to(settings: Settings) -> set[str] | None:
    """Return the events that somebody listens to; None where whoever emits may not know, or not soon."""
    found = asyncio.run(
        settings.ask_aside(lambda client, engine: client.run(engine.list_subscriptions()), ASIDE_SECONDS)
    )
    return None if found is None else {each["event"] for each in found}


def _shown(payload: object) -> str:
    return payload if isinstance(payload, str) else msgspec.json.encode(payload).decode()


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column)
    return table
