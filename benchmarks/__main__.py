"""`make bench`, or `python -m benchmarks --help`."""

import sys
from pathlib import Path

import click
from rich.console import Console

from benchmarks import machine
from benchmarks.measure import NotAvailableError, Sample, Workload
from benchmarks.report import Report, figure
from benchmarks.server import Server, running_server
from benchmarks.workloads import ALL
from pgconductor.cli.loop import run

NAMES = [each.name for each in ALL]
TOLD = ", ".join(each.name + "*" * each.long for each in ALL) + " (* only when named)"


@click.command()
@click.option("--rounds", default=3, show_default=True, help="How often each is measured; medians are shown.")
@click.option("--only", multiple=True, metavar="NAME", help=f"Repeatable; a name or its beginning: {TOLD}.")
@click.option("--output", type=Path, default=Path("benchmarks/results/latest.json"), show_default=True)
@click.option("--statements", is_flag=True, help="Show what each SQL statement costs. The rates are lower then.")
def main(rounds: int, only: tuple[str, ...], output: Path, statements: bool) -> None:
    """Measure the engine on a Postgres of its own. Leaves with 1 when a round was not correct."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    chosen = _choose(only)
    with running_server(nested=statements) as server:
        report = Report(machine.describe(), server.describe())
        for workload in chosen:
            try:
                report.add(workload, [_measure(console, server, workload, number) for number in range(rounds)])
            except NotAvailableError as missing:
                console.print(f"[dim]{workload.name}: n/a, {missing}[/]")
            if statements:
                run(_print_statements(console, server))
    report.print(console)
    report.write(output)
    console.print(f"written to {output}")
    sys.exit(bool(report.faults))


def _choose(only: tuple[str, ...]) -> list[Workload]:
    """Return the workloads of these names or beginnings of names; without one all that are not long."""
    for name in only:
        if not any(each.startswith(name) for each in NAMES):
            raise click.BadParameter(f"no workload is called {name!r}: {', '.join(NAMES)}", param_hint="--only")
    return [each for each in ALL if (each.name.startswith(only) if only else not each.long)]


def _measure(console: Console, server: Server, workload: Workload, number: int) -> Sample:
    with console.status(f"{workload.title}, round {number + 1}"):
        sample: Sample = run(workload.run(server))
    console.print(f"[dim]{workload.name}: {figure(sample.value)} {workload.unit}[/]")
    return sample


async def _print_statements(console: Console, server: Server) -> None:
    """Show what the last round's statements cost; those inside functions are counted in their callers as well."""
    for ms, calls, query in await server.top_statements(30):
        console.print(f"{ms:9.1f} ms {calls:8,} calls  {' '.join(query.split())[:160]}", markup=False)


if __name__ == "__main__":
    main()
