"""`pgconductor roles`: the roles of the engine, and the script that makes them."""

import click
from rich import box
from rich.table import Table

from pgconductor.cli.session import Settings, json_option, pass_settings, print_json
from pgconductor.cli.text import console, line
from pgconductor.roles import names_for, roles_sql


@click.command()
@click.option("--sql", "as_sql", is_flag=True, help="Print the SQL that makes the roles, and connect to nothing.")
@click.option("--owner", metavar="NAME", help="Owns the schema and migrates; else SCHEMA_owner.")
@click.option("--worker", metavar="NAME", help="What orchestrators and operators need; else SCHEMA_worker.")
@click.option("--enqueuer", metavar="NAME", help="Starts executions and emits events; else SCHEMA_enqueuer.")
@click.option("--reader", metavar="NAME", help="Reads the views and reports; else SCHEMA_reader.")
@json_option
@pass_settings
def roles(settings: Settings, /, as_sql: bool, as_json: bool, **given: str | None) -> None:
    """List who may do what with the engine; with --sql, print what makes the roles.

    Run the script after `migrate`:  pgconductor roles --sql | psql "$(pgconductor db url)"
    """
    if as_sql:
        script = roles_sql(names_for(settings.schema, **given), settings.schema)
        return print_json({"sql": script}) if as_json else click.echo(script, nl=False)
    if any(given.values()):
        raise click.UsageError("a name is for --sql")
    found = settings.ask(lambda client, engine: client.run(engine.list_roles()))
    if as_json:
        return print_json(found)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, collapse_padding=True)
    for column in ("kind", "role"):
        table.add_column(column)
    for each in found:
        table.add_row(each["kind"], line(each["role"]))
    console().print(table)
    return None
