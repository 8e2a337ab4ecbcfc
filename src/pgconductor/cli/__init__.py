"""The command line: `pgconductor`.

Exit codes: 0 it worked, 1 it did not, 2 the command was not understood. `--json` prints one JSON document instead of
text for people.
"""

from typing import Any

import click
import psycopg

from pgconductor.cli.database import db, migrate
from pgconductor.cli.dev import dev
from pgconductor.cli.doctor import doctor
from pgconductor.cli.events import events
from pgconductor.cli.gen import gen
from pgconductor.cli.invoke import invoke
from pgconductor.cli.queues import queues
from pgconductor.cli.roles import roles
from pgconductor.cli.runs import runs
from pgconductor.cli.schedules import schedules
from pgconductor.cli.serve import worker
from pgconductor.cli.session import SCHEMA, Settings
from pgconductor.cli.status import status
from pgconductor.cli.tasks import tasks
from pgconductor.cli.text import redacted, safe
from pgconductor.cli.workers import workers
from pgconductor.errors import ConductorError


class _Commands(click.Group):
    """Shows commands in the order of their use, and errors of the library as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read along, such as `head`, has read enough: click ends the process without a word
        except (ConductorError, psycopg.Error, OSError, UnicodeEncodeError) as error:
            message = safe(redacted(str(error).strip()))
            click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--dsn", metavar="DSN", help="Postgres; else PGCONDUCTOR_URL, DATABASE_URL, the development server.")
@click.option("--schema", default=SCHEMA, show_default=True, help="The engine's schema.")
@click.version_option(package_name="pgconductor", prog_name="pgconductor")
@click.pass_context
def main(ctx: click.Context, dsn: str | None, schema: str) -> None:
    """Durable execution for Python that needs only Postgres."""
    ctx.obj = Settings(dsn, schema)


for _command in (
    *(dev, worker, migrate, invoke, runs, queues, tasks, events, workers, schedules),
    *(status, doctor, db, roles, gen),
):
    main.add_command(_command)
