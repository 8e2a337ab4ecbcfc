"""`make bench-peers`, or `python -m benchmarks.peers --help`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from benchmarks import machine
from benchmarks.peers.environments import Package, SetupError, ensure, read_packages
from benchmarks.peers.peer import Peer
from benchmarks.peers.picture import draw
from benchmarks.peers.report import Comparison
from benchmarks.peers.results import Results
from benchmarks.peers.runner import Form, Runner
from benchmarks.server import Server, running_server
from benchmarks.worker import run

RESULTS = Path("benchmarks/results")
ROUNDS = 3


async def _prepare(console: Console, server: Server, packages: Sequence[Package], results: Results) -> list[Peer]:
    """Return the peers that can be measured; the others are named, with the reason."""
    ready = []
    for package in packages:
        peer = Peer(package, server)
        try:
            await peer.prepare()
        except (SetupError, RuntimeError, OSError) as reason:
            console.print(f"[yellow]{package.name} is not measured:[/] {escape(str(reason)[-600:])}")
            results.versions[package.name] = f"not measured: {str(reason).splitlines()[-1][:120]}"
            continue
        results.versions[package.name] = peer.version
        if not package.is_node:
            results.python_peers.add(package.name)
        ready.append(peer)
    return ready


async def _compare(console: Console, server: Server, packages: Sequence[Package], form: Form) -> Comparison:
    results = Results()
    peers = await _prepare(console, server, packages, results)
    await Runner(console, server, peers, results, form).run()
    conditions = {"machine": machine.describe(), "server": server.describe(), "form": str(form)}
    return Comparison(results, conditions, packages)


@click.command()
@click.option("--rounds", type=int, help=f"How many interleaved rounds; by default {ROUNDS}, with `--quick` one.")
@click.option("--only", multiple=True, metavar="NAME", help="Repeatable; a measure or its beginning.")
@click.option("--peers", metavar="NAMES", help="Only these, separated by commas; `none` for ours alone.")
@click.option("--quick", is_flag=True, help="Leave out what takes long.")
@click.option("--full", is_flag=True, help="Measure slow peers in everything too.")
@click.option("--huge", is_flag=True, help="With ten million ready and ten million finished, which takes long to fill.")
@click.option("--setup", is_flag=True, help="Only make the environments of the peers.")
@click.option("--page", type=Path, help="Write the page of the documentation here, with its picture beside it.")
@click.option("--output", type=Path, default=RESULTS / "peers.json", show_default=True)
def main(
    rounds: int | None,
    only: tuple[str, ...],
    peers: str | None,
    quick: bool,
    full: bool,
    huge: bool,
    setup: bool,
    page: Path | None,
    output: Path,
) -> None:
    """Measure the engine beside its peers on one server. Leaves with 1 when a round was not correct."""
    console = Console(width=None if sys.stdout.isatty() else 220)
    packages = [package for package in read_packages() if peers is None or package.name in peers.split(",")]
    if setup:
        made = [_set_up(console, package) for package in packages]
        sys.exit(not all(made))
    form = Form(rounds or (1 if quick else ROUNDS), only, quick, full, huge)
    with running_server(over_tcp=True) as server:
        comparison = run(_compare(console, server, packages, form))
    comparison.print(console)
    comparison.write_json(output)
    picture = (page or output).with_suffix(".svg")
    picture.write_text(draw(comparison.results))
    if page:
        comparison.write_page(page, picture.name)
    console.print(f"written to {', '.join(str(path) for path in (output, picture, page) if path)}")
    sys.exit(bool(comparison.results.faults))


def _set_up(console: Console, package: Package) -> bool:
    try:
        ensure(package)
    except SetupError as reason:
        console.print(f"[red]{package.name}[/] {escape(str(reason))}")
        return False
    console.print(f"{package.name} {' '.join(package.packages)}")
    return True


if __name__ == "__main__":
    main()
