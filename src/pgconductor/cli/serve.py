"""`pgconductor worker`: run the executions of an application."""

import asyncio
import contextlib
import importlib
import logging
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import click
from rich.text import Text

from pgconductor.cli.devote import devote_process
from pgconductor.cli.loop import run
from pgconductor.cli.session import SCHEMA, Settings, pass_settings
from pgconductor.cli.text import console, line, marked, redacted_dsn
from pgconductor.conductor import Conductor
from pgconductor.errors import ConductorError
from pgconductor.logs import LogSetup, below, set_up
from pgconductor.orchestrator import Orchestrator
from pgconductor.route import is_absent, why_absent

log = logging.getLogger("pgconductor.worker")
SERVER_SECONDS_MAX = 60
SERVER_PAUSE_SECONDS = 0.5


@click.command()
@click.argument("application", metavar="MODULE:APP")
@click.option("--queue", "-q", "queues", multiple=True, metavar="NAME[=N]", help="A queue, with its concurrency.")
@click.option("--concurrency", default=10, show_default=True, type=click.IntRange(1, 10_000), help="Of other queues.")
@click.option("--log-level", default="info", show_default=True, help="What is logged to the terminal.")
@click.option("--log-format", default="text", show_default=True, type=click.Choice(["text", "json"]), help="How.")
@pass_settings
def worker(
    settings: Settings, application: str, queues: tuple[str, ...], concurrency: int, log_level: str, log_format: str
) -> None:
    """Run the executions of an application, until SIGTERM or SIGINT. A Postgres that is not there yet gets a minute.

    pgconductor worker shop.tasks:app -q default=20 -q mail=2
    """
    _log(log_level, log_format)
    app = load(application, settings)
    run(_work(app, parse_queues(queues, concurrency), concurrency))


def load(application: str, settings: Settings) -> Conductor[Any]:
    """Import an application; options of the command line win over what its code says.

    Raises:
        click.UsageError: There is no such module, or no conductor in it, or one for another schema.
    """
    name, _, attribute = application.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    module = _import(name)
    found = getattr(module, attribute, None) if attribute else _only_conductor(module)
    if not isinstance(cast("object", found), Conductor):
        raise click.UsageError(f"{application!r} is not a Conductor; name it as module:variable")
    app = cast("Conductor[Any]", found)
    if settings.schema not in (SCHEMA, app.schema):
        raise click.UsageError(f"--schema {settings.schema}: {application} is for {app.schema!r}; leave it out")
    if settings.given_dsn:
        app.use_address(settings.dsn)
    return app


def _import(name: str) -> ModuleType:
    """Import the application's module; what is wrong with its code is shown from its own first line on."""
    try:
        return importlib.import_module(name)
    except ConductorError:
        raise  # it tells in one line what to mend
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise click.UsageError(f"there is no module {name!r} here ({Path.cwd()})") from error
        own = below(error.__traceback__, _is_of_import)
        shown = "".join(traceback.format_exception(error.with_traceback(own)))
        click.echo(f"{click.style('error:', fg='red', bold=True)} cannot import {name}\n{shown}", err=True, nl=False)
        raise SystemExit(1) from error


def _is_of_import(file: str) -> bool:
    return file in (__file__, importlib.__file__) or file.startswith("<frozen importlib")


def _only_conductor(module: ModuleType) -> object:
    found: list[object] = [value for value in vars(module).values() if isinstance(value, Conductor)]
    return found[0] if len(found) == 1 else None


def parse_queues(given: tuple[str, ...], concurrency: int) -> dict[str, int] | None:
    """Read `name=number` pairs; None when there are none.

    Raises:
        click.BadParameter: One has a number that is not a concurrency.
    """
    queues: dict[str, int] = {}
    for each in given:
        name, _, number = each.partition("=")
        if number and not (number.isdecimal() and 1 <= int(number) <= 10_000):
            raise click.BadParameter(f"{each!r}: the concurrency is a number from 1 to 10,000", param_hint="--queue")
        queues[name] = int(number) if number else concurrency
    return queues or None


async def _work(app: Conductor[Any], queues: dict[str, int] | None, concurrency: int) -> None:
    orchestrator = Orchestrator(app, queues=queues, concurrency=concurrency)
    await _wait_for_server(app.dsn)
    async with app, orchestrator:
        devote_process()
        # whoever cannot be greeted (the disk is full, or nobody reads, where rich exits) is worked for all the same
        with contextlib.suppress(OSError, UnicodeError, SystemExit):
            _greet(app, orchestrator, queues or {task.queue: concurrency for task in app.tasks.values()})
        await orchestrator.stopped


async def _wait_for_server(dsn: str) -> None:
    """Return when a server answers, or after a minute: services that are started together come up in any order."""
    until = time.monotonic() + SERVER_SECONDS_MAX
    is_told = False
    while await asyncio.to_thread(is_absent, dsn) and time.monotonic() < until:
        if not is_told and (reason := await asyncio.to_thread(why_absent, dsn)):
            is_told = True
            where = redacted_dsn(dsn)
            log.warning("no Postgres answers at %s yet (%s); trying for %d s", where, reason, SERVER_SECONDS_MAX)
        await asyncio.sleep(SERVER_PAUSE_SECONDS)


def _greet(app: Conductor[Any], orchestrator: Orchestrator, queues: dict[str, int]) -> None:
    out = console()
    where = f"worker {orchestrator.id} on {line(redacted_dsn(app.dsn))}"
    out.print(marked("●", "green", where), soft_wrap=True)
    for name, number in sorted(queues.items()):
        tasks = ", ".join(sorted(task.name for task in app.tasks.values() if task.queue == name))
        shown = Text.assemble(f"  {line(name)} ({number} at once)  ", (line(tasks, 200), "dim"))
        out.print(shown, soft_wrap=True)


def _log(level: str, form: str) -> None:
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise click.BadParameter(f"{level!r} is not a level", param_hint="--log-level")
    set_up(LogSetup(number, form == "json"))
