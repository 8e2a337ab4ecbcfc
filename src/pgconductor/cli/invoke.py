"""`pgconductor invoke`: start an execution from the shell."""

import asyncio
from datetime import timedelta
from typing import Any, Final

import click
import msgspec

from pgconductor.cli.session import Settings, duration, json_option, pass_settings, print_json
from pgconductor.cli.text import console, line, safe, state
from pgconductor.conductor import Conductor
from pgconductor.errors import ExecutionCancelled, ExecutionFailed
from pgconductor.options import Options
from pgconductor.run import Run

_UNSERVED: Final = ("unknown_task", "no_worker_for_queue", "no_worker_for_task")
TELL_SECONDS: Final = 3.0
"""After so long `--wait` says what keeps the execution from its end; without it, that takes no longer."""


def _payload(_: click.Context, __: click.Parameter, text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError) as error:
        raise click.BadParameter(f"not a JSON object: {error}") from error


@click.command()
@click.argument("task")
@click.argument("payload", default="{}", callback=_payload, metavar="[JSON]")
@click.option("--wait", is_flag=True, help="Wait for the end and print the result.")
@click.option("--timeout", type=duration, help="How long to wait, such as 30s.")
@click.option("--queue", help="Another queue than the task's.")
@click.option("--priority", type=int, help="Higher runs first.")
@click.option("--delay", type=duration, help="Start later, such as 5m.")
@click.option("--dedupe-key", help="Calls with one key get one execution.")
@json_option
@pass_settings
def invoke(
    settings: Settings,
    /,
    task: str,
    payload: dict[str, Any],
    wait: bool,
    timeout: timedelta | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Start an execution of TASK with a JSON object of its arguments.

    pgconductor invoke charge '{"order_id": 7, "cents": 500}' --wait
    """
    options: Any = {name: value for name, value in given.items() if value is not None}
    call = (task, payload, options)
    report, failed = settings.conduct(lambda app: _invoke(settings, app, *call, wait=wait, timeout=timeout))
    if as_json:
        print_json(report)
    else:
        _print(report)
    if failed:
        click.get_current_context().exit(1)


async def _invoke(
    settings: Settings, app: Conductor, task: str, payload: dict[str, Any], options: Options,
    *, wait: bool, timeout: timedelta | None,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    call = app.define_task(task, dict, object).bind(payload)
    run = await app.invoke(call, **options)
    report: dict[str, Any] = {"id": str(run.id), "task": task}
    if not wait:
        await _tell(settings, run, TELL_SECONDS, _UNSERVED)
        return report | {"state": await run.state()}, False
    try:
        return report | {"state": "completed", "result": await _wait(settings, run, timeout)}, False
    except ExecutionFailed as error:
        facts = {"type": error.error_type, "message": error.message, "traceback": error.remote_traceback}
        return report | {"state": "failed", "error": facts}, True
    except ExecutionCancelled as error:
        return report | {"state": "cancelled", "reason": error.reason}, True


async def _wait(settings: Settings, run: Run[object], timeout: timedelta | None) -> object:
    """Return the result; where it takes long, say meanwhile what the execution waits for."""
    telling = asyncio.create_task(_tell_later(settings, run))
    try:
        return await run.result(timeout)
    finally:
        telling.cancel()
        await asyncio.wait([telling])


async def _tell_later(settings: Settings, run: Run[object]) -> None:
    await asyncio.sleep(TELL_SECONDS)
    await _tell(settings, run, None)


async def _tell(settings: Settings, run: Run[object], seconds: float | None, only: tuple[str, ...] = ()) -> None:
    """Say on stderr what keeps an execution from its end; if only some reasons count, for one of these."""
    # who may invoke need not be allowed to read
    found = await settings.ask_aside(lambda client, engine: client.run(engine.why_not_running(str(run.id))), seconds)
    if found is not None and (not only or found["reasons"][0]["code"] in only):
        click.echo(f"{run.id} is {found['state']}: {line(found['summary'])}", err=True)


def _print(report: dict[str, Any]) -> None:
    out = console()
    out.print(state(report["state"]), safe(report["id"]))
    if "result" in report:
        print_json(report["result"])
    if "error" in report:
        error = report["error"]
        out.print(safe(error["traceback"] or f"{error['type']}: {error['message']}"), soft_wrap=True)
    if report.get("reason"):
        out.print(safe(report["reason"]))
