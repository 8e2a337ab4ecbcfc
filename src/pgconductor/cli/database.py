"""`pgconductor migrate` and `pgconductor db`: the schema, and the development server."""

import os
import shutil
from pathlib import Path

import click
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor import embedded, schema
from pgconductor.cli.session import Settings, json_option, pass_settings, print_json
from pgconductor.cli.text import SECRETS, console, line, marked, redacted_dsn, safe


@click.command()
@click.option("--plan", "mode", flag_value="plan", help="Say what would be done, and do nothing.")
@click.option("--sql", "mode", flag_value="sql", help="Print the SQL for those who run it by hand.")
@click.option("--since", type=click.IntRange(0), default=0, help="With --sql: the last migration that is there.")
@click.option(
    "--wait",
    "wait_seconds",
    type=click.FloatRange(0),
    default=schema.STOP_SECONDS_MAX,
    show_default=True,
    help="Seconds that workers of other releases get to stop, where a migration breaks them.",
)
@json_option
@pass_settings
def migrate(settings: Settings, mode: str | None, since: int, wait_seconds: float, as_json: bool) -> None:
    """Install the engine, or bring it up to this release. Safe to repeat, and while workers run."""
    if mode == "sql":
        click.echo(schema.sql(settings.schema, since), nl=False)
        return
    if mode == "plan":
        steps = schema.plan(settings.dsn, settings.schema)
    else:
        steps = schema.migrate(settings.dsn, settings.schema, wait_seconds=wait_seconds)
    if as_json:
        print_json({"schema": settings.schema, "planned" if mode == "plan" else "done": steps})
        return
    out = console()
    for step in steps:
        out.print(marked("·" if mode == "plan" else "✓", "green", step))
    if not steps:
        out.print(marked("✓", "green", f"schema {line(settings.schema)} is up to date"))


@click.group()
def db() -> None:
    """The development server: a Postgres of the project's own."""


@db.command()
@json_option
def start(as_json: bool) -> None:
    """Start the project's server unless it runs."""
    state = embedded.ensure()
    if as_json:
        print_json({"pid": state.pid, "port": state.port, "data": state.data_dir, "dsn": redacted_dsn(state.dsn)})
        return
    where = f"Postgres runs on port {state.port}, data in {safe(state.data_dir)}"
    console().print(marked("●", "green", where), soft_wrap=True)


@db.command()
@json_option
def stop(as_json: bool) -> None:
    """Stop the project's server. Its data stay."""
    stopped = embedded.stop()
    if as_json:
        print_json({"stopped": stopped})
    else:
        console().print("stopped" if stopped else "it was not running")


@db.command()
@pass_settings
def url(settings: Settings) -> None:
    """Print the address in use, with its password, for other programs: psql "$(pgconductor db url)"."""
    click.echo(settings.dsn)


@db.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@pass_settings
def psql(settings: Settings, arguments: tuple[str, ...]) -> None:
    """Open psql on the database in use; further arguments are psql's."""
    program = shutil.which("psql")
    if program is None:
        raise click.ClickException("psql is not installed; see `pgconductor db url` for other programs")
    given = conninfo_to_dict(settings.dsn)
    password = given.pop("password", None)  # not on the command line, where every user of the machine sees it
    if secrets := sorted(SECRETS & given.keys()):
        raise click.ClickException(
            f"every user of the machine would see {', '.join(secrets)} on psql's command line; "
            "write the address into a service file (~/.pg_service.conf), and give service=NAME"
        )
    environment = os.environ | ({"PGPASSWORD": str(password)} if password else {})
    os.execve(program, [Path(program).name, make_conninfo("", **given), *arguments], environment)  # noqa: S606
