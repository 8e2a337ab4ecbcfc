"""`pgconductor doctor`: look for what will hurt, and say what to do about it."""

import asyncio
from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple

import click
import psycopg
from psycopg.conninfo import make_conninfo
from rich.text import Text

from pgconductor import schema
from pgconductor.cli.session import Settings, json_option, pass_settings, print_json
from pgconductor.cli.status import stranded_reason
from pgconductor.cli.text import console, counted, elapsed, line, place_of, redacted, redacted_dsn, safe
from pgconductor.client import LoopClient
from pgconductor.engine import Engine
from pgconductor.errors import ConductorError, ServerError
from pgconductor.notify import Listener
from pgconductor.route import STANDBY, STANDBY_REMEDY

VERSION_LOWEST: Final = 15
VERSION_HIGHEST: Final = 18
CONNECTIONS_LEFT_MIN: Final = 10
HINT_SECONDS_MAX: Final = 3.0
SNAPSHOT_SECONDS_MAX: Final = 900
SNAPSHOT_TRANSACTIONS_MAX: Final = 1_000_000
FAULTS: Final = (ConductorError, psycopg.Error, OSError)
"""How a question to the server ends that could not be answered; a time that ran out is an OSError."""
POOLER_REMEDY: Final = "work starts within the poll interval of a second; connect workers directly to be faster"


class Check(NamedTuple):
    """One finding."""

    name: str
    verdict: Literal["ok", "warning", "failure"]
    found: str
    remedy: str = ""


@click.command()
@json_option
@pass_settings
def doctor(settings: Settings, as_json: bool) -> None:
    """Check the server, the schema and the workers. Exits 1 if something is wrong; a warning is not."""
    checks = _examine(settings)
    if as_json:
        print_json([check._asdict() for check in checks])
    else:
        _print(checks)
    if any(check.verdict == "failure" for check in checks):
        click.get_current_context().exit(1)


def _examine(settings: Settings) -> list[Check]:
    try:
        facts = _server_facts(settings)
    except FAULTS as error:
        return [_failed("connection", error, "check the address and that Postgres runs")]
    checks = [Check("connection", "ok", redacted_dsn(settings.dsn)), *_judge_server(facts), _judge_schema(settings)]
    if checks[-1].verdict == "failure":
        return checks
    try:
        return [*checks, *settings.ask(_examine_engine)]
    except FAULTS as error:
        return [*checks, _failed("engine", error)]


def _server_facts(settings: Settings) -> dict[str, Any]:
    """Ask the server about itself; a standby too, which no other command talks to."""
    try:
        return settings.ask(lambda client, engine: client.run(engine.server_facts()))
    except ServerError as error:
        if error.reason != STANDBY:
            raise
    anywhere = Settings(make_conninfo(settings.dsn, target_session_attrs="any"), settings.schema)
    return anywhere.ask(lambda client, engine: client.run(engine.server_facts()))


def _judge_schema(settings: Settings) -> Check:
    try:
        planned = schema.plan(settings.dsn, settings.schema)
    except FAULTS as error:
        return _failed("schema", error)
    if planned:
        missing = f"{counted(len(planned), 'step')} to take in schema {settings.schema}"
        return Check("schema", "failure", missing, "run `pgconductor migrate`")
    return Check("schema", "ok", f"{settings.schema} is up to date")


def _failed(name: str, error: Exception, remedy: str = "") -> Check:
    """Make a finding of what could not be examined."""
    if isinstance(error, ServerError):
        return Check(name, "failure", line(redacted(error.reason)), line(redacted(error.remedy or remedy)))
    return Check(name, "failure", line(redacted(str(error))), remedy)


def _judge_server(facts: dict[str, Any]) -> Iterator[Check]:
    major = facts["version_number"] // 10_000
    if VERSION_LOWEST <= major <= VERSION_HIGHEST:
        yield Check("server", "ok", f"Postgres {facts['version']}")
    else:
        verdict: Literal["warning", "failure"] = "failure" if major < VERSION_LOWEST else "warning"
        remedy = f"use Postgres {VERSION_LOWEST} to {VERSION_HIGHEST}"
        yield Check("server", verdict, f"Postgres {facts['version']}", remedy)
    if facts["encoding"] == "UTF8":
        yield Check("encoding", "ok", "UTF8")
    else:
        yield Check("encoding", "failure", facts["encoding"], "create the database with encoding UTF8")
    if facts["in_recovery"]:
        yield Check("role", "failure", STANDBY, STANDBY_REMEDY)
    yield from _judge_durability(facts)
    left = facts["connections_max"] - facts["connections"]
    found = f"{left} of {facts['connections_max']} connections are free"
    if left >= CONNECTIONS_LEFT_MIN:
        yield Check("connections", "ok", found)
    else:
        yield Check("connections", "warning", found, "raise max_connections, or use a pooler for the application")


def _judge_durability(facts: dict[str, Any]) -> Iterator[Check]:
    unsafe = [name for name in ("fsync", "full_page_writes") if facts[name] != "on"]
    if unsafe:
        found = f"{' and '.join(unsafe)} off: a power cut destroys the database"
        yield Check("durability", "failure", found, "turn it on")
    elif facts["synchronous_commit"] in ("off", "local"):
        found = f"synchronous_commit is {facts['synchronous_commit']}: an accepted call may be lost in a crash"
        yield Check("durability", "warning", found, "turn it on, at least for this role")
    else:
        yield Check("durability", "ok", f"fsync on, synchronous_commit {facts['synchronous_commit']}")
    if facts["autovacuum"] != "on":
        yield Check("autovacuum", "warning", "off: the tables grow and claiming slows down", "turn it on")
    yield from _judge_snapshots(facts["snapshots"] or [])


def _judge_snapshots(held: list[dict[str, Any]]) -> Iterator[Check]:
    """Name who keeps dead rows alive: no vacuum removes what has died since."""
    for each in held:
        seconds, transactions = each["seconds"] or 0, each["transactions"] or 0
        if seconds > SNAPSHOT_SECONDS_MAX or transactions > SNAPSHOT_TRANSACTIONS_MAX:
            since = f"for {elapsed(seconds)}" if seconds else f"for {transactions:,} transactions"
            found = f"{line(each['holder'])} has held one {since}: dead rows stay, and the tables grow"
            yield Check("old snapshot", "warning", found, "end it, or drop it if nothing needs it any more")


async def _examine_engine(client: LoopClient, engine: Engine) -> list[Check]:
    found = await client.run(engine.overview())
    return [await _examine_hints(client, engine), *_judge_workers(found), *_judge_work(found)]


async def _examine_hints(client: LoopClient, engine: Engine) -> Check:
    """Send a hint and wait for it. Through a pooler there is nothing to wait for."""
    if client.pool.is_pooled:
        found = "a pooler stands in front: there is no LISTEN, so workers and waiting clients poll"
        return Check("hints", "warning", found, POOLER_REMEDY)
    heard = asyncio.Event()
    listener = Listener(await client.pool.address(), engine.schema, lambda kind, _: _hear(kind, heard))
    listener.start()
    try:
        async with asyncio.timeout(HINT_SECONDS_MAX):
            while not heard.is_set():
                await client.run(engine.notify("doctor"))
                await asyncio.wait([asyncio.ensure_future(heard.wait())], timeout=0.2)
    except TimeoutError:
        found = "no hint came back: LISTEN does not work here"
        return Check("hints", "warning", found, POOLER_REMEDY)
    finally:
        await listener.stop()
    return Check("hints", "ok", "LISTEN and NOTIFY work")


def _hear(kind: str, heard: asyncio.Event) -> None:
    if kind == "doctor":
        heard.set()


def _judge_workers(found: dict[str, Any]) -> Iterator[Check]:
    live = [each for each in found["workers"] if each["live"]]
    dead = len(found["workers"]) - len(live)
    if live:
        versions = ", ".join(sorted({line(each["version"]) for each in live}))
        yield Check("workers", "ok", f"{len(live)} live, version {versions}")
    else:
        yield Check("workers", "warning", "none is live", "start one with `pgconductor worker module:app`")
    if dead:
        remedy = "a live worker takes their executions over within seconds"
        yield Check("lost workers", "warning", f"{dead} stopped beating", remedy)
    for each in live:
        if each["blocked_seconds"] is not None:
            by = f"for {each['blocked_seconds']:.0f}s by {line(each['blocked_by'])}"
            blocked = f"{place_of(each)}: its event loop has been blocked {by}"
            yield Check("blocked worker", "warning", blocked, "await something there, or make it a plain `def` task")


def _judge_work(found: dict[str, Any]) -> Iterator[Check]:
    stranded = found["stranded"]
    for each in stranded[:20]:
        remedy = f"`pgconductor worker module:app -q {line(each['queue'])}`, with the code of the task"
        yield Check("stranded work", "warning", stranded_reason(each), remedy)
    if not stranded:
        yield Check("work", "ok", f"{found['ready']:,} ready, {found['running']:,} running")
    for name in found["paused"]:
        yield Check("paused queue", "warning", line(name), f"`pgconductor queues resume {line(name)}`")
    for each in found["paused_schedules"]:
        place = f"{line(each['task'])} {line(each['name'])}"
        yield Check("paused schedule", "warning", place, f"`pgconductor schedules resume {place}`")
    for name in found["closed"]:
        remedy = f"`pgconductor tasks limit {line(name)} --reset`, or another limit in the code"
        yield Check("closed task", "warning", f"{line(name)} has a limit of 0, so that none may start", remedy)


def _print(checks: list[Check]) -> None:
    out = console()
    marks = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failure": ("✗", "red")}
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark, style = marks[check.verdict]
        text = Text.assemble((f" {mark} ", style), (f"{check.name:<{width}}  ", "bold"), safe(check.found))
        if check.remedy:
            text.append(f"\n   {'':<{width}}  → {check.remedy}", style="dim")
        out.print(text, soft_wrap=True)
