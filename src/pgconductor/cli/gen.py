"""`pgconductor gen`: code from what the database knows."""

from pathlib import Path

import click

from pgconductor.cli.session import Settings, json_option, pass_settings, print_json
from pgconductor.gen_types import render_types


@click.group()
def gen() -> None:
    """Write code from what the database knows."""


@gen.command("types")
@click.option("--schema", default="public", show_default=True, help="The schema of the tables.")
@click.option("--table", "tables", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="A file; else print.")
@json_option
@pass_settings
def types(settings: Settings, schema: str, tables: tuple[str, ...], output: Path | None, as_json: bool) -> None:
    """Write a class for the rows of each table and view, for `Change[...]`."""
    found = settings.ask(lambda client, engine: client.run(engine.describe_rows(schema, list(tables) or None)))
    missing = sorted(set(tables) - {table.name for table in found})
    if missing or not found:
        names = ", ".join(missing) or "nothing"
        raise click.ClickException(f"schema {schema} has no table {names}" if missing else f"schema {schema} is empty")
    if as_json:
        print_json(found)
        return
    source = render_types(schema, found)
    if output is None:
        click.echo(source, nl=False)
    else:
        output.write_text(source, "utf-8")
        click.echo(f"{len(found)} {'class' if len(found) == 1 else 'classes'} written to {output}", err=True)
