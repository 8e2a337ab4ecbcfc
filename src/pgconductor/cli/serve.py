"""`pgconductor worker` and `pgconductor dev`: run the executions of an application."""

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import click
from rich.logging import RichHandler

from pgconductor import embedded
from pgconductor.cli.devote import devote_process
from pgconductor.cli.loop import run
from pgconductor.cli.session import SCHEMA, Settings, pass_settings
from pgconductor.cli.text import console, line, redacted_dsn
from pgconductor.conductor import Conductor
from pgconductor.logs import JsonFormatter
from pgconductor.orchestrator import Orchestrator
from pgconductor.route import is_absent

log = logging.getLogger("pgconductor.worker")
STOP_SECONDS_MAX = 40
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


@click.command()
@click.argument("application", metavar="MODULE:APP")
@click.option("--reload/--no-reload", default=True, show_default=True, help="Start again when a Python file changes.")
@click.option("--concurrency", default=10, show_default=True, type=click.IntRange(1, 10_000), help="Of each queue.")
@pass_settings
def dev(settings: Settings, application: str, reload: bool, concurrency: int) -> None:
    """Develop: start Postgres, install the engine, run a worker, and start it again when the code changes."""
    out = console()
    dsn = settings.dsn
    out.print(f"[green]●[/] Postgres  {redacted_dsn(dsn)}", soft_wrap=True)
    command = [sys.executable, "-m", "pgconductor", "worker", application, "--concurrency", str(concurrency)]
    environment = os.environ | {"PGCONDUCTOR_URL": dsn}
    if reload:
        _run_with_reload(command, environment)
    else:
        raise SystemExit(subprocess.call(command, env=environment))


def load(application: str, settings: Settings) -> Conductor[Any]:
    """Import an application; options of the command line win over what its code says.

    Raises:
        click.UsageError: There is no such module, or no conductor in it, or one for another schema.
    """
    name, _, attribute = application.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            raise
        raise click.UsageError(f"there is no module {name!r} here ({Path.cwd()})") from error
    found = getattr(module, attribute, None) if attribute else _only_conductor(module)
    if not isinstance(cast("object", found), Conductor):
        raise click.UsageError(f"{application!r} is not a Conductor; name it as module:variable")
    app = cast("Conductor[Any]", found)
    if settings.schema not in (SCHEMA, app.schema):
        raise click.UsageError(f"--schema {settings.schema}: {application} is for {app.schema!r}; leave it out")
    if settings.given_dsn:
        app.use_address(settings.given_dsn)
    return app


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
    await orchestrator.start()
    devote_process()
    with contextlib.suppress(BrokenPipeError, SystemExit):  # rich exits where nobody reads: work goes on all the same
        _greet(app, orchestrator, queues or {task.queue: concurrency for task in app.tasks.values()})
    try:
        await orchestrator.stopped
    finally:
        await app.close()


async def _wait_for_server(dsn: str) -> None:
    """Return when a server answers, or after a minute: services that are started together come up in any order."""
    until = time.monotonic() + SERVER_SECONDS_MAX
    is_told = False
    while await asyncio.to_thread(is_absent, dsn) and time.monotonic() < until:
        if not is_told:
            is_told = True
            log.warning("no Postgres answers at %s yet; trying for %d s", redacted_dsn(dsn), SERVER_SECONDS_MAX)
        await asyncio.sleep(SERVER_PAUSE_SECONDS)


def _greet(app: Conductor[Any], orchestrator: Orchestrator, queues: dict[str, int]) -> None:
    out = console()
    out.print(f"[green]●[/] worker {orchestrator.id} on {line(redacted_dsn(app.dsn))}", soft_wrap=True)
    for name, number in sorted(queues.items()):
        tasks = ", ".join(sorted(task.name for task in app.tasks.values() if task.queue == name))
        out.print(f"  {line(name)} ({number} at once)  [dim]{line(tasks, 200)}[/]", soft_wrap=True)


def _log(level: str, form: str) -> None:
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise click.BadParameter(f"{level!r} is not a level", param_hint="--log-level")
    is_pretty = sys.stderr.isatty() and form == "text"
    handler = RichHandler(show_path=False, markup=False) if is_pretty else logging.StreamHandler()
    if form == "json":
        handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=number, handlers=[handler], format="%(levelname)s %(name)s: %(message)s")


def _run_with_reload(command: list[str], environment: dict[str, str]) -> None:
    try:
        from watchfiles import PythonFilter, watch
    except ImportError as error:
        raise click.ClickException('install "pgconductor[dev]" for reloading, or give --no-reload') from error
    out = console()
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: ending.set())
    process = _start(command, environment)
    try:
        for changes in watch(
            embedded.project_root(), watch_filter=PythonFilter(), raise_interrupt=False, stop_event=ending
        ):
            names = ", ".join(sorted({Path(path).name for _, path in changes}))
            out.print(f"[yellow]↻[/] {line(names, 100)} changed, starting again")
            _stop(process)
            process = _start(command, environment)
    finally:
        _stop(process)


def _start(command: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Run a worker in a session of its own, so that Ctrl-C reaches it through us alone."""
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
